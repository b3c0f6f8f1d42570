"""The page cache of a source, whose size may be changed while it is in use."""

from __future__ import annotations

from migrate.policy.parameters import DEFAULT_CACHE_MAX
from migrate.runtime.machine_memory import available_memory
from migrate.units import option_size
from proto.codec.kernel import PageCache

LEAST_CACHE_MAX = 1 << 20


def default_cache_max() -> int:
    """Return the bound, in bytes, for a cache whose bound the user has not set.

    It is 1 GiB, or a power of two up to a quarter of the free memory if that is less.
    """
    free = available_memory()
    if not free:
        return DEFAULT_CACHE_MAX
    return min(DEFAULT_CACHE_MAX, max(1 << (free // 4).bit_length() >> 1, LEAST_CACHE_MAX))


class SizedCache:
    """A page cache with a size in force, and a size to change to. Sizes are in bytes.

    The event loop sets `wanted`; the worker thread, which uses the pages, resizes between batches.

    whole  -- the size of the guest: a cache larger than the guest takes no more memory than it
    pages  -- None before the cache is open, and without deltas
    size   -- in force; the destination is told this one
    wanted -- from the next batch on
    fixed  -- a user has asked for a size, so `--cache-size auto` no longer changes it
    """

    def __init__(self, whole: int, page_size: int, size: int) -> None:
        self.pages: PageCache | None = None
        self.size = 0
        self.wanted = size
        self.fixed = False
        self._page_size = page_size
        self._most = max(1 << (whole - 1).bit_length(), page_size)
        self._refused = 0
        self._closed = False

    @property
    def evictions(self) -> int:
        return self.pages.evictions if self.pages is not None else 0

    def useful(self, size: int) -> int:
        """Return the part of `size` that this guest can fill.

        The cache is fully associative, so a cache of the guest's size holds all of its pages.
        """
        return min(size, self._most)

    def open(self, *, deltas: bool) -> PageCache | None:
        """Return a cache of the wanted size; None without deltas."""
        if not deltas:
            self._closed, self.wanted = True, 0
            return None
        self.size = self.wanted
        self.pages = PageCache(self.useful(self.size), self._page_size)
        return self.pages

    def ask(self, size: int) -> str:
        """Have another size from the next batch on. Return why that cannot be, or "".

        Pages that fit the new size stay in the cache.
        """
        if size < self._page_size or size & (size - 1):
            return f"a cache size of {size} bytes cannot be used: powers of two only"
        if self._closed:
            return "xbzrle is off: there is no cache to have another size"
        self.wanted, self.fixed = size, True
        return ""

    def resize(self) -> None:
        """Change to the wanted size, if there is memory for it. Runs in the worker thread."""
        if self.pages is not None and self.wanted != self.size:
            try:
                self.pages.resize(self.useful(self.wanted))
                self.size = self.wanted
            except MemoryError:
                self._refused, self.wanted, self.fixed = self.wanted, self.size, True

    def refusal(self) -> str:
        """Return, once, that there was no memory for a wanted size; else ""."""
        refused, self._refused = self._refused, 0
        if not refused:
            return ""
        return (
            f"there is no memory for a cache of {option_size(refused)}: it stays "
            f"{option_size(self.size)}"
        )
