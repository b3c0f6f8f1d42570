"""The digest of a whole memory, from the hashes of its pages.

    digest = XXH3-128 of all page hashes, 8 bytes each, little-endian, in order

A page that is sent whole or as zeros is hashed on its way, on either side. One that a delta has
changed is `stale`: it is hashed from memory when it has come to rest, so that the pause pays only
for what the last round touched, not for the size of the guest.
"""

from __future__ import annotations

import time
from array import array

import xxhash

from migrate.memory import Memory, private_buffer
from proto.kernel import PageHashes

SETTLE_BYTES = 256 << 10


class Digest:
    """Brings the hashes of one memory up to date; `seconds` and `hashed` (pages) tell the cost."""

    def __init__(self, memory: Memory, hashes: PageHashes) -> None:
        self.seconds = 0.0
        self.hashed = 0
        self._memory = memory
        self._hashes = hashes
        self._buffer = private_buffer(SETTLE_BYTES)
        self._numbers = memoryview(array("Q", bytes(8 * (SETTLE_BYTES // hashes.page_size))))

    def stale(self, beside: bytes | bytearray = b"") -> int:
        """How many pages are stale, or in the bitmap `beside`."""
        stale = int.from_bytes(self._hashes.stale, "little")
        return (stale | int.from_bytes(beside, "little")).bit_count()

    def settle(self, but: bytes | bytearray = b"") -> int:
        """Hashes all stale pages but those in a bitmap, from memory; how many it hashed."""
        began = time.perf_counter()
        hashes, hashed, page = self._hashes, 0, 0
        todo = int.from_bytes(hashes.stale, "little") & ~int.from_bytes(but, "little")
        bits = todo.to_bytes(len(hashes.stale), "little")
        while todo and page < hashes.pages:
            count, page = self._memory.gather(
                bits, page, hashes.pages, hashes.page_size, self._buffer, self._numbers
            )
            hashes.note_pages(self._numbers, count, self._buffer)
            hashed += count
        self.seconds += time.perf_counter() - began
        self.hashed += hashed
        return hashed

    def digest(self) -> bytes:
        """The digest of the whole memory; hashes what is stale first."""
        self.settle()
        return xxhash.xxh3_128_digest(self._hashes.table)
