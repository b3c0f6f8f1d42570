"""The views that the command line asks for, as one observer.

    views = Views(args)                raises UsageError or ConnectError before anything moves
    views.describe(...)                what moves, from where to where
    views.observe(event, statistics)   called by the migration
    views.end(statistics)              a migration is over; another one may follow
    views.close()                      the program ends

A view that fails is dropped, and the user is told so: once the views are made, no call here raises.
Text from outside (names, the peer's sentences) is made printable before a view gets it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from migrate.events import Event, Notice
from migrate.output import printable
from migrate.statistics import Statistics, Status
from migrate.views.history import History
from migrate.views.progress import Lines

if TYPE_CHECKING:
    from migrate.destination.receiver import Arrival
    from migrate.views.metrics import Metrics


def add_view_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of migrate-src that say what is shown."""
    parser.add_argument(
        "--progress", choices=["auto", "plain", "never"], default="auto",
        help="auto: a live view on a terminal, else a line every 2 s and per round; plain: lines; "
        "never: neither",
    )  # fmt: skip
    parser.add_argument(
        "--events", default="", metavar="json[:FD]",
        help="write each event as a line of JSON to file descriptor FD (default: 1; nothing else "
        "goes to standard output then)",
    )  # fmt: skip
    parser.add_argument(
        "--report", default="", metavar="FILE.html",
        help="write a page with tables and plots after the migration, also if it failed",
    )  # fmt: skip
    add_metrics_options(parser)


def add_metrics_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of both programs."""
    parser.add_argument(
        "--metrics", default="", metavar="[HOST:]PORT",
        help="serve Prometheus metrics over HTTP (default host: 127.0.0.1; port 0 picks a free "
        "port and prints it)",
    )  # fmt: skip
    parser.add_argument(
        "--metrics-textfile", default="", metavar="PATH",
        help="write the metrics to this file every 5 s and at the end, for node_exporter",
    )  # fmt: skip


def wants_live(mode: str, stream: TextIO) -> bool:
    """Return whether to draw a live view: the terminal is capable, and the user wants no lines."""
    terminal = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return mode == "auto" and terminal and _has_boxes(stream)


def _has_boxes(stream: TextIO) -> bool:
    """Return whether the stream's encoding has the characters that the live view uses."""
    try:
        "╭━█".encode(stream.encoding or "utf-8")
    except (UnicodeError, LookupError):
        return False
    return True


class Views:
    """All views of the migrations of one program.

    history     -- what each round did
    owns_stdout -- whether standard output is for events alone
    """

    def __init__(self, args: argparse.Namespace, name: str = "migrate-src") -> None:
        self.history = History()
        self._name, self._stream = name, sys.stderr
        self._views: dict[str, Any] = {}
        # Views that have failed, by their option; "" is the text view.
        self._failed: set[str] = set()
        self._metrics: Metrics | None = None
        mode = "never" if args.quiet else args.progress
        self._add_events(args.events)
        self._text = self._text_view(mode, name)
        self._add_report(args.report)
        self._metrics = _metrics(args, self._families)
        if self._metrics and self._metrics.address and not args.quiet:
            self.say(f"metrics at {self._metrics.address}")

    def _text_view(self, mode: str, name: str) -> Any:
        lines = Lines(self.history, name, self._stream, silent=mode == "never")
        if self._events_on_terminal or not wants_live(mode, self._stream):
            return lines
        from migrate.views.live import Live

        return Live(self.history, name, self._stream)

    def _add_events(self, text: str) -> None:
        self.owns_stdout = False
        self._events_on_terminal = False
        if text:
            from migrate.views.events import Events, parse_events

            fd = parse_events(text)
            self._events_on_terminal = os.isatty(fd)
            self.owns_stdout = fd == 1
            self._views["--events"] = Events(self.history, fd)

    def _add_report(self, path: str) -> None:
        if path:
            from migrate.views.report import Report

            self._views["--report"] = Report(self.history, path)

    def _families(self) -> Any:
        from migrate.views.metrics import source_families

        return source_families(self.history.last)

    def describe(self, facts: Mapping[str, str]) -> None:
        """Take what is about to move, by name: guest, destination, and parameters."""
        self._each("describe", {name: printable(value) for name, value in facts.items()})

    def observe(self, event: Event, s: Statistics) -> None:
        """Show an event of the migration (see migrate.events)."""
        if isinstance(event, Notice):
            event = Notice(printable(event.text))
        self.history.observe(event, s)
        self._each("observe", event, s)
        if self._metrics is not None:
            paused = self.history.paused_at is not None and not self.history.over
            self._guarded("--metrics-textfile", self._metrics.observe, paused)

    def end(self, s: Statistics) -> None:
        """Show the final statistics of a migration, also of one that failed."""
        self.history.end(s)
        self._each("end", s)
        if self._metrics is not None:
            self._guarded("--metrics-textfile", self._metrics.write)

    def _each(self, verb: str, *arguments: Any) -> None:
        self._guarded("", getattr(self._text, verb), *arguments)
        for name in list(self._views):
            self._guarded(name, getattr(self._views[name], verb), *arguments)

    def _guarded(self, name: str, act: Callable[..., Any], *arguments: Any) -> None:
        """Call a view; if it fails, drop it. Metrics are kept, and tried again next time.

        name -- its option; "" is the text view
        """
        try:
            act(*arguments)
        except Exception as error:
            self._views.pop(name, None)
            first = name not in self._failed
            self._failed.add(name)
            if not name:
                self._stop_drawing()
            if first:
                self.say(f"{name or 'the live view'} has failed: {why(error)}")

    def _stop_drawing(self) -> None:
        """Replace the live view by lines."""
        drawing, self._text = self._text, Lines(self.history, self._name, self._stream)
        with contextlib.suppress(Exception):
            drawing.clear()

    def say(self, text: str) -> None:
        """Print a sentence to standard error."""
        try:
            self._text.say(text)
        except Exception:
            self._stop_drawing()
            with contextlib.suppress(Exception):  # a stream that is not of migrate.output
                self._text.say(text)

    def clear(self) -> None:
        """Release the terminal: other output follows."""
        self._guarded("", self._text.clear)

    def close(self) -> None:
        """Close all views, as the program ends."""
        self.clear()
        for name in list(self._views):
            self._guarded(name, self._close, name)
        self._views.clear()
        self._guarded("", self._text.close)
        if self._metrics is not None:
            self._guarded("--metrics", self._metrics.close)

    def _close(self, name: str) -> None:
        view = self._views[name]
        if hasattr(view, "close") and (said := view.close()):
            self.say(f"{said}" if said.startswith(name) else f"{name}: {said}")


def why(error: Exception) -> str:
    """Return the text of an error, without the file name that OSError adds."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _metrics(args: argparse.Namespace, families: Callable[[], Any]) -> Metrics | None:
    """Return the metrics that the command line asks for. Raises UsageError, ConnectError."""
    if not args.metrics and not args.metrics_textfile:
        return None
    from migrate.views.metrics import Metrics

    return Metrics(families, args.metrics, args.metrics_textfile)


class DestinationViews:
    """The views of migrate-dst: metrics of the guest that it receives."""

    def __init__(
        self, args: argparse.Namespace, arrival: Callable[[], Arrival | None],
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._arrival = arrival
        self._say = say
        self._failed = False
        self._metrics = _metrics(args, self._families)
        if self._metrics and self._metrics.address:
            say(f"metrics at {self._metrics.address}")

    def _families(self) -> Any:
        from migrate.views.metrics import destination_families

        return destination_families(self._arrival())

    def observe(self) -> None:
        """Update the metrics after an event."""
        arrival = self._arrival()
        if self._metrics is not None:
            self._do(self._metrics.observe, arrival is not None and arrival.status is Status.DEVICE)

    def close(self) -> None:
        """Write the metrics for the last time, as the program ends."""
        if self._metrics is not None:
            self._do(self._metrics.write)
            self._do(self._metrics.close)

    def _do(self, act: Callable[..., None], *arguments: Any) -> None:
        try:
            act(*arguments)
        except Exception as error:
            if not self._failed:
                self._say(f"--metrics-textfile: {why(error)}")
            self._failed = True
