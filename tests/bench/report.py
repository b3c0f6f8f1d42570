"""What a part is given and what it hands back; tables as text for terminal and README alike."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


class LeftOutError(Exception):
    """Something cannot be measured here; the message is one sentence that says why."""


@dataclass(frozen=True)
class Options:
    """`runs` is how often each measurement is repeated; 0 leaves it to the part."""

    quick: bool = False
    runs: int = 0

    def turns(self, usual: int = 3) -> int:
        return self.runs or (1 if self.quick else usual)

    def counted(self, usual: int = 3) -> str:
        """The sentence that says how often."""
        turns = self.turns(usual)
        return "One run of each." if turns == 1 else f"Medians of {turns} runs, taken in turn."

    def say(self, text: str) -> None:
        """Progress, for whoever waits."""
        print(f"  {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Table:
    """The first column names the row and is aligned left, the others right.

    title -- stands above the table; "" for none
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"a row of {len(row)} cells in a table of {len(self.head)}: {row}")

    def markdown(self) -> str:
        """A Markdown table that is also aligned as plain text."""
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (self.head, *self.rows)]
        widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]

        def line(row: Sequence[str]) -> str:
            padded = [row[0].ljust(widths[0])]
            padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            return f"| {' | '.join(padded)} |"

        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines = [line(cells[0]), line(rule), *map(line, cells[1:])]
        return "\n".join([f"**{self.title}**", "", *lines] if self.title else lines)


@dataclass(frozen=True)
class Part:
    """What one part found.

    method -- sentences that say what was measured and how
    notes  -- sentences on what was left out, and what to know when reading the table
    data   -- all numbers, each run of them: goes to bench.json and to the plots
    """

    name: str
    title: str
    method: str
    tables: Sequence[Table]
    data: dict[str, Any]
    notes: Sequence[str] = field(default_factory=tuple)

    def text(self) -> str:
        pieces = [f"## {self.title}", self.method, *(table.markdown() for table in self.tables)]
        pieces += ["\n".join(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n\n".join(pieces)


def seconds(value: float | None) -> str:
    """Seconds with as many digits as mean something."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def gigabytes(value: float) -> str:
    """Bytes per second as GB/s (10^9 bytes)."""
    return f"{value / 1e9:.2f}" if value >= 1e8 else f"{value / 1e9:.3f}"


def mebibytes(value: float) -> str:
    """Bytes as MiB (2^20 bytes)."""
    return f"{value / 2**20:.0f}"


def size_name(value: int) -> str:
    """A size as a person writes it: 512 MiB, 2 GiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit and value % unit == 0:
            return f"{value // unit} {name}"
    return f"{value} B"
