"""How long something that breaks is tried again.

    progress . . . break   try   try   break   try . . . give up
                   |<----------- seconds ----------->|

The time runs from the first break after the last progress. Only something new that came through
renews it, never a connection alone: a peer, or what stands between, that accepts, greets and hangs
up would keep us for ever.

A side that sends cannot always know what came through before it has asked. Where an attempt has
broken off and may have brought something, the time to connect runs anew; where it then turns out
that nothing came, and the time is over, that is the end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Budget:
    """Time for attempts without progress.

    pauses -- seconds between two attempts: the first pause, and the longest
    breaks -- since the last progress
    greeted -- attempts since the last progress that were let in, and broke off
    """

    def __init__(
        self, pauses: tuple[float, float] = (0.0, 0.0),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.breaks = self.greeted = 0
        self._pauses = pauses
        self._clock = clock
        self._first = self._since = math.inf
        self._pause = pauses[0]

    def renew(self) -> None:
        """Something new has come through."""
        self.breaks = self.greeted = 0
        self._first = self._since = math.inf
        self._pause = self._pauses[0]

    def broke(self, *, greeted: bool = False) -> None:
        """An attempt has broken off.

        greeted -- it was let in, so that it may have brought something
        """
        now = self._clock()
        if not self.breaks:
            self._first = self._since = now
        elif greeted:
            self.greeted += 1
            self._since = now
        self.breaks += 1

    def left(self, seconds: float) -> float:
        """What is left of so many seconds to connect."""
        return self._since + seconds - self._clock()

    def used(self) -> float:
        """Seconds since the first break; 0.0 where there is none."""
        return self._clock() - self._first if self.breaks else 0.0

    def over(self, seconds: float) -> bool:
        """Nothing has come, as is known now: whether that has been so for too long.

        The first attempt after a break is let go on: it may bring something yet.
        """
        return bool(self.greeted) and self.used() > seconds

    def pause(self, seconds: float) -> float:
        """How long to wait before the next attempt: twice as long each time."""
        pause, self._pause = self._pause, min(2 * self._pause, self._pauses[1])
        return max(min(pause, self.left(seconds)), 0.0)
