"""What a user sees while a migration runs: one redrawn line on a terminal, else plain lines."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TextIO

from migrate.quantities import format_size
from migrate.statistics import Statistics

REDRAW_SECONDS = 0.1
PLAIN_SECONDS = 2.0


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
    return ", ".join(parts)


class Progress:
    """Prints to `stream` (stderr): mode auto, never or plain."""

    def __init__(self, mode: str = "auto", stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._redraw = (
            mode == "auto" and self._stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        )
        self._silent = mode == "never"
        self._drawn_at = 0.0
        self._width = 0

    def show(self, event: str, s: Statistics) -> None:
        """An observer for Source."""
        if event.startswith("notice: "):
            self.say(event.removeprefix("notice: "))
            return
        if self._silent or event == "paused":
            return
        now = time.monotonic()
        interval = REDRAW_SECONDS if self._redraw else PLAIN_SECONDS
        if now - self._drawn_at < interval and not (event == "round" and s.dirty_sync_count == 1):
            return
        self._drawn_at = now
        line = progress_line(s)
        if self._redraw:
            columns = os.get_terminal_size(self._stream.fileno()).columns
            line = line[: columns - 1]
            self._write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._write(f"migrate-src: {line}\n")

    def _write(self, text: str) -> None:
        # Whoever reads it may be gone; that is no reason to stop.
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()

    def say(self, text: str) -> None:
        """A sentence on a line of its own."""
        self.clear()
        self._write(f"migrate-src: {text}\n")

    def clear(self) -> None:
        if self._width:
            self._write("\r" + " " * self._width + "\r")
            self._width = 0
