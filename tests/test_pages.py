"""Batches: what the encoder writes brings the decoder's memory to the snapshot, whatever happens.

The whole-memory test is the invariant the product stands on: after each round the destination
holds the snapshot, byte for byte. Both kernels run it side by side and must write the same bytes.
"""

import ctypes
import errno
import itertools
import mmap
import os
import random
import struct
from array import array
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.wire.errors import DecodeError
from tests.batches import (
    HEAD,
    PAGE,
    SEED,
    SMALLEST_ROOM,
    Pair,
    batch,
    bitmap,
    check_of,
    counters,
    fill,
    hashes_tell_the_content,
    head,
    listed,
    page_hash,
    put,
    put_as,
    taken,
    touch,
)
from tests.kernels import BOTH, COMPILED, kernel  # noqa: F401

# ---------------------------------------------------------------- records


def test_record_layout(kernel):
    """Each kind of record once, byte by byte, with its gap to the record before it."""
    encoder = Pair(kernel).encoder
    encoder.begin_round(1)
    raw = fill(7), fill(8), fill(9)
    first = batch(encoder, {1: fill(0), 2: fill(0), 3: raw[0], 4: raw[1], 9: raw[2]})
    assert first == (
        head(1, 1, *raw) + b"\x00\x02" + b"\x40\x00\x02" + b"\x44\x00\x01",
        b"".join(raw),
    )
    encoder.begin_round(0x01020304)
    second = batch(encoder, {3: b"\1" + fill(7)[1:], 9: fill(0), 10: fill(0)})
    assert second == (head(0x01020304, 3) + b"\x80\x03\x00\x01\x01" + b"\x05\x02", b"")


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
    ((records, data),) = pair.send(contents)
    assert records.endswith(bytes.fromhex(record) + b"\x00\x01")
    assert data.endswith(fill(2))
    assert all(pair.page(number) == content for number, content in contents.items())


def test_raw_runs(kernel):
    """Neighbours share one record; a gap, a zero page or a delta opens a new one."""
    pair = Pair(kernel, pages=64)
    pair.encoder.begin_round(1)
    ((records, data),) = pair.send({page: fill(page + 1) for page in range(40)})
    assert records[HEAD:] == b"\x40\x00\x28"
    assert data == b"".join(fill(page + 1) for page in range(40))
    pair.encoder.begin_round(2)
    other = random.Random(1).randbytes(PAGE)
    ((records, data),) = pair.send({50: other, 51: fill(0), 52: other, 53: other, 55: other})
    assert len(records) == HEAD + 3 + 2 + 3 + 3
    assert data == other * 4
    assert pair.page(55) == other


@pytest.mark.exhaustive
def test_raw_run_ends_at_the_limit_of_its_count(kernel, monkeypatch):
    if kernel is not COMPILED:  # all pages are the same: one is enough to hash
        monkeypatch.setattr(kernel.PageHashes, "hash_of", cache(kernel.PageHashes.hash_of))
    pages = 65536
    pair = Pair(kernel, pages=pages, cache=0, room=(pages + 1) * (PAGE + 32))
    pair.encoder.begin_round(1)
    ((records, data),) = pair.send(dict.fromkeys(range(pages), fill(1)))
    assert records[HEAD:] == b"\x40\xff\xff" + b"\x40\x00\x01"
    assert len(data) == pages * PAGE
    assert pair.memory == fill(1, pages * PAGE)


def test_new_batch_opens_a_new_run(kernel):
    pair = Pair(kernel)
    pair.encoder.begin_round(1)
    for page in (0, 1):
        content = fill(page + 1)
        assert pair.send({page: content}) == [(head(1, page, content) + b"\x40\x00\x01", content)]


def test_batch_across_several_feeds(kernel):
    """Runs go on from one feed to the next, and headroom stands before the records."""
    encoder = Pair(kernel, headroom=16).encoder
    encoder.begin_round(1)
    for page in (0, 1, 2):
        assert put(encoder, {page: fill(3)}) == 1
    for page in (3, 4):
        assert put(encoder, {page: fill(0)}) == 1
    assert encoder.feed_zeros(5, 2) == 2
    assert encoder.pending
    records, data = encoder.finish_batch()
    assert records[16:] == head(1, 0, *[fill(3)] * 3) + b"\x40\x00\x03" + b"\x00\x04"
    assert data == fill(3) * 3
    assert not encoder.pending


def test_headroom_is_the_callers(kernel):
    """It is part of the same memory: a frame's header needs no write of its own."""
    encoder = Pair(kernel, headroom=24).encoder
    encoder.begin_round(1)
    put(encoder, {3: fill(3)})
    records, data = encoder.finish_batch()
    records[:24] = bytes(range(24))
    assert records == bytes(range(24)) + head(1, 3, fill(3)) + b"\x40\x00\x01"
    assert data == fill(3)


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
    ((records, data),) = pair.send(
        {0: fill(0), 1: a[:-1] + b"\xff", 2: d, 3: c[:-1] + b"\xff", 4: fill(0)}
    )
    assert counters(pair.encoder) == {
        **{"zero": 2, "unchanged": 1, "raw": 5, "delta": 1, "delta_bytes": 4},
        **{"hits": 2, "misses": 1, "overflows": 1},
    }
    assert len(records) == HEAD + (1 + 1 + 4) + 3 + 2
    assert data == d + c[:-1] + b"\xff"
    pair.encoder.begin_round(3)
    assert pair.send({2: d}) == []
    assert pair.encoder.unchanged == 2
    assert (pair.decoder.zero, pair.decoder.raw, pair.decoder.delta) == (2, 5, 1)
    assert pair.decoder.received_pages == 5


def test_without_a_cache_everything_is_raw_or_zero(kernel):
    pair = Pair(kernel, cache=0)
    for now in (1, 2):
        pair.encoder.begin_round(now)
        pair.send({0: fill(1), 1: fill(0), 2: fill(2)})
    assert counters(pair.encoder) == {"zero": 1, "unchanged": 1, "raw": 4}


def test_zero_page_is_a_delta_base_without_cache(kernel):
    pair = Pair(kernel, cache=1)
    pair.encoder.begin_round(1)
    pair.send({0: fill(0), 1: fill(0)})
    assert len(pair.cache) == 0
    pair.encoder.begin_round(2)
    pair.send({0: b"\1" + bytes(PAGE - 1), 1: b"\2" + bytes(PAGE - 1)})
    assert counters(pair.encoder) == {"zero": 2, "delta": 2, "delta_bytes": 6, "hits": 2}
    assert pair.page(1) == b"\2" + bytes(PAGE - 1)


def test_page_that_becomes_zero_leaves_the_cache(kernel):
    pair = Pair(kernel)
    pair.encoder.begin_round(1)
    pair.send({3: fill(5)})
    assert pair.cache.get(3) == fill(5)
    pair.encoder.begin_round(2)
    pair.send({3: fill(0)})
    assert pair.cache.get(3) is None
    assert pair.page(3) == fill(0)


def test_hit_marks_its_entry_as_reused(kernel):
    """One hit, and it is safe for two rounds instead of one."""
    pair = Pair(kernel, cache=1)
    for now, page in [(1, 0), (2, 0), (3, 1)]:
        pair.encoder.begin_round(now)
        pair.send({page: fill(now)})
    assert pair.cache.get(1) is None
    pair.encoder.begin_round(4)
    pair.send({1: fill(9)})
    assert pair.cache.get(1) == fill(9)


def test_cache_equals_the_peers_memory(kernel):
    pair = Pair(kernel)
    noise = random.Random(3)
    version = bytearray(noise.randbytes(PAGE))
    for now in range(1, 9):
        pair.encoder.begin_round(now)
        pair.send({3: bytes(version)})
        assert pair.cache.get(3) == pair.page(3) == version
        if now % 2:
            version[:] = noise.randbytes(PAGE)
        else:
            version[noise.randrange(PAGE)] ^= 0xFF
    assert pair.encoder.overflows == 4
    assert pair.encoder.delta == 3


def test_merged_deltas_are_sent_if_agreed(kernel):
    new = b"\1\0\1" + bytes(PAGE - 3)
    for merge, delta in [(False, b"\0\1\1\1\1\1"), (True, b"\0\3\1\0\1")]:
        pair = Pair(kernel, merge=merge)
        pair.encoder.begin_round(1)
        pair.send({2: fill(0)})
        pair.encoder.begin_round(2)
        ((records, data),) = pair.send({2: new})
        assert records == head(2, 2) + b"\x80" + bytes([len(delta)]) + delta
        assert data == b""
        assert pair.page(2) == pair.cache.get(2) == new


# ---------------------------------------------------------------- zeros without reading


def test_feed_zeros(kernel):
    pair = Pair(kernel, pages=300)
    encoder = pair.encoder
    encoder.begin_round(1)
    assert encoder.feed_zeros(0, 300) == 300
    assert taken(encoder) == (head(1, 0) + b"\x00\xac\x02", b"")
    assert encoder.feed_zeros(10, 20) == 20
    assert not encoder.pending
    assert counters(encoder) == {"zero": 300, "unchanged": 20}
    encoder.begin_round(2)
    put(encoder, {7: fill(1)})
    encoder.finish_batch()
    assert encoder.feed_zeros(0, 0) == 0
    for first, count in [(299, 2), (301, 0)]:
        with pytest.raises(ValueError, match="out of order or outside"):
            encoder.feed_zeros(first, count)


def test_feed_zeros_stops_at_the_room(kernel):
    """Every other page is already zero, so that each one left takes a record of its own."""
    encoder = Pair(kernel, pages=200, room=SMALLEST_ROOM + 8).encoder
    encoder.begin_round(1)
    for page in range(0, 200, 2):
        encoder.feed_zeros(page, 1)
        encoder.finish_batch()
    start, batches = 0, []
    while start < 200:
        start += encoder.feed_zeros(start, 200 - start)
        batches.append(taken(encoder))
    assert len(batches) > 2
    assert encoder.zero == 200
    decoder = kernel.PageDecoder(kernel.PageHashes(200, PAGE, SEED), 200 * PAGE)
    memory = bytearray(200 * PAGE)
    assert sum(decoder.apply(*each, memory) for each in batches) == 100


def test_full_batch_accepts_no_page(kernel):
    encoder = Pair(kernel, room=SMALLEST_ROOM).encoder
    encoder.begin_round(1)
    put(encoder, {0: fill(1)})
    assert encoder.full
    assert encoder.feed_zeros(1, 1) == 0
    memory, numbers = encoder.space()
    assert (len(memory), len(numbers)) == (0, 0)
    assert taken(encoder) == (head(1, 0, fill(1)) + b"\x40\0\1", fill(1))
    assert encoder.feed_zeros(1, 1) == 1


# ---------------------------------------------------------------- room


@pytest.mark.parametrize("size", [1024, 4096, 16384])
def test_space_offers_whole_pages_and_their_numbers(kernel, size):
    """At most 256 KiB, so that copied pages stay in the core's own cache until encoded."""
    encoder = Pair(kernel, size=size, pages=2000).encoder
    encoder.begin_round(1)
    memory, numbers = encoder.space()
    assert (len(memory), len(numbers)) == (256 << 10, (256 << 10) // size)
    assert not memory.readonly
    for memory, numbers in (encoder.space(), encoder.space()):
        assert len(memory) == len(numbers) * size


def test_batch_never_exceeds_its_room(kernel):
    for room in (SMALLEST_ROOM, 4 * PAGE, 4 * PAGE + 31, 10 * PAGE):
        pair = Pair(kernel, pages=64, room=room, headroom=40)
        contents = {page: fill(page % 5) for page in range(0, 64, 2)}
        for now in (1, 2):
            pair.encoder.begin_round(now)
            batches = pair.send(contents)
            assert all(len(records) + len(data) <= room for records, data in batches)
            contents = {page: fill(page % 7 + now) for page in range(64)}
        assert len(batches) >= 64 * PAGE // room
        assert pair.memory == b"".join(fill(page % 7 + 1) for page in range(64))


def test_smallest_room_holds_a_page(kernel):
    """Else a caller that goes on until all is sent would never end."""
    with pytest.raises(ValueError, match="no room for a page"):
        Pair(kernel, room=SMALLEST_ROOM - 1)
    pair = Pair(kernel, pages=400, room=SMALLEST_ROOM)
    pair.encoder.begin_round(1)
    assert not pair.encoder.full
    contents = {page: random.Random(page).randbytes(PAGE) for page in (0, 1, 200, 399)}
    assert len(pair.send(contents)) == 4
    assert all(pair.page(page) == content for page, content in contents.items())


# ---------------------------------------------------------------- the memory of batches


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def held_in(view: memoryview, how: int) -> object:
    """A way in which a transport may go on using a part of a batch."""
    match how % 6:
        case 0:
            return view[len(view) // 2 :]
        case 1:
            return memoryview(view)[1:][1:]
        case 2:
            return view.toreadonly()[: len(view) // 3]
        case 3:
            return np.frombuffer(view, np.uint8)[::3]
        case 4:
            return view[len(view) % 8 :].cast("Q")
        case _:
            return view


@pytest.mark.parametrize("seed", range(6))
def test_batch_in_use_is_never_overwritten(kernel, seed):
    """However it is held, and in whatever order the parts are let go."""
    noise = random.Random(seed)
    encoder = Pair(kernel, pages=64, room=8 * PAGE, headroom=8).encoder
    held: list[tuple[object, bytes]] = []
    for now in range(1, 80):
        encoder.begin_round(now)
        numbers = sorted(noise.sample(range(64), 5))
        put(encoder, {number: noise.randbytes(PAGE) for number in numbers})
        for view in encoder.finish_batch():
            part = held_in(view, noise.randrange(6))
            held.append((part, bytes(memoryview(part))))
        del view, part
        noise.shuffle(held)
        del held[noise.randrange(1, 12) :]
        for part, content in held:
            assert bytes(memoryview(part)) == content


def test_batch_memory_is_reused_after_its_last_view():
    """One batch after the other takes one piece of memory, not one each."""
    encoder = Pair(COMPILED, pages=64, room=8 * PAGE).encoder
    seen: list[int] = []

    def send() -> memoryview:
        encoder.begin_round(encoder_round := len(seen) + 1)
        put(encoder, {0: fill(encoder_round % 250 + 1), 1: random.randbytes(PAGE)})
        records, _ = encoder.finish_batch()
        seen.append(address(records))
        return records

    for _ in range(10):
        send()
    assert len(set(seen)) == 1
    kept = send()[3:][2:5].toreadonly()
    send()
    assert seen[-2] == seen[0] != seen[-1]
    second = send()
    third = send()
    assert len({seen[0], *seen[-2:]}) == 3
    del second, third, kept
    before = set(seen)
    for _ in range(10):
        send()
    assert set(seen) == before


def test_late_snapshot_view_belongs_to_its_batch(kernel):
    """A caller that keeps `space` and writes to it later affects only the batch it was for."""
    encoder = Pair(kernel).encoder
    encoder.begin_round(1)
    late, _ = encoder.space()
    put(encoder, {0: fill(1)})
    taken(encoder)
    put(encoder, {1: fill(2)})
    late[:] = fill(9, len(late))
    assert taken(encoder) == (head(1, 1, fill(2)) + b"\x40\0\1", fill(2))


def test_views_outlive_their_encoder(kernel):
    pair = Pair(kernel)
    pair.encoder.begin_round(1)
    memory, numbers = pair.encoder.space()
    put(pair.encoder, {0: fill(1)})
    records, data = pair.encoder.finish_batch()
    del pair
    memory[-1] = numbers[-1] = 1
    assert (records, data) == (head(1, 0, fill(1)) + b"\x40\0\1", fill(1))


# ---------------------------------------------------------------- what the encoder refuses


def test_encoder_arguments(kernel):
    for pages, size, message in [
        (4, 1000, "a power of two from 1024 to 16384"),
        (4, 32768, "a power of two from 1024 to 16384"),
        (4, 512, "a power of two from 1024 to 16384"),
        (0, PAGE, "no pages"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernel.PageHashes(pages, size, SEED)
    hashes = kernel.PageHashes(4, 2048, SEED)
    used = kernel.PageCache(4096, 2048)
    used.put(1, bytes(2048), 1)
    for arguments, message in [
        ({"cache": kernel.PageCache(2 * PAGE, PAGE)}, "pages of another size"),
        ({"cache": used}, "pages of another migration"),
        ({"headroom": -1}, "no room for a page"),
        ({"room": 0}, "no room for a page"),
        ({"room": 2048 + 95}, "no room for a page"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernel.PageEncoder(hashes, **arguments)
    encoder = kernel.PageEncoder(hashes)
    assert (encoder.pages, encoder.page_size) == (4, 2048)


def test_round_numbers_rise_and_batches_do_not_cross_rounds(kernel):
    encoder = Pair(kernel).encoder
    with pytest.raises(ValueError, match="no round was begun"):
        put(encoder, {0: fill(1)})
    with pytest.raises(ValueError, match="out of order or outside"):
        encoder.feed_zeros(0, 1)
    with pytest.raises(ValueError, match="round 0 after round 0"):
        encoder.begin_round(0)
    encoder.begin_round(3)
    encoder.begin_round(3)
    with pytest.raises(ValueError, match="round 2 after round 3"):
        encoder.begin_round(2)
    with pytest.raises(ValueError, match="the batch is empty"):
        encoder.finish_batch()
    put(encoder, {0: fill(0)})
    with pytest.raises(ValueError, match="was not taken"):
        encoder.begin_round(4)


@pytest.mark.parametrize("numbers", [[2, 1], [1, 1], [16], [3, 2**64 - 1]])
def test_pages_must_come_in_order(kernel, numbers):
    encoder = Pair(kernel).encoder
    encoder.begin_round(1)
    with pytest.raises(ValueError, match=f"page {numbers[-1]} is out of order or outside"):
        put_as(encoder, numbers, fill(1))
    # those before it are in
    assert encoder.pending == (len(numbers) > 1)


def test_page_order_is_checked_across_feeds(kernel):
    encoder = Pair(kernel).encoder
    encoder.begin_round(1)
    put(encoder, {5: fill(1)})
    for again in (4, 5):
        with pytest.raises(ValueError, match="out of order"):
            put(encoder, {again: fill(1)})
    put(encoder, {6: fill(0)})
    with pytest.raises(ValueError, match="out of order"):
        encoder.feed_zeros(6, 1)
    encoder.finish_batch()
    assert put(encoder, {4: fill(1)}) == 1


def test_feed_refuses_more_pages_than_space(kernel):
    """A snapshot is fed once: after that its memory is the batch's."""
    encoder = Pair(kernel).encoder
    encoder.begin_round(1)

    def refused(count: int, offered: int) -> None:
        with pytest.raises(ValueError, match=f"{count} pages: there was space for {offered}"):
            encoder.feed(count, bitmap(16))

    refused(1, 0)
    encoder.space()
    refused(257, 256)
    refused(-1, 256)
    encoder.feed(0, bitmap(16))
    put(encoder, {0: fill(1)})
    refused(1, 0)
    encoder.space()
    assert encoder.feed_zeros(1, 1) == 1
    refused(1, 0)
    encoder.space()
    encoder.finish_batch()
    refused(1, 0)


def test_short_buffers_are_refused(kernel):
    encoder = Pair(kernel).encoder
    encoder.begin_round(1)
    encoder.space()
    with pytest.raises(ValueError, match="the dirty bitmap is too short"):
        encoder.feed(1, bytes(1))
    for arguments in [(0, 2, bytes(PAGE), bitmap(16)), (0, 1, bytes(PAGE), bytearray(1))]:
        with pytest.raises(ValueError, match="too short"):
            encoder.scan(*arguments)
    with pytest.raises(ValueError, match="too short"):
        encoder.scan_zeros(0, 1, bytearray(1))
    with pytest.raises(ValueError, match="outside the guest"):
        encoder.scan(10, 7, bytes(7 * PAGE), bitmap(16))
    with pytest.raises(ValueError, match="outside the guest"):
        encoder.scan_zeros(10, 7, bitmap(16))


# ---------------------------------------------------------------- hashes


@pytest.mark.parametrize("size", [1024, 2048, 4096, 8192, 16384])
def test_page_hash_follows_its_definition(kernel, size):
    noise = random.Random(size)
    hashes = kernel.PageHashes(9, size, SEED)
    zero = page_hash(bytes(size))
    assert hashes.table == zero.to_bytes(8, "little") * 9
    assert (hashes.pages, hashes.page_size, hashes.stale) == (9, size, bytes(8))
    contents = [fill(0xFF, size), noise.randbytes(size), bytes(size - 1) + b"\1"]
    hashes.hash_pages(array("Q", [8, 0, 4, 7]), 3, b"".join(contents))
    expected = [zero] * 9
    expected[8], expected[0], expected[4] = map(page_hash, contents)
    assert hashes.table == struct.pack("<9Q", *expected)
    other = kernel.PageHashes(1, size, b"another seed")
    assert other.table == page_hash(bytes(size), b"another seed").to_bytes(8, "little")
    assert other.table != hashes.table[8:16]


def test_page_hash_covers_every_byte(kernel):
    hashes = kernel.PageHashes(1, PAGE, SEED)
    seen = {bytes(hashes.table)}
    for at in range(PAGE):
        hashes.hash_pages(array("Q", [0]), 1, bytes(at) + b"\1" + bytes(PAGE - at - 1))
        seen.add(bytes(hashes.table))
    assert len(seen) == PAGE + 1


def test_hashed_pages_are_not_stale(kernel):
    hashes = kernel.PageHashes(100, PAGE, SEED)
    hashes.stale[:] = bitmap(100, [3, 4, 70])
    hashes.hash_pages(array("Q", [3, 70, 99]), 3, bytes(3 * PAGE))
    assert listed(hashes.stale) == [4]
    before = bytes(hashes.table)
    for numbers, count, content, message in [
        ([1], 2, bytes(2 * PAGE), "fewer pages than that"),
        ([1], -1, b"", "fewer pages than that"),
        ([1], 1, bytes(PAGE - 1), "fewer pages than that"),
        ([4, 100], 2, fill(1, 2 * PAGE), "page 100 is outside the guest"),
        ([4, 2**64 - 1], 2, fill(1, 2 * PAGE), "is outside the guest"),
    ]:
        with pytest.raises(ValueError, match=message):
            hashes.hash_pages(array("Q", numbers), count, content)
    assert (hashes.table, listed(hashes.stale)) == (before, [4])


def test_raw_pages_are_hashed_and_deltas_make_stale(kernel):
    pair = Pair(kernel, pages=8, cache=2)
    pair.encoder.begin_round(1)
    pair.send({0: fill(1), 1: fill(0), 2: fill(2), 3: fill(3)})
    assert listed(pair.hashes.stale) == listed(pair.there.stale) == []
    pair.encoder.begin_round(2)
    pair.send({0: b"\0" + fill(1)[1:], 1: fill(0), 2: fill(2), 3: fill(9), 4: fill(0)})
    # page 2 was written, so its bytes may have been others for a moment
    assert listed(pair.hashes.stale) == [0, 2]
    assert listed(pair.there.stale) == [0]
    expected = [page_hash(content) for content in (fill(1), fill(0), fill(2), fill(9))]
    expected += [page_hash(fill(0))] * 4
    assert pair.hashes.table == pair.there.table == struct.pack("<8Q", *expected)
    pair.encoder.begin_round(3)
    pair.send({0: fill(0), 2: random.Random(1).randbytes(PAGE)})
    assert listed(pair.hashes.stale) == listed(pair.there.stale) == []


# ---------------------------------------------------------------- scan


@pytest.mark.parametrize("cache", [0, 2, 32])
def test_scan_finds_exactly_the_changed_pages(kernel, cache):
    pages, noise = 40, random.Random(cache)
    pair = Pair(kernel, pages=pages, cache=cache)
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
        # a page that a delta changed and that was evicted since has neither content nor hash
        unknown = [
            page for page in listed(pair.hashes.stale)
            if pair.cache is None or pair.cache.get(page) is None
        ]  # fmt: skip
        assert not unknown or cache == 2
        changed = bitmap(pages)
        data = b"".join(memory.values())
        found = pair.encoder.scan(0, 10, data[: 10 * PAGE], changed)
        found += pair.encoder.scan(10, pages - 10, data[10 * PAGE :], changed)
        assert listed(changed) == sorted({*wanted, *unknown})
        assert found == len(listed(changed))
        # what is as the peer has it was hashed from the copy that was compared
        assert set(listed(pair.hashes.stale)) <= set(listed(changed))


def test_scan_hashes_stale_unchanged_pages(kernel):
    pair = Pair(kernel, pages=4)
    pair.encoder.begin_round(1)
    pair.send({1: fill(1), 2: fill(2)})
    pair.encoder.begin_round(2)
    one, two = b"\2" + fill(1)[1:], b"\1" + fill(2)[1:]
    pair.send({1: one, 2: two})
    assert listed(pair.hashes.stale) == [1, 2]
    changed = bitmap(4)
    assert pair.encoder.scan(1, 2, one + fill(7), changed) == 1
    assert (listed(changed), listed(pair.hashes.stale)) == ([2], [2])
    assert pair.hashes.table[8:16] == page_hash(one).to_bytes(8, "little")


def test_scan_zeros(kernel):
    encoder = Pair(kernel).encoder
    encoder.begin_round(1)
    put(encoder, {0: fill(0), 1: fill(1), 2: fill(0)})
    changed = bitmap(16)
    assert encoder.scan_zeros(0, 4, changed) == 2
    assert listed(changed) == [1, 3]


# ---------------------------------------------------------------- overflowing pages


def dense(now: int, page: int = 0) -> bytes:
    """Content of a round whose delta from any other round's overflows."""
    return bytes(0 if i % 2 else (now * 37 + page + i) % 255 + 1 for i in range(PAGE))


def rounds_of(pair: Pair, contents: list[bytes]) -> list[str]:
    """Page 0 in round after round; what became of each."""
    fates = []
    for now, content in enumerate(contents, 1):
        before = counters(pair.encoder)
        pair.encoder.begin_round(now)
        pair.send({0: content})
        assert pair.page(0) == content
        assert pair.cache.get(0) in (None, content)
        after = counters(pair.encoder)
        counted = [n for n in ("overflows", "spared", "misses", "delta", "raw")
                   if after.get(n, 0) > before.get(n, 0)]  # fmt: skip
        fates.append(counted[0])
    return fates


def test_overflowing_page_is_left_out_for_longer_each_time(kernel):
    pair = Pair(kernel)
    fates = rounds_of(pair, [dense(now) for now in range(1, 80)])
    waits = [len(list(run)) for fate, run in itertools.groupby(fates) if fate == "spared"]
    assert fates[:3] == ["raw", "overflows", "overflows"]
    assert waits[:6] == [1, 2, 4, 8, 16, 16]
    assert pair.encoder.misses == 0


def test_fitting_delta_ends_the_overflow_series(kernel):
    pair = Pair(kernel)
    contents = [dense(now) for now in range(1, 6)]  # raw, 2 overflows, spared, an overflow
    contents += [dense(6), dense(7), dense(7)[:-1] + b"x"]  # 2 spared, then it fits
    contents += [dense(9), dense(10), dense(11)]
    assert rounds_of(pair, contents)[4:] == [
        "overflows", "spared", "spared", "delta", "overflows", "overflows", "spared",
    ]  # fmt: skip


def test_left_out_page_is_not_cached(kernel):
    pair = Pair(kernel, cache=1)
    rounds_of(pair, [dense(now) for now in range(1, 6)])
    assert len(pair.cache) == 0


def test_left_out_page_is_not_cached_after_forget(kernel):
    """It is new to the peer then; the cache must hold the content that was last sent."""
    pair = Pair(kernel)
    rounds_of(pair, [dense(now) for now in range(1, 6)])
    pair.encoder.forget()
    for now in range(6, 12):
        pair.encoder.begin_round(now)
        pair.send({0: dense(now)})
        assert pair.page(0) == dense(now)
        assert pair.cache.get(0) in (None, dense(now))


def test_zero_page_does_not_shorten_the_wait_after_overflow(kernel):
    pair = Pair(kernel)
    rounds_of(pair, [dense(1), dense(2), dense(3), dense(4), dense(5)])  # two to wait
    for now, content in enumerate([bytes(PAGE), dense(7), dense(8), dense(9)], 6):
        pair.encoder.begin_round(now)
        pair.send({0: content})
        assert pair.cache.get(0) in (None, content)
    assert pair.encoder.spared == 1 + 2


# ---------------------------------------------------------------- deltas off and on


def test_inactive_encoder_sends_no_deltas_and_empties_the_cache(kernel):
    pair = Pair(kernel)
    pair.encoder.begin_round(1)
    pair.send({0: fill(1), 1: bytes(PAGE), 2: fill(2)})
    assert pair.encoder.active
    pair.encoder.active = False
    assert len(pair.cache) == 0
    pair.encoder.begin_round(2)
    pair.send({0: fill(1)[:-1] + b"x", 1: fill(3)[:-1] + b"y", 2: bytes(PAGE)})
    assert counters(pair.encoder) == {"zero": 2, "raw": 4}
    assert len(pair.cache) == 0


def test_reactivated_encoder_builds_on_the_last_content(kernel):
    pair = Pair(kernel)
    contents = [fill(now)[:-1] + b"x" for now in range(1, 6)]
    for now, content in enumerate(contents, 1):
        pair.encoder.begin_round(now)
        pair.encoder.active = now not in (2, 3)
        pair.send({0: content})
        assert pair.page(0) == content
    assert pair.encoder.misses == 1
    assert pair.encoder.hits == 1


def test_encoder_without_cache_cannot_be_activated(kernel):
    pair = Pair(kernel, cache=0)
    assert not pair.encoder.active
    pair.encoder.active = False
    with pytest.raises(ValueError, match="no cache"):
        pair.encoder.active = True


# ---------------------------------------------------------------- heat


def heat(encoder) -> dict[int, int]:
    """Return the number of pages by heat, without zeros."""
    return {degree: pages for degree, pages in enumerate(encoder.sample_heat()[1]) if pages}


@pytest.mark.parametrize("cache", [0, 4])
def test_heat_counts_sendings_after_the_first(kernel, cache):
    pair = Pair(kernel, pages=20, cache=cache)
    for now in range(1, 5):
        pair.encoder.begin_round(now)
        pair.send({page: fill(now) for page in range(20) if now == 1 or page < now})
    # pages 0 and 1 in rounds 2 to 4, page 2 in 3 and 4, page 3 in 4
    assert heat(pair.encoder) == {0: 16, 32: 1, 64: 1, 96: 2}


def test_heat_sample_counts_sendings_by_heat_before(kernel):
    pair = Pair(kernel, pages=20)
    told = []
    for now, pages in enumerate([range(20), range(6), range(8), range(3)], 1):
        pair.encoder.begin_round(now)
        pair.send({page: fill(now) for page in pages})
        sendings, _ = pair.encoder.sample_heat()
        told.append({degree: count for degree, count in enumerate(sendings) if count})
    assert told == [{}, {0: 6}, {0: 2, 32: 6}, {64: 3}]


def test_zero_pages_have_no_heat(kernel):
    pair = Pair(kernel)
    for now in range(1, 5):
        pair.encoder.begin_round(now)
        pair.send({0: bytes(PAGE) if now % 2 else fill(now), 1: bytes(PAGE)})
    assert heat(pair.encoder) == {0: 16}


def test_heat_is_halved_every_four_rounds_and_never_overflows(kernel):
    pair = Pair(kernel)
    peaks = []
    for now in range(1, 60):
        pair.encoder.begin_round(now)
        pair.send({0: fill(now), **({1: fill(now)} if now < 3 else {})})
        peaks.append(max(heat(pair.encoder)))
    assert max(peaks) > 200
    assert min(peaks[20:]) >= 100
    assert heat(pair.encoder)[0] == 15, "page 1 is forgotten"


def test_heat_stops_at_255(kernel):
    pair = Pair(kernel)
    for now in range(1, 12):
        pair.encoder.begin_round(now)
        pair.send({0: fill(now)})
    assert heat(pair.encoder) == {0: 15, 255: 1}


def test_short_rounds_do_not_cool_a_large_working_set(kernel):
    pair = Pair(kernel, pages=200, cache=4)
    for now in range(1, 20):
        pair.encoder.begin_round(now)
        pair.send({page: fill(now) for page in range(200 if now < 3 else 1)})
        pair.encoder.sample_heat()
    assert 0 not in heat(pair.encoder)


# ---------------------------------------------------------------- the whole memory


@pytest.mark.exhaustive
@given(
    seed=st.integers(0, 2**32),
    cache=st.sampled_from([0, 1, 4, 64]),
    room=st.sampled_from([SMALLEST_ROOM, 5000, 1 << 20]),
    stride=st.sampled_from([1, 2, 90]),
    size=st.sampled_from([1024, 1024, 4096]),
    merge=st.booleans(),
    headroom=st.sampled_from([0, 24]),
)
@settings(max_examples=200, deadline=None)
def test_destination_equals_the_snapshot(seed, cache, room, stride, size, merge, headroom):
    noise = random.Random(seed)
    count = 20
    room = max(room, size + 96)
    pairs = [
        Pair(
            each, pages=count * stride, cache=cache, room=room, size=size, merge=merge,
            headroom=headroom,
        )
        for each in BOTH
    ]  # fmt: skip
    memory = {page * stride: bytes(size) for page in range(count)}
    touched = list(memory)
    for now in range(1, 13):
        resized = size << noise.randrange(6)
        active = noise.randrange(4) > 0
        for pair in pairs:
            pair.encoder.begin_round(now)
            if cache and seed % 5 == 0:
                pair.encoder.active = active
            if cache and seed % 3 == 0:
                pair.cache.resize(resized)
        batches = [pair.send({page: memory[page] for page in touched}) for pair in pairs]
        assert batches[0] == batches[1]
        assert counters(pairs[0].encoder) == counters(pairs[1].encoder)
        assert pairs[0].encoder.sample_heat() == pairs[1].encoder.sample_heat()
        assert pairs[0].memory == pairs[1].memory
        assert pairs[0].decoder.recent == pairs[1].decoder.recent
        assert pairs[0].decoder.received_pages == pairs[1].decoder.received_pages == count
        for page, content in memory.items():
            assert pairs[0].page(page) == content
            if cache:
                kept = pairs[0].cache.get(page)
                assert kept == pairs[1].cache.get(page)
                assert kept in (None, content)
        hashes_tell_the_content(pairs)
        touched = touch(noise, memory, size)


# ---------------------------------------------------------------- decoder


def test_decoder_arguments(kernel):
    hashes = kernel.PageHashes(9, PAGE, SEED)
    for size in (0, 8 * PAGE, 9 * PAGE + 1):
        with pytest.raises(ValueError, match=f"{size} bytes are not 9 pages of 1024"):
            kernel.PageDecoder(hashes, size)
    decoder = kernel.PageDecoder(hashes, 8 * PAGE + 1)
    assert (decoder.pages, decoder.page_size, decoder.size) == (9, PAGE, 8 * PAGE + 1)
    assert not any(decoder.recent)
    with pytest.raises(ValueError, match="shorter than the guest"):
        decoder.apply(head(1, 0) + b"\0\1", b"", bytearray(9 * PAGE - 1))


def test_recent_pages_are_changed_by_deltas_this_round(kernel):
    pair = Pair(kernel, pages=80)
    pair.encoder.begin_round(1)
    pair.send({page: fill(page == 5) for page in range(80)})
    assert listed(pair.decoder.recent) == []
    pair.encoder.begin_round(2)
    pair.send({5: fill(0), 9: b"\1" + bytes(PAGE - 1), 70: b"\1" + bytes(PAGE - 1)})
    assert listed(pair.decoder.recent) == [9, 70]
    pair.send({11: b"\1" + bytes(PAGE - 1)})
    assert listed(pair.decoder.recent) == [9, 11, 70]
    pair.decoder.end_round()
    assert listed(pair.decoder.recent) == []
    assert listed(pair.there.stale) == [9, 11, 70]


def test_zeros_are_written_only_over_content(kernel):
    """Pages that are zero from the start take no memory: the place has zeros already."""
    pair = Pair(kernel, pages=4)
    pair.memory[:] = fill(0xEE, 4 * PAGE)  # so that one sees what is written
    pair.encoder.begin_round(1)
    pair.send({0: fill(0), 1: fill(1)})
    assert [pair.page(page)[0] for page in range(4)] == [0xEE, 1, 0xEE, 0xEE]
    pair.encoder.begin_round(2)
    pair.send({1: fill(0)})
    assert pair.page(1) == fill(0)


def test_check_lists_pages_first_written_by_a_delta(kernel):
    """What needs room at the destination before it is written through a mapping."""
    pair = Pair(kernel, pages=300)
    pair.encoder.begin_round(1)
    contents = {page: fill(1) for page in (0, 1, 2, 100)} | {3: fill(0), 6: fill(0), 200: fill(0)}
    contents = dict(sorted(contents.items()))
    records, data = batch(pair.encoder, contents)
    assert pair.decoder.check(records, len(data)) == (1, [])
    pair.decoder.apply(records, data, pair.memory)
    pair.encoder.begin_round(2)
    sparse = b"\2" + bytes(PAGE - 1)
    records, data = batch(
        pair.encoder, {1: b"\3" + fill(1)[1:], 3: sparse, 4: fill(2), 200: sparse}
    )
    assert pair.decoder.check(records, len(data)) == (2, [3, 200])
    assert pair.decoder.check(records, len(data)) == (2, [3, 200]), "it touches nothing"
    pair.decoder.apply(records, data, pair.memory)
    assert pair.decoder.check(head(3, 3) + b"\x80\3\0\1\1", 0) == (3, [])


def test_highest_round_number(kernel):
    decoder = Pair(kernel, pages=4).decoder
    assert decoder.check(head(2**32 - 1, 0) + b"\0\1", 0) == (2**32 - 1, [])


def test_delta_without_a_base_is_refused(kernel):
    pair = Pair(kernel)
    records = head(1, 3) + b"\x80\3\0\1\1"
    for refused in (
        lambda: pair.decoder.check(records, 0),
        lambda: pair.decoder.apply(records, b"", pair.memory),
    ):
        with pytest.raises(DecodeError, match="a delta for a page that was never sent"):
            refused()
    pair.decoder.apply(head(1, 3) + b"\0\1", b"", pair.memory)
    assert pair.decoder.apply(records, b"", pair.memory) == 1
    assert pair.page(3) == b"\1" + bytes(PAGE - 1)


@pytest.mark.parametrize("where", ["first", "last", "check"])
def test_raw_pages_are_written_only_if_all_match_the_check(kernel, where):
    raw = fill(1), fill(2), fill(3)
    records = bytearray(head(1, 0, *raw) + b"\x40\0\2" + b"\x41\0\1")
    data = bytearray(b"".join(raw))
    match where:
        case "first":
            data[0] ^= 1
        case "last":
            data[-1] ^= 0x80
        case "check":
            records[19] ^= 1
    pair = Pair(kernel)
    assert pair.decoder.check(records, len(data)) == (1, [])
    before = bytes(pair.there.table)
    with pytest.raises(DecodeError, match="does not match their check"):
        pair.decoder.apply(records, data, pair.memory)
    assert not any(pair.memory)
    assert pair.there.table == before
    assert (pair.decoder.received_pages, pair.decoder.raw) == (0, 0)


def test_check_covers_the_order_of_raw_pages(kernel):
    pair = Pair(kernel)
    records = head(1, 0, fill(1), fill(2)) + b"\x40\0\2"
    with pytest.raises(DecodeError, match="does not match their check"):
        pair.decoder.apply(records, fill(2) + fill(1), pair.memory)
    assert pair.decoder.apply(records, fill(1) + fill(2), pair.memory) == 2


def test_bad_delta_leaves_its_page_and_keeps_earlier_records(kernel):
    pair = Pair(kernel)
    pair.encoder.begin_round(1)
    pair.send({0: fill(1), 1: fill(2), 2: fill(3)})
    records = head(2, 0) + b"\x80\3\0\1\xaa" + b"\x80\5\0\1\xaa\0\1" + b"\x80\3\0\1\xaa"
    with pytest.raises(DecodeError, match="^byte 25 of the batch: an empty zero run"):
        pair.decoder.apply(records, b"", pair.memory)
    assert [pair.page(page)[0] for page in range(3)] == [0xAA, 2, 3]
    assert pair.decoder.delta == 1
    assert listed(pair.there.stale) == listed(pair.decoder.recent) == [0]


# ---------------------------------------------------------------- into a file


class Place:
    """A guest of `size` bytes at an offset in a file, of which whole pages are mapped."""

    def __init__(self, size: int, offset: int = 0) -> None:
        self.pages = -(-size // PAGE)
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, offset + size)
        mapped = mmap.mmap(-1 if size % PAGE else self.fd, offset + self.pages * PAGE)
        self.memory = memoryview(mapped)[offset:]
        self.offset = offset

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def content(self) -> bytes:
        return os.pread(self.fd, 1 << 20, 0)


def test_raw_pages_are_written_to_the_file(kernel):
    """They are seen through its mapping; deltas and zeros go through that."""
    with Place(16 * PAGE, 3 * PAGE) as place:
        pair = Pair(kernel)
        pair.memory = place.memory
        versions = [
            {1: fill(1), 2: fill(2), 3: fill(0), 5: fill(5)},
            {1: b"\xaa" + fill(1)[1:], 2: fill(0), 3: b"\1" + bytes(PAGE - 1)},
            {2: fill(7), 5: random.Random(5).randbytes(PAGE)},
        ]
        expected = bytearray(19 * PAGE)
        for now, contents in enumerate(versions, 1):
            pair.encoder.begin_round(now)
            records, data = batch(pair.encoder, contents)
            pair.decoder.check(records, len(data))
            done = pair.decoder.apply(records, data, place.memory, place.fd, place.offset)
            assert done == len(contents)
            for page, content in contents.items():
                expected[(3 + page) * PAGE : (4 + page) * PAGE] = content
            assert place.content() == expected


@pytest.mark.parametrize("tail", [1, 511, PAGE - 1])
def test_filling_of_the_last_page_is_not_written(kernel, tail):
    """The file keeps its size, and what may follow the guest in it."""
    size = 2 * PAGE + tail
    with Place(size) as place:
        hashes = kernel.PageHashes(3, PAGE, SEED)
        decoder = kernel.PageDecoder(hashes, size)
        raw = fill(1), fill(2), fill(3)
        records = head(1, 0, *raw) + b"\x40\0\3"
        decoder.apply(records, b"".join(raw), place.memory, place.fd)
        assert place.content() == b"".join(raw)[:size]
        os.pwrite(place.fd, fill(9), size)
        decoder.apply(records, b"".join(raw), place.memory, place.fd)
        assert place.content() == b"".join(raw)[:size] + fill(9)
        # the hash is of the whole page that came, as at the source
        assert hashes.table[16:] == page_hash(fill(3)).to_bytes(8, "little")


def test_file_that_cannot_be_written_is_an_os_error(kernel):
    with Place(16 * PAGE) as place:
        pair = Pair(kernel)
        readonly = os.open(f"/proc/self/fd/{place.fd}", os.O_RDONLY)
        try:
            with pytest.raises(OSError, match=r".") as raised:
                pair.decoder.apply(
                    head(1, 0, fill(1)) + b"\x40\0\1", fill(1), place.memory, readonly
                )
        finally:
            os.close(readonly)
        assert raised.value.errno == errno.EBADF
        assert not any(place.content())
        assert (pair.decoder.raw, pair.decoder.received_pages) == (0, 0)


# ---------------------------------------------------------------- bytes of a hostile peer

# (records, raw pages, what is wrong)
HOSTILE = {
    "no bytes": (b"", b"", "holds no record"),
    "a head alone": (head(1, 0), b"", "holds no record"),
    "half a head": (head(1, 0)[:11], b"", "holds no record"),
    "first page outside": (head(1, 16) + b"\0\1", b"", "page number outside"),
    "first page far outside": (head(1, 2**64 - 1) + b"\0\1", b"", "page number outside"),
    "gap outside": (head(1, 0) + b"\x10\1", b"", "page number outside"),
    "gap far outside": (
        head(1, 0) + b"\x3f" + b"\xff" * 8 + b"\x7f\1", b"", "page number outside"
    ),
    "gap past 64 bits": (head(1, 0) + b"\x3f" + b"\xff" * 9 + b"\1\1", b"", "length does not end"),
    "gap cut": (head(1, 0) + b"\x3f\x80", b"", "ends inside a record"),
    "zero run of none": (head(1, 0) + b"\0\0", b"", "page number outside"),
    "zero run too long": (head(1, 0) + b"\0\x11", b"", "page number outside"),
    "zero run enormous": (head(1, 0) + b"\0" + b"\xff" * 8 + b"\x7f", b"", "page number outside"),
    "zero run cut": (head(1, 0) + b"\0\x81", b"", "ends inside a record"),
    "raw run of none": (head(1, 0) + b"\x40\0\0", b"", "page number outside"),
    "raw run too long": (
        head(1, 0, *[bytes(PAGE)] * 17) + b"\x40\0\x11", bytes(17 * PAGE), "page number outside"
    ),
    "fewer raw pages than named": (
        head(1, 0, bytes(PAGE)) + b"\x40\0\2", bytes(PAGE), "not name as many pages as came"
    ),
    "no raw pages": (head(1, 0) + b"\x40\0\1", b"", "not name as many pages as came"),
    "raw count cut": (head(1, 0) + b"\x40\0", b"", "ends inside a record"),
    "empty delta": (head(1, 0) + b"\x80\0", b"", "no bytes, or longer than a page"),
    "long delta": (
        head(1, 0) + b"\x80\x81\x08" + bytes(1025), b"", "no bytes, or longer than a page"
    ),
    "delta length unending": (head(1, 0) + b"\x80\x80\x80\x80\1", b"", "length does not end"),
    "delta cut": (head(1, 0) + b"\x80\4\0\2\1", b"", "ends inside a record"),
    "unknown record": (head(1, 0) + b"\xc0\1", b"", "an unknown record type"),
    "past the last page": (head(1, 15) + b"\0\1\0\1", b"", "page number outside"),
}  # fmt: skip

# What only one of the two can see.
ONLY_CHECK = {
    "a page too many": (head(1, 0, fill(1), fill(2)) + b"\x40\0\1", fill(1) + fill(2)),
    "half a page too many": (head(1, 0, fill(1)) + b"\x40\0\1", fill(1) + b"half"),
    "pages that no record names": (head(1, 0, fill(1)) + b"\0\1", fill(1)),
}
ONLY_APPLY = {
    "bad delta": (
        head(1, 0) + b"\x80\4\0\3\1\1", b"", "a non-zero run goes past the end of the delta"
    ),
    "bad content": (head(1, 0, fill(1)) + b"\x40\0\1", fill(2), "does not match their check"),
}  # fmt: skip


def with_page_0(kernel) -> Pair:
    pair = Pair(kernel)
    pair.encoder.begin_round(1)
    pair.send({0: fill(1)})
    return pair


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_batches(kernel, name):
    records, data, message = HOSTILE[name]
    pair = with_page_0(kernel)
    with pytest.raises(DecodeError, match=message):
        pair.decoder.check(records, len(data))
    with pytest.raises(DecodeError, match=message):
        pair.decoder.apply(records, data, pair.memory)
    if "past the last page" not in name:
        assert pair.memory == fill(1) + bytes(15 * PAGE)


@pytest.mark.parametrize("name", ONLY_CHECK)
def test_surplus_raw_pages_are_refused(kernel, name):
    records, data = ONLY_CHECK[name]
    with pytest.raises(DecodeError, match="not name as many pages as came"):
        with_page_0(kernel).decoder.check(records, len(data))


@pytest.mark.parametrize("name", ONLY_APPLY)
def test_hostile_content(kernel, name):
    records, data, message = ONLY_APPLY[name]
    pair = with_page_0(kernel)
    pair.decoder.check(records, len(data))
    with pytest.raises(DecodeError, match=message):
        pair.decoder.apply(records, data, pair.memory)
    assert pair.memory == fill(1) + bytes(15 * PAGE)


def rich_batch() -> tuple[dict[int, bytes], dict[int, bytes], tuple[bytes, bytes]]:
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
    encoder = Pair(COMPILED, pages=100).encoder
    encoder.begin_round(1)
    batch(encoder, before)
    encoder.begin_round(2)
    return before, after, batch(encoder, after)


BEFORE, AFTER, (RECORDS, DATA) = rich_batch()


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
        *(bytes(pair.memory), bytes(decoder.recent)),
        *(bytes(pair.there.table), bytes(pair.there.stale)),
        *(decoder.received_pages, decoder.zero, decoder.raw, decoder.delta),
    )


def test_truncated_batches_are_refused_or_whole(kernel):
    """A cut inside a record is an error; one between records leaves a shorter batch."""
    pair = primed(kernel)
    before = state(pair)
    accepted = []
    for length in range(len(RECORDS)):
        for data_bytes in (0, PAGE, 2 * PAGE):
            try:
                pair.decoder.check(RECORDS[:length], data_bytes)
                accepted.append((length, data_bytes // PAGE))
            except DecodeError:
                pass
    assert state(pair) == before
    # after each record but the last: delta, zero, raw, raw, zero, delta
    assert [pages for _, pages in accepted] == [0, 0, 1, 2, 2, 2]
    assert len({length for length, _ in accepted}) == 6
    for data_bytes in (0, PAGE, 2 * PAGE - 1, 2 * PAGE + 1, 3 * PAGE):
        with pytest.raises(DecodeError, match="not name as many pages as came"):
            pair.decoder.check(RECORDS, data_bytes)
    assert pair.decoder.check(RECORDS, len(DATA)) == (2, [90])
    assert pair.decoder.apply(RECORDS, DATA, pair.memory) == len(AFTER)
    assert all(pair.page(page) == content for page, content in AFTER.items())


@pytest.mark.exhaustive
@given(st.data())
@settings(max_examples=300, deadline=None)
def test_mutations_are_refused_or_applied_the_same_way(data):
    """check() changes nothing; apply() agrees with it; twins agree; no write leaves the guest."""
    records, content = bytearray(RECORDS), bytearray(DATA)
    places = st.one_of(st.integers(HEAD, len(records) - 1), st.integers(0, len(records) - 1))
    for place, value in data.draw(
        st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=5)
    ):
        records[place] = value
    if data.draw(st.integers(0, 3)) == 0:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1
    whole, some = st.just(len(records)), st.integers(0, len(records))
    records = records[: data.draw(st.one_of(whole, some))]
    content = content[: data.draw(st.sampled_from([len(content)] * 3 + [0, PAGE, PAGE + 1]))]
    if data.draw(st.booleans()) and len(records) >= HEAD:  # else hardly any gets past the check
        pages = [
            bytes(content[at : at + PAGE]) for at in range(0, len(content) // PAGE * PAGE, PAGE)
        ]
        records[12:HEAD] = check_of(*pages).to_bytes(8, "big")
    compare(bytes(records), bytes(content))


@given(st.integers(0, 105), st.binary(min_size=1, max_size=60), st.integers(0, 2))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_refused_or_applied_the_same_way(first, records, pages):
    raw = [fill(page + 1) for page in range(pages)]
    compare(head(2, first, *raw) + records, b"".join(raw))


def compare(records: bytes, data: bytes) -> None:
    outcomes = []
    for each in BOTH:
        pair = primed(each)
        guarded = bytearray(64) + pair.memory + bytearray(64)
        before = state(pair)
        checked = verdict(pair.decoder.check, records, len(data))
        assert state(pair) == before
        applied = verdict(pair.decoder.apply, records, data, memoryview(guarded)[64:-64])
        assert not any(guarded[:64] + guarded[-64:])
        pair.memory = guarded[64:-64]
        if isinstance(checked, str):
            # the number of raw pages is the check's alone, where there are enough
            assert isinstance(applied, str) or "not name as many pages as came" in checked
        elif isinstance(applied, str):
            assert any(text in applied for text in CONTENT_FAULTS)
        if isinstance(applied, str) and "does not match their check" in applied:
            assert state(pair) == before
        outcomes.append((checked, applied, state(pair)))
    assert outcomes[0] == outcomes[1]


# What check() cannot see: it does not look at raw pages, nor into deltas.
CONTENT_FAULTS = [
    "does not match their check",
    "the data ends inside a record",
    "a length does not end where it must",
    "an empty zero run inside a delta",
    "a run goes past the end of the page",
    "an empty non-zero run",
    "a non-zero run goes past the end of the delta",
]


# ---------------------------------------------------------------- guests that are mostly zeros


def test_nonzero_parts_of_the_hash_table(kernel):
    pages = 3000
    hashes = kernel.PageHashes(pages, PAGE, SEED)
    assert hashes.nonzero_part(0, 8000) == (pages, b"")
    filled = [0, 1, 5, 1000, 1001, 2999]
    hashes.hash_pages(array("Q", filled), len(filled), b"".join(fill(n + 1) for n in range(6)))
    table = bytes(hashes.table)
    assert hashes.part(4, 3) == table[32:56]
    for first, most, start, end in (
        (0, 8000, 0, 3000), (0, 3, 0, 2), (0, 6, 0, 6), (2, 1, 5, 6), (6, 8, 1000, 1002),
        (1001, 1, 1001, 1002), (1002, 5, 2999, 3000),
    ):  # fmt: skip
        assert hashes.nonzero_part(first, most) == (start, table[8 * start : 8 * end])
    assert hashes.nonzero_part(3000, 1) == hashes.nonzero_part(0, 0) == (pages, b"")
    for first, count in ((0, 3001), (3001, 0), (2999, 2)):
        with pytest.raises(ValueError, match="outside the guest"):
            hashes.part(first, count)
    hashes.clear()
    assert (hashes.table, hashes.sum) == (
        kernel.PageHashes(pages, PAGE, SEED).table, kernel.PageHashes(pages, PAGE, SEED).sum,
    )  # fmt: skip


@pytest.mark.parametrize("cached", [0, 4])
def test_adopt_zeros_equals_adopting_their_hashes(kernel, cached):
    """By range or page by page: the known state of the peer, and later batches, are the same."""
    told = []
    for by_range in (True, False):
        pair = Pair(kernel, pages=200, cache=cached)
        pair.encoder.begin_round(1)
        pair.send({page: fill(page % 5 // 4) for page in range(190)})
        zero = kernel.PageHashes(1, PAGE, SEED).table
        if by_range:
            pair.encoder.adopt_zeros(2, 150)
        else:
            pair.encoder.adopt(2, bytes(zero) * 150)
        changed = bytearray(bitmap(200, []))
        pair.encoder.scan(0, 200, bytes(pair.memory), changed)
        told.append((listed(changed), pair.hashes.table, pair.hashes.sum, len(pair.cache or ())))
    assert told[0] == told[1]
    assert told[0][0] == [*range(4, 152, 5), *range(190, 200)]
    for first, count in ((0, 201), (201, 0)):
        with pytest.raises(ValueError, match="outside the guest"):
            pair.encoder.adopt_zeros(first, count)


@pytest.mark.parametrize("size", [PAGE, 100 * PAGE, 100 * PAGE - 5])
def test_scan_file_equals_scan_of_its_content(kernel, tmp_path, size):
    pages = -(-size // PAGE)
    pair = Pair(kernel, pages=pages, bytes_=size)
    content = bytearray(random.Random(3).randbytes(size))
    padded = bytes(content).ljust(pages * PAGE, b"\0")
    pair.encoder.begin_round(1)
    pair.send({page: padded[page * PAGE : (page + 1) * PAGE] for page in range(pages)})
    path = tmp_path / "guest"
    for at in (0, size - 1):
        content[at] ^= 1
    path.write_bytes(content)
    with path.open("rb") as file:
        for room in (1, 3, 64):
            changed = bytearray(bitmap(pages, []))
            found = pair.encoder.scan_file(
                file.fileno(), size, 0, pages, changed, bytearray(room * PAGE)
            )
            assert listed(changed) == sorted({0, pages - 1})
            assert found == len({0, pages - 1})
        with pytest.raises(ValueError, match="shorter than a page"):
            pair.encoder.scan_file(file.fileno(), size, 0, pages, changed, bytearray(PAGE - 1))
        with pytest.raises(ValueError, match="outside the guest"):
            pair.encoder.scan_file(file.fileno(), size, 1, pages, changed, bytearray(PAGE))
        with pytest.raises(ValueError, match="too short"):
            pair.encoder.scan_file(file.fileno(), size, 0, pages, bytearray(), bytearray(PAGE))
    with pytest.raises(OSError, match="Bad file descriptor"):
        pair.encoder.scan_file(-1, size, 0, pages, changed, bytearray(PAGE))
