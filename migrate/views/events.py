"""`--events json[:FD]`: a line of JSON per event, for programs that watch a migration.

    {"event": NAME, "timestamp": {"seconds": S, "microseconds": U}, "data": {...}}

Names are QEMU's, if it has one; docs/observability.md lists all events and their data.

A reader that is slow or gone does not delay the migration (see migrate.output). Lines that the
descriptor does not take are kept, up to a bound. Beyond it events are dropped and counted, and a
DROPPED event with the count takes their place.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from migrate.errors import UsageError
from migrate.events import Event, Notice, SourceEvent
from migrate.output.outlet import MAX_WAITING_BYTES, Outlet
from migrate.output.streams import is_inherited
from migrate.statistics import OVER, Statistics, query_migrate
from migrate.views.history import History, RoundRecord

# How long the program waits at its end for a reader to take the rest.
CLOSE_SECONDS = 1.0


def parse_events(text: str) -> int:
    """Return the descriptor of `json` or `json:FD`. Raises UsageError if it is not writable."""
    kind, colon, number = text.partition(":")
    if kind != "json" or (colon and not (number.isdecimal() and len(number) < 8)):
        raise UsageError(f"--events {text!r} is not understood: write json, or json:FD")
    fd = int(number) if colon else 1
    if not is_inherited(fd):  # a full disk is accepted: it may have room later
        raise UsageError(f"--events {text}: descriptor {fd}: {os.strerror(errno.EBADF)}")
    return fd


def round_data(r: RoundRecord) -> dict[str, Any]:
    """Return a round's figures: QEMU's names, if it has one; times in milliseconds."""
    data: dict[str, Any] = {
        "pass": r.number,
        "began": round(r.began * 1e3, 3),
        "time": round(r.seconds * 1e3, 3),
        "transferred": r.wire_bytes,
        "duplicate": r.zero,
        "normal": r.normal,
        "skipped": r.skipped,
        "remaining": r.remaining,
        "dirty-bytes-rate": round(r.dirty_rate),
        "mbps": round(r.mbps, 3),
        "xbzrle-cache": {
            "cache-size": r.cache_size, "pages": r.delta, "bytes": r.delta_bytes,
            "cache-hit": r.hits, "cache-miss": r.misses, "overflow": r.overflow,
        },
        "paused": r.paused,
        "unfinished": r.unfinished,
    }  # fmt: skip
    if r.expected_downtime is not None:
        data["expected-downtime"] = round(r.expected_downtime * 1e3, 3)
    return data


class EventLines:
    """Lines for a descriptor that may not accept them. Each is written whole or not at all."""

    def __init__(self, fd: int) -> None:
        self._outlet = Outlet(fd)
        self._dropped = self._untold = 0

    @property
    def dropped(self) -> int:
        """Total number of lines that were not written."""
        return self._dropped + self._outlet.lost

    @property
    def fault(self) -> OSError | None:
        """The error after which nothing more is written, or None."""
        return self._outlet.fault

    def put(self, line: bytes, told: Callable[[int], bytes]) -> None:
        """Write a line, or drop it.

        told -- makes the line that says how many were dropped
        """
        self.flush()
        if self._untold and self._outlet.waiting_bytes < MAX_WAITING_BYTES // 2:
            self._outlet.put(told(self._untold))
            self._untold = 0
        full = self._outlet.waiting_bytes + len(line) > MAX_WAITING_BYTES
        if self.fault is not None or self._untold or full:
            self._dropped += 1
            self._untold += 1
            return
        self._outlet.put(line)
        self.flush()

    def flush(self) -> None:
        """Write what the descriptor accepts now."""
        self._outlet.flush()

    def close(self) -> None:
        """Give the reader a moment for the rest. The descriptor itself stays open."""
        self._outlet.flush(CLOSE_SECONDS)
        self._outlet.drop()
        self._outlet.close()


class Events:
    """A view that writes events to a descriptor.

    clock -- in seconds since 1970
    """

    def __init__(
        self, history: History, fd: int, clock: Callable[[], float] = time.time
    ) -> None:  # fmt: skip
        self._history = history
        self._lines = EventLines(fd)
        self._clock = clock
        # The final statistics of a migration, until its last event is written.
        self._last: Statistics | None = None

    def describe(self, facts: Mapping[str, str]) -> None:
        """Write what is about to move."""
        self._emit("GUEST", {name.replace(" ", "-"): value for name, value in facts.items()})

    def observe(self, event: Event, s: Statistics) -> None:
        """Write an event. The history has taken it already."""
        if event is SourceEvent.STATUS and s.status in OVER:
            self._last = s  # its counters are not complete before `end`
            return
        if event is SourceEvent.STATUS:
            self.end(self._last)
            self._emit("MIGRATION", {"status": s.status})
        elif event is SourceEvent.ROUND_DONE:
            self._emit("ROUND", round_data(self._history.recent[-1]))
        elif event is SourceEvent.PROGRESS:
            self._emit("PROGRESS", query_migrate(s))
        elif event is SourceEvent.PAUSED:
            self._emit("STOP", {})
        elif isinstance(event, Notice):
            self._emit("NOTICE", {"text": event.text})

    def end(self, s: Statistics | None) -> None:
        """Write the last round and the result, once per migration."""
        if s is None or self._last is None:
            return
        self._last = None
        if tail := self._history.tail:
            self._emit("ROUND", round_data(tail))
        self._emit("MIGRATION", query_migrate(s))

    def _emit(self, name: str, data: dict[str, Any]) -> None:
        self._lines.put(self._line(name, data), self._dropped)

    def _dropped(self, count: int) -> bytes:
        return self._line("DROPPED", {"count": count})

    def _line(self, name: str, data: dict[str, Any]) -> bytes:
        seconds, rest = divmod(round(self._clock() * 1e6), 10**6)
        stamp = {"seconds": seconds, "microseconds": rest}
        return json.dumps({"event": name, "timestamp": stamp, "data": data}).encode() + b"\n"

    def close(self) -> str:
        """Close, as the program ends; return a sentence if events were lost, else ""."""
        self.end(self._last)
        self._lines.close()
        if not self._lines.dropped:
            return ""
        why = "its reader was too slow"
        if (fault := self._lines.fault) is not None:
            gone = isinstance(fault, BrokenPipeError)
            why = "its reader is gone" if gone else f"{fault.strerror}"
        return f"--events: {self._lines.dropped} events were dropped: {why}"
