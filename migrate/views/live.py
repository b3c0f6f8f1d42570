"""The live view: what happens now, drawn in place on a terminal, notices above it.

Drawing happens in the event loop of the migration, between its steps, so it is kept short and
rare, and in the pause nothing is drawn: the picture stands still from the moment before the guest
is stopped to the moment after it runs. It is not drawn either while the terminal takes nothing
(^S): what is written there waits in migrate.output.

    under 60 columns    what happens now
    more                the last rounds below it, as far as the height goes
    140 columns         the last rounds beside it
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

from migrate.output import behind, printable
from migrate.quantities import format_size
from migrate.statistics import Statistics
from migrate.views.history import History, RoundRecord

FRAME_SECONDS = 0.2
NARROW, WIDE, WIDEST = 60, 140, 144
KINDS = (("zero", "cyan"), ("whole", "yellow"), ("delta", "green"))
COLOURS = {"completed": "bold green", "failed": "bold red", "cancelled": "bold red"}
BLOCKS = " ▁▂▃▄▅▆▇█"


def bar(share: float, width: int, style: str) -> Text:
    """A bar of `width` cells, so much of it filled."""
    filled = round(min(max(share, 0.0), 1.0) * width)
    return Text.assemble(("━" * filled, style), ("━" * (width - filled), "bright_black"))


def stacked(parts: Sequence[tuple[float, str]], width: int) -> Text:
    """One bar of several colours in proportion; each that is not zero is seen."""
    total = sum(value for value, _ in parts)
    if not total:
        return Text("━" * width, "bright_black")
    cells = [max(round(value * width / total), 1) if value else 0 for value, _ in parts]
    cells[cells.index(max(cells))] += width - sum(cells)
    return Text.assemble(
        *(("━" * n, style) for n, (_, style) in zip(cells, parts, strict=True) if n > 0)
    )


def sparkline(values: list[float], width: int) -> str:
    """The last values as columns of up to one line's height."""
    values = values[-width:]
    most = max(values, default=0.0)
    if not most:
        return BLOCKS[1] * len(values)
    return "".join(BLOCKS[1 + round(value / most * 7)] for value in values)


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f} ms"


def lines(rows: Iterable[tuple[str, Text | str]]) -> Text:
    """A name and what there is to say, on a line each.

    One text of many lines: a table of rich takes ten times as long to draw.
    """
    text = Text(no_wrap=True, overflow="ellipsis")
    for name, said in rows:
        text.append(f"{name:<15}", "bright_black").append(said).append("\n")
    text.rstrip()
    return text


def facts(history: History, limit: str, width: int) -> Text:
    """What happens now."""
    s, rounds = history.last, list(history.recent)
    room = max(min(width - 18, 40), 8)
    over = s.status in COLOURS
    number = s.dirty_sync_count + (s.status == "active")
    about = f"  round {number}  {s.total_time:.1f} s"
    moved = 1 - s.remaining / s.total if s.total else 0.0
    dirty = f"{format_size(s.dirty_pages_rate * s.page_size)}/s" if rounds else "-"
    rows: list[tuple[str, Text | str]] = [
        ("status", Text.assemble((s.status, COLOURS.get(s.status, "bold")), about)),
        ("remaining", f"{format_size(s.remaining)} of {format_size(s.total)}"),
        ("", bar(moved, room, "green" if s.status == "completed" else "blue")),
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
    """What was expected, and what came."""
    if s.downtime is not None:
        expected = f", {milliseconds(s.expected_downtime)} expected"
        return "downtime", Text.assemble((milliseconds(s.downtime), "bold"), expected)
    allowed = f" of {limit} allowed" if limit and s.expected_downtime is not None else ""
    return "exp. downtime", milliseconds(s.expected_downtime) + allowed


def _kinds(s: Statistics, room: int) -> list[tuple[str, Text | str]]:
    """Bytes of the guest by how they were sent, and what they cost on the wire."""
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
    """The last rounds, a line for each."""
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
    """One frame for a terminal of this size."""
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

    clock -- seconds, for the distance of frames
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
        """What is about to move: the title."""
        self._described = facts

    def observe(self, event: str, s: Statistics) -> None:
        """After the history was told."""
        if event.startswith("notice: "):
            self.say(event.removeprefix("notice: "))
        elif event == "status":
            if not self._history.over:
                self._draw()  # "device" comes before the guest is stopped
        elif s.status == "active" and self._clock() - self._drawn_at >= FRAME_SECONDS:
            self._draw()  # in the pause the status is "device"

    def _draw(self) -> None:
        if behind(self._stream):
            return
        console = self._console
        width, height = console.size
        if self._region is not None and width < self._drawn_width:
            # Its lines are wrapped now: nobody knows where they begin.
            self._stop()
            console.clear()
        if self._region is None:
            # What others print to standard error goes above it; the result goes where it belongs.
            self._region = Region(console=console, auto_refresh=False, redirect_stdout=False)
            self._region.start()
        self._drawn_width = min(width, WIDEST)
        frame = picture(self._history, self._described, width, height)
        self._region.update(frame, refresh=True)
        self._drawn_at = self._clock()

    def say(self, text: str) -> None:
        """A sentence above the picture."""
        line = Text(f"{self._name}: {printable(text)}")
        self._console.print(line, soft_wrap=True, markup=False, emoji=False)

    def end(self, _s: Statistics) -> None:
        """The last frame, which stays."""
        self.clear()

    def clear(self) -> None:
        """Others may write below the last frame from here on; the cursor is as it was."""
        if self._region is not None and self._history.over:
            self._draw()
        self._stop()

    def close(self) -> None:
        """Nothing follows."""
        self.clear()

    def _stop(self) -> None:
        if self._region is not None:
            region, self._region = self._region, None
            region.stop()
