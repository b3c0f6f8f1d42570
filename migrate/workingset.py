"""The working set: which part of a guest is written again and again, and what a cache of it hits.

    pages by heat, before a round      hottest ............... coldest
                                       |||||||||  |||| ||  | |       |
    a cache of M pages holds these     <--------- M --------->
    what the round sent again                |||     | |   ||        |     its share of hits

The encoder counts how often and how lately each page was sent again: its heat (see
proto.kernel.PageEncoder). The best that a cache of M pages can do is to hold the M hottest, and
what that is worth the next round tells: which of those it sends. So no page is taken for a hot one
because it happened to be sent lately. The page cache comes near that: it evicts no page that is
used in every round, and of a sweep over more than fits it keeps as much as fits.

Numbers in, numbers out: nothing here knows encoders, guests or clocks.
"""

from __future__ import annotations

from collections.abc import Sequence

# Less heat than this is of long ago: a page was sent once, some 12 rounds before.
FAINT = 4
# A larger cache must hit at least so much more of what is sent again to be worth its memory.
WORTH = 0.03
# What was seen counts half, once so many times the working set was sent since.
MEMORY = 4


class WorkingSet:
    """Learns from the survey of each round; `page_size` in bytes."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages = 0
        """Pages that were lately sent again."""
        self._ranks: list[int] = []  # pages by heat, before the next round
        self._sent = 0.0
        self._hit: dict[int, float] = {}  # cache pages -> sendings that it would have hit

    @property
    def size(self) -> int:
        """In bytes."""
        return self.pages * self.page_size

    def learn(self, sendings: Sequence[int], pages: Sequence[int]) -> None:
        """`PageEncoder.survey()` of a round."""
        ranks, self._ranks = self._ranks, list(pages)
        self.pages = sum(pages[FAINT:])
        if not any(ranks[1:]) or not any(sendings):
            return
        self._sent += sum(sendings)
        hottest = [(ranks[heat], sendings[heat]) for heat in range(len(ranks)) if ranks[heat]][::-1]
        entries = 1
        while entries < 2 * sum(pages):
            self._hit[entries] = self._hit.get(entries, 0.0) + _hit(entries, hottest)
            entries *= 2
        while self._sent > MEMORY * max(self.pages, 1):
            self._sent /= 2
            self._hit = {entries: hit / 2 for entries, hit in self._hit.items()}

    def hit_share(self, cache_size: int) -> float:
        """The best share of pages sent again that a cache of so many bytes, a power of two, hits.

        1.0 where none is sent again.
        """
        entries = cache_size // self.page_size
        if 2 * self._sent >= self.pages and self._hit:
            return self._hit.get(entries, self._sent if entries else 0.0) / self._sent
        return min(entries / self.pages, 1.0) if self.pages else 1.0

    def fitting(self, most: int) -> int:
        """The smallest power of two, in bytes, up to `most`, beyond which more brings little."""
        best = self.hit_share(most)
        size = self.page_size
        while size < most and self.hit_share(size) < best - WORTH:
            size *= 2
        return min(size, most)


def _hit(room: int, hottest: Sequence[tuple[int, int]]) -> float:
    """How many sendings a cache of so many pages hits; (pages, sendings) by falling heat."""
    hit = 0.0
    for pages, sendings in hottest:
        held = min(pages, room)
        hit += sendings * held / pages
        room -= held
        if not room:
            break
    return hit
