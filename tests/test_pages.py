"""Batches: what the encoder writes brings the decoder's memory to the snapshot, whatever happens.

The whole-memory test is the invariant the product stands on: after each round the destination
holds the snapshot, byte for byte. Both kernels run it side by side and must write the same bytes.
"""

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto import _kernel, _twin
from proto.errors import DecodeError
from tests.kernels import kernel  # noqa: F401

# ruff: noqa: F811

PAGE = 1024
HEAD = 12
BOTH = [_kernel, _twin]
COUNTERS = ["zero", "unchanged", "raw", "delta", "delta_bytes", "hits", "misses", "overflows"]
KEY = random.Random(5).randbytes(PAGE)


def bitmap(pages: int, numbers=()) -> bytearray:
    bits = bytearray((pages + 7) // 8)
    for page in numbers:
        bits[page >> 3] |= 1 << (page & 7)
    return bits


def listed(bits: bytes) -> list[int]:
    return [i for i in range(len(bits) * 8) if bits[i >> 3] >> (i & 7) & 1]


def fill(byte: int, size: int = PAGE) -> bytes:
    return bytes([byte]) * size


def feed(encoder, contents: dict[int, bytes], start: int = 0) -> int:
    return encoder.feed(
        array("Q", contents),
        len(contents),
        b"".join(contents.values()),
        bitmap(encoder.pages, contents),
        start,
    )


def batch(encoder, contents: dict[int, bytes]) -> bytes:
    assert feed(encoder, contents) == len(contents)
    return bytes(encoder.take())


def head(now: int, page: int) -> bytes:
    return now.to_bytes(4, "big") + page.to_bytes(8, "big")


def counters(encoder) -> dict[str, int]:
    return {name: getattr(encoder, name) for name in COUNTERS if getattr(encoder, name)}


class Pair:
    """A source and a destination of one kernel, and the destination's memory."""

    def __init__(self, kernel, *, pages=16, cache=8, key=None, room=1 << 20, size=PAGE):
        self.cache = kernel.PageCache(cache * size, size) if cache else None
        self.encoder = kernel.PageEncoder(pages, size, self.cache, key, room)
        self.decoder = kernel.PageDecoder(pages, size, 4)
        self.memory = bytearray(pages * size)
        self.size = size

    def send(self, contents: dict[int, bytes]) -> list[bytes]:
        """Feeds, takes, checks and applies, in as many batches as the room makes."""
        bodies, start = [], 0
        while True:
            start += feed(self.encoder, contents, start)
            if self.encoder.pending:
                bodies.append(bytes(self.encoder.take()))
                self.decoder.check(bodies[-1])
                self.decoder.apply(bodies[-1], self.memory)
            if start == len(contents):
                return bodies

    def page(self, number: int) -> bytes:
        return bytes(self.memory[number * self.size : (number + 1) * self.size])


# ---------------------------------------------------------------- records


def test_record_layout(kernel):
    """Each kind of record once, byte by byte, with its gap to the record before it."""
    encoder = Pair(kernel).encoder
    encoder.begin_round(1)
    first = batch(encoder, {1: fill(0), 2: fill(0), 3: fill(7), 4: fill(8), 9: fill(9)})
    assert first == (
        head(1, 1)
        + b"\x00\x02"
        + (b"\x40\x00\x02" + fill(7) + fill(8))
        + (b"\x44\x00\x01" + fill(9))
    )
    encoder.begin_round(0x01020304)
    second = batch(encoder, {3: b"\1" + fill(7)[1:], 9: fill(0), 10: fill(0)})
    assert second == head(0x01020304, 3) + b"\x80\x03\x00\x01\x01" + b"\x05\x02"


@pytest.mark.parametrize(
    ("gap", "record"),
    [(0, "40"), (62, "7e"), (63, "7f00"), (64, "7f01"), (190, "7f7f"), (191, "7f8001")],
)
def test_gaps(kernel, gap, record):
    pair = Pair(kernel, pages=400)
    pair.encoder.begin_round(1)
    contents = {5: fill(1), 6 + gap: fill(2)}
    if gap == 0:
        contents = {5: fill(0), 6: fill(2)}
    (body,) = pair.send(contents)
    assert body.endswith(bytes.fromhex(record) + b"\x00\x01" + fill(2))
    assert all(pair.page(number) == content for number, content in contents.items())


def test_raw_runs(kernel):
    """Neighbours share one record; a gap, a zero page or a delta opens a new one."""
    pair = Pair(kernel, pages=64)
    pair.encoder.begin_round(1)
    (body,) = pair.send({page: fill(page + 1) for page in range(40)})
    assert body[HEAD : HEAD + 3] == b"\x40\x00\x28"
    assert len(body) == HEAD + 3 + 40 * PAGE
    pair.encoder.begin_round(2)
    other = random.Random(1).randbytes(PAGE)
    (body,) = pair.send({50: other, 51: fill(0), 52: other, 53: other, 55: other})
    assert len(body) == HEAD + 4 * PAGE + 3 + 2 + 3 + 3
    assert pair.page(55) == other


def test_a_raw_run_ends_at_the_limit_of_its_count(kernel):
    pages = 65536
    encoder = kernel.PageEncoder(pages, PAGE, None, None, (pages + 1) * PAGE)
    encoder.begin_round(1)
    numbers = array("Q", range(pages))
    assert encoder.feed(numbers, pages, fill(1, pages * PAGE), bitmap(pages)) == pages
    body = encoder.take()
    second = HEAD + 3 + 65535 * PAGE
    assert body[HEAD : HEAD + 3] == b"\x40\xff\xff"
    assert body[second:] == b"\x40\x00\x01" + fill(1)


def test_a_new_batch_opens_a_new_run(kernel):
    pair = Pair(kernel)
    pair.encoder.begin_round(1)
    for page in (0, 1):
        (body,) = pair.send({page: fill(page + 1)})
        assert body == head(1, page) + b"\x40\x00\x01" + fill(page + 1)


def test_a_batch_across_several_feeds(kernel):
    """Runs go on from one feed to the next, and headroom stands before the body."""
    encoder = Pair(kernel).encoder
    encoder.begin_round(1)
    for page in (0, 1, 2):
        assert feed(encoder, {page: fill(3)}) == 1
    for page in (3, 4):
        assert feed(encoder, {page: fill(0)}) == 1
    assert encoder.feed_zeros(5, 2) == 2
    assert encoder.pending
    body = encoder.take(16)
    assert len(body) == 16 + HEAD + 3 + 3 * PAGE + 2
    assert body[16 : 16 + HEAD + 3] == head(1, 0) + b"\x40\x00\x03"
    assert body[-2:] == b"\x00\x04"
    assert not encoder.pending


# ---------------------------------------------------------------- counters


def test_counters(kernel):
    pair = Pair(kernel, pages=8, cache=2)
    pair.encoder.begin_round(1)
    noise = random.Random(2)
    a, b, c, d = (noise.randbytes(PAGE) for _ in range(4))
    pair.send({0: fill(0), 1: a, 2: b, 3: c})
    # first sight is neither hit nor miss
    assert counters(pair.encoder) == {"zero": 1, "raw": 3}
    pair.encoder.begin_round(2)
    (body,) = pair.send({0: fill(0), 1: a[:-1] + b"\xff", 2: d, 3: c[:-1] + b"\xff", 4: fill(0)})
    assert counters(pair.encoder) == {
        **{"zero": 2, "unchanged": 1, "raw": 5, "delta": 1, "delta_bytes": 4},
        **{"hits": 2, "misses": 1, "overflows": 1},
    }
    assert len(body) == HEAD + (1 + 1 + 4) + (3 + 2 * PAGE) + 2
    pair.encoder.begin_round(3)
    assert pair.send({2: d}) == []
    assert pair.encoder.unchanged == 2
    assert (pair.decoder.zero, pair.decoder.raw, pair.decoder.delta) == (2, 5, 1)
    assert pair.decoder.received_pages == 5


def test_without_a_cache_everything_is_raw_or_zero(kernel):
    pair = Pair(kernel, cache=0)
    assert pair.encoder.cache_object is None
    for now in (1, 2):
        pair.encoder.begin_round(now)
        pair.send({0: fill(1), 1: fill(0), 2: fill(2)})
    assert counters(pair.encoder) == {"zero": 1, "unchanged": 1, "raw": 4}


def test_a_zero_page_is_a_base_that_needs_no_slot(kernel):
    pair = Pair(kernel, cache=1)
    pair.encoder.begin_round(1)
    pair.send({0: fill(0), 1: fill(0)})
    assert len(pair.cache) == 0
    pair.encoder.begin_round(2)
    pair.send({0: b"\1" + bytes(PAGE - 1), 1: b"\2" + bytes(PAGE - 1)})
    assert counters(pair.encoder) == {"zero": 2, "delta": 2, "delta_bytes": 6, "hits": 2}
    assert pair.page(1) == b"\2" + bytes(PAGE - 1)


def test_a_page_that_becomes_zero_frees_its_slot(kernel):
    pair = Pair(kernel)
    pair.encoder.begin_round(1)
    pair.send({3: fill(5)})
    assert pair.cache.get(3) == fill(5)
    pair.encoder.begin_round(2)
    pair.send({3: fill(0)})
    assert pair.cache.get(3) is None
    assert pair.page(3) == fill(0)


def test_a_hit_proves_an_entry(kernel):
    """One hit, and it is safe for two rounds instead of one."""
    pair = Pair(kernel, cache=1)
    for now, page in [(1, 0), (2, 0), (3, 1)]:
        pair.encoder.begin_round(now)
        pair.send({page: fill(now)})
    assert pair.cache.get(1) is None
    pair.encoder.begin_round(4)
    pair.send({1: fill(9)})
    assert pair.cache.get(1) == fill(9)


def test_the_cache_holds_what_the_peer_holds(kernel):
    pair = Pair(kernel)
    noise = random.Random(3)
    version = noise.randbytes(PAGE)
    for now in range(1, 6):
        pair.encoder.begin_round(now)
        pair.send({3: version})
        assert pair.cache.get(3) == pair.page(3) == version
        version = noise.randbytes(PAGE) if now == 3 else version[1:] + version[:1]


# ---------------------------------------------------------------- zeros without reading


def test_feed_zeros(kernel):
    pair = Pair(kernel, pages=300)
    encoder = pair.encoder
    encoder.begin_round(1)
    assert not encoder.known_zero(0, 300)
    assert encoder.feed_zeros(0, 300) == 300
    assert encoder.take() == head(1, 0) + b"\x00\xac\x02"
    assert encoder.known_zero(0, 300)
    assert encoder.known_zero(290, 1000)
    assert encoder.feed_zeros(10, 20) == 20
    assert not encoder.pending
    assert counters(encoder) == {"zero": 300, "unchanged": 20}
    encoder.begin_round(2)
    feed(encoder, {7: fill(1)})
    assert not encoder.known_zero(0, 8)
    assert encoder.known_zero(8, 200)
    encoder.take()
    assert encoder.feed_zeros(0, 0) == 0
    for first, count in [(299, 2), (301, 0)]:
        with pytest.raises(ValueError, match="out of order or outside"):
            encoder.feed_zeros(first, count)


def test_feed_zeros_stops_at_the_room(kernel):
    """Every other page is already zero, so that each one left takes a record of its own."""
    room = PAGE + 64 + 40
    encoder = Pair(kernel, pages=200, room=room).encoder
    encoder.begin_round(1)
    for page in range(0, 200, 2):
        encoder.feed_zeros(page, 1)
        encoder.take()
    start, bodies = 0, []
    while start < 200:
        start += encoder.feed_zeros(start, 200 - start)
        bodies.append(encoder.take())
    assert len(bodies) > 2
    assert encoder.zero == 200
    decoder = kernel.PageDecoder(200, PAGE, 4)
    assert sum(decoder.apply(body, bytearray(200 * PAGE)) for body in bodies) == 100


def test_feed_zeros_into_a_full_batch(kernel):
    encoder = Pair(kernel, room=PAGE + 64).encoder
    encoder.begin_round(1)
    feed(encoder, {0: fill(1)})
    assert encoder.full
    with pytest.raises(ValueError, match="the batch is full"):
        encoder.feed_zeros(1, 1)


# ---------------------------------------------------------------- room


def test_a_batch_that_is_full_goes_on_with_start(kernel):
    pair = Pair(kernel, pages=32, room=4 * PAGE)
    pair.encoder.begin_round(1)
    contents = {page: fill(page % 5) for page in range(32)}
    assert feed(pair.encoder, contents) < 32
    assert pair.encoder.full
    assert feed(pair.encoder, {31: fill(1)}) == 0
    pair = Pair(kernel, pages=32, room=4 * PAGE)
    pair.encoder.begin_round(1)
    bodies = pair.send(contents)
    assert len(bodies) > 5
    assert max(map(len, bodies)) <= 4 * PAGE
    assert pair.memory == b"".join(contents.values())


def test_the_smallest_room_takes_a_page(kernel):
    """Else a caller that goes on with start= would never end."""
    with pytest.raises(ValueError, match="no room for one"):
        kernel.PageEncoder(4, PAGE, None, None, PAGE + 63)
    pair = Pair(kernel, pages=400, room=PAGE + 64)
    pair.encoder.begin_round(1)
    assert not pair.encoder.full
    contents = {page: random.Random(page).randbytes(PAGE) for page in (0, 1, 200, 399)}
    assert len(pair.send(contents)) == 4
    assert all(pair.page(page) == content for page, content in contents.items())


# ---------------------------------------------------------------- what the encoder refuses


def test_encoder_arguments(kernel):
    cache = kernel.PageCache(2 * PAGE, PAGE)
    for arguments, message in [
        ((4, 1000), "a power of two from 1024 to 16384"),
        ((4, 32768), "a power of two from 1024 to 16384"),
        ((4, 2048, cache), "pages of another size"),
        ((4, PAGE, None, b"short"), "as long as a page, 1024 bytes"),
        ((0, PAGE), "no pages"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernel.PageEncoder(*arguments)


def test_rounds_go_up_and_own_their_batches(kernel):
    encoder = Pair(kernel).encoder
    with pytest.raises(ValueError, match="no round was begun"):
        feed(encoder, {0: fill(1)})
    with pytest.raises(ValueError, match="out of order or outside"):
        encoder.feed_zeros(0, 1)
    with pytest.raises(ValueError, match="round 0 after round 0"):
        encoder.begin_round(0)
    encoder.begin_round(3)
    encoder.begin_round(3)
    with pytest.raises(ValueError, match="round 2 after round 3"):
        encoder.begin_round(2)
    feed(encoder, {0: fill(0)})
    with pytest.raises(ValueError, match="was not taken"):
        encoder.begin_round(4)
    with pytest.raises(ValueError, match="headroom"):
        encoder.take(-1)


@pytest.mark.parametrize("numbers", [[2, 1], [1, 1], [16], [3, 2**64 - 1]])
def test_pages_must_come_in_order(kernel, numbers):
    encoder = Pair(kernel).encoder
    encoder.begin_round(1)
    with pytest.raises(ValueError, match=f"page {numbers[-1]} is out of order or outside"):
        encoder.feed(array("Q", numbers), len(numbers), fill(1) * 2, bitmap(16))


def test_order_holds_across_feeds(kernel):
    encoder = Pair(kernel).encoder
    encoder.begin_round(1)
    feed(encoder, {5: fill(1)})
    for again in (4, 5):
        with pytest.raises(ValueError, match="out of order"):
            feed(encoder, {again: fill(1)})
    feed(encoder, {6: fill(0)})
    with pytest.raises(ValueError, match="out of order"):
        encoder.feed_zeros(6, 1)
    encoder.take()
    assert feed(encoder, {4: fill(1)}) == 1


def test_buffers_must_be_long_enough(kernel):
    encoder = Pair(kernel, key=KEY).encoder
    encoder.begin_round(1)
    one = array("Q", [1])
    for arguments in [(one, 1, bytes(PAGE - 1), bitmap(16)), (one, 1, bytes(PAGE), bytes(1))]:
        with pytest.raises(ValueError, match="too short"):
            encoder.feed(*arguments)
    for arguments in [(one, 2, bytes(2 * PAGE), bitmap(16)), (one, 1, fill(0), bitmap(16), 2)]:
        with pytest.raises(ValueError, match="numbers were given"):
            encoder.feed(*arguments)
    for arguments in [(0, 2, bytes(PAGE), bitmap(16)), (0, 1, bytes(PAGE), bytearray(1))]:
        with pytest.raises(ValueError, match="too short"):
            encoder.scan(*arguments)
    with pytest.raises(ValueError, match="too short"):
        encoder.scan_zeros(0, 1, bytearray(1))
    with pytest.raises(ValueError, match="outside the guest"):
        encoder.scan(10, 7, bytes(7 * PAGE), bitmap(16))
    with pytest.raises(ValueError, match="outside the guest"):
        encoder.scan_zeros(10, 7, bitmap(16))
    with pytest.raises(ValueError, match="hash key"):
        Pair(kernel).encoder.scan(0, 1, bytes(PAGE), bitmap(16))


# ---------------------------------------------------------------- scan


@pytest.mark.parametrize("cache", [0, 2, 32])
def test_scan_finds_exactly_what_changed(kernel, cache):
    pages, noise = 40, random.Random(cache)
    pair = Pair(kernel, pages=pages, cache=cache, key=KEY)
    memory = {page: fill(0) if page % 3 == 0 else noise.randbytes(PAGE) for page in range(pages)}
    changed = bitmap(pages)
    assert pair.encoder.scan(0, pages, b"".join(memory.values()), changed) == pages
    assert listed(changed) == list(memory)
    for now in range(1, 8):
        pair.encoder.begin_round(now)
        pair.send({page: memory[page] for page in listed(changed)})
        assert pair.memory == b"".join(memory.values())
        touched = sorted(noise.sample(range(pages), 9))
        for page in touched:
            content = bytearray(memory[page])
            content[noise.randrange(PAGE)] ^= 1 << noise.randrange(8)
            memory[page] = bytes(content) if page % 4 else fill(0)
        wanted = [page for page in touched if memory[page] != pair.page(page)]
        changed = bitmap(pages)
        data = b"".join(memory.values())
        found = pair.encoder.scan(0, 10, data[: 10 * PAGE], changed)
        found += pair.encoder.scan(10, pages - 10, data[10 * PAGE :], changed)
        assert listed(changed) == wanted
        assert found == len(wanted)


def test_scan_zeros(kernel):
    encoder = Pair(kernel).encoder
    encoder.begin_round(1)
    feed(encoder, {0: fill(0), 1: fill(1), 2: fill(0)})
    changed = bitmap(16)
    assert encoder.scan_zeros(0, 4, changed) == 2
    assert listed(changed) == [1, 3]


# ---------------------------------------------------------------- the whole memory


def touch(noise: random.Random, memory: dict[int, bytes], size: int) -> list[int]:
    """One round of a guest: some pages zeroed, some changed here and there, some rewritten."""
    touched = sorted(noise.sample(sorted(memory), noise.randint(0, len(memory))))
    for page in touched:
        content = bytearray(memory[page])
        match noise.choice(["zero", "sparse", "sparse", "dense", "half", "same"]):
            case "zero":
                content = bytearray(size)
            case "sparse":
                for _ in range(noise.randint(1, 9)):
                    content[noise.randrange(size)] = noise.randrange(256)
            case "dense":
                content = bytearray(noise.randbytes(size))
            case "half":
                content[::3] = noise.randbytes(len(content[::3]))
        memory[page] = bytes(content)
    return touched


@given(
    seed=st.integers(0, 2**32),
    cache=st.sampled_from([0, 1, 4, 64]),
    room=st.sampled_from([PAGE + 64, 5000, 1 << 20]),
    stride=st.sampled_from([1, 2, 90]),
    size=st.sampled_from([1024, 1024, 4096]),
)
@settings(max_examples=200, deadline=None)
def test_the_destination_has_the_snapshot(seed, cache, room, stride, size):
    noise = random.Random(seed)
    count = 20
    room = max(room, size + 64)
    pairs = [Pair(each, pages=count * stride, cache=cache, room=room, size=size) for each in BOTH]
    memory = {page * stride: bytes(size) for page in range(count)}
    touched = list(memory)
    for now in range(1, 7):
        resized = size << noise.randrange(6)
        for pair in pairs:
            pair.encoder.begin_round(now)
            if cache and seed % 3 == 0:
                pair.cache.resize(resized)
        bodies = [pair.send({page: memory[page] for page in touched}) for pair in pairs]
        assert bodies[0] == bodies[1]
        assert counters(pairs[0].encoder) == counters(pairs[1].encoder)
        assert pairs[0].memory == pairs[1].memory
        assert pairs[0].decoder.stale == pairs[1].decoder.stale
        assert pairs[0].decoder.received_pages == pairs[1].decoder.received_pages == count
        for page, content in memory.items():
            assert pairs[0].page(page) == content
            if cache:
                kept = pairs[0].cache.get(page)
                assert kept == pairs[1].cache.get(page)
                assert kept in (None, content)
        touched = touch(noise, memory, size)


# ---------------------------------------------------------------- decoder


def test_decoder_arguments(kernel):
    for arguments, message in [
        ((4, 1000, 1), "a power of two from 1024 to 16384"),
        ((0, PAGE, 1), "no pages"),
        ((4, PAGE, 0), "no pages"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernel.PageDecoder(*arguments)
    decoder = kernel.PageDecoder(9, PAGE, 4)
    assert decoder.stale == b"\1\1\1"
    assert (decoder.pages, decoder.page_size, decoder.chunk_pages) == (9, PAGE, 4)
    with pytest.raises(ValueError, match="shorter than the guest"):
        decoder.apply(head(1, 0) + b"\0\1", bytearray(9 * PAGE - 1))


def test_stale_chunks_and_pages_ever_written(kernel):
    pair = Pair(kernel, pages=16)
    pair.encoder.begin_round(1)
    pair.decoder.stale[:] = bytes(4)
    pair.send({page: fill(page == 5) for page in range(16)})
    assert pair.decoder.stale == b"\0\1\0\0"
    assert not pair.decoder.ever_written(0, 5)
    assert pair.decoder.ever_written(0, 6)
    assert not pair.decoder.ever_written(6, 100)
    pair.decoder.stale[:] = bytes(4)
    pair.encoder.begin_round(2)
    pair.send({5: fill(0), 9: b"\1" + bytes(PAGE - 1)})
    assert pair.decoder.stale == b"\0\1\1\0"
    assert pair.page(5) == fill(0)
    assert pair.decoder.ever_written(5, 1)


def test_fresh_runs(kernel):
    """What needs room at the destination: pages written for the first time, not zero pages."""
    pair = Pair(kernel, pages=300)
    pair.encoder.begin_round(1)
    contents = {page: fill(1) for page in (0, 1, 2, 5, 100, 101)} | {3: fill(0), 6: fill(0)}
    contents = dict(sorted(contents.items()))
    body = batch(pair.encoder, contents)
    fresh = [(7, 7)]
    assert pair.decoder.check(body, fresh) == 1
    assert fresh == [(7, 7), (0, 3), (5, 1), (100, 2)]
    pair.decoder.apply(body, pair.memory)
    pair.encoder.begin_round(2)
    sparse = b"\2" + bytes(PAGE - 1)
    body = batch(pair.encoder, {1: fill(3), 2: fill(2), 3: sparse, 4: fill(2), 5: fill(2)})
    fresh = []
    pair.decoder.check(body, fresh)
    assert fresh == [(3, 2)]
    pair.decoder.apply(body, pair.memory)
    fresh = []
    pair.decoder.check(head(3, 3) + b"\x80\3\0\1\1", fresh)
    assert fresh == []


def test_the_highest_round_number(kernel):
    assert kernel.PageDecoder(4, PAGE, 1).check(head(2**32 - 1, 0) + b"\0\1") == 2**32 - 1


def test_a_delta_without_a_base_is_refused(kernel):
    pair = Pair(kernel)
    body = head(1, 3) + b"\x80\3\0\1\1"
    for refused in (
        lambda: pair.decoder.check(body),
        lambda: pair.decoder.apply(body, pair.memory),
    ):
        with pytest.raises(DecodeError, match="a delta for a page that was never sent"):
            refused()
    pair.decoder.apply(head(1, 3) + b"\0\1", pair.memory)
    assert pair.decoder.apply(body, pair.memory) == 1
    assert pair.page(3) == b"\1" + bytes(PAGE - 1)


HOSTILE = {
    "no bytes": (b"", "holds no record"),
    "a head alone": (head(1, 0), "holds no record"),
    "first page outside": (head(1, 16) + b"\0\1", "page number outside"),
    "first page far outside": (head(1, 2**64 - 1) + b"\0\1", "page number outside"),
    "gap outside": (head(1, 0) + b"\x10\1", "page number outside"),
    "gap far outside": (head(1, 0) + b"\x3f" + b"\xff" * 8 + b"\x7f\1", "page number outside"),
    "gap past 64 bits": (head(1, 0) + b"\x3f" + b"\xff" * 9 + b"\1\1", "length does not end"),
    "gap cut": (head(1, 0) + b"\x3f\x80", "ends inside a record"),
    "zero run of none": (head(1, 0) + b"\0\0", "page number outside"),
    "zero run too long": (head(1, 0) + b"\0\x11", "page number outside"),
    "zero run enormous": (head(1, 0) + b"\0" + b"\xff" * 8 + b"\x7f", "page number outside"),
    "zero run cut": (head(1, 0) + b"\0\x81", "ends inside a record"),
    "raw run of none": (head(1, 0) + b"\x40\0\0", "page number outside"),
    "raw run too long": (head(1, 0) + b"\x40\0\x11" + bytes(17 * PAGE), "page number outside"),
    "raw run cut": (head(1, 0) + b"\x40\0\2" + bytes(2 * PAGE - 1), "ends inside a record"),
    "raw count cut": (head(1, 0) + b"\x40\0", "ends inside a record"),
    "empty delta": (head(1, 0) + b"\x80\0", "no bytes, or longer than a page"),
    "long delta": (head(1, 0) + b"\x80\x81\x08" + bytes(1025), "no bytes, or longer than a page"),
    "delta length unending": (head(1, 0) + b"\x80\x80\x80\x80\1", "length does not end"),
    "delta cut": (head(1, 0) + b"\x80\4\0\2\1", "ends inside a record"),
    "bad delta": (head(1, 0) + b"\x80\4\0\3\1\1", "a non-zero run goes past the end of the delta"),
    "unknown record": (head(1, 0) + b"\xc0\1", "an unknown record type"),
    "past the last page": (head(1, 15) + b"\0\1\0\1", "page number outside"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies(kernel, name):
    body, message = HOSTILE[name]
    pair = Pair(kernel)
    pair.encoder.begin_round(1)
    pair.send({0: fill(1)})
    memory = bytes(pair.memory)
    fresh = []
    with pytest.raises(DecodeError, match=message):
        pair.decoder.check(body, fresh)
    with pytest.raises(DecodeError, match=message):
        pair.decoder.apply(body, pair.memory)
    assert fresh == []
    assert pair.page(0) == memory[:PAGE]


def rich_batch() -> tuple[dict[int, bytes], dict[int, bytes], bytes]:
    """Round 1 and round 2 of a guest of 100 pages, and the batch of round 2, of all kinds."""
    noise = random.Random(9)
    before = {page: noise.randbytes(PAGE) for page in (0, 1, 2, 80)} | {90: fill(0)}
    after = {
        0: before[0][:500] + b"\0\1\2" + before[0][503:],
        1: fill(0),
        2: noise.randbytes(PAGE),
        70: fill(6),
        71: fill(0),
        80: before[80][:-1] + b"\xaa",
        90: bytes(200) + b"\1" + bytes(PAGE - 201),
    }
    encoder = Pair(_kernel, pages=100).encoder
    encoder.begin_round(1)
    batch(encoder, before)
    encoder.begin_round(2)
    return before, after, batch(encoder, after)


BEFORE, AFTER, BODY = rich_batch()


def primed(kernel) -> Pair:
    pair = Pair(kernel, pages=100)
    pair.encoder.begin_round(1)
    pair.send(BEFORE)
    return pair


def verdict(call, *arguments) -> object:
    try:
        return call(*arguments)
    except DecodeError as error:
        return str(error)


def state(pair: Pair) -> tuple[object, ...]:
    decoder = pair.decoder
    return (
        bytes(pair.memory),
        bytes(decoder.stale),
        *(decoder.received_pages, decoder.zero, decoder.raw, decoder.delta),
        [decoder.ever_written(page, 1) for page in range(decoder.pages)],
    )


def test_every_truncation_is_refused_or_whole(kernel):
    """A cut inside a record is an error; one between records leaves a shorter batch."""
    pair = primed(kernel)
    before = state(pair)
    accepted = []
    for length in range(len(BODY)):
        fresh = []
        try:
            pair.decoder.check(BODY[:length], fresh)
            accepted.append(length)
        except DecodeError:
            assert fresh == []
    assert state(pair) == before
    # after each record but the last: delta, zero, raw, raw, zero, delta
    assert len(accepted) == 6
    assert pair.decoder.check(BODY) == 2
    assert pair.decoder.apply(BODY, pair.memory) == len(AFTER)
    assert all(pair.page(page) == content for page, content in AFTER.items())


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_mutations_are_refused_or_applied_the_same_way(data):
    """check() changes nothing; apply() agrees with it; twins agree; no write leaves the guest."""
    body = bytearray(BODY)
    records = [12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]
    places = st.one_of(st.sampled_from(records), st.integers(0, len(body) - 1))
    for place, value in data.draw(
        st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=5)
    ):
        body[place] = value
    body = bytes(body[: data.draw(st.one_of(st.just(len(body)), st.integers(0, len(body))))])
    compare(body)


@given(st.integers(0, 105), st.binary(min_size=1, max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_refused_or_applied_the_same_way(first, records):
    compare(head(2, first) + records)


def compare(body: bytes) -> None:
    outcomes = []
    for each in BOTH:
        pair = primed(each)
        guarded = bytearray(64) + pair.memory + bytearray(64)
        before = state(pair)
        fresh = []
        checked = verdict(pair.decoder.check, body, fresh)
        assert state(pair) == before
        applied = verdict(pair.decoder.apply, body, memoryview(guarded)[64:-64])
        assert not any(guarded[:64] + guarded[-64:])
        assert isinstance(checked, str) == isinstance(applied, str)
        pair.memory = guarded[64:-64]
        outcomes.append((checked, applied, fresh, state(pair)))
    assert outcomes[0] == outcomes[1]
