"""Page hashes and the sum digest in plain Python: see _hashes.pyx for what they are for."""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING

import xxhash

from proto.codec._bitmaps_twin import bitmap
from proto.codec._xbzrle_twin import check_page_size

if TYPE_CHECKING:
    from typing_extensions import Buffer


class PageHashes:
    """The hash of every page as the destination holds it, at first that of zeros.

    table -- the hashes, 8 bytes each, little-endian
    stale -- a bit per page: a delta has changed it since its hash was computed
    """

    def __init__(self, pages: int, page_size: int, seed: bytes) -> None:
        check_page_size(page_size)
        if pages == 0:
            raise ValueError("no pages")
        self.pages = pages
        self.page_size = page_size
        words = page_size // 8
        key = hashlib.shake_256(seed).digest(page_size + 32)
        every = [int.from_bytes(key[i : i + 8], "little") for i in range(0, len(key), 8)]
        self._key, rest = every[:words], every[words:]
        self._fold = rest[0] | rest[1] << 64, rest[2] | rest[3] << 64
        self.zero = self.hash_of(bytes(page_size))
        self.table = bytearray(self.zero.to_bytes(8, "little")) * pages
        self.stale = bitmap(pages)

    def hash_of(self, content: bytes) -> int:
        """Return the hash of a page: NH over 64-bit words, then multiply-shift to 64 bits."""
        mask = 2**64 - 1
        data = memoryview(content).cast("Q")
        words = [(d + k) & mask for d, k in zip(data, self._key, strict=True)]
        sum_ = sum(a * b for a, b in zip(words[::2], words[1::2], strict=True)) % 2**128
        low, high = self._fold
        return (low * (sum_ & mask) + high * (sum_ >> 64)) % 2**128 >> 64

    def note(self, page: int, value: int) -> None:
        self.table[8 * page : 8 * page + 8] = value.to_bytes(8, "little")
        self.stale[page >> 3] &= ~(1 << (page & 7))

    def mark_stale(self, page: int) -> None:
        self.stale[page >> 3] |= 1 << (page & 7)

    def is_stale(self, page: int) -> bool:
        return bool(self.stale[page >> 3] >> (page & 7) & 1)

    def matches(self, page: int, content: bytes) -> bool:
        value = self.hash_of(content).to_bytes(8, "little")
        return self.table[8 * page : 8 * page + 8] == value

    def clear(self) -> None:
        """Make every hash that of zeros again."""
        self.table[:] = self.zero.to_bytes(8, "little") * self.pages
        self.stale[:] = bytes(len(self.stale))

    @property
    def sum(self) -> bytes:
        """The sum digest, 16 bytes big-endian (proto/README.md, "The digest")."""
        total = xxhash.xxh3_128_intdigest(struct.pack("<QQ", self.pages, self.zero))
        for page, (value,) in enumerate(struct.iter_unpack("<Q", self.table)):
            if value != self.zero:
                total += xxhash.xxh3_128_intdigest(struct.pack("<QQ", page, value))
        return (total % 2**128).to_bytes(16, "big")

    def part(self, first: int, count: int) -> bytearray:
        """Return the hashes of `count` pages from `first` on, 8 bytes each, little-endian."""
        if first + count > self.pages:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        return self.table[8 * first : 8 * (first + count)]

    def nonzero_part(self, first: int, most: int) -> tuple[int, bytes]:
        """Return the next hashes that are not that of zeros, as (their first page, the hashes).

        first -- looks at this page and those behind it
        most  -- looks at this many pages from the first such page on

        The hashes go as far as the last page of those with another hash than that of zeros. At
        the end of the guest it returns (pages, b"").
        """
        zero = self.zero.to_bytes(8, "little")
        filled = [
            page for page in range(first, self.pages)
            if self.table[8 * page : 8 * page + 8] != zero
        ]  # fmt: skip
        if not filled or not most:
            return self.pages, b""
        start = filled[0]
        end = max(page for page in filled if page < start + most) + 1
        return start, bytes(self.part(start, end - start))

    def hash_pages(self, numbers: Buffer, count: int, content: Buffer) -> None:
        """Hash `count` pages, whose numbers and content are given; they are stale no more."""
        wanted, data, size = memoryview(numbers), memoryview(content), self.page_size
        if not 0 <= count <= len(wanted) or len(data) < count * size:
            raise ValueError("there are fewer pages than that")
        for i in range(count):
            if wanted[i] >= self.pages:
                raise ValueError(f"page {wanted[i]} is outside the guest")
        for i in range(count):
            self.note(wanted[i], self.hash_of(bytes(data[i * size : (i + 1) * size])))
