"""The source's knowledge of the peer's copy, in plain Python: see _peer_copy.pyx."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from proto.codec._cache_twin import PageCache
from proto.codec._hashes_twin import PageHashes

if TYPE_CHECKING:
    from typing_extensions import Buffer


class PeerCopy:
    """The pages that the peer holds. PageEncoder keeps it up to date as it encodes pages.

    hashes -- keeps the hash of every page that is sent
    cache  -- of contents that the peer holds; None: there is none
    """

    def __init__(self, hashes: PageHashes, cache: PageCache | None = None) -> None:
        self.pages = hashes.pages
        self.page_size = hashes.page_size
        if cache is not None and cache.page_size != self.page_size:
            raise ValueError("the cache has pages of another size")
        if cache is not None and len(cache):
            raise ValueError("the cache holds pages of another migration")
        self._hashes = hashes
        self._cache = cache
        self._sent: set[int] = set()
        self._zeros: set[int] = set()
        self._zero_page = bytes(self.page_size)

    def adopt(self, first: int, table: Buffer) -> None:
        """Take over what the peer says it holds: the hashes of the pages from `first` on.

        table -- 8 bytes for each page, little-endian

        These pages count as sent. The cache drops the content of a page that has another hash than
        the peer says. Raises ValueError for pages outside the guest.
        """
        raw = bytes(table)
        if len(raw) % 8 or first + len(raw) // 8 > self.pages:
            raise ValueError(f"{len(raw)} bytes of hashes from page {first} on")
        for i in range(len(raw) // 8):
            page, value = first + i, int.from_bytes(raw[8 * i : 8 * i + 8], "little")
            self._hashes.note(page, value)
            self._sent.add(page)
            self._zeros.discard(page)
            if value == self._hashes.zero:
                self._zeros.add(page)
            if self._cache is None:
                continue
            cached = self._cache.get(page)
            if cached is not None and (
                value == self._hashes.zero or self._hashes.hash_of(cached) != value
            ):
                self._cache.drop(page)

    def adopt_zeros(self, first: int, count: int) -> None:
        """As `adopt`, for `count` pages that the peer holds as zeros."""
        if first + count > self.pages:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        self.adopt(first, self._hashes.zero.to_bytes(8, "little") * count)

    def forget(self) -> None:
        """Forget what the peer holds: every page is to be sent as in round 1."""
        self._sent.clear()
        self._zeros.clear()
        self._hashes.clear()
        for page in range(self.pages):
            if self._cache is not None:
                self._cache.drop(page)

    def _differs(self, page: int, content: bytes) -> bool:
        if page not in self._sent:
            return True
        if page in self._zeros:
            return content != self._zero_page
        cached = None if self._cache is None else self._cache.get(page)
        if cached is None:
            return self._hashes.is_stale(page) or not self._hashes.matches(page, content)
        if content == cached and self._hashes.is_stale(page):
            self._hashes.note(page, self._hashes.hash_of(content))
        return content != cached

    def scan(self, first: int, count: int, data: Buffer, changed: Buffer) -> int:
        """Set a bit in `changed` for each page in `data` that differs from the peer's.

        first, count -- the pages in `data`

        The result is exact for pages in the cache and for pages of zeros. Others are compared by
        their hash, which misses a change with a probability below 2^-62. A page that equals its
        cached content gets a new hash if that was stale. Returns how many pages differ.
        """
        content, bits = memoryview(data), memoryview(changed)
        if first + count > self.pages:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        if len(bits) * 8 < self.pages:
            raise ValueError("the data or the bitmap is too short")
        if len(content) < count * self.page_size:
            raise ValueError("the data is too short")
        found = 0
        for i in range(count):
            page = first + i
            if self._differs(page, bytes(content[i * self.page_size : (i + 1) * self.page_size])):
                bits[page >> 3] |= 1 << (page & 7)
                found += 1
        return found

    def scan_file(
        self, fd: int, size: int, first: int, count: int, changed: Buffer, buffer: Buffer
    ) -> int:
        """As `scan`, for pages of a file of `size` bytes, read with pread(2).

        buffer -- takes some pages at a time

        Behind the end of the file are zeros. Several threads may scan at once, each its own pages
        with a buffer of its own, as long as no other method of the encoder runs. Raises OSError if
        reading fails.
        """
        page_size = self.page_size
        step, found, end = len(memoryview(buffer)) // page_size, 0, first + count
        if end > self.pages:
            raise ValueError(f"pages {first} to {end} are outside the guest")
        if step == 0:
            raise ValueError("the buffer is shorter than a page")
        for page in range(first, end, step):
            some = min(step, end - page)
            want = min(some * page_size, max(size - page * page_size, 0))
            content = bytearray()
            while len(content) < want:
                read = os.pread(fd, want - len(content), page * page_size + len(content))
                if not read:
                    break
                content += read
            found += self.scan(page, some, content.ljust(some * page_size, b"\0"), changed)
        return found

    def scan_zeros(self, first: int, count: int, changed: Buffer) -> int:
        """As `scan`, for pages that are known to be zeros without reading them."""
        bits = memoryview(changed)
        if first + count > self.pages:
            raise ValueError(f"pages {first} to {first + count} are outside the guest")
        if len(bits) * 8 < self.pages:
            raise ValueError("the bitmap is too short")
        differing = [page for page in range(first, first + count) if page not in self._zeros]
        for page in differing:
            bits[page >> 3] |= 1 << (page & 7)
        return len(differing)
