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

__all__ = ["decode", "encode"]


def encode(old: Buffer, new: Buffer) -> bytes | None:
    """The canonical delta that turns `old` into `new`.

    old, new -- two versions of a page: equally long, 1 to 16384 bytes

    Returns b"" for identical pages, and None on overflow: where the delta does not fit as many
    bytes as the page has, so that the page itself is the better message. A delta of exactly a
    page fits. Room for two bytes is asked before each length, even for one that turns out to be
    the unsent end of the page: that is QEMU's test, and it decides which pages overflow (4 equal
    bytes at the end of a page of 4096 that is otherwise new overflow, 5 do not; a page of one
    byte always does).

    Raises ValueError for pages of two lengths, or of one out of range.
    """
    return kernel.encode(old, new)


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
