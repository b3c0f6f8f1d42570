"""Progress as plain lines, for output that is not a terminal.

There is a line every two seconds, and a line per round. Short rounds are merged, so there are at
most five such lines a second; the last round before the pause is always shown. In the pause nothing
is written.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from migrate.events import Event, Notice, SourceEvent
from migrate.output import printable
from migrate.output.streams import behind
from migrate.statistics import Statistics, Status
from migrate.units import format_size
from migrate.views.history import History, RoundRecord, merge

PLAIN_SECONDS = 2.0
ROUND_SECONDS = 0.2


def progress_line(s: Statistics) -> str:
    """Return round, remaining, dirty rate, throughput and expected downtime in 80 columns."""
    parts = [
        f"round {s.dirty_sync_count + (s.status is Status.ACTIVE)}: {format_size(s.remaining)} left"
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
    """Return what a round has moved, and what is dirty after it."""
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
    """A view that prints lines.

    stream -- where to; standard error by default (see migrate.output)
    silent -- print notices only
    clock  -- in seconds; limits the rate of lines
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
        self._unprinted: RoundRecord | None = None

    def observe(self, event: Event, s: Statistics) -> None:
        """Print a line if one is due. The history has taken the event already."""
        if isinstance(event, Notice):
            self.say(event.text)
        elif self._silent:
            return
        elif event is SourceEvent.STATUS:
            self._print_round()  # before the pause, or at the end
        elif event is SourceEvent.ROUND_DONE:
            self._round(self._history.recent[-1])
        elif event is SourceEvent.PROGRESS and s.status is Status.ACTIVE:
            self._interval(s)

    def _round(self, record: RoundRecord) -> None:
        self._unprinted = record if self._unprinted is None else merge(self._unprinted, record)
        if self._clock() - self._round_at >= ROUND_SECONDS:
            self._print_round()

    def _print_round(self) -> None:
        if self._unprinted is not None:
            self._round_at = self._clock()
            self._line(round_line(self._unprinted))
            self._unprinted = None

    def _interval(self, s: Statistics) -> None:
        now = self._clock()
        if now - self._line_at >= PLAIN_SECONDS:
            self._line_at = now
            self._line(progress_line(s))

    def _line(self, text: str) -> None:
        """Print a line, or leave it out if the reader has not read the earlier ones yet."""
        if not behind(self._stream):
            self.say(text)

    def say(self, text: str) -> None:
        """Print a sentence on a line of its own."""
        self._stream.write(f"{self._name}: {printable(text)}\n")
        self._stream.flush()

    def clear(self) -> None:
        """Release the terminal: lines need nothing for that."""

    def describe(self, facts: Mapping[str, str]) -> None:
        """Take what is about to move: migrate-src prints it."""

    def end(self, _s: Statistics) -> None:
        """Print the last round of a migration."""
        self._print_round()

    def close(self) -> None:
        """Release the terminal for good."""
