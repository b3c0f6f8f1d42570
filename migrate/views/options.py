"""What the command line says about views, and all of them as one observer.

views = Views(args)                raises UsageError or ConnectError before anything moves
views.describe(...)                what moves, from where to where
views.observe(event, statistics)   as a Source calls it
views.end(statistics)              a migration is over; another one may follow
views.close()                      the program ends
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from typing import TextIO

from migrate.statistics import Statistics
from migrate.views.history import History
from migrate.views.progress import Lines


def add_view_options(parser: argparse.ArgumentParser) -> None:
    """The options of migrate-src that say what is shown."""
    parser.add_argument(
        "--progress", choices=["auto", "plain", "never"], default="auto",
        help="auto: a live view on a terminal, else a line each 2 s and for each round; plain: "
        "lines; never: neither",
    )  # fmt: skip


def wants_live(mode: str, stream: TextIO) -> bool:
    """Whether there is a terminal that can be drawn on, and it was not declined."""
    return mode == "auto" and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Views:
    """All that is shown of the migrations of one program."""

    def __init__(self, args: argparse.Namespace, name: str = "migrate-src") -> None:
        self.history = History()
        mode = "never" if args.quiet else args.progress
        self._lines = Lines(self.history, name, sys.stderr, silent=mode == "never")

    def describe(self, facts: Mapping[str, str]) -> None:
        """What is about to move, by name: guest, destination, and what was set."""

    def observe(self, event: str, s: Statistics) -> None:
        """An observer for Source."""
        self.history.observe(event, s)
        self._lines.observe(event, s)

    def end(self, s: Statistics) -> None:
        """A migration is over, whatever came of it; `s` is its last word."""
        self.history.observe("end", s)
        self._lines.end()

    def say(self, text: str) -> None:
        """A sentence for the user, on standard error."""
        self._lines.say(text)

    def clear(self) -> None:
        """Somebody else is about to write to the terminal."""
        self._lines.clear()

    def close(self) -> None:
        """The program ends."""
        self._lines.close()
