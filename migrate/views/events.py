"""`--events json[:FD]`: one JSON object on a line for each event, for programs that watch.

    {"event": NAME, "timestamp": {"seconds": S, "microseconds": U}, "data": {...}}

Names are QEMU's where it has them; the README lists all events and what they hold.

A reader that is slow, or gone, keeps nobody waiting (see migrate.output): a line that finds no room
is kept, up to a bound; beyond it, events are dropped, counted, and the number is told in their
place.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from migrate import output
from migrate.errors import UsageError
from migrate.output import MAX_WAITING_BYTES
from migrate.statistics import Statistics, query_migrate
from migrate.views.history import OVER, History, RoundRecord

# How long the end of the program waits for a reader to take what is left.
CLOSE_SECONDS = 1.0


def parse_events(text: str) -> int:
    """The descriptor of `json` or `json:FD`. Raises UsageError where it cannot be written."""
    kind, colon, number = text.partition(":")
    if kind != "json" or (colon and not (number.isdecimal() and len(number) < 8)):
        raise UsageError(f"--events {text!r} is not understood: write json, or json:FD")
    fd = int(number) if colon else 1
    if not output.given(fd):  # a disk that is full may have room later
        raise UsageError(f"--events {text}: descriptor {fd}: {os.strerror(errno.EBADF)}")
    return fd


def round_data(r: RoundRecord) -> dict[str, Any]:
    """A round's figures: QEMU's names where it has them, times in milliseconds."""
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


class Outlet:
    """Lines for a descriptor that may not take them, each whole or not at all."""

    def __init__(self, fd: int) -> None:
        self._outlet = output.Outlet(fd)
        self._dropped = self._untold = 0

    @property
    def dropped(self) -> int:
        """Lines that were not written, all in all."""
        return self._dropped + self._outlet.lost

    @property
    def fault(self) -> OSError | None:
        """Why nothing more is written, where that is so."""
        return self._outlet.fault

    def put(self, line: bytes, told: Callable[[int], bytes]) -> None:
        """`told` makes the line that says how many were dropped."""
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
        """Writes what there is room for."""
        self._outlet.flush()

    def close(self) -> None:
        """Gives the reader a moment for the rest; the descriptor is whoever's it was."""
        self._outlet.flush(CLOSE_SECONDS)
        self._outlet.drop()
        self._outlet.close()


class Events:
    """A view that writes events to a descriptor.

    clock -- seconds since 1970
    """

    def __init__(
        self, history: History, fd: int, clock: Callable[[], float] = time.time
    ) -> None:  # fmt: skip
        self._history = history
        self._outlet = Outlet(fd)
        self._clock = clock
        self._last: Statistics | None = None
        """The last word of a migration, until it is told."""

    def describe(self, facts: Mapping[str, str]) -> None:
        """What is about to move."""
        self._emit("GUEST", {name.replace(" ", "-"): value for name, value in facts.items()})

    def observe(self, event: str, s: Statistics) -> None:
        """After the history was told."""
        if event == "status" and s.status in OVER:
            self._last = s  # what it has counted is not complete before `end`
            return
        if event == "status":
            self.end(self._last)
            self._emit("MIGRATION", {"status": s.status})
        elif event == "round":
            self._emit("ROUND", round_data(self._history.recent[-1]))
        elif event == "progress":
            self._emit("PROGRESS", query_migrate(s))
        elif event == "paused":
            self._emit("STOP", {})
        elif event.startswith("notice: "):
            self._emit("NOTICE", {"text": event.removeprefix("notice: ")})

    def end(self, s: Statistics | None) -> None:
        """The last round, and the result; once for each migration."""
        if s is None or self._last is None:
            return
        self._last = None
        if tail := self._history.tail:
            self._emit("ROUND", round_data(tail))
        self._emit("MIGRATION", query_migrate(s))

    def _emit(self, name: str, data: dict[str, Any]) -> None:
        self._outlet.put(self._line(name, data), self._dropped)

    def _dropped(self, count: int) -> bytes:
        return self._line("DROPPED", {"count": count})

    def _line(self, name: str, data: dict[str, Any]) -> bytes:
        seconds, rest = divmod(round(self._clock() * 1e6), 10**6)
        stamp = {"seconds": seconds, "microseconds": rest}
        return json.dumps({"event": name, "timestamp": stamp, "data": data}).encode() + b"\n"

    def close(self) -> str:
        """The program ends; a sentence for the user where events were lost."""
        self.end(self._last)
        self._outlet.close()
        if not self._outlet.dropped:
            return ""
        why = "its reader was too slow"
        if (fault := self._outlet.fault) is not None:
            gone = isinstance(fault, BrokenPipeError)
            why = "its reader is gone" if gone else f"{fault.strerror}"
        return f"--events: {self._outlet.dropped} events were dropped: {why}"
