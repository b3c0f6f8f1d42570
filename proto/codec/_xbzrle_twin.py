"""XBZRLE in plain Python: what _xbzrle.pyx means, without how it is made fast.

A twin has the same names as its kernel, and gives the same bytes, counters and errors, a hundred
times slower. It is the oracle of the tests, and `XBMIGRATE_KERNEL=python` runs it for real. Where
the kernels have bitmaps, hash tables and pointers, the twins have sets, dicts and slices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proto.codec.faults import (
    BAD_LENGTH,
    EMPTY_RUN,
    PAST_DELTA,
    PAST_PAGE,
    SHORT,
    ZERO_RUN,
    FaultError,
)
from proto.wire.errors import DecodeError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MIN_PAGE_SIZE = 1024
MAX_PAGE_SIZE = 16384
WIDE = 32  # room that the kernel's wide stores need
WORD = 64  # merged deltas: gaps of two are looked at in pieces of this many bytes
DENSE = 21  # with fewer changed bytes, no piece can become all of them
SIMD = "none"


def check_page_size(size: int) -> None:
    """Raise ValueError for a page size that no guest can have."""
    if not MIN_PAGE_SIZE <= size <= MAX_PAGE_SIZE or size & (size - 1):
        raise ValueError(
            f"a page of {size} bytes: it must be a power of two from {MIN_PAGE_SIZE} to "
            f"{MAX_PAGE_SIZE}"
        )


# ---------------------------------------------------------------- ULEB128


def put_uleb(value: int) -> bytes:
    """Return a number as ULEB128, in as few bytes as possible."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def get_uleb(data: bytes, at: int, most: int) -> tuple[int, int]:
    """Read a number of at most `most` bytes. Return it and the position after it.

    Raises FaultError.
    """
    value = 0
    for n in range(most):
        if at + n >= len(data):
            raise FaultError(SHORT)
        byte = data[at + n]
        value |= (byte & 0x7F) << 7 * n
        if byte < 0x80:
            return value, at + n + 1
    raise FaultError(BAD_LENGTH)


# ---------------------------------------------------------------- one page


def runs_of(changed: list[bool]) -> list[tuple[int, int]]:
    """Return the runs of True, as (start, end)."""
    edges = [i for i, flag in enumerate(changed) if flag != (i > 0 and changed[i - 1])]
    if len(edges) % 2:
        edges.append(len(changed))
    return list(zip(edges[::2], edges[1::2], strict=True))


def merged(changed: list[bool]) -> list[bool]:
    """Close the gaps that are cheaper sent than skipped: see xb_filled in _diff.h."""
    size = len(changed)

    def at(flags: list[bool], i: int) -> bool:
        return 0 <= i < size and flags[i]

    one = [c or (at(changed, i - 1) and at(changed, i + 1)) for i, c in enumerate(changed)]
    result = list(one)
    for start in range(0, size, WORD):
        end = start + WORD
        if not any(changed[start:end]):
            continue
        both = one[start:end]
        for i in range(start, min(end, size) - 1):
            if not (one[i] or one[i + 1]) and at(one, i - 1) and at(one, i + 2):
                both[i - start] = both[i + 1 - start] = True
        around = sum(changed[max(start - WORD, 0) : start]), sum(changed[end : end + WORD])
        if not (len(both) == WORD and all(both)) and max(around) < DENSE:
            result[start:end] = both
    return result


def encode_page(old: bytes, new: bytes, merge: bool = False) -> bytes | None:
    """Return the delta, b"" for equal pages, None if it would not fit a page."""
    size = len(new)
    changed = [a != b for a, b in zip(old, new, strict=True)]
    runs = runs_of(merged(changed) if merge else changed)
    out = bytearray()
    at = 0
    for start, end in runs:
        if not merge and len(out) + 2 > size:
            return None
        out += put_uleb(start - at)
        if not merge and len(out) + 2 > size:
            return None
        out += put_uleb(end - start) + new[start:end]
        if len(out) > size:
            return None
        at = end
    if not merge and runs and at < size and len(out) + 2 > size:
        return None
    return bytes(out)


def delta_runs(delta: bytes, size: int) -> list[tuple[int, bytes]]:
    """Return the runs of a delta as (position in the page, new bytes), all inside the page.

    Raises FaultError.
    """
    runs = []
    i = at = 0
    while i < len(delta):
        if len(delta) - i < 2:
            raise FaultError(SHORT)
        equal, after = get_uleb(delta, i, 2)
        if i and equal == 0:
            raise FaultError(ZERO_RUN)
        i = after
        at += equal
        if at > size:
            raise FaultError(PAST_PAGE)
        if len(delta) - i < 2:
            raise FaultError(SHORT)
        count, i = get_uleb(delta, i, 2)
        if count == 0:
            raise FaultError(EMPTY_RUN)
        if at + count > size:
            raise FaultError(PAST_PAGE)
        if i + count > len(delta):
            raise FaultError(PAST_DELTA)
        runs.append((at, delta[i : i + count]))
        i += count
        at += count
    return runs


def encode(old: Buffer, new: Buffer, merge: bool = False) -> bytes | None:
    """Return the delta that turns `old` into `new`: see proto.xbzrle.encode."""
    old, new = bytes(old), bytes(new)
    if len(old) != len(new) or not 1 <= len(old) <= MAX_PAGE_SIZE:
        raise ValueError(
            f"pages of {len(old)} and {len(new)} bytes: they must be equally long, "
            f"1 to {MAX_PAGE_SIZE}"
        )
    return encode_page(old, new, merge)


def decode(delta: Buffer, page: Buffer) -> None:
    """Rewrite `page` in place: see proto.xbzrle.decode."""
    target = memoryview(page)
    if not 1 <= len(target) <= MAX_PAGE_SIZE:
        raise ValueError(f"a page of {len(target)} bytes: it must have 1 to {MAX_PAGE_SIZE}")
    try:
        runs = delta_runs(bytes(delta), len(target))
    except FaultError as fault:
        raise DecodeError(f"bad XBZRLE delta: {fault}") from None
    for at, content in runs:
        target[at : at + len(content)] = content


def encode_pages(
    old: Buffer, new: Buffer, page_size: int, out: Buffer, lengths: Buffer, merge: bool = False
) -> int:
    """Encode many pages in one call: see proto.xbzrle.encode_pages."""
    olds, news, room, sizes = bytes(old), bytes(new), memoryview(out), memoryview(lengths)
    pages = len(sizes)
    if not 1 <= page_size <= MAX_PAGE_SIZE:
        raise ValueError(f"a page of {page_size} bytes: it must have 1 to {MAX_PAGE_SIZE}")
    if not len(olds) == len(news) == pages * page_size:
        raise ValueError(f"{len(olds)} and {len(news)} bytes are not {pages} pages of {page_size}")
    if len(room) < (pages + 1) * page_size + WIDE:
        raise ValueError(
            f"{len(room)} bytes of room: {pages} deltas can need up to "
            f"{(pages + 1) * page_size + WIDE}"
        )
    done = 0
    for i in range(pages):
        page = slice(i * page_size, (i + 1) * page_size)
        delta = encode_page(olds[page], news[page], merge)
        sizes[i] = -1 if delta is None else len(delta)
        if delta:
            room[done : done + len(delta)] = delta
            done += len(delta)
    return done


def decode_pages(deltas: Buffer, lengths: Buffer, pages: Buffer, page_size: int) -> None:
    """Apply many deltas in one call: see proto.xbzrle.decode_pages."""
    data, sizes, target = memoryview(deltas), memoryview(lengths), memoryview(pages)
    if not 1 <= page_size <= MAX_PAGE_SIZE or len(target) != len(sizes) * page_size:
        raise ValueError(f"{len(target)} bytes are not {len(sizes)} pages of {page_size}")
    at = 0
    for i, length in enumerate(sizes):
        if length <= 0:
            continue
        try:
            if at + length > len(data):
                raise FaultError(SHORT)
            for place, run in delta_runs(bytes(data[at : at + length]), page_size):
                start = i * page_size + place
                target[start : start + len(run)] = run
        except FaultError as fault:
            raise DecodeError(f"page {i}: bad XBZRLE delta: {fault}") from None
        at += length
