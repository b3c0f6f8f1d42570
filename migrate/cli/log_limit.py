"""Bound the lines that strangers can cause: print a few, then how many more there were."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# At most LINES lines are printed in SECONDS seconds.
LINES = 10
SECONDS = 10.0


class LogLimit:
    """Prints at most LINES lines in SECONDS seconds.

    say  -- prints a line
    more -- returns a line that says how many were left out
    """

    def __init__(self, say: Callable[[str], object], more: Callable[[int], str]) -> None:
        self._say = say
        self._more = more
        self._said = self._left_out = 0
        self._timer: asyncio.TimerHandle | None = None

    def say(self, line: str) -> None:
        """Print a line, or count it as left out. Call it in the loop's thread."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SECONDS, self._begin_again)
        if self._said < LINES:
            self._said += 1
            self._say(line)
        else:
            self._left_out += 1

    def _begin_again(self) -> None:
        left_out, self._said, self._left_out, self._timer = self._left_out, 0, 0, None
        if left_out:
            self.say(self._more(left_out))

    def close(self) -> None:
        """Print how many lines were left out."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._left_out:
            self._say(self._more(self._left_out))
            self._left_out = 0
