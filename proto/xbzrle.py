"""XBZRLE: the difference between two versions of a page, as runs of equal and of new bytes.

    delta = (equal, count, bytes)+

`equal` is how many bytes stay as they are, `count` how many new ones follow; both are ULEB128 of
one or two bytes. The new bytes are sent as they are, not XORed; the equal bytes at the end of the
page are not sent at all. The format is that of QEMU's docs/xbzrle.txt, and since every run is as
long as it can be, there is one canonical delta for a pair of pages: the same bytes as QEMU's.

Knows nothing of caches, page numbers or records.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proto import kernel

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["decode", "decode_pages", "encode", "encode_pages"]


def encode(old: Buffer, new: Buffer, merge: bool = False) -> bytes | None:
    """The delta that turns `old` into `new`: the canonical one, or a merged one.

    old, new -- two versions of a page: equally long, 1 to 16384 bytes
    merge    -- short gaps of equal bytes between two runs are sent as if they had changed: those
                of one byte, and of two where few bytes around have changed. The delta is never
                longer than the canonical one, any decoder takes it, and where changes lie close
                together it is shorter and both sides are faster.

    Returns b"" for identical pages, and None on overflow: where the delta does not fit as many
    bytes as the page has, so that the page itself is the better message. A delta of exactly a
    page fits. Room for two bytes is asked before each length, even for one that turns out to be
    the unsent end of the page: that is QEMU's test, and it decides which pages overflow (4 equal
    bytes at the end of a page of 4096 that is otherwise new overflow, 5 do not; a page of one
    byte that changed always does). A merged delta overflows only where it is longer than the page.

    Raises ValueError for pages of two lengths, or of one out of range.
    """
    return kernel.encode(old, new, merge)


def encode_pages(
    old: Buffer, new: Buffer, page_size: int, out: Buffer, lengths: Buffer, merge: bool = False
) -> int:
    """Encodes many pages in one call, without the GIL.

    old, new -- as many pages as `lengths` has entries, one after the other
    out      -- takes the deltas, one after the other: (pages + 1) * page_size + 32 bytes
    lengths  -- 32-bit integers (array("i"), a NumPy int32 array): takes what `encode` gives for
                each page, the length of its delta, 0 for identical pages, -1 on overflow

    Returns how many bytes of `out` the deltas take. Raises ValueError for sizes that do not fit.
    """
    return kernel.encode_pages(old, new, page_size, out, lengths, merge)


def decode(delta: Buffer, page: Buffer) -> None:
    """Applies `delta` to `page` in place.

    delta -- any valid delta, not only a canonical one: run lengths may be padded to two bytes
             (`80 00` is 0) and a run may be cut in two as long as no run but the first is empty
    page  -- the version that the delta was made from, writable, 1 to 16384 bytes

    An empty delta changes nothing. The delta carries no check of its base: on another page than
    its own it gives garbage, never an error.

    Raises DecodeError for a delta that is not well-formed or leaves the page, ValueError for a
    page out of range. Either way the page is as it was: the delta is checked whole before the
    first byte is written (QEMU's decoder writes as it goes).
    """
    kernel.decode(delta, page)


def decode_pages(deltas: Buffer, lengths: Buffer, pages: Buffer, page_size: int) -> None:
    """Applies what `encode_pages` gave to the old pages, in place, without the GIL.

    Raises DecodeError, naming the page, at the first bad delta: the pages before it have changed,
    it and those after it are as they were. Raises ValueError for sizes that do not fit.
    """
    kernel.decode_pages(deltas, lengths, pages, page_size)
