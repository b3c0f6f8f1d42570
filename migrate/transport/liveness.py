"""Decides when a peer is lost, and when to send it a PING.

    peer's last byte        PING      PING      PING      PING
    |-------------------------|---------|---------|---------|
    0                                                  peer_timeout: the peer is lost

Both sides send PING BEATS times in each `peer_timeout`, whatever else they send. So a peer that is
there is never silent for longer than a beat and a round trip, and silence means that it is dead,
stopped or cut off.

Three cases need care:

- We do not read, because too much waits to be received (see Link). The peer's bytes wait in the
  kernel, and its silence is ours. It is judged again from the moment we read.
- We were stopped ourselves: SIGSTOP, a suspended machine, a host that froze. Then a beat comes far
  too late, and what the peer has sent meanwhile is unread. It is judged anew from that beat.
- A peer that sends a byte now and then is not silent, but inside a frame it must send at least
  LEAST_RATE, or it would hold its connection and the frame's memory for ever.

The kernel watches the connection too, see migrate.transport.keepalive.
"""

from __future__ import annotations

import math

# PINGs in each `peer_timeout`: three may be lost before a peer that is there is given up.
BEATS = 4
# Bytes per second inside a frame. The largest control frame then takes 4 min at the most; a path
# that slow cannot carry a guest.
LEAST_RATE = 256


class Liveness:
    """The signs of life of one peer. All times are those of time.monotonic(), and are passed in."""

    def __init__(self, timeout: float, now: float) -> None:
        self.timeout = timeout
        self.beat_seconds = timeout / BEATS
        self._reading = True
        self._heard_at = now
        self._ping_at = now + self.beat_seconds
        self._frame: tuple[float, int] | None = None
        """When the frame that is coming began, and how many bytes had come before it."""

    def begin(self, now: float) -> None:
        """Begin when the connection is made: the first PING is due a beat from now."""
        self._ping_at = now + self.beat_seconds

    def heard(self, now: float, received: int, *, in_frame: bool) -> None:
        """Note that bytes have come.

        received -- how many so far
        in_frame -- the last of them are the beginning of a frame
        """
        self._heard_at = now
        if not in_frame or not self._reading:
            self._frame = None
        elif self._frame is None:
            self._frame = now, received

    def pause(self) -> None:
        """Note that we stop reading."""
        self._reading, self._frame = False, None

    def resume(self, now: float) -> None:
        """Note that we read again."""
        self._reading, self._heard_at = True, now

    def next_beat(self) -> float:
        """Return when `judge` is to be called next, so that a silence is noticed on time."""
        silent_at = self._heard_at + self.timeout if self._reading else math.inf
        return min(self._ping_at, silent_at)

    def judge(self, due: float, now: float, received: int) -> str:
        """Return why the peer is lost, to be said of it, or "".

        due -- what `next_beat` said
        """
        if now - due > self.beat_seconds:  # we were stopped ourselves
            self._heard_at, self._frame = now, None
        if not self._reading:
            return ""
        if self._trickles(now, received):
            return f"sends less than {LEAST_RATE} bytes a second"
        silence = now - self._heard_at
        return f"has said nothing for {silence:.3g} s" if silence >= self.timeout else ""

    def take_ping(self, now: float) -> bool:
        """Return whether a PING is due; the next one is due a beat from now then."""
        if now < self._ping_at:
            return False
        self._ping_at = now + self.beat_seconds
        return True

    def _trickles(self, now: float, received: int) -> bool:
        """Return whether the frame that is coming comes so slowly that it may never be whole."""
        if self._frame is None:
            return False
        began, before = self._frame
        seconds = now - began
        return seconds > self.timeout and received - before < LEAST_RATE * seconds
