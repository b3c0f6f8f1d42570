"""The codec: QEMU's bytes, QEMU's overflow decisions, and a decoder that bad bytes cannot hurt."""

import random
from array import array

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proto import xbzrle
from proto.wire.errors import DecodeError
from tests.kernels import BOTH, COMPILED, TWIN, kernel  # noqa: F401

PAGE = 4096
SIZES = [1024, 2048, 4096, 8192, 16384]


def changed(old: bytes, *runs: tuple[int, int]) -> bytes:
    """`old` with every byte of each (position, count) made different."""
    new = bytearray(old)
    for at, count in runs:
        for i in range(at, at + count):
            new[i] ^= 0x55
    return bytes(new)


def decoded(kernel, delta: bytes, old: bytes) -> bytes:
    page = bytearray(old)
    kernel.decode(delta, page)
    return bytes(page)


# ---------------------------------------------------------------- known bytes


def test_document_example(kernel):
    old = bytes(PAGE)
    new = bytearray(old)
    new[1001:1016] = bytes(range(1, 16))
    new[1019], new[1021] = 0x67, 0x69
    delta = bytes.fromhex("e907 0f 0102030405060708090a0b0c0d0e0f 0301 67 0101 69")
    assert len(delta) == 24
    assert kernel.encode(old, new) == delta
    assert decoded(kernel, delta, old) == new


def test_public_names_are_the_kernel():
    page = bytearray(PAGE)
    delta = xbzrle.encode(page, b"\1" + bytes(PAGE - 1))
    assert delta == b"\0\1\1"
    assert xbzrle.decode(delta, page) is None
    assert page[0] == 1
    assert xbzrle.encode(page, page) == b""
    assert xbzrle.encode(bytes(PAGE), b"\1" * PAGE) is None
    with pytest.raises(DecodeError):
        xbzrle.decode(b"\0", page)


# ---------------------------------------------------------------- the unit tests of QEMU


def uleb(n: int) -> bytes:
    return bytes([n]) if n < 0x80 else bytes([n & 0x7F | 0x80, n >> 7])


def test_qemu_uleb(kernel):
    """Every length of one or two bytes, as the position of one changed byte."""
    size = 16384
    old, new = bytes(size), bytearray(size)
    for n in range(0x4000) if kernel is COMPILED else [*range(0, 0x4000, 997), 127, 128, 0x3FFF]:
        new[n] = 1
        delta = kernel.encode(old, new)
        assert delta == uleb(n) + b"\1\1"
        assert decoded(kernel, delta, old) == new
        new[n] = 0
    page = bytearray(PAGE)
    with pytest.raises(DecodeError):
        kernel.decode(b"\x80\x80\1\1", page)
    assert not any(page)


def qemu_page(length: int, shift: int, *marks: int) -> bytes:
    page = bytearray(PAGE)
    for i in range(1, length + 1):
        page[1000 + i] = (i + shift) % 256
    page[1000 + length + 3], page[1000 + length + 5] = marks
    return bytes(page)


@pytest.mark.parametrize("length", [0, 1, 255, 3089])
def test_qemu_encode_decode_zero(kernel, length):
    page = qemu_page(length, 0, 103, 105)
    assert kernel.encode(page, page) == b""


@pytest.mark.parametrize("length", [0, 1, 255, 3089])
def test_qemu_encode_decode_unchanged(kernel, length):
    page = qemu_page(length, 4, 107, 109)
    assert kernel.encode(page, bytes(page)) == b""


def test_qemu_encode_decode_1_byte(kernel):
    old, new = bytes(PAGE), bytes(PAGE - 1) + b"\1"
    delta = kernel.encode(old, new)
    assert delta == bytes.fromhex("ff1f 01 01")
    assert decoded(kernel, delta, old) == new


def test_qemu_encode_decode_overflow(kernel):
    old, new = bytes(PAGE), bytearray(PAGE)
    for i in range(2047):
        new[2 * i] = 1
    assert kernel.encode(old, new) is None


def test_qemu_encode_decode(kernel):
    rng = random.Random(20)
    for _ in range(10_000 if kernel is COMPILED else 200):
        length = rng.randrange(3090)
        old, new = qemu_page(length, 4, 107, 109), qemu_page(length, 0, 103, 105)
        delta = kernel.encode(old, new)
        assert 0 < len(delta) < PAGE
        assert decoded(kernel, delta, old) == new


# ---------------------------------------------------------------- overflow


@pytest.mark.parametrize(
    ("runs", "length"),
    [
        ([(3, 4093)], 4096),
        ([(2, 4094)], None),
        ([(0, 4096)], None),
        ([(0, 4091)], 4094),
        ([(0, 4092)], None),
        ([(0, 4093)], None),
        ([(0, 4094)], None),
        ([(0, 4095)], None),
        ([(0, 1)], 3),
        ([(4095, 1)], 4),
        ([], 0),
    ],
)
def test_overflow_boundaries(kernel, runs, length):
    old = bytes(range(256)) * 16
    new = changed(old, *runs)
    delta = kernel.encode(old, new)
    assert (None if delta is None else len(delta)) == length
    if delta is not None:
        assert decoded(kernel, delta, old) == new


@pytest.mark.parametrize("size", SIZES)
def test_every_page_size(kernel, size):
    old = random.Random(size).randbytes(size)
    for runs in ([(0, 1)], [(size - 1, 1)], [(1, 127), (200, 128)], [(3, size - 3)]):
        new = changed(old, *runs)
        delta = kernel.encode(old, new)
        assert decoded(kernel, delta, old) == new
    assert len(delta) == size
    assert kernel.encode(old, changed(old, (0, size))) is None
    assert kernel.encode(old, old) == b""


@pytest.mark.parametrize(
    ("at", "count", "head"),
    [
        (127, 127, b"\x7f\x7f"),
        (128, 128, b"\x80\x01\x80\x01"),
        (16383, 1, b"\xff\x7f\x01"),
        (0, 16379, b"\x00\xfb\x7f"),
    ],
)
def test_run_length_boundaries(kernel, at, count, head):
    old = bytes(16384)
    new = changed(old, (at, count))
    assert kernel.encode(old, new) == head + new[at : at + count]
    assert decoded(kernel, head + new[at : at + count], old) == new


def test_one_byte_page_always_overflows(kernel):
    assert kernel.encode(b"a", b"b") is None
    assert kernel.encode(b"a", b"b", True) is None
    assert kernel.encode(b"a", b"a") == b""
    assert kernel.encode(b"aa", b"aa") == b""


# ---------------------------------------------------------------- merged


def spots(size: int, *at: int) -> tuple[bytes, bytes]:
    """A page, and the same with these bytes changed."""
    return bytes(size), changed(bytes(size), *[(i, 1) for i in at])


@pytest.mark.parametrize(
    ("at", "delta"),
    [
        # a gap of one is closed, one of three is not
        ((10, 12), "0a 03 550055"),
        ((10, 14), "0a0155 030155"),
        # of two too, as it saves a run; not where it crosses a word of 64 bytes
        ((10, 13), "0a 04 55000055"),
        ((61, 64), "3d 04 55000055"),
        ((62, 65), "3e0155 020155"),
        ((63, 66), "3f 04 55000055"),
        ((60, 63), "3c 04 55000055"),
        # a gap of one is closed wherever it lies
        ((62, 64), "3e 03 550055"),
        ((63, 65), "3f 03 550055"),
        # what has been closed counts as changed for its neighbours
        ((10, 12, 15, 18), "0a 09 550055000055000055"),
        # at either end of the page
        ((0, 2, 5), "00 06 550055000055"),
        ((1021, 1023), "fd07 03 550055"),
        ((1020, 1023), "fc07 04 55000055"),
    ],
)
def test_merge_closes_short_gaps(kernel, at, delta):
    old, new = spots(1024, *at)
    assert kernel.encode(old, new, True) == bytes.fromhex(delta)
    assert decoded(kernel, bytes.fromhex(delta), old) == new


def test_merge_keeps_gaps_of_two_in_dense_pages(kernel):
    """There they could make a run of 128 bytes and more, whose length takes a byte more."""
    for count, lengths in [(20, [58]), (21, [1] * 21)]:
        old, new = spots(256, *range(64, 64 + 3 * count, 3))
        expected, at = b"", 0
        for i, length in enumerate(lengths):
            start = 64 + 3 * i
            expected += bytes([start - at, length]) + new[start : start + length]
            at = start + length
        assert (kernel.encode(old, new, True) == expected) == (count == 20), count
        assert len(kernel.encode(old, new, True)) <= len(kernel.encode(old, new))
    for neighbour in (0, 128):  # of which one side is enough
        dense = range(neighbour, neighbour + 42, 2)
        old, new = spots(256, *sorted([*dense, 90, 93]))
        assert b"\x01\x55\x02\x01\x55" in kernel.encode(old, new, True)
        old, new = spots(256, *sorted([*dense[1:], 90, 93]))
        assert b"\x04\x55\0\0\x55" in kernel.encode(old, new, True)


def test_merged_delta_overflows_only_if_longer_than_the_page(kernel):
    old = bytes(1024)
    for end, fits in [(1020, True), (1022, False)]:  # every other byte, up to this one
        new = changed(old, *[(i, 1) for i in range(0, end + 1, 2)])
        assert kernel.encode(old, new) is None
        delta = kernel.encode(old, new, True)
        assert delta == (b"\x00\xfd\x07" + new[:1021] if fits else None)
    for equal in range(6):  # at the end, where the canonical delta wants room that it does not use
        new = changed(old, (0, 1024 - equal))
        delta = kernel.encode(old, new, True)
        assert (delta is None) == (equal < 3)
        assert (kernel.encode(old, new) is None) == (equal < 5)


# ---------------------------------------------------------------- many pages at once


def many(pairs: list[tuple[bytes, bytes]], kernel, merge: bool) -> tuple[bytes, list[int]]:
    size = len(pairs[0][0]) if pairs else 1024
    out = bytearray(b"\xee" * ((len(pairs) + 1) * size + 32))
    lengths = array("i", [77] * len(pairs))
    old, new = (b"".join(side) for side in zip(*pairs, strict=True)) if pairs else (b"", b"")
    used = kernel.encode_pages(old, new, size, out, lengths, merge)
    return bytes(out[:used]), list(lengths)


@pytest.mark.parametrize("merge", [False, True])
def test_encode_pages_equals_encode(kernel, merge):
    noise = random.Random(4)
    for size in (1, 8, 100, 1024, 4096, 16384):
        pairs = []
        for _ in range(9):
            old = noise.randbytes(size)
            runs = [(noise.randrange(size), 1) for _ in range(noise.choice([0, 1, 9, 50, 5000]))]
            pairs.append((old, changed(old, *runs)))
        deltas = [kernel.encode(old, new, merge) for old, new in pairs]
        data, lengths = many(pairs, kernel, merge)
        assert data == b"".join(delta or b"" for delta in deltas)
        assert lengths == [-1 if delta is None else len(delta) for delta in deltas]
        pages = bytearray().join(old for old, _ in pairs)
        kernel.decode_pages(data, array("i", lengths), pages, size)
        for i, ((old, new), delta) in enumerate(zip(pairs, deltas, strict=True)):
            assert pages[i * size : (i + 1) * size] == (old if delta is None else new)


def test_encode_and_decode_no_pages(kernel):
    assert many([], kernel, False) == (b"", [])
    kernel.decode_pages(b"", array("i"), bytearray(), 1024)


def test_overflowing_page_takes_no_room(kernel):
    """The room is for as many pages of deltas; each one more may be measured once it is written."""
    full, one = (bytes(64), b"\1" * 64), (bytes(64), b"\1" + bytes(63))
    longest = (bytes(64), bytes(3) + b"\1" * 61)
    assert many([full, one, full, one], kernel, False) == (b"\0\1\1" * 2, [-1, 3, -1, 3])
    data, lengths = many([longest] * 5, kernel, False)
    assert lengths == [63] * 5
    assert data == (b"\3\x3d" + b"\1" * 61) * 5


def test_encode_pages_and_decode_pages_refuse_sizes(kernel):
    page, lengths = bytes(1024), array("i", [0])
    room = bytearray(2 * 1024 + 32)
    for size in (0, 16385):
        with pytest.raises(ValueError, match="it must have 1 to 16384"):
            kernel.encode_pages(page, page, size, room, lengths)
    for old, new in [(page, bytes(2048)), (bytes(2048), page), (b"", b""), (bytes(1023),) * 2]:
        with pytest.raises(ValueError, match="bytes are not 1 pages of 1024"):
            kernel.encode_pages(old, new, 1024, room, lengths)
    with pytest.raises(ValueError, match="2079 bytes of room: 1 deltas can need up to 2080"):
        kernel.encode_pages(page, page, 1024, room[:-1], lengths)
    for pages, size in [(bytearray(1023), 1024), (bytearray(2048), 1024), (bytearray(), 0)]:
        with pytest.raises(ValueError, match="bytes are not 1 pages of"):
            kernel.decode_pages(b"", lengths, pages, size)


@pytest.mark.parametrize(
    ("deltas", "lengths", "message"),
    [
        (b"\0\1a" + b"\0\1b\0\1c", [3, 6, 3], "page 1: .*: an empty zero run inside a delta"),
        (b"\0\1a" + b"\0\1", [3, 3, 0], "page 1: .*: the data ends inside a record"),
        (b"\0\1a", [3, 2**31 - 1, 0], "page 1: .*: the data ends inside a record"),
    ],
)
def test_decode_pages_stops_at_the_first_bad_delta(kernel, deltas, lengths, message):
    """Those before it have changed; it and those after it are as they were."""
    pages = bytearray(3 * 1024)
    with pytest.raises(DecodeError, match=message):
        kernel.decode_pages(deltas, array("i", lengths), pages, 1024)
    assert pages == b"a" + bytes(3 * 1024 - 1)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("old", "new"), [(b"", b""), (b"a", b"ab"), (bytes(16385), bytes(16385)), (b"ab", b"")]
)
def test_encode_refuses_sizes(kernel, old, new):
    with pytest.raises(ValueError, match="equally long, 1 to 16384"):
        kernel.encode(old, new)


@pytest.mark.parametrize("size", [0, 16385])
def test_decode_refuses_sizes(kernel, size):
    with pytest.raises(ValueError, match="it must have 1 to 16384"):
        kernel.decode(b"\0\1a", bytearray(size))


BAD = {
    "one byte": ("00", "the data ends inside a record"),
    "no second length": ("0001aa 01", "the data ends inside a record"),
    "long equal run, then nothing": ("8001", "the data ends inside a record"),
    "three-byte length": ("808001 01aa", "a length does not end where it must"),
    "three-byte count": ("00 818000 aa", "a length does not end where it must"),
    "empty second equal run": ("0001aa 0001bb", "an empty zero run inside a delta"),
    "padded empty second equal run": ("0001aa 800001bb", "an empty zero run inside a delta"),
    "equal run past the page": ("8120 01aa", "a run goes past the end of the page"),
    "new run past the page": ("ff1f 02aaaa", "a run goes past the end of the page"),
    "new run at the end of the page": ("8020 01aa", "a run goes past the end of the page"),
    "no new bytes": ("000000", "an empty non-zero run"),
    "new run past the delta": ("0003aabb", "a non-zero run goes past the end of the delta"),
    "half a count": ("05 81", "the data ends inside a record"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_delta_leaves_the_page(kernel, name):
    """A good run before the bad one is undone, too."""
    text, message = BAD[name]
    bad = bytes.fromhex(text)
    page = bytearray(b"\x11" * PAGE)
    with pytest.raises(DecodeError, match=f"^bad XBZRLE delta: {message}$"):
        kernel.decode(bad, page)
    assert page == b"\x11" * PAGE


@pytest.mark.parametrize(
    ("text", "at", "content"),
    [
        ("8000 01aa", 0, b"\xaa"),
        ("8500 8100aa", 5, b"\xaa"),
        ("0001aa 8100 01bb", 0, b"\xaa\x11\xbb"),
        ("ff1f 01aa", 4095, b"\xaa"),
    ],
)
def test_overlong_lengths_are_read(kernel, text, at, content):
    page = bytearray(b"\x11" * PAGE)
    kernel.decode(bytes.fromhex(text), page)
    expected = bytearray(b"\x11" * PAGE)
    expected[at : at + len(content)] = content
    assert page == expected


def test_empty_delta_changes_nothing(kernel):
    page = bytearray(b"\x11" * PAGE)
    kernel.decode(b"", page)
    assert page == b"\x11" * PAGE


# ---------------------------------------------------------------- twins


@st.composite
def versions(draw):
    """Two versions of a page: from a few bytes apart to nearly all, in runs of awkward lengths."""
    size = draw(st.sampled_from([*SIZES, 8, 63, 64, 65, 1000]))
    old = random.Random(draw(st.integers(0, 9))).randbytes(size)
    lengths = st.sampled_from([1, 1, 2, 3, 7, 8, 9, 63, 64, 65, 126, 127, 128, 129, 1000, 4091])
    new, at = bytearray(old), 0
    tail = draw(st.integers(0, 6))
    style = draw(st.sampled_from(["runs", "alternating", "dense", "shifted"]))
    if style == "alternating":
        step = draw(st.integers(2, 5))
        new[::step] = bytes(b ^ 1 for b in new[::step])
    elif style == "dense":
        lead = draw(st.integers(0, 4))
        new[lead : size - tail] = bytes(b ^ 0xFF for b in new[lead : size - tail])
    elif style == "shifted":
        new = new[1:] + new[:1]
    else:
        for equal, count in draw(st.lists(st.tuples(lengths, lengths), max_size=60)):
            at += equal - (at == 0 and tail == 0)
            for i in range(at, min(at + count, size)):
                new[i] ^= 0x80
            at += count
    return old, bytes(new)


@given(versions())
@example((bytes(16384), bytes(16383) + b"\1"))
@settings(max_examples=150, deadline=None)
def test_twins_agree_and_round_trip(pair):
    old, new = pair
    canonical, merged = (COMPILED.encode(old, new, merge) for merge in (False, True))
    for delta, merge in [(canonical, False), (merged, True)]:
        assert TWIN.encode(old, new, merge) == delta
        assert (delta == b"") == (old == new)
        if delta is not None:
            assert len(delta) <= len(old)
            for kernel in BOTH:
                assert decoded(kernel, delta, old) == new
    if canonical is not None:
        assert len(merged) <= len(canonical)


@given(st.binary(min_size=1, max_size=200), st.data())
@settings(max_examples=200, deadline=None)
def test_twins_agree_on_small_pages(old, data):
    new = data.draw(st.binary(min_size=len(old), max_size=len(old)))
    for merge in (False, True):
        assert COMPILED.encode(old, new, merge) == TWIN.encode(old, new, merge)


GUARD = b"\xc3" * 64


def guarded(kernel, delta: bytes, size: int) -> tuple[bytes, str]:
    """Decodes into a slice of a larger buffer: the page, and the error if there was one."""
    buffer = bytearray(GUARD + b"\x11" * size + GUARD)
    page, error = memoryview(buffer)[len(GUARD) : len(GUARD) + size], ""
    try:
        kernel.decode(delta, page)
    except DecodeError as fault:
        error = str(fault)
        assert page == b"\x11" * size
    assert buffer[: len(GUARD)] == GUARD
    assert buffer[-len(GUARD) :] == GUARD
    return bytes(page), error


runs = st.tuples(st.integers(0, 40), st.binary(max_size=20), st.booleans()).map(
    lambda run: (
        (bytes([run[0] | 0x80, 0]) if run[2] else bytes([run[0]])) + bytes([len(run[1])]) + run[1]
    )
)


@given(
    st.one_of(st.binary(max_size=300), st.lists(runs, max_size=12).map(b"".join)),
    st.sampled_from([1, 7, 64, 100, 1024]),
)
@settings(max_examples=500, deadline=None)
def test_decoder_survives_any_bytes(delta, size):
    """Nothing outside the page is written, the page is untouched on error, and twins agree."""
    assert guarded(COMPILED, delta, size) == guarded(TWIN, delta, size)


@given(versions(), st.data())
@settings(max_examples=100, deadline=None)
def test_decoder_survives_mutations(pair, data):
    old, new = pair
    delta = bytearray(COMPILED.encode(old, new) or b"\0\1a")
    for _ in range(data.draw(st.integers(1, 4))):
        delta[data.draw(st.integers(0, len(delta) - 1))] = data.draw(st.integers(0, 255))
    delta = bytes(delta[: data.draw(st.integers(0, len(delta)))])
    assert guarded(COMPILED, delta, len(old)) == guarded(TWIN, delta, len(old))
