"""How short a pause to wait for: as short as the guest allows, and longer only in time.

    a round would leave less than WORTH_A_ROUND of the best pause so far
                                            the aim is SHORT_SECONDS: wait, another may be shorter
    it would not                            the aim rises, from the best pause so far on, by the
                                            same share each time, up to the downtime limit

A round takes about as long as the pause would that is put off for it. So a falling series costs a
few times its first pause at most, and when it has ended, the aim reaches the pauses that the guest
does allow within a few rounds, however they vary.
"""

from __future__ import annotations

import math

# A pause is put off as long as each round shortens it to this share.
WORTH_A_ROUND = 0.75
# A pause of this many seconds is never put off.
SHORT_SECONDS = 0.01


class DowntimeAim:
    """The aim of one migration.

    seconds -- the pause to wait for
    """

    def __init__(self) -> None:
        self.seconds = SHORT_SECONDS
        self._best = math.inf

    def learn(self, expected: float, limit: float) -> float:
        """Take in what the pause would be after a round; return the aim, at most `limit`."""
        if expected < self._best * WORTH_A_ROUND:
            self._best, self.seconds = expected, SHORT_SECONDS
        else:
            self._best = min(self._best, expected)
            self.seconds = min(max(self.seconds, self._best) / WORTH_A_ROUND, limit)
        return min(self.seconds, limit)
