"""A bound on the part of a stream that is on its way: as much as the path holds, and little more.

What is sent and not taken has to arrive before the guest can run at the destination, so a queue
there lengthens the pause.

    window = rate at which the destination takes * (2 * round trip + QUEUE_SECONDS)
"""

from __future__ import annotations

from collections import deque

# Seconds of sending that may wait beside what the path holds.
QUEUE_SECONDS = 0.03
# Bounds of the window in bytes: three batches keep a fast path busy before anything is measured,
# and what is kept for sending again must not fill the memory.
MIN_WINDOW = 3 << 20
MAX_WINDOW = 64 << 20
# The rate is that of the last half second.
RATE_SECONDS = 0.5


class SendWindow:
    """Measures the path from what the destination takes; `most` bytes may be on their way.

    rate -- bytes per second that the destination takes
    """

    def __init__(self) -> None:
        self.most = MIN_WINDOW
        self.rate = 0.0
        self._round_trip = 0.0
        # (bytes, time of sending), oldest first, and (time, bytes) of what was taken.
        self._sent: deque[tuple[int, float]] = deque()
        self._taken: deque[tuple[float, int]] = deque()

    def sent(self, size: int, now: float) -> None:
        """Note that an item of `size` bytes is sent."""
        self._sent.append((size, now))

    def taken(self, now: float) -> None:
        """Note that the destination has taken the oldest item on its way."""
        size, at = self._sent.popleft()
        trip = now - at
        self._round_trip = min(self._round_trip or trip, trip)
        self._taken.append((now, size))
        while now - self._taken[0][0] > RATE_SECONDS:
            self._taken.popleft()
        began = self._taken[0][0]
        if now > began:
            self.rate = sum(size for _, size in self._taken) / (now - began)
            wanted = int(self.rate * (2 * self._round_trip + QUEUE_SECONDS))
            self.most = min(max(wanted, MIN_WINDOW), MAX_WINDOW)

    def clear(self) -> None:
        """Forget what was on its way: the connection broke."""
        self._sent.clear()
        self._round_trip = 0.0
