"""XBZRLE: the difference between two versions of a page, as runs of equal and of new bytes.

    delta = (equal, count, bytes)+

`equal` bytes stay as they are, then `count` new ones follow; both numbers are ULEB128 of one or two
bytes. The new bytes are sent as they are, not XORed. The equal bytes at the end of the page are not
sent at all. The format is that of QEMU's docs/xbzrle.txt. Since every run is as long as it can be,
a pair of pages has one canonical delta: the same bytes as QEMU's.

This module does not know caches, page numbers or records.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proto.codec import kernel

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["decode", "decode_pages", "encode", "encode_pages"]


def encode(old: Buffer, new: Buffer, merge: bool = False) -> bytes | None:
    """Return the delta that turns `old` into `new`: the canonical one, or a merged one.

    old, new -- two versions of a page: equally long, 1 to 16384 bytes
    merge    -- send short gaps of equal bytes between two runs as if they had changed: gaps of one
                byte, and of two if few bytes around them have changed. The delta is never longer
                than the canonical one, and any decoder accepts it. If changes are close together,
                it is shorter and both sides are faster.

    Returns b"" for identical pages, and None on overflow: if the delta does not fit into as many
    bytes as the page has, the page itself is the better message. A delta of exactly a page fits.
    The encoder wants room for two bytes before each length, even before that of the equal bytes at
    the end of the page, which is never sent. That is QEMU's test, and it decides which pages
    overflow: a page of 4096 bytes that is new except for the last 4 overflows, with the last 5
    equal it does not, and a page of one byte that changed always does. A merged delta overflows
    only if it is longer than the page.

    Raises ValueError for pages of different lengths, or of a length out of range.
    """
    return kernel.encode(old, new, merge)


def encode_pages(
    old: Buffer, new: Buffer, page_size: int, out: Buffer, lengths: Buffer, merge: bool = False
) -> int:
    """Encode many pages in one call, without the GIL.

    old, new -- as many pages as `lengths` has entries, one after the other
    out      -- takes the deltas, one after the other: (pages + 1) * page_size + 32 bytes
    lengths  -- 32-bit integers (array("i"), a NumPy int32 array): takes for each page the length
                of its delta, 0 for identical pages, -1 on overflow

    Returns how many bytes of `out` the deltas take. Raises ValueError for sizes that do not fit.
    """
    return kernel.encode_pages(old, new, page_size, out, lengths, merge)


def decode(delta: Buffer, page: Buffer) -> None:
    """Apply `delta` to `page` in place.

    delta -- any valid delta, not only a canonical one: lengths may be padded to two bytes (`80 00`
             is 0), and a run may be cut in two as long as no run but the first equal one is empty
    page  -- the version that the delta was made from, writable, 1 to 16384 bytes

    An empty delta changes nothing. A delta has no check of its base: applied to another page it
    gives garbage, never an error.

    Raises DecodeError for a delta that is not well-formed or leaves the page, and ValueError for a
    page of a length out of range. Either way the page is as it was. (QEMU's decoder writes as it
    reads.)
    """
    kernel.decode(delta, page)


def decode_pages(deltas: Buffer, lengths: Buffer, pages: Buffer, page_size: int) -> None:
    """Apply what `encode_pages` gave to the old pages, in place, without the GIL.

    Raises DecodeError, which names the page, at the first bad delta: the pages before it have
    changed; that page and those after it are as they were. Raises ValueError for sizes that do not
    fit.
    """
    kernel.decode_pages(deltas, lengths, pages, page_size)
