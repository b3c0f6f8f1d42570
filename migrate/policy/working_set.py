"""Estimate the working set, and the share of it that a cache of any size would hit.

    pages by heat, before a round      hottest ............... coldest
                                       |||||||||  |||| ||  | |       |
    a cache of M pages holds these     <--------- M --------->
    pages that the round sends again         |||     | |   ||        |     its share of hits

The encoder counts how often and how recently each page was sent again: the page's heat (see
PageEncoder). The best that a cache of M pages can do is to hold the M hottest pages. What that is
worth shows in the next round: the share of the pages sent again that are among those M. Heat is
taken before the round and hits are counted in it, so a page is not taken for a hot one only because
it was just sent. The page cache comes close to this bound: it evicts no page that is used in every
round, and of a sweep over more pages than fit it keeps as many as fit.

This module knows no encoders, guests or clocks: numbers in, numbers out.
"""

from __future__ import annotations

from collections.abc import Sequence

# A page of less heat was sent once, some 12 rounds before; it does not belong to the working set.
FAINT_HEAT = 4
# A larger cache must hit at least this much more of what is sent again to be worth its memory.
MIN_GAIN = 0.03
# Observations count half once the working set has been sent this many times since.
HALF_LIFE = 4


class WorkingSet:
    """Learns from the survey of each round; `page_size` in bytes.

    pages -- pages that were recently sent again
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages = 0
        # Pages per heat before the next round.
        self._ranks: list[int] = []
        # Pages sent again, and how many of them caches of 1, 2, 4 ... pages would have hit.
        self._sent = 0.0
        self._hit: dict[int, float] = {}

    @property
    def size(self) -> int:
        """In bytes."""
        return self.pages * self.page_size

    def learn(self, sendings: Sequence[int], pages: Sequence[int]) -> None:
        """Take in what `PageEncoder.sample_heat()` returns after a round.

        sendings -- by the heat that a page had before the round, how many such pages it sent again
        pages    -- how many pages of each heat there are now
        """
        ranks, self._ranks = self._ranks, list(pages)
        self.pages = sum(pages[FAINT_HEAT:])
        if not any(ranks[1:]) or not any(sendings):
            return
        self._sent += sum(sendings)
        hottest = [(ranks[heat], sendings[heat]) for heat in range(len(ranks)) if ranks[heat]][::-1]
        entries = 1
        while entries < 2 * sum(pages):
            self._hit[entries] = self._hit.get(entries, 0.0) + _hits(entries, hottest)
            entries *= 2
        while self._sent > HALF_LIFE * max(self.pages, 1):
            self._sent /= 2
            self._hit = {entries: hit / 2 for entries, hit in self._hit.items()}

    def hit_share(self, cache_size: int) -> float:
        """Return the best share of pages sent again that a cache of `cache_size` bytes hits.

        `cache_size` is a power of two. 1.0 when no page is sent again. Before enough has been sent
        again to tell, all pages of the working set count as equally hot.
        """
        entries = cache_size // self.page_size
        if 2 * self._sent >= self.pages and self._hit:
            return self._hit.get(entries, self._sent if entries else 0.0) / self._sent
        return min(entries / self.pages, 1.0) if self.pages else 1.0

    def fitting(self, most: int) -> int:
        """Return the smallest power of two, in bytes and up to `most`, that hits nearly the best
        share."""
        best = self.hit_share(most)
        size = self.page_size
        while size < most and self.hit_share(size) < best - MIN_GAIN:
            size *= 2
        return min(size, most)


def _hits(entries: int, hottest: Sequence[tuple[int, int]]) -> float:
    """Return how many sendings a cache of `entries` pages hits.

    hottest -- (pages, sendings), by falling heat; of a heat that fits in part, a share is hit
    """
    hit = 0.0
    for pages, sendings in hottest:
        cached = min(pages, entries)
        hit += sendings * cached / pages
        entries -= cached
        if not entries:
            break
    return hit
