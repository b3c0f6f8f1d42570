"""`--events json[:FD]`: one JSON object on a line for each event, for programs that watch.

    {"event": NAME, "timestamp": {"seconds": S, "microseconds": U}, "data": {...}}

Names are QEMU's where it has them; the README lists all events and what they hold.

A reader that is slow, or gone, keeps nobody waiting: a line is written only where a poll says that
there is room (a pipe then takes PIPE_BUF bytes without blocking, whatever its mode, which is not
ours to change: others may share it). What finds no room waits, up to a bound; beyond it, events
are dropped, counted, and the number is told in their place.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from migrate.errors import UsageError
from migrate.statistics import Statistics, query_migrate
from migrate.views.history import OVER, History, RoundRecord

MAX_WAITING_BYTES = 1 << 20
PIECE = select.PIPE_BUF
# How long the end of the program waits for a reader to take what is left.
CLOSE_SECONDS = 1.0


def parse_events(text: str) -> int:
    """The descriptor of `json` or `json:FD`. Raises UsageError where it cannot be written."""
    kind, colon, number = text.partition(":")
    if kind != "json" or (colon and not (number.isdecimal() and len(number) < 8)):
        raise UsageError(f"--events {text!r} is not understood: write json, or json:FD")
    fd = int(number) if colon else 1
    try:
        os.write(fd, b"")  # a descriptor that is open for reading only refuses even that
    except OSError as error:
        raise UsageError(f"--events {text}: descriptor {fd}: {error.strerror}") from None
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
    """Lines to a descriptor that may not take them; nothing here blocks, but for `close`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._gone = False
        self.dropped = 0
        """Lines that found no room, all in all."""
        self._untold = 0
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    @property
    def gone(self) -> bool:
        """Whether nobody will read any more."""
        return self._gone

    def put(self, line: bytes, told: Callable[[int], bytes]) -> None:
        """`told` makes the line that says how many were dropped."""
        self.flush()
        if self._untold and self._bytes < MAX_WAITING_BYTES // 2:
            self._queue(told(self._untold))
            self._untold = 0
        if self._gone or self._untold or self._bytes + len(line) > MAX_WAITING_BYTES:
            self.dropped += 1
            self._untold += 1
            return
        self._queue(line)
        self.flush()

    def _queue(self, line: bytes) -> None:
        self._waiting.append(line)
        self._bytes += len(line)

    def flush(self, patience: float = 0.0) -> None:
        """Writes what there is room for; waits for room for so many seconds."""
        until = time.monotonic() + patience
        while self._waiting and not self._gone:
            left = max(until - time.monotonic(), 0.0) if patience else 0.0
            if not self._poll.poll(left * 1e3):
                return
            piece = self._waiting[0][:PIECE]
            try:
                taken = os.write(self._fd, piece)
            except BlockingIOError:
                return
            except OSError:
                self._gone = True
                self.dropped += len(self._waiting)
                self._waiting.clear()
                return
            self._bytes -= taken
            if taken == len(self._waiting[0]):
                self._waiting.popleft()
            else:
                self._waiting[0] = self._waiting[0][taken:]

    def close(self) -> None:
        """Gives the reader a moment for the rest; the descriptor is whoever's it was."""
        self.flush(CLOSE_SECONDS)
        self.dropped += len(self._waiting)
        self._waiting.clear()


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
        with contextlib.suppress(OSError):
            self._outlet.close()
        if not self._outlet.dropped:
            return ""
        why = "its reader is gone" if self._outlet.gone else "its reader was too slow"
        return f"--events: {self._outlet.dropped} events were dropped: {why}"
