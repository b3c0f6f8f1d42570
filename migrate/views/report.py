"""`--report FILE.html`: one page on a migration that is over, with all it needs inside.

Words and tables are made here, pictures in `plots`, by a helper process (see `drawing`). Nothing
on the page comes from elsewhere, so it can be mailed and kept; what others wrote (a guest's
description, an error) is escaped. matplotlib is looked for before the migration begins, and loaded
after it is over.
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from html import escape
from importlib.util import find_spec
from pathlib import Path

from migrate.errors import UsageError
from migrate.filesystem import check_file, write_whole
from migrate.quantities import format_size, parse_milliseconds
from migrate.statistics import Statistics
from migrate.views import drawing
from migrate.views.history import OVER, History, RoundRecord

MAX_ROWS = 200
STYLE = (Path(__file__).parent / "report.css").read_text()


def milliseconds(seconds: float | None) -> str:
    """A time for people: 12.3 ms, 250 ms, 4.50 s."""
    if seconds is None:
        return "-"
    if seconds >= 10:
        return f"{seconds:.1f} s"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def verdict(s: Statistics) -> str:
    """What came of it, in one sentence."""
    took = milliseconds(s.total_time)
    rounds = "1 round" if s.dirty_sync_count == 1 else f"{s.dirty_sync_count} rounds"
    if s.status == "completed":
        return (
            f"The guest of {format_size(s.total)} moved in {took} and {rounds}, was verified, and "
            f"stood still for {milliseconds(s.downtime)}."
        )
    if s.status == "cancelled":
        return (
            f"The migration was cancelled after {took} and {rounds}: the guest runs on here, if it "
            "ran before."
        )
    return f"The migration failed after {took} and {rounds}."


def slowed(s: Statistics) -> str:
    most = s.cpu_throttle_highest
    return f" The guest was slowed by up to {most} %." if most else ""


def tiles(s: Statistics) -> list[tuple[str, str, str]]:
    """The numbers to look at first: name, value, and what to hold it against."""
    predicted = f"{milliseconds(s.expected_downtime)} predicted"
    saved = s.xbzrle_pages * s.page_size - s.xbzrle_bytes
    return [
        ("downtime", milliseconds(s.downtime), predicted),
        ("total time", milliseconds(s.total_time), f"{milliseconds(s.setup_time)} of it setup"),
        ("on the wire", format_size(s.transferred), f"{_multiple(s)} the guest's size"),
        ("saved by deltas", format_size(max(saved, 0)), f"{s.xbzrle_pages} pages as deltas"),
        ("cache hits", percent(_hits(s)), f"{s.cache_hits} of {s.cache_hits + s.cache_miss}"),
        ("left to move", format_size(s.remaining), f"of {format_size(s.total)}"),
    ]


def _multiple(s: Statistics) -> str:
    return f"{s.transferred / s.total:.2f} times" if s.total else "-"


def _hits(s: Statistics) -> float | None:
    return 1 - s.cache_miss_rate if s.cache_hits + s.cache_miss else None


def moved(s: Statistics) -> list[tuple[str, ...]]:
    """Kinds of page: how many, what of the guest they stand for, what they cost."""
    size = s.page_size
    rest = s.transferred - s.normal * size - s.xbzrle_bytes
    rest_name = "zero, and all framing"
    if s.status != "completed":
        rest_name += ", and a batch that was cut off"
    return [
        ("whole", f"{s.normal}", format_size(s.normal * size), format_size(s.normal * size)),
        ("delta", f"{s.xbzrle_pages}", format_size(s.xbzrle_pages * size),
         format_size(s.xbzrle_bytes)),
        (rest_name, f"{s.duplicate}", format_size(s.duplicate * size),
         format_size(max(rest, 0))),
        ("dirty, but equal: not sent", f"{s.skipped}", format_size(s.skipped * size), "0 B"),
        ("total", f"{s.duplicate + s.normal + s.xbzrle_pages + s.skipped}",
         format_size((s.duplicate + s.normal + s.xbzrle_pages + s.skipped) * size),
         format_size(s.transferred)),
    ]  # fmt: skip


def round_row(r: RoundRecord) -> tuple[str, ...]:
    name = f"{r.number}" if r.first == r.number else f"{r.first} to {r.number}"
    if r.paused or r.unfinished:
        name += " (unfinished)" if r.unfinished else " (pause)"
    if r.unfinished and not r.pages:
        name = "after them"
    return (
        name, milliseconds(r.seconds), format_size(r.wire_bytes), f"{r.mbps:.0f}", f"{r.zero}",
        f"{r.normal}", f"{r.delta}", f"{r.skipped}", percent(r.hit_ratio), f"{r.overflow}",
        format_size(r.remaining), f"{format_size(r.dirty_rate)}/s",
        milliseconds(r.expected_downtime),
    )  # fmt: skip


ROUND_HEADS = (
    "round", "time", "on the wire", "Mbit/s", "zero", "whole", "delta", "equal", "cache hits",
    "overflow", "left after it", "dirtied", "downtime predicted",
)  # fmt: skip


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], kind: str = "") -> str:
    cells = "".join(f"<th>{escape(head)}</th>" for head in heads)
    lines = ("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    body = "\n".join(lines)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{cells}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _rounds(records: list[RoundRecord]) -> str:
    """All rounds, or the first and last ones of too many."""
    left_out = len(records) - MAX_ROWS
    note = ""
    if left_out > 0:
        half = MAX_ROWS // 2
        records = records[:half] + records[-half:]
        note = f"<p>{left_out} rows in the middle are left out.</p>"
    return note + _table(ROUND_HEADS, [round_row(r) for r in records], "rounds")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>" if body else ""


def _list(sentences: list[str]) -> str:
    items = "".join(f"<li>{escape(one)}</li>" for one in sentences)
    return f"<ul>{items}</ul>" if items else ""


def page(
    history: History, described: Mapping[str, str], figures: list[tuple[str, str]], now: str
) -> str:  # fmt: skip
    """The whole page; `figures` are titles and SVG."""
    s = history.last
    records = history.rounds()
    heading = f"{described.get('guest', 'A guest')} → {described.get('destination', '')}"
    boxes = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<small>{escape(note)}</small></div>"
        for name, value, note in tiles(s)
    )
    plots = "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in figures
    )
    capabilities = {f"capability {k}": "on" if v else "off" for k, v in s.capabilities.items()}
    options = [(k, v) for k, v in {**described, **capabilities}.items()]
    return "\n".join([
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(f'Migration {s.status}: {heading}')}</title>",
        f"<style>{STYLE}</style></head><body><main>",
        f'<header><p class="what">{escape(heading)}</p>',
        f'<h1 class="{escape(s.status)}">{escape(verdict(s) + slowed(s))}</h1>',
        f'<p class="why">{escape(s.error)}</p></header>' if s.error else "</header>",
        f'<div class="tiles">{boxes}</div>',
        _section("Advice", _list(list(getattr(s, "advice", ())))),
        f'<div class="plots">{plots}</div>',
        _section("What moved", _table(("kind", "pages", "of the guest", "on the wire"), moved(s))),
        _section("Rounds", _rounds(records) if records else ""),
        _section("Options", _table(("name", "value"), options, "options")),
        _section("Notices", _list(history.notices)),
        f"<footer>xbmigrate, {escape(now)}</footer></main></body></html>\n",
    ])  # fmt: skip


class Report:
    """A view that writes a page when a migration is over; of further ones beside the first.

    Raises UsageError where it cannot be written, or drawn.
    """

    def __init__(
        self, history: History, path: str, clock: Callable[[], float] = time.time
    ) -> None:  # fmt: skip
        if find_spec("matplotlib") is None:
            raise UsageError("--report draws with matplotlib: pip install 'xbmigrate[report]'")
        directory = os.path.dirname(path) or "."
        if os.path.isdir(path) or not os.path.isdir(directory):
            raise UsageError(f"--report {path}: there is no such place for a file")
        if os.path.exists(path) and not os.path.isfile(path):
            raise UsageError(f"--report {path}: it is no plain file, and is not replaced")
        check_file(path, "--report")
        self._history = history
        self._path = path
        self._clock = clock
        self._described: Mapping[str, str] = {}
        self._thread = ThreadPoolExecutor(1)
        self._drawn: list[Future[None]] = []

    def describe(self, facts: Mapping[str, str]) -> None:
        """What is about to move: the heading and the options."""
        self._described = facts

    def _limit(self) -> float | None:
        """Milliseconds of downtime that were allowed, where that is known."""
        with contextlib.suppress(UsageError):
            return parse_milliseconds(
                self._described.get("downtime limit", "").replace(" ", ""), ""
            )
        return None

    def observe(self, event: str, s: Statistics) -> None:
        """The history knows all."""

    def end(self, s: Statistics) -> None:
        """Has it drawn and written, by a thread: it takes seconds, and the program is asked."""
        if s.status in OVER:
            now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self._clock()))
            history = copy.deepcopy(self._history)  # the next migration begins another one
            self._drawn.append(
                self._thread.submit(self._draw, history, self._described, self._limit(), now)
            )

    def close(self) -> str:
        """Waits for what is drawn; what went wrong, or ""."""
        self._thread.shutdown()
        faults = [fault for one in self._drawn if (fault := one.exception())]
        return f"{getattr(faults[0], 'strerror', None) or faults[0]}" if faults else ""

    def _draw(
        self, history: History, described: Mapping[str, str], limit: float | None, now: str
    ) -> None:
        text = page(history, described, drawing.figures(history, limit), now)
        path, number = self._path, history.migrations
        if number > 1:
            stem, suffix = os.path.splitext(path)
            path = f"{stem}-{number}{suffix}"
        write_whole(path, text.encode("utf-8", "backslashreplace"), "--report")
