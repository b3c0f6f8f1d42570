"""The heat of pages, in plain Python: see _heat.pyx for what that means."""

from __future__ import annotations

SENDING = 32  # what one sending adds
HOTTEST = 255
COOL_SURVEYS = 4  # surveys after which all heat is halved


class PageHeat:
    """The heat of every page of a guest.

    pages -- of the guest
    """

    def __init__(self, pages: int) -> None:
        self._pages = pages
        self._heats: dict[int, int] = {}
        self._resent = self._surveys = 0  # sendings and surveys since heat was halved
        self._sendings = [0] * (HOTTEST + 1)  # since the last survey, by the heat before them

    def sample(self) -> tuple[list[int], list[int]]:
        """Return what was sent again and what is hot now. It is called after each round.

        Returns (sendings since the last survey, by the heat that their pages had before; pages by
        the heat that they have), each a list of 256 numbers.
        """
        sendings, self._sendings = self._sendings, [0] * (HOTTEST + 1)
        self._surveys += 1
        if self._surveys >= COOL_SURVEYS and 2 * self._resent >= len(self._heats):
            self._heats = {page: heat // 2 for page, heat in self._heats.items() if heat > 1}
            self._resent = self._surveys = 0
        pages = [0] * (HOTTEST + 1)
        for heat in self._heats.values():
            pages[heat] += 1
        pages[0] = self._pages - len(self._heats)
        return sendings, pages

    def warm(self, page: int) -> None:
        """Count one sending of a page that the peer has."""
        heat = self._heats.get(page, 0)
        self._sendings[heat] += 1
        self._heats[page] = min(heat + SENDING, HOTTEST)
        self._resent += 1
