"""A time limit on retries without progress.

    progress . . . break   try   try   break   try . . . give up
                   |<----------- seconds ----------->|

The time runs from the first break after the last progress. Only new data that came through renews
it, never a connection alone: a peer, or a proxy in between, that accepts, greets and hangs up would
keep us for ever.

A sender does not know what came through before it has asked. So after an attempt that was greeted
the time to connect runs anew; if it turns out that nothing came, and the time is over, that is the
end (`over`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Budget:
    """Counts breaks and time since the last progress.

    pauses -- seconds between two attempts: the first pause, and the longest
    clock  -- returns seconds
    """

    def __init__(
        self, pauses: tuple[float, float] = (0.0, 0.0),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.breaks = 0
        """Since the last progress."""
        self.greeted = 0
        """Attempts since the last progress that the peer accepted and that broke off later."""
        self._pauses = pauses
        self._clock = clock
        self._first = self._since = math.inf
        self._pause = pauses[0]

    def renew(self) -> None:
        """Start anew: new data has come through."""
        self.breaks = self.greeted = 0
        self._first = self._since = math.inf
        self._pause = self._pauses[0]

    def broke(self, *, greeted: bool = False) -> None:
        """Count an attempt that has broken off.

        greeted -- the peer had accepted it, so it may have brought something
        """
        now = self._clock()
        if not self.breaks:
            self._first = self._since = now
        elif greeted:
            self.greeted += 1
            self._since = now
        self.breaks += 1

    def left(self, seconds: float) -> float:
        """Return how many of `seconds` are left to connect; below 0 when they are over."""
        return self._since + seconds - self._clock()

    def used(self) -> float:
        """Return the seconds since the first break; 0.0 without one."""
        return self._clock() - self._first if self.breaks else 0.0

    def over(self, seconds: float) -> bool:
        """Return whether there has been no progress for more than `seconds`.

        To be asked when it is known that nothing has come. The first attempt after a break always
        goes on: it may bring something yet.
        """
        return bool(self.greeted) and self.used() > seconds

    def pause(self, seconds: float) -> float:
        """Return how many seconds to wait before the next attempt: twice as many each time, and no
        more than are left of `seconds`."""
        pause, self._pause = self._pause, min(2 * self._pause, self._pauses[1])
        return max(min(pause, self.left(seconds)), 0.0)
