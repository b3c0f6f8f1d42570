"""The digest of a whole memory, from the hashes of its pages.

    by_sum      the sum that PageHashes keeps up to date: it takes no time to compute
    otherwise   XXH3-128 of all page hashes, 8 bytes each, little-endian, in order, for a peer
                without the capability `sparse`: 0.2 s at 1 TiB

Both sides hash a page that is sent whole or as zeros as it passes. A page that a delta has changed
is `stale`: it is hashed from memory once the guest has stopped changing it. So the pause pays only
for what the last round touched, not for the size of the guest.
"""

from __future__ import annotations

import time
from array import array

import xxhash

from migrate.memory.memory import Memory, private_buffer
from proto.codec.kernel import PageHashes, count_bits

SETTLE_BYTES = 256 << 10
# Hashes that are read together: 512 KiB, which stay in the core's own cache.
PART = 1 << 16


class Digest:
    """The digest of one memory, and the cost of keeping its page hashes up to date.

    by_sum        -- as agreed with the peer
    seconds       -- spent hashing stale pages, in total
    hashed        -- stale pages hashed, in total
    whole_seconds -- what the last `rehearse` took
    """

    def __init__(self, memory: Memory, hashes: PageHashes, *, by_sum: bool = False) -> None:
        self.by_sum = by_sum
        self.seconds = 0.0
        self.hashed = 0
        self.whole_seconds = 0.0
        self._memory = memory
        self._hashes = hashes
        self._buffer = private_buffer(SETTLE_BYTES)
        self._numbers = memoryview(array("Q", bytes(8 * (SETTLE_BYTES // hashes.page_size))))

    def stale(self, beside: bytes | bytearray | memoryview = b"") -> int:
        """Return how many pages are stale, or in the bitmap `beside`."""
        return count_bits(self._hashes.stale, beside)

    def rehearse(self, beside: memoryview) -> int:
        """Measure what `digest` costs if no page is stale; return `stale(beside)`.

        That is to look for stale pages in the whole guest, and to read all hashes.
        """
        began = time.perf_counter()
        stale = self.stale(beside)
        self._whole()
        self.whole_seconds = time.perf_counter() - began
        return stale

    def settle(self, but: bytes | bytearray | memoryview = b"") -> int:
        """Hash all stale pages from memory, except those in the bitmap `but`; return how many."""
        began = time.perf_counter()
        hashes, hashed, page = self._hashes, 0, 0
        while page < hashes.pages:
            count, page = self._memory.gather(
                hashes.stale, page, hashes.pages, hashes.page_size, self._buffer, self._numbers, but
            )
            hashes.hash_pages(self._numbers, count, self._buffer)
            hashed += count
        self.seconds += time.perf_counter() - began
        self.hashed += hashed
        return hashed

    def digest(self) -> bytes:
        """Hash what is stale, and return the digest of the whole memory."""
        self.settle()
        return self._whole()

    def _whole(self) -> bytes:
        hashes = self._hashes
        if self.by_sum:
            return hashes.sum
        state = xxhash.xxh3_128()
        for first in range(0, hashes.pages, PART):
            state.update(hashes.part(first, min(PART, hashes.pages - first)))
        return state.digest()
