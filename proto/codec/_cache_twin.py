"""The page cache in plain Python: see _cache.pyx for what it does and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from proto.codec._xbzrle_twin import check_page_size
from proto.wire.errors import CacheSizeError

if TYPE_CHECKING:
    from typing_extensions import Buffer

LIFETIME = 2  # rounds
PROBES = 16
MOST_ENTRIES = 1 << 31


def has_bit(bits: bytes, i: int) -> bool:
    return i < len(bits) * 8 and bool(bits[i >> 3] >> (i & 7) & 1)


@dataclass
class Entry:
    page: int
    content: bytes
    age: int  # round of its last use
    reused: bool  # since it came in


class PageCache:
    """Old contents of pages, by page number; each equals what the peer holds.

    An entry stays in its slot. A clock hand moves over the slots to find one to evict.
    """

    def __init__(self, size: int, page_size: int) -> None:
        self.page_size = page_size
        self.capacity = self._entries_for(size)
        self.evictions = 0
        self._slots: list[Entry | None] = [None] * self.capacity
        self._index: dict[int, int] = {}  # page -> slot
        self._spare = list(reversed(range(self.capacity)))  # stack of free slots
        self._hand = 0

    def _entries_for(self, size: int) -> int:
        check_page_size(self.page_size)
        if size < self.page_size or size & (size - 1):
            raise CacheSizeError(
                f"a cache of {size} bytes: the size must be a power of two and at least one page "
                f"({self.page_size} bytes)"
            )
        if size // self.page_size >= MOST_ENTRIES:
            raise CacheSizeError(
                f"a cache of {size} bytes: more than {MOST_ENTRIES} pages cannot be indexed"
            )
        return size // self.page_size

    @property
    def size(self) -> int:
        return self.capacity * self.page_size

    def __len__(self) -> int:
        return len(self._index)

    def entry(self, page: int) -> Entry | None:
        slot = self._index.get(page)
        return None if slot is None else self._slots[slot]

    def _victim(self, now: int, dirty: bytes) -> tuple[int, Entry] | None:
        """Return a slot that may be evicted, and its entry. None: the newcomer is refused."""
        for _ in range(min(PROBES, self.capacity)):
            slot = self._hand
            self._hand = (self._hand + 1) % self.capacity
            entry = self._slots[slot]
            if entry is None or has_bit(dirty, entry.page):
                continue
            if entry.age + (LIFETIME if entry.reused else 1) <= now:
                return slot, entry
        return None

    def insert(self, page: int, content: bytes, now: int, dirty: bytes) -> bool:
        """Enter a page that is not in the cache. Return False if it was refused.

        From round 2 on a page counts as reused at once: it is sent because it was written.
        """
        if self._spare:
            slot = self._spare.pop()
        else:
            victim = self._victim(now, dirty)
            if victim is None:
                return False
            slot, evicted = victim
            del self._index[evicted.page]
            self.evictions += 1
        self._slots[slot] = Entry(page, content, now, reused=now > 1)
        self._index[page] = slot
        return True

    def get(self, page: int) -> bytes | None:
        """Return the cached content of a page, or None."""
        entry = self.entry(page)
        return None if entry is None else entry.content

    def put(self, page: int, content: Buffer, now: int, dirty: Buffer = b"") -> bool:
        """Cache `content` as of round `now`. Return False if the page was refused.

        dirty -- the dirty bitmap of the round: its pages are not evicted
        """
        content = bytes(content)
        if len(content) != self.page_size:
            raise ValueError(f"a page has {self.page_size} bytes, not {len(content)}")
        entry = self.entry(page)
        if entry is None:
            return self.insert(page, content, now, bytes(dirty))
        entry.content, entry.age, entry.reused = content, now, True
        return True

    def drop(self, page: int) -> None:
        """Forget a page. Nothing happens if it is not cached."""
        slot = self._index.pop(page, None)
        if slot is not None:
            self._slots[slot] = None
            self._spare.append(slot)

    def clear(self) -> None:
        """Forget all pages."""
        self._slots = [None] * self.capacity
        self._index.clear()
        self._spare = list(reversed(range(self.capacity)))
        self._hand = 0

    def resize(self, size: int) -> None:
        """Change the capacity. Every entry that still fits is kept, the newest first.

        Raises CacheSizeError for a size that breaks the rule; nothing has changed then.
        """
        capacity = self._entries_for(size)
        if capacity == self.capacity:
            return
        # newest age first, then the lower slot
        order = sorted(
            (-entry.age, slot, entry) for slot, entry in enumerate(self._slots) if entry is not None
        )
        slots: list[Entry | None] = [None] * capacity
        for _, slot, entry in order[:capacity]:  # those whose slot stays
            if slot < capacity:
                slots[slot] = entry
        for _, slot, entry in order[:capacity]:  # those that must move down
            if slot >= capacity:
                slots[slots.index(None)] = entry
        self._slots = slots
        self._index = {entry.page: slot for slot, entry in enumerate(slots) if entry is not None}
        self._spare = [slot for slot in reversed(range(capacity)) if slots[slot] is None]
        self._hand = 0
        self.capacity = capacity
