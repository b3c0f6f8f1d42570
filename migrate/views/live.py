"""The live view: a picture that is redrawn in place on a terminal, with notices above it.

The event loop of the migration draws it, so drawing is kept short and rare. In the pause nothing is
drawn: the last frame before it stays until the guest runs. While the terminal takes no output (^S),
nothing is drawn either; what was written before waits in migrate.output.

    under 60 columns    the current state
    60 to 139           the last rounds below it, if the terminal is high enough
    from 140            the last rounds beside it
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live as Region
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from migrate.events import Event, Notice, SourceEvent
from migrate.output import printable
from migrate.output.streams import behind
from migrate.statistics import Statistics, Status
from migrate.units import format_size
from migrate.views.history import History, RoundRecord

FRAME_SECONDS = 0.2
NARROW, WIDE, WIDEST = 60, 140, 144
KINDS = (("zero", "cyan"), ("whole", "yellow"), ("delta", "green"))
COLOURS = {
    Status.COMPLETED: "bold green", Status.FAILED: "bold red", Status.CANCELLED: "bold red"
}  # fmt: skip
BLOCKS = " ▁▂▃▄▅▆▇█"


def bar(share: float, width: int, style: str) -> Text:
    """Return a bar of `width` cells, filled up to `share` (0 to 1)."""
    filled = round(min(max(share, 0.0), 1.0) * width)
    return Text.assemble(("━" * filled, style), ("━" * (width - filled), "bright_black"))


def stacked(parts: Sequence[tuple[float, str]], width: int) -> Text:
    """Return a bar of several colours in proportion. A value above zero gets at least one cell."""
    total = sum(value for value, _ in parts)
    if not total:
        return Text("━" * width, "bright_black")
    cells = [max(round(value * width / total), 1) if value else 0 for value, _ in parts]
    cells[cells.index(max(cells))] += width - sum(cells)
    return Text.assemble(
        *(("━" * n, style) for n, (_, style) in zip(cells, parts, strict=True) if n > 0)
    )


def sparkline(values: list[float], width: int) -> str:
    """Return the last `width` values as columns in one line."""
    values = values[-width:]
    most = max(values, default=0.0)
    if not most:
        return BLOCKS[1] * len(values)
    return "".join(BLOCKS[1 + round(value / most * 7)] for value in values)


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f} ms"


def lines(rows: Iterable[tuple[str, Text | str]]) -> Text:
    """Return one line per row: its name and its text.

    This is one text of many lines, because a table of rich takes ten times as long to draw.
    """
    text = Text(no_wrap=True, overflow="ellipsis")
    for name, said in rows:
        text.append(f"{name:<15}", "bright_black").append(said).append("\n")
    text.rstrip()
    return text


def facts(history: History, limit: str, width: int) -> Text:
    """Return the current state, for a terminal of this width."""
    s, rounds = history.last, list(history.recent)
    room = max(min(width - 18, 40), 8)
    over = s.status in COLOURS
    number = s.dirty_sync_count + (s.status is Status.ACTIVE)
    about = f"  round {number}  {s.total_time:.1f} s"
    moved = 1 - s.remaining / s.total if s.total else 0.0
    dirty = f"{format_size(s.dirty_pages_rate * s.page_size)}/s" if rounds else "-"
    rows: list[tuple[str, Text | str]] = [
        ("status", Text.assemble((s.status, COLOURS.get(s.status, "bold")), about)),
        ("remaining", f"{format_size(s.remaining)} of {format_size(s.total)}"),
        ("", bar(moved, room, "green" if s.status is Status.COMPLETED else "blue")),
        ("dirtied", dirty + ("" if over else f", sending {s.mbps:.0f} Mbit/s")),
    ]
    if len(rounds) > 1:
        columns = sparkline([float(r.remaining) for r in rounds[-room:]], room)
        rows.append(("per round", Text(columns, "blue")))
    rows += _kinds(s, room)
    if s.xbzrle:
        rows.append(("cache hits", _hits(s, rounds)))
    rows.append(_downtime(s, limit))
    if s.reconnects:
        rows.append(("reconnects", str(s.reconnects)))
    return lines(rows)


def _downtime(s: Statistics, limit: str) -> tuple[str, Text | str]:
    """Return the row of the downtime: predicted, then real."""
    if s.downtime is not None:
        expected = f", {milliseconds(s.expected_downtime)} expected"
        return "downtime", Text.assemble((milliseconds(s.downtime), "bold"), expected)
    allowed = f" of {limit} allowed" if limit and s.expected_downtime is not None else ""
    return "exp. downtime", milliseconds(s.expected_downtime) + allowed


def _kinds(s: Statistics, room: int) -> list[tuple[str, Text | str]]:
    """Return the rows of guest bytes by kind of page, and of their cost on the wire."""
    counts = (s.duplicate, s.normal, s.xbzrle_pages)
    rows: list[tuple[str, Text | str]] = [("on the wire", format_size(s.transferred))]
    for (name, style), pages in zip(KINDS, counts, strict=True):
        text = Text(f"{format_size(pages * s.page_size):>10} ", style)
        if name == "delta" and pages:
            text.append(f" as {format_size(s.xbzrle_bytes)}", "default")
        rows.append((f"  {name}", text))
    drawn = [(pages, style) for (_, style), pages in zip(KINDS, counts, strict=True)]
    return [*rows, ("", stacked(drawn, room))]


def _hits(s: Statistics, rounds: list[RoundRecord]) -> str:
    if not s.cache_hits + s.cache_miss:
        return "-"
    text = f"{1 - s.cache_miss_rate:.1%}"
    last = rounds[-1].hit_ratio if rounds else None
    return text + (f" ({last:.1%} last round)" if last is not None else "")


COLUMNS = (("round", 7), ("s", 7), ("wire", 11), ("zero", 8), ("whole", 8), ("delta", 8),
           ("hits", 6), ("left", 11), ("exp.", 9))  # fmt: skip


def table(history: History, rows: int) -> Text:
    """Return the last rounds, a line each."""
    records = [*history.recent, *([history.tail] if history.tail else [])]
    records = records[max(len(records) - rows, 0) :]
    heads = "".join(f"{name:>{width}}" for name, width in COLUMNS)
    text = Text(heads, "bright_black", no_wrap=True, overflow="ellipsis")
    for r in records:
        cells = (
            str(r.number), f"{r.seconds:.2f}", format_size(r.wire_bytes), str(r.zero),
            str(r.normal), str(r.delta), "-" if r.hit_ratio is None else f"{r.hit_ratio:.0%}",
            format_size(r.remaining), milliseconds(r.expected_downtime),
        )  # fmt: skip
        pairs = zip(cells, COLUMNS, strict=True)
        line = "".join(f"{cell:>{width}}" for cell, (_, width) in pairs)
        text.append(f"\n{line}", "default bold" if r.paused else "default")
    return text


def picture(
    history: History, described: Mapping[str, str], width: int, height: int
) -> RenderableType:  # fmt: skip
    """Return one frame for a terminal of this size."""
    limit = described.get("downtime limit", "")
    title = Text(
        f"{described.get('guest', 'guest')} → {described.get('destination', '')}", "bold",
        no_wrap=True, overflow="ellipsis",
    )  # fmt: skip
    if width < NARROW:
        body: RenderableType = facts(history, limit, width)
        return Group(title, body)
    if width < WIDE:
        body = facts(history, limit, width)
        rows = min(height - 20, 10)
        if rows > 0 and history.recent:
            body = Group(body, Text(), table(history, rows))
    else:
        body = Table.grid(padding=(0, 3))
        body.add_row(facts(history, limit, 58), table(history, min(height - 5, 11)))
    return Panel(body, title=title, title_align="left", border_style="bright_black",
                 width=min(width - 1, WIDEST if width >= WIDE else 90))  # fmt: skip


class Live:
    """A view that draws on `stream`, a terminal.

    clock -- in seconds; limits the rate of frames
    """

    def __init__(
        self, history: History, name: str, stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._history = history
        self._name = name
        self._stream = stream
        self._clock = clock
        self._console = Console(file=stream, highlight=False)
        self._region: Region | None = None
        self._described: Mapping[str, str] = {}
        self._drawn_at = float("-inf")
        self._drawn_width = 0

    def describe(self, facts: Mapping[str, str]) -> None:
        """Take what is about to move, for the title."""
        self._described = facts

    def observe(self, event: Event, s: Statistics) -> None:
        """Draw a frame if one is due. The history has taken the event already."""
        if isinstance(event, Notice):
            self.say(event.text)
        elif event is SourceEvent.STATUS:
            if not self._history.over:
                self._draw()  # DEVICE comes before the guest is paused
        elif s.status is Status.ACTIVE and self._clock() - self._drawn_at >= FRAME_SECONDS:
            self._draw()  # in the pause the status is DEVICE

    def _draw(self) -> None:
        if behind(self._stream):
            return
        console = self._console
        width, height = console.size
        if self._region is not None and width < self._drawn_width:
            # The terminal has wrapped the old frame, so it cannot be overwritten in place.
            self._stop()
            console.clear()
        if self._region is None:
            # Other output to standard error goes above the picture; standard output is untouched.
            self._region = Region(console=console, auto_refresh=False, redirect_stdout=False)
            self._region.start()
        self._drawn_width = min(width, WIDEST)
        frame = picture(self._history, self._described, width, height)
        self._region.update(frame, refresh=True)
        self._drawn_at = self._clock()

    def say(self, text: str) -> None:
        """Print a sentence above the picture."""
        line = Text(f"{self._name}: {printable(text)}")
        self._console.print(line, soft_wrap=True, markup=False, emoji=False)

    def end(self, _s: Statistics) -> None:
        """Draw the last frame, which stays."""
        self.clear()

    def clear(self) -> None:
        """Release the terminal: the last frame stays, and the cursor is below it."""
        if self._region is not None and self._history.over:
            self._draw()
        self._stop()

    def close(self) -> None:
        """Release the terminal for good."""
        self.clear()

    def _stop(self) -> None:
        if self._region is not None:
            region, self._region = self._region, None
            region.stop()
