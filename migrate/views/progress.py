"""What a user sees of a migration where there is no terminal: whole lines, never too many.

One line each two seconds, and one for each round. Rounds of milliseconds are told together, five
times a second at most; the last one before the pause always. In the pause nothing is written.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from migrate.output import behind, printable
from migrate.quantities import format_size
from migrate.statistics import Statistics
from migrate.views.history import History, RoundRecord, together

PLAIN_SECONDS = 2.0
ROUND_SECONDS = 0.2


def progress_line(s: Statistics) -> str:
    """Round, remaining, dirty rate, throughput and expected downtime, on a line for 80 columns."""
    parts = [
        f"round {s.dirty_sync_count + (s.status == 'active')}: {format_size(s.remaining)} left"
    ]
    if s.dirty_sync_count:
        parts.append(f"dirty {format_size(s.dirty_pages_rate * s.page_size)}/s")
    parts.append(f"{s.mbps:.0f} Mbit/s")
    if s.expected_downtime is not None:
        parts.append(f"exp. downtime {s.expected_downtime * 1e3:.0f} ms")
    if s.cpu_throttle_percentage:
        parts.append(f"slowed {s.cpu_throttle_percentage} %")
    return ", ".join(parts)


def round_line(r: RoundRecord) -> str:
    """What one round, or several, have moved, and what is dirty after them."""
    name = f"round {r.number}" if r.first == r.number else f"rounds {r.first} to {r.number}"
    parts = [
        f"{name} took {r.seconds:.2f} s: {format_size(r.wire_bytes)} for {r.zero} zero, "
        f"{r.normal} whole and {r.delta} delta pages"
    ]
    if r.hit_ratio is not None:
        parts.append(f"cache hits {r.hit_ratio:.0%}")
    parts.append(f"{format_size(r.remaining)} dirty ({format_size(r.dirty_rate)}/s)")
    if r.expected_downtime is not None:
        parts.append(f"exp. downtime {r.expected_downtime * 1e3:.0f} ms")
    return ", ".join(parts)


class Lines:
    """A view that writes to `stream` (stderr, see migrate.output); silent: notices only.

    clock -- seconds, for the distance of lines
    """

    def __init__(
        self, history: History, name: str = "migrate-src", stream: TextIO | None = None,
        *, silent: bool = False, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._history = history
        self._name = name
        self._stream = stream or sys.stderr
        self._silent = silent
        self._clock = clock
        self._line_at = self._round_at = float("-inf")
        self._held: RoundRecord | None = None

    def observe(self, event: str, s: Statistics) -> None:
        """After the history was told."""
        if event.startswith("notice: "):
            self.say(event.removeprefix("notice: "))
        elif self._silent:
            return
        elif event == "status":
            self._tell_held()  # before the pause, or at the end
        elif event == "round":
            self._round(self._history.recent[-1])
        elif event == "progress" and s.status == "active":
            self._interval(s)

    def _round(self, record: RoundRecord) -> None:
        self._held = record if self._held is None else together(self._held, record)
        if self._clock() - self._round_at >= ROUND_SECONDS:
            self._tell_held()

    def _tell_held(self) -> None:
        if self._held is not None:
            self._round_at = self._clock()
            self._line(round_line(self._held))
            self._held = None

    def _interval(self, s: Statistics) -> None:
        now = self._clock()
        if now - self._line_at >= PLAIN_SECONDS:
            self._line_at = now
            self._line(progress_line(s))

    def _line(self, text: str) -> None:
        """Print a line that may be left out: nothing is printed behind a reader that is slow."""
        if not behind(self._stream):
            self.say(text)

    def say(self, text: str) -> None:
        """Print a sentence on a line of its own."""
        self._stream.write(f"{self._name}: {printable(text)}\n")
        self._stream.flush()

    def clear(self) -> None:
        """Before somebody else writes: lines leave nothing behind."""

    def describe(self, facts: Mapping[str, str]) -> None:
        """What is about to move: it is said elsewhere."""

    def end(self, _s: Statistics) -> None:
        """A migration is over."""
        self._tell_held()

    def close(self) -> None:
        """Nothing follows."""
