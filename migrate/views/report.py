"""`--report FILE.html`: one self-contained page about a migration that is over.

`report_page` makes the text and tables; a helper process draws the figures (`drawing`, `plots`).
The program checks for matplotlib before the migration begins, and loads it after the migration.
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from migrate.errors import UsageError
from migrate.events import Event
from migrate.files.filesystem import check_file, write_whole
from migrate.statistics import OVER, Statistics
from migrate.units import parse_milliseconds
from migrate.views import drawing
from migrate.views.history import History
from migrate.views.report_page import page


class Report:
    """A view that writes a page after each migration: the first to `path`, others beside it.

    The constructor raises UsageError if the page cannot be written or drawn. If drawing fails
    later, the page has no figures and says why.
    """

    def __init__(
        self, history: History, path: str, clock: Callable[[], float] = time.time
    ) -> None:  # fmt: skip
        drawing.check()
        directory = os.path.dirname(path) or "."
        if os.path.isdir(path) or not os.path.isdir(directory):
            raise UsageError(f"--report {path}: no file can be made there")
        if os.path.exists(path) and not os.path.isfile(path):
            raise UsageError(f"--report {path}: it is not a regular file, and is not replaced")
        check_file(path, "--report")
        self._history = history
        self._path = path
        self._clock = clock
        self._described: Mapping[str, str] = {}
        self._thread = ThreadPoolExecutor(1)
        self._drawn: list[Future[str]] = []

    def describe(self, facts: Mapping[str, str]) -> None:
        """Take what is about to move, for the heading and the options."""
        self._described = facts

    def _limit(self) -> float | None:
        """Return the downtime limit in milliseconds, or None if it is not known."""
        with contextlib.suppress(UsageError):
            return parse_milliseconds(
                self._described.get("downtime limit", "").replace(" ", ""), ""
            )
        return None

    def observe(self, event: Event, s: Statistics) -> None:
        """Do nothing: the page is made from the history."""

    def end(self, s: Statistics) -> None:
        """Write the page in a thread: drawing takes seconds, in which commands may come."""
        if s.status in OVER:
            now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self._clock()))
            history = copy.deepcopy(self._history)  # the next migration resets it
            self._drawn.append(
                self._thread.submit(self._draw, history, self._described, self._limit(), now)
            )

    def close(self) -> str:
        """Wait until all pages are written; return what went wrong, or ""."""
        self._thread.shutdown()
        faults = [fault for one in self._drawn if (fault := one.exception())]
        if faults:
            return f"{getattr(faults[0], 'strerror', None) or faults[0]}"
        return next((said for one in self._drawn if (said := one.result())), "")

    def _draw(
        self, history: History, described: Mapping[str, str], limit: float | None, now: str
    ) -> str:
        """Write one page; return why it has no figures, or ""."""
        figures, missing = [], ""
        try:
            figures = drawing.figures(history, limit)
        except Exception as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            missing = f"the page has no figures: {why}"
        text = page(history, described, figures, now, missing)
        path, number = self._path, history.migrations
        if number > 1:
            stem, suffix = os.path.splitext(path)
            path = f"{stem}-{number}{suffix}"
        write_whole(path, text.encode("utf-8", "backslashreplace"), "--report")
        return missing
