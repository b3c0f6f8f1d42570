"""What the command line says about views, and all of them as one observer.

    views = Views(args)                raises UsageError or ConnectError before anything moves
    views.describe(...)                what moves, from where to where
    views.observe(event, statistics)   as a Source calls it
    views.end(statistics)              a migration is over; another one may follow
    views.close()                      the program ends

A view that fails is left out from then on, with a word to the user: no call here raises, once the
views are made. What they show of names and of the peer's words is printable.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from migrate.output import printable
from migrate.statistics import Statistics
from migrate.views.history import History
from migrate.views.progress import Lines

if TYPE_CHECKING:
    from migrate.reception import Arrival
    from migrate.views.metrics import Metrics


def add_view_options(parser: argparse.ArgumentParser) -> None:
    """The options of migrate-src that say what is shown."""
    parser.add_argument(
        "--progress", choices=["auto", "plain", "never"], default="auto",
        help="auto: a live view on a terminal, else a line each 2 s and for each round; plain: "
        "lines; never: neither",
    )  # fmt: skip
    parser.add_argument(
        "--events", default="", metavar="json[:FD]",
        help="write each event as a JSON object on a line, to descriptor FD (default: 1, and then "
        "nothing else goes to standard output)",
    )  # fmt: skip
    parser.add_argument(
        "--report", default="", metavar="FILE.html",
        help="write a page with tables and plots when the migration is over, whatever came of it",
    )  # fmt: skip
    add_metrics_options(parser)


def add_metrics_options(parser: argparse.ArgumentParser) -> None:
    """The options of both programs."""
    parser.add_argument(
        "--metrics", default="", metavar="[HOST:]PORT",
        help="serve Prometheus metrics over HTTP (default host: 127.0.0.1; port 0 picks a free one "
        "and prints it)",
    )  # fmt: skip
    parser.add_argument(
        "--metrics-textfile", default="", metavar="PATH",
        help="write them to this file, each 5 s and at the end, for node_exporter to collect",
    )  # fmt: skip


def wants_live(mode: str, stream: TextIO) -> bool:
    """Whether there is a terminal that can be drawn on, and it was not declined."""
    terminal = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return mode == "auto" and terminal and _has_boxes(stream)


def _has_boxes(stream: TextIO) -> bool:
    """Whether the encoding has what pictures are drawn with."""
    try:
        "╭━█".encode(stream.encoding or "utf-8")
    except (UnicodeError, LookupError):
        return False
    return True


class Views:
    """All that is shown of the migrations of one program."""

    def __init__(self, args: argparse.Namespace, name: str = "migrate-src") -> None:
        self.history = History()
        self._name, self._stream = name, sys.stderr
        self._views: dict[str, Any] = {}
        self._failed: set[str] = set()
        """Views that have failed, by their option; "" is the text."""
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
        """Whether nothing but events may go to standard output."""
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
        """What is about to move, by name: guest, destination, and what was set."""
        self._each("describe", {name: printable(value) for name, value in facts.items()})

    def observe(self, event: str, s: Statistics) -> None:
        """An observer for Source."""
        event = printable(event)  # a notice is a sentence
        self.history.observe(event, s)
        self._each("observe", event, s)
        if self._metrics is not None:
            paused = self.history.paused_at is not None and not self.history.over
            self._guarded("--metrics-textfile", self._metrics.observe, paused)

    def end(self, s: Statistics) -> None:
        """A migration is over, whatever came of it; `s` is its last word."""
        self.history.observe("end", s)
        self._each("end", s)
        if self._metrics is not None:
            self._guarded("--metrics-textfile", self._metrics.write)

    def _each(self, verb: str, *arguments: Any) -> None:
        self._guarded("", getattr(self._text, verb), *arguments)
        for name in list(self._views):
            self._guarded(name, getattr(self._views[name], verb), *arguments)

    def _guarded(self, name: str, act: Callable[..., Any], *arguments: Any) -> None:
        """Does it, or leaves that view out from now on. Metrics are tried again, and may come."""
        try:
            act(*arguments)
        except Exception as error:
            self._views.pop(name, None)
            first = name not in self._failed
            self._failed.add(name)
            if not name:
                self._stop_drawing()
            if first:
                self.say(f"{name or 'the live view'} goes no further: {why(error)}")

    def _stop_drawing(self) -> None:
        """The text goes on as lines."""
        drawing, self._text = self._text, Lines(self.history, self._name, self._stream)
        with contextlib.suppress(Exception):
            drawing.clear()

    def say(self, text: str) -> None:
        """A sentence for the user, on standard error."""
        try:
            self._text.say(text)
        except Exception:
            self._stop_drawing()
            with contextlib.suppress(Exception):  # not a stream of migrate.output
                self._text.say(text)

    def clear(self) -> None:
        """Somebody else is about to write to the terminal."""
        self._guarded("", self._text.clear)

    def close(self) -> None:
        """The program ends."""
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
    """What is said of an error."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _metrics(args: argparse.Namespace, families: Callable[[], Any]) -> Metrics | None:
    """Raises UsageError, ConnectError."""
    if not args.metrics and not args.metrics_textfile:
        return None
    from migrate.views.metrics import Metrics

    return Metrics(families, args.metrics, args.metrics_textfile)


class DestinationViews:
    """What migrate-dst shows of the guest that comes: metrics."""

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
        """Something has happened."""
        arrival = self._arrival()
        if self._metrics is not None:
            self._do(self._metrics.observe, arrival is not None and arrival.status == "device")

    def close(self) -> None:
        """The program ends."""
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
