"""The page cache of a source, whose size is asked for while it is in use."""

from __future__ import annotations

from migrate.available import available_memory
from migrate.parameters import DEFAULT_CACHE_MAX
from migrate.quantities import option_size
from proto.kernel import PageCache

LEAST_CACHE_MAX = 1 << 20


def default_cache_max() -> int:
    """The largest cache that nobody here has asked for: 1 GiB, or a quarter of what is free."""
    free = available_memory()
    if not free:
        return DEFAULT_CACHE_MAX
    return min(DEFAULT_CACHE_MAX, max(1 << (free // 4).bit_length() >> 1, LEAST_CACHE_MAX))


class SizedCache:
    """It has one size, and is to have another from the next batch on. Sizes are in bytes.

    whole -- the guest's: a cache of more than fits it takes no more memory
    """

    def __init__(self, whole: int, page_size: int, size: int) -> None:
        self.pages: PageCache | None = None
        """None before it is open, and where there are no deltas."""
        self.size = 0
        """In force, and what the destination is told."""
        self.wanted = size
        self.fixed = False
        """Somebody has asked, who knows better than whatever finds the size by itself."""
        self._page_size = page_size
        self._most = max(1 << (whole - 1).bit_length(), page_size)
        self._refused = 0
        self._closed = False

    @property
    def evictions(self) -> int:
        return self.pages.evictions if self.pages is not None else 0

    def useful(self, size: int) -> int:
        """What of a size this guest can fill: any pages fit together, so no more than it."""
        return min(size, self._most)

    def open(self, *, deltas: bool) -> PageCache | None:
        """With the size that is wanted; without deltas there is none, and none is wanted."""
        if not deltas:
            self._closed, self.wanted = True, 0
            return None
        self.size = self.wanted
        self.pages = PageCache(self.useful(self.size), self._page_size)
        return self.pages

    def ask(self, size: int) -> str:
        """From the next batch on, keeping what still fits; or a sentence why not."""
        if size < self._page_size or size & (size - 1):
            return f"a cache size of {size} bytes cannot be used: powers of two only"
        if self._closed:
            return "xbzrle is off: there is no cache to have another size"
        self.wanted, self.fixed = size, True
        return ""

    def resize(self) -> None:
        """In the thread that uses the pages: to what is wanted, if there is memory."""
        if self.pages is not None and self.wanted != self.size:
            try:
                self.pages.resize(self.useful(self.wanted))
                self.size = self.wanted
            except MemoryError:
                self._refused, self.wanted, self.fixed = self.wanted, self.size, True

    def refusal(self) -> str:
        """What has become of a size that there was no memory for: said once."""
        refused, self._refused = self._refused, 0
        if not refused:
            return ""
        return (
            f"there is no memory for a cache of {option_size(refused)}: it stays "
            f"{option_size(self.size)}"
        )
