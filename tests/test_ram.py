"""The pages in QEMU's stream: reading its records, and writing them.

The oracle for both kernels is a loader written here from the format alone, which treats records as
QEMU does. Whatever a source's encoder makes of them, a destination that applies it, and one that
writes records for a QEMU again, must end up with the memory of this loader.
"""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto import xbzrle
from proto.wire.errors import DecodeError, StreamError
from tests.batches import SEED, counters, fill, head, taken
from tests.kernels import BOTH, COMPILED

PAGE = 1024
ZERO, RAW, DELTA = range(3)
FLAGS = {ZERO: 0x02, RAW: 0x08, DELTA: 0x40}
EOS = bytes.fromhex("0000000000000010")
BLOCKS = [(b"pc.ram", 9), (b"x" * 255, 1), (b"/rom@etc/acpi/tables", 3)]
PAGES = 13
NUMBERED = [(name, offset * PAGE) for name, pages in BLOCKS for offset in range(pages)]
TABLE = struct.Struct("=QQII")
MOST_ROOM = 16 + 255 + PAGE
SIDES = list(zip(BOTH, BOTH, strict=True))
both = pytest.mark.parametrize(("kernel", "ram"), SIDES, ids=["cython", "python"])


# ---------------------------------------------------------------- records, by hand


def record(page: int, kind: int, body: bytes, *, again: bool = False) -> bytes:
    """again: of the same block as the last one."""
    name, offset = NUMBERED[page]
    word = (offset | FLAGS[kind] | 0x20 * again).to_bytes(8, "big")
    name = b"" if again else bytes([len(name)]) + name
    if kind == ZERO:
        return word + name + b"\0"
    if kind == RAW:
        return word + name + body
    return word + name + b"\1" + len(body).to_bytes(2, "big") + body


def stream_of(pages: list[tuple[int, int, bytes]], hide: list[bool] | None = None) -> bytes:
    """As QEMU writes them; hide: where the name of the same block is left out (else: all)."""
    out, last = b"", None
    for i, (page, kind, body) in enumerate(pages):
        name = NUMBERED[page][0]
        out += record(page, kind, body, again=name == last and (hide is None or hide[i]))
        last = name
    return out


def found(reader, data: bytes, count: int) -> list[tuple[int, int, bytes]]:
    """What the table says, as (page, kind, body)."""
    rows = [TABLE.unpack_from(reader.records, TABLE.size * i) for i in range(count)]
    return [(page, kind, data[at : at + length]) for page, at, length, kind in rows]


def read(reader, data: bytes, ends: list[int] | None = None):
    """Read up to each of these ends; return the items found, where it stops, and why."""
    at, pages = 0, []
    for end in [*(ends or []), len(data)]:
        piece = data[:end]
        while True:
            try:
                at, count, why = reader.scan(piece, at, end)
            except StreamError as error:
                return pages, error.at, str(error)
            pages += found(reader, piece, count)
            if why == COMPILED.SCAN_END:
                return pages, at, "end"
            if why == COMPILED.SCAN_MORE and not count:
                break
    return pages, at, "more"


def told(reader) -> tuple[int, ...]:
    return reader.zero, reader.raw, reader.delta, reader.delta_bytes


contents = st.sampled_from([fill(7), fill(0xFF), bytes(range(256)) * 4, b"\1" + bytes(PAGE - 1)])
deltas = st.binary(max_size=40) | st.just(bytes(PAGE)) | st.just(b"\0\1x")
some_pages = st.lists(
    st.one_of(
        st.tuples(st.integers(0, PAGES - 1), st.just(ZERO), st.just(b"")),
        st.tuples(st.integers(0, PAGES - 1), st.just(RAW), contents),
        st.tuples(st.integers(0, PAGES - 1), st.just(DELTA), deltas),
    ),
    max_size=12,
)


@st.composite
def streams(draw) -> bytes:
    """Records that are right, and then perhaps not quite."""
    pages = draw(some_pages)
    hide = draw(st.lists(st.booleans(), min_size=len(pages), max_size=len(pages)))
    data = bytearray(stream_of(pages, hide) + draw(st.sampled_from([b"", EOS, EOS + b"rest"])))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        what = draw(st.integers(0, 3))
        if what == 0:
            data[at:at] = draw(st.binary(max_size=9))
        elif what == 1:
            del data[at : at + draw(st.integers(1, 300))]
        elif at < len(data):
            data[at] = draw(st.sampled_from([0, 1, 2, 4, 0x10, 0x20, 0x28, 0x60, 0x80, 0xFF]))
    return bytes(data)


def cuts_of(data: bytes, places: list[int]) -> list[int]:
    return sorted(place % (len(data) + 1) for place in places)


# ---------------------------------------------------------------- reading


@both
def test_record_of_each_kind(kernel, ram):
    """The very bytes: the example of a real QEMU, one changed byte, among them."""
    reader = ram.RamReader([(b"pc.ram", 4096)], 4096)
    data = bytes.fromhex(
        "0000000000100002 06 70632e72616d 00"  # zero, with a name
        "0000000000100060 01 0003 00010f"  # XBZRLE | CONTINUE
        "0000000000101028"
    ) + bytes(range(256)) * 16  # fmt: skip
    assert reader.scan(data + EOS, 0, len(data) + 8) == (len(data) + 8, 3, ram.SCAN_END)
    rows = [TABLE.unpack_from(reader.records, 24 * i) for i in range(3)]
    assert rows == [(256, 15, 0, ZERO), (256, 27, 3, DELTA), (257, 38, 4096, RAW)]
    assert told(reader) == (1, 1, 1, 3)


@both
@settings(max_examples=50)
@given(pages=some_pages, data=st.data())
def test_records_are_found_with_their_bodies(kernel, ram, pages, data):
    hide = data.draw(st.lists(st.booleans(), min_size=len(pages), max_size=len(pages)))
    stream = stream_of(pages, hide) + EOS
    assert read(ram.RamReader(BLOCKS, PAGE), stream) == (pages, len(stream), "end")


@settings(max_examples=400)
@given(streams(), st.lists(st.integers(0, 1 << 16), max_size=6))
def test_reader_and_twin_agree_however_data_is_cut(data, places):
    """Hostile bytes too: the same pages, the same fault, at the same place."""
    whole = []
    for ram in BOTH:
        reader = ram.RamReader(BLOCKS, PAGE)
        whole.append((read(reader, data), told(reader)))
        assert read(ram.RamReader(BLOCKS, PAGE), data, cuts_of(data, places)) == whole[-1][0]
    assert whole[0] == whole[1]


@given(st.binary(max_size=200))
def test_reader_and_twin_agree_on_any_bytes(data):
    first, second = (read(ram.RamReader(BLOCKS, PAGE), data) for ram in BOTH)
    assert first == second


@both
def test_byte_by_byte(kernel, ram):
    pages = [(0, ZERO, b""), (1, RAW, fill(3)), (9, DELTA, b"\0\1x"), (12, DELTA, b"")]
    stream = stream_of(pages) + EOS
    reader = ram.RamReader(BLOCKS, PAGE)
    assert read(reader, stream, list(range(len(stream)))) == (pages, len(stream), "end")


@both
def test_last_block_is_remembered_from_section_to_section(kernel, ram):
    reader = ram.RamReader(BLOCKS, PAGE)
    assert read(reader, record(9, ZERO, b"") + EOS)[2] == "end"
    assert read(reader, record(9, RAW, fill(1), again=True))[0] == [(9, RAW, fill(1))]


@both
def test_scan_stops_when_the_table_is_full(kernel, ram):
    reader = ram.RamReader(BLOCKS, PAGE)
    piece = record(0, ZERO, b"")
    data = piece * (ram.SCAN_RECORDS + 1) + EOS
    assert len(reader.records) == 24 * ram.SCAN_RECORDS
    at = len(piece) * ram.SCAN_RECORDS
    assert reader.scan(data, 0, len(data)) == (at, ram.SCAN_RECORDS, ram.SCAN_FULL)
    assert reader.scan(data, at, len(data)) == (len(data), 1, ram.SCAN_END)
    data = piece * ram.SCAN_RECORDS + EOS
    assert reader.scan(data, 0, len(data)) == (len(data), ram.SCAN_RECORDS, ram.SCAN_END)


def word(value: int) -> bytes:
    return value.to_bytes(8, "big")


FAULTS = [
    (word(0x28) + fill(1), "a page of the same block as the last one, but it is the first"),
    (word(0x08) + b"\4nope" + fill(1), "a page of a block b'nope', which is not in the list"),
    (word(0x08) + b"\0" + fill(1), "a page of a block b'', which is not in the list"),
    (word(9 * PAGE | 8) + b"\6pc.ram" + fill(1), "a page outside its block"),
    (word(1 << 63 | 8) + b"\6pc.ram" + fill(1), "a page outside its block"),
    (word((1 << 64) - PAGE | 2) + b"\6pc.ram\0", "a page outside its block"),
    (word(2) + b"\6pc.ram\1", "a page filled with something else than zeros"),
    (word(0x40) + b"\6pc.ram\2\0\3\0\1x", "a delta of an unknown encoding"),
    (word(0x40) + b"\6pc.ram\1\4\1" + fill(1), "a delta that is longer than a page"),
    (word(0x01), "a record with the flag FULL, which no QEMU since 2009 writes"),
    (word(0x04), "a record with the flag MEM_SIZE, though the blocks are known"),
    (word(0x80), "a record with the flag HOOK: RDMA cannot be carried"),
    (word(0x100), "a record with the flag COMPRESS_PAGE: switch the capability compress off"),
    (word(0x120), "a record with the flag COMPRESS_PAGE: switch the capability compress off"),
    (word(0x200), "a record with the flag MULTIFD_FLUSH: switch the capability multifd off"),
    (word(0x0A), "a record with the flags 0xa, which mean nothing here"),
    (word(0x48), "a record with the flags 0x48, which mean nothing here"),
    (word(0), "a record with the flags 0x0, which mean nothing here"),
    (word(0x30), "a record with the flags 0x30, which mean nothing here"),
    (word(PAGE | 0x10), "a record with the flags 0x10, which mean nothing here"),
]


@both
@pytest.mark.parametrize(("data", "text"), FAULTS, ids=[text for _, text in FAULTS])
def test_bad_record_is_refused_at_its_place(kernel, ram, data, text):
    reader = ram.RamReader(BLOCKS, PAGE)
    with pytest.raises(StreamError) as info:
        reader.scan(data, 0, len(data))
    assert (str(info.value), info.value.at) == (text, 0)
    if not int.from_bytes(data[:8], "big") & 0x20:  # CONTINUE means something behind another page
        before = record(12, ZERO, b"")
        reader = ram.RamReader(BLOCKS, PAGE)
        pages, at, why = read(reader, before + data)
        assert (pages, at, why) == ([(12, ZERO, b"")], len(before), text)


@both
def test_delta_as_long_as_a_page_is_accepted(kernel, ram):
    pages = [(0, DELTA, bytes(PAGE))]
    assert read(ram.RamReader(BLOCKS, PAGE), stream_of(pages))[0] == pages


@both
def test_reader_and_writer_refuse_bad_arguments(kernel, ram):
    for size in (0, 512, 1023, 3072, 32768):
        with pytest.raises(ValueError, match=f"a page of {size} bytes"):
            ram.RamReader(BLOCKS, size)
    hashes = kernel.PageHashes(PAGES, PAGE, SEED)
    for blocks, text in (
        ([], "0 blocks: a guest has 1 to 1024"),
        ([(b"x", 1)] * 1025, "1025 blocks"),
        ([(b"", 1)], "a block's name has 0 bytes"),
        ([(b"x" * 256, 1)], "a block's name has 256 bytes"),
    ):
        with pytest.raises(ValueError, match=text):
            ram.RamReader(blocks, PAGE)
        with pytest.raises(ValueError, match=text):
            ram.RamWriter(hashes, blocks)
    with pytest.raises(ValueError, match="the blocks have other pages than the guest"):
        ram.RamWriter(hashes, [(b"pc.ram", PAGES - 1)])
    reader = ram.RamReader(BLOCKS, PAGE)
    assert reader.scan(b"", 0, 0) == (0, 0, ram.SCAN_MORE)
    for start, end in ((0, 9), (-1, 4), (5, 4)):
        with pytest.raises(ValueError, match="there are fewer bytes than that"):
            reader.scan(bytes(8), start, end)


# ---------------------------------------------------------------- writing


class Loader:
    """What QEMU's loader makes of records."""

    def __init__(self) -> None:
        self.memory = bytearray(PAGES * PAGE)

    def page(self, number: int) -> bytes:
        return bytes(self.memory[number * PAGE : (number + 1) * PAGE])

    def load(self, page: int, kind: int, body: bytes) -> None:
        content = bytearray(self.page(page))
        if kind == DELTA and body:
            xbzrle.decode(body, content)
        elif kind != DELTA:
            content = bytearray(body if kind == RAW else PAGE)
        self.memory[page * PAGE : (page + 1) * PAGE] = content


class Carrier:
    """A source, and two destinations: one has the memory, one has records written for a QEMU."""

    def __init__(self, kernel, ram, *, cache: int = 4, room: int = 1 << 20) -> None:
        self.cache = kernel.PageCache(cache * PAGE, PAGE) if cache else None
        self.reader = ram.RamReader(BLOCKS, PAGE)
        self.encoder = kernel.PageEncoder(
            kernel.PageHashes(PAGES, PAGE, SEED), self.cache, room=room
        )
        self.decoder = kernel.PageDecoder(kernel.PageHashes(PAGES, PAGE, SEED), PAGES * PAGE)
        self.memory = bytearray(PAGES * PAGE)
        self.writer = ram.RamWriter(kernel.PageHashes(PAGES, PAGE, SEED), BLOCKS)
        self.there = ram.RamReader(BLOCKS, PAGE)
        self.loader = Loader()
        self.rounds = 1
        self.batches: list[tuple[bytes, bytes]] = []
        self.encoder.begin_round(1)

    def carry(self, data: bytes) -> None:
        """As migrate.qemu.stream.intake does it."""
        at = 0
        while at < len(data):
            at, count, _ = self.reader.scan(data, at, len(data))
            done = 0
            while True:
                done, wrapped = self.encoder.feed_records(data, self.reader.records, done, count)
                if done == count:
                    break
                assert wrapped or self.encoder.full
                self.flush()
                if wrapped:
                    self.rounds += 1
                    self.encoder.begin_round(self.rounds)
        self.flush()

    def flush(self) -> None:
        if not self.encoder.pending:
            return
        batch = taken(self.encoder)
        self.batches.append(batch)
        assert self.decoder.check(batch[0], len(batch[1]))[0] == self.rounds
        self.decoder.apply(*batch, self.memory)
        for page, kind, body in read(self.there, self.written(*batch))[0]:
            self.loader.load(page, kind, body)

    def written(self, records: bytes, raw: bytes, room: int = MOST_ROOM) -> bytes:
        self.writer.begin(records, raw)
        out, data = bytearray(room), b""
        while count := self.writer.fill(out):
            data += out[:count]
        return data

    @property
    def told(self):
        writer = self.writer
        return (
            counters(self.encoder), self.rounds, len(self.cache or ()), told(self.there),
            writer.zero, writer.raw, writer.delta, writer.received_pages,
        )  # fmt: skip


@st.composite
def histories(draw) -> list[tuple[int, int, bytes]]:
    """Generate pages as a QEMU may send them: each delta fits the content before it."""
    chance = random.Random(draw(st.integers(0, 1 << 32)))
    loader, sent, pages = Loader(), set(), []
    numbers = draw(st.lists(st.integers(0, PAGES - 1), max_size=60))
    if draw(st.booleans()):  # in passes, as it does
        numbers = [n for i in range(0, len(numbers), 10) for n in sorted(set(numbers[i : i + 10]))]
    for number in numbers:
        kind, now = chance.randrange(8), loader.page(number)
        changed = bytearray(now)
        for _ in range(chance.choice((1, 3, 200))):
            changed[chance.randrange(PAGE)] = chance.randrange(256)
        if kind < 2:
            new = (number, ZERO, b"")
        elif kind < 5 or number not in sent:
            anew = chance.choice((now, bytes(PAGE), chance.randbytes(PAGE), bytes(changed)))
            new = (number, RAW, anew)
        else:
            new = (number, DELTA, _delta(chance, now, bytes(changed)))
        loader.load(*new)
        sent.add(number)
        pages.append(new)
    return pages


def _delta(chance: random.Random, old: bytes, new: bytes) -> bytes:
    """Generate a legal delta: empty, shortest, or one that repeats bytes already there."""
    what = chance.randrange(4)
    if what == 0:
        return b""
    if what == 1:  # back to zeros
        return b"\0\xfc\x07" + bytes(PAGE - 4)
    if what == 2:
        at = chance.randrange(PAGE - 600)
        return bytes([at & 0x7F | 0x80, at >> 7, 0x80 | 0x58, 4]) + new[at : at + 600]
    return xbzrle.encode(old, new) or b""


@settings(max_examples=150)
@given(histories(), st.sampled_from([0, 1, 2, 4, 16]), st.sampled_from([PAGE + 96, 3000, 1 << 20]))
def test_carried_stream_gives_the_memory_qemu_would_load(pages, cache, room):
    """Whether or not a page was in the cache; both kernels write the same bytes."""
    expected = Loader()
    for page in pages:
        expected.load(*page)
    carriers = [Carrier(*side, cache=cache, room=room) for side in SIDES]
    for carrier in carriers:
        carrier.carry(stream_of(pages))
        assert carrier.memory == expected.memory
        assert carrier.loader.memory == expected.memory
        if carrier.cache is not None:
            kept = {page: carrier.cache.get(page) for page in range(PAGES)}
            assert all(expected.page(p) == kept[p] for p in kept if kept[p] is not None)
            assert len(carrier.cache) == sum(content is not None for content in kept.values())
    assert carriers[0].batches == carriers[1].batches
    assert carriers[0].told == carriers[1].told


@both
def test_feed_records_finds_the_shortest_records(kernel, ram):
    """A known zero page is not sent; a cached page becomes the canonical delta."""
    carrier = Carrier(kernel, ram)
    one, two = b"\1" * 900 + bytes(124), b"\1" * 899 + bytes(125)
    carrier.carry(stream_of([(0, ZERO, b""), (1, ZERO, b""), (2, RAW, one)]))
    assert carrier.batches == [(head(1, 0, one) + b"\0\2" + b"\x40\0\1", one)]
    carrier.carry(stream_of([(0, ZERO, b""), (2, RAW, two), (3, RAW, bytes(PAGE))]))
    assert carrier.batches[1:] == [(head(2, 2) + b"\x80\4\x83\7\1\0" + b"\0\1", b"")]
    carrier.carry(stream_of([(2, DELTA, b"\0\2\1\5"), (3, DELTA, b"\0\1\0"), (4, DELTA, b"")][:2]))
    # as they came, though the first could be shorter and the second changes nothing
    assert carrier.batches[2:] == [(head(3, 2) + b"\x80\4\0\2\1\5" + b"\x80\3\0\1\0", b"")]
    assert carrier.cache.get(2) == b"\1\5" + two[2:]
    assert carrier.cache.get(3) == bytes(PAGE)


@both
def test_passed_delta_of_an_uncached_page_makes_it_unknown(kernel, ram):
    carrier = Carrier(kernel, ram, cache=1)
    carrier.carry(stream_of([(1, RAW, fill(1)), (2, RAW, fill(2))]))
    carrier.carry(stream_of([(1, DELTA, b"\0\1x"), (2, DELTA, b"\0\1y")]))
    assert [carrier.cache.get(1), carrier.cache.get(2)] == [b"x" + fill(1)[1:], None]
    assert carrier.encoder.hits == carrier.encoder.misses == 0
    carrier.carry(stream_of([(2, RAW, b"y" + fill(2)[1:])]))
    assert carrier.batches[-1][1] == b"y" + fill(2)[1:], "sent whole, as nobody knows better"


@both
def test_left_out_page_stays_out_after_passed_delta(kernel, ram):
    """Its deltas have overflowed twice: a delta of its zeros must not bring it back, or it is in
    the cache twice with the next page that comes."""
    carrier, chance = Carrier(kernel, ram), random.Random(1)
    one, two, three, four = (chance.randbytes(PAGE) for _ in range(4))
    for content in (one, two, three):
        carrier.carry(stream_of([(0, RAW, content)]))
    assert carrier.encoder.overflows == 2
    assert carrier.cache.get(0) is None
    carrier.carry(stream_of([(0, ZERO, b"")]))
    carrier.carry(stream_of([(0, DELTA, b"\0\1x")]))
    assert len(carrier.cache) == 0
    carrier.carry(stream_of([(0, RAW, four)]))
    assert carrier.cache.get(0) == four
    assert len(carrier.cache) == 1


@both
@pytest.mark.parametrize("cache", [0, 4])
def test_inactive_encoder_passes_deltas_on(kernel, ram, cache):
    carrier = Carrier(kernel, ram, cache=cache)
    if cache:
        carrier.encoder.active = False
    one = fill(1)
    carrier.carry(stream_of([(0, RAW, one), (1, ZERO, b"")]))
    carrier.carry(stream_of([(0, DELTA, b"\0\1x"), (1, DELTA, b"\0\1y")]))
    carrier.carry(stream_of([(0, RAW, one), (1, DELTA, b"")]))
    assert (carrier.encoder.raw, carrier.encoder.delta, carrier.encoder.unchanged) == (2, 2, 1)
    assert carrier.memory[:PAGE] == one
    assert carrier.memory[PAGE : PAGE + 2] == b"y\0"
    assert len(carrier.cache or ()) == 0


def table(*rows: tuple[int, int, int, int]) -> bytes:
    return b"".join(TABLE.pack(*row) for row in rows)


def encoder_of(kernel, **options):
    made = kernel.PageEncoder(
        kernel.PageHashes(PAGES, PAGE, SEED), kernel.PageCache(4 * PAGE, PAGE), **options
    )
    made.begin_round(1)
    return made


@both
def test_feed_records_stops_at_a_new_round_or_a_full_batch(kernel, ram):
    encoder = encoder_of(kernel, room=PAGE + 96)
    data = bytes(range(256)) * 12
    rows = table((3, 0, PAGE, RAW), (5, 0, PAGE, RAW), (4, 0, 0, ZERO), (4, 0, 0, ZERO))
    assert encoder.feed_records(data, rows, 0, 4) == (1, False)
    assert encoder.full
    encoder.finish_batch()
    assert encoder.feed_records(data, rows, 1, 4) == (2, False)
    encoder.finish_batch()
    assert encoder.feed_records(data, rows, 2, 4) == (2, True)
    assert not encoder.pending
    encoder.begin_round(2)
    assert encoder.feed_records(data, rows, 2, 4) == (3, True), "a page is in a batch once"
    encoder.finish_batch()
    encoder.begin_round(3)
    assert encoder.feed_records(data, rows, 3, 4) == (4, False)
    assert not encoder.pending
    assert encoder.feed_records(data, rows, 4, 4) == (4, False)


HUGE = (1 << 64) - 1
ROWS = [
    ((0, 0, 3, DELTA), "page 0: a delta for a page that was never sent"),
    ((0, 0, 0, DELTA), "page 0: a delta for a page that was never sent"),
    ((1, 0, 1, DELTA), "page 1: the data ends inside a record"),
    ((1, 0, PAGE + 1, DELTA), "page 1: a delta with no bytes, or longer than a page"),
    ((1, 0, PAGE, DELTA), "page 1: a length does not end where it must"),
    ((PAGES, 0, PAGE, RAW), f"page {PAGES}: a page number outside the guest"),
    ((HUGE, 0, 0, ZERO), f"page {HUGE}: a page number outside the guest"),
    ((1, 0, PAGE - 1, RAW), "page 1: a page number outside the guest"),
    ((1, PAGE + 1, PAGE, RAW), "page 1: a page number outside the guest"),
    ((1, 2 * PAGE, 1, DELTA), "page 1: a page number outside the guest"),
    ((1, HUGE, 1, DELTA), "page 1: a page number outside the guest"),
    ((1, HUGE, PAGE, RAW), "page 1: a page number outside the guest"),
]


@both
@pytest.mark.parametrize(("row", "text"), ROWS, ids=str)
@pytest.mark.parametrize("base", [fill(0), fill(1)], ids=["zero", "cached"])
def test_feed_records_refuses_bad_records(kernel, ram, row, text, base):
    encoder = encoder_of(kernel)
    assert encoder.feed_records(base, table((1, 0, PAGE, RAW)), 0, 1) == (1, False)
    taken(encoder)
    encoder.begin_round(2)
    before = counters(encoder)
    with pytest.raises(DecodeError) as info:
        encoder.feed_records(b"\xff" * 2 * PAGE, table(row), 0, 1)
    assert str(info.value) == text
    assert (counters(encoder), encoder.pending) == (before, False)


@both
def test_feed_records_refuses_missing_records(kernel, ram):
    encoder = kernel.PageEncoder(kernel.PageHashes(PAGES, PAGE, SEED))
    with pytest.raises(ValueError, match="no round was begun"):
        encoder.feed_records(b"", b"", 0, 0)
    encoder.begin_round(1)
    assert encoder.feed_records(b"", b"", 0, 0) == (0, False)
    for first, count in ((0, 1), (1, 0), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="there are fewer records than that"):
            encoder.feed_records(b"", bytes(23), first, count)


# ---------------------------------------------------------------- batches from a peer


def writer_of(kernel, ram, known=()):
    """known: pages that have come, so that a delta has a base."""
    made = ram.RamWriter(kernel.PageHashes(PAGES, PAGE, SEED), BLOCKS)
    for page in known:
        made.begin(head(1, page) + b"\0\1", b"")
        drained(made)
    return made


def drained(writer, room: int = MOST_ROOM) -> bytes:
    out, data = bytearray(room), b""
    while count := writer.fill(out):
        data += out[:count]
    return data


@both
def test_batch_becomes_records(kernel, ram):
    """Compared byte by byte. A record names its block unless it is the last one named."""
    writer = writer_of(kernel, ram)
    raw = fill(1), fill(2)
    writer.begin(head(1, 7, *raw) + b"\0\1" + b"\x40\0\2" + b"\1\1", b"".join(raw))
    assert drained(writer) == (
        bytes.fromhex("0000000000001c02 06 70632e72616d 00")
        + bytes.fromhex("0000000000002028") + raw[0]
        + bytes.fromhex("0000000000000008 ff") + b"x" * 255 + raw[1]
        + bytes.fromhex("0000000000000402 14") + b"/rom@etc/acpi/tables" + b"\0"
    )  # fmt: skip
    writer.begin(head(9, 7) + b"\x80\3\0\1x" + b"\x83\3\0\1y", b"")
    assert drained(writer) == (
        bytes.fromhex("0000000000001c40 06 70632e72616d 01 0003 000178")
        + bytes.fromhex("0000000000000440 14") + b"/rom@etc/acpi/tables"
        + bytes.fromhex("01 0003 000179")
    )  # fmt: skip
    assert (writer.zero, writer.raw, writer.delta, writer.received_pages) == (2, 2, 2, 4)


@both
def test_fill_writes_as_many_records_as_fit(kernel, ram):
    writer = writer_of(kernel, ram)
    writer.begin(head(1, 0) + b"\0" + bytes([PAGES]), b"")
    with pytest.raises(ValueError, match="no room for a page"):
        writer.fill(bytearray(MOST_ROOM - 1))
    assert writer.fill(bytearray(MOST_ROOM)) == 16, "the next may need all of it"
    assert writer.fill(bytearray(MOST_ROOM + 9)) == 9 * 2
    with pytest.raises(ValueError, match="the last batch was not written to its end"):
        writer.begin(head(1, 0) + b"\0\1", b"")
    assert len(drained(writer, 1 << 16)) == 6 * 9 + 9 + 256 + 9 * 3 + 21
    assert writer.fill(bytearray(MOST_ROOM)) == 0
    writer.begin(head(1, 0) + b"\0\1", b"")


@both
def test_dropped_batch_is_released(kernel, ram):
    """A retained batch would keep its caller's memory from being reused."""
    writer = writer_of(kernel, ram)
    records, raw = memoryview(head(1, 0, fill(1)) + b"\x40\0\1"), memoryview(fill(1))
    writer.begin(records, raw)
    writer.drop()
    records.release()
    raw.release()
    assert writer.fill(bytearray(MOST_ROOM)) == 0
    assert writer.received_pages == 0
    refused = memoryview(b"\0" * 30)
    with pytest.raises(DecodeError):
        writer.begin(refused, b"\1")
    refused.release()


TWO = b"".join((fill(1), fill(2)))
BATCHES = [
    (b"", b"", "a batch of 0 bytes holds no record"),
    (head(1, 0), b"", "a batch of 20 bytes holds no record"),
    (head(1, PAGES) + b"\0\1", b"", f"page {PAGES}: a page number outside the guest"),
    (head(1, HUGE) + b"\0\1", b"", f"page {HUGE}: a page number outside the guest"),
    (head(1, 2) + b"\0", b"", "page 2, byte 20 of the batch: the data ends inside a record"),
    (head(1, 2) + b"\0\1\xc0\1", b"", "page 2, byte 22 of the batch: an unknown record type"),
    (head(1, 2) + b"\0\x0c", b"", "page 2, byte 20 of the batch: a page number outside the guest"),
    (head(1, 2) + b"\0\1\5\0", b"", "page 2, byte 22 of the batch: a page number outside the "
     "guest"),
    (head(1, 2) + b"\0\1\x83\3\0\1x", b"", "page 6, byte 22 of the batch: a delta for a page that "
     "was never sent"),
    (head(1, 1) + b"\x80\0", b"", "page 1, byte 20 of the batch: a delta with no bytes, or longer "
     "than a page"),
    (head(1, 0) + b"\0\1\x80\2\0\1", b"", "page 1, byte 22 of the batch: the data ends inside a "
     "record"),
    (head(1, 0) + b"\x81\4\0\1xy", b"", "page 1, byte 20 of the batch: the data ends inside a "
     "record"),
    (head(1, 0, fill(1)) + b"\x40\0\2", fill(1), "page 0, byte 20 of the batch: the raw records do "
     "not name as many pages as came"),
    (head(1, 0, fill(1), fill(2)) + b"\x40\0\1", TWO, "page 0, byte 23 of the batch: the raw "
     "records do not name as many pages as came"),
    (head(1, 0, fill(1)) + b"\x40\0\1", fill(2), "page 0, byte 20 of the batch: the content of its "
     "raw pages does not match their check"),
    (head(1, 0, fill(1)) + b"\x40\0\1", TWO[:-1], "page 0, byte 20 of the batch: the content of "
     "its raw pages does not match their check"),
]  # fmt: skip


@both
@pytest.mark.parametrize(("records", "raw", "text"), BATCHES, ids=[b[2] for b in BATCHES])
def test_bad_batch_is_refused_whole(kernel, ram, records, raw, text):
    writer = writer_of(kernel, ram, [1])
    with pytest.raises(DecodeError) as info:
        writer.begin(records, raw)
    assert str(info.value) == text
    assert writer.fill(bytearray(MOST_ROOM)) == 0
    assert (writer.zero, writer.raw, writer.delta, writer.received_pages) == (1, 0, 0, 1)


bits_of_batches = st.lists(
    st.sampled_from([b"\0\1", b"\1\2", b"\x40\0\1", b"\x41\0\2", b"\x80\3\0\1x", b"\x82\3\1\2\1",
                     b"\x3f\0\1", b"\xff\0\3\0\1z", b"\x80\4\0\2\1\1", b"\0\x0d"])
    | st.binary(max_size=5),
    max_size=6,
)  # fmt: skip


@settings(max_examples=400)
@given(
    st.lists(st.tuples(st.integers(0, PAGES), bits_of_batches, st.integers(0, 4)), max_size=4),
    st.sampled_from([MOST_ROOM, MOST_ROOM + 700, 1 << 16]),
)
def test_any_batches_become_the_same_records(batches, room):
    """Both refuse or both write the same, and the readers find what the batch says."""
    writers = [writer_of(*side) for side in SIDES]
    reader, decoded = ram_reader_and_decoder()
    memory, loader = bytearray(PAGES * PAGE), Loader()
    for page, parts, pages in batches:
        raw = [fill(page + i) for i in range(pages)]
        batch = head(1, page, *raw) + b"".join(parts), b"".join(raw)
        results = []
        for writer in writers:
            try:
                writer.begin(*batch)
            except DecodeError as error:
                results.append(str(error))
            else:
                results.append(drained(writer, room))
        assert results[0] == results[1]
        if isinstance(results[0], bytes):
            decoded.check(batch[0], len(batch[1]))
            decoded.apply(*batch, memory)
            for one in read(reader, results[0])[0]:
                loader.load(*one)
            assert loader.memory == memory
    states = [(w.zero, w.raw, w.delta, w.received_pages) for w in writers]
    assert states[0] == states[1] == (
        decoded.zero, decoded.raw, decoded.delta, decoded.received_pages,
    )  # fmt: skip


def ram_reader_and_decoder():
    kernel, ram = SIDES[0]
    hashes = kernel.PageHashes(PAGES, PAGE, SEED)
    return ram.RamReader(BLOCKS, PAGE), kernel.PageDecoder(hashes, PAGES * PAGE)
