"""Find the size of the page cache for `--cache-size auto`.

    working set + what the cache did in a round -> the size for the next round

The cache grows to what the working set needs as soon as a larger one would hit noticeably more, and
the hits would save enough to be worth the memory. It shrinks only after it has been far too large
for a long time, since a guest may come back to what it wrote before.

This module knows no encoders and no guests: numbers in, a size out.
"""

from __future__ import annotations

from dataclasses import dataclass

from migrate.policy.working_set import WorkingSet

# Shares of fewer lookups are mostly chance: of 256, the standard error is up to 3 %, which is less
# than the GROWTH_GAIN that they are compared with.
MIN_LOOKUPS = 256
# A cache with a smaller share of misses is large enough.
FEW_MISSES = 0.05
# A larger cache must be expected to hit this much more of the lookups.
GROWTH_GAIN = 0.05
# A hit that saves a smaller share of the bytes of its page is not worth the memory.
MIN_SAVING = 0.25
# A cache of this many times what is needed, for this many rounds, shrinks to twice what is needed.
FAR_TOO_LARGE = 8
IDLE_ROUNDS = 32


@dataclass(frozen=True)
class CacheUse:
    """What the page cache did in one round, in pages; delta_bytes is the size of the deltas."""

    hits: int = 0
    misses: int = 0
    overflows: int = 0
    delta_bytes: int = 0

    def since(self, before: CacheUse) -> CacheUse:
        return CacheUse(
            self.hits - before.hits,
            self.misses - before.misses,
            self.overflows - before.overflows,
            self.delta_bytes - before.delta_bytes,
        )

    def saving(self, page_size: int) -> float:
        """Return the share of a page's bytes that a hit has saved; 1.0 before the first hit."""
        if not self.hits:
            return 1.0
        return 1 - self.overflows / self.hits - self.delta_bytes / (self.hits * page_size)


class CacheSizing:
    """Chooses `size`, in bytes, for the next round: a power of two up to `most`.

    size -- to begin with; the cache never becomes smaller
    """

    def __init__(self, size: int, most: int, page_size: int) -> None:
        self.size = min(size, most)
        self.most = most
        self._page_size = page_size
        self._least = self.size
        self._idle = 0

    def decide(self, working: WorkingSet, use: CacheUse) -> int:
        """Take in what the cache did in a round; return the size in bytes for the next."""
        looked_up = use.hits + use.misses
        if looked_up < MIN_LOOKUPS:
            return self.size
        wanted = working.fitting(self.most)
        if wanted > self.size:
            gain = working.hit_share(wanted) - working.hit_share(self.size)
            if (
                use.misses > FEW_MISSES * looked_up
                and gain > GROWTH_GAIN
                and use.saving(self._page_size) > MIN_SAVING
            ):
                self.size = wanted
        self._idle = self._idle + 1 if FAR_TOO_LARGE * wanted <= self.size else 0
        if self._idle >= IDLE_ROUNDS:
            self._idle = 0
            self.size = max(2 * wanted, self._least)
        return self.size
