"""The digest of a whole memory, from the hashes of its pages.

    by_sum   the sum that PageHashes keeps up to date: asking for it takes no time
    else     XXH3-128 of all page hashes, 8 bytes each, little-endian, in order, for a peer that
             lacks the capability `sparse`: 0.2 s at 1 TiB

A page that is sent whole or as zeros is hashed on its way, on either side. One that a delta has
changed is `stale`: it is hashed from memory when it has come to rest, so that the pause pays only
for what the last round touched, not for the size of the guest.
"""

from __future__ import annotations

import time
from array import array

import xxhash

from migrate.memory import Memory, private_buffer
from proto.kernel import PageHashes, count_bits

SETTLE_BYTES = 256 << 10
# Hashes that are looked at together: 512 KiB, which stay in the core's own cache.
PART = 1 << 16


class Digest:
    """Brings the hashes of one memory up to date; `seconds` and `hashed` (pages) tell the cost.

    by_sum        -- as agreed with the peer
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
        """How many pages are stale, or in the bitmap `beside`."""
        return count_bits(self._hashes.stale, beside)

    def rehearse(self, beside: memoryview) -> int:
        """Do, and time, what `digest` does whether any page is stale or not: look for stale pages
        in the whole guest, and look at all hashes. Returns `stale(beside)`."""
        began = time.perf_counter()
        stale = self.stale(beside)
        self._whole()
        self.whole_seconds = time.perf_counter() - began
        return stale

    def settle(self, but: bytes | bytearray | memoryview = b"") -> int:
        """Hashes all stale pages but those in a bitmap, from memory; how many it hashed."""
        began = time.perf_counter()
        hashes, hashed, page = self._hashes, 0, 0
        while page < hashes.pages:
            count, page = self._memory.gather(
                hashes.stale, page, hashes.pages, hashes.page_size, self._buffer, self._numbers, but
            )
            hashes.note_pages(self._numbers, count, self._buffer)
            hashed += count
        self.seconds += time.perf_counter() - began
        self.hashed += hashed
        return hashed

    def digest(self) -> bytes:
        """The digest of the whole memory; hashes what is stale first."""
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
