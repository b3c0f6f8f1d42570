"""The report's pictures, as SVG that takes its colours from the page it stands in.

Drawn with stand-ins for colours, which are then replaced by the page's variables: so one picture
is right in light and dark. Loads matplotlib; imported when a migration is over.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from migrate.quantities import format_size
from migrate.views.history import History, RoundRecord

INK, SOFT, LINE = "#010101", "#020202", "#030303"
BLUE, GREEN, AMBER, RED = "#040404", "#050505", "#060606", "#070707"
VARIABLES = {
    INK: "ink", SOFT: "soft", LINE: "line", BLUE: "blue", GREEN: "green", AMBER: "amber",
    RED: "red",
}  # fmt: skip
# A picture is half a page wide, or the whole of a telephone.
INCHES = (5.4, 2.9)
# Points in a line beyond which nobody sees a difference.
MOST_BARS = 60
RC: dict[str, Any] = {
    "font.size": 10, "svg.fonttype": "none", "text.color": INK, "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE, "xtick.color": SOFT, "ytick.color": SOFT, "axes.grid": True,
    "grid.color": LINE, "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False, "xtick.major.size": 0,
    "ytick.major.size": 0, "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip

Draw = Callable[[History, list[RoundRecord], Axes], None]


def draw_remaining(history: History, rounds: list[RoundRecord], axes: Axes) -> None:
    """What is left inside the rounds, and what was dirty after each."""
    samples = [(one.time, one.remaining) for one in history.samples]
    ends = [(r.ended, r.remaining) for r in rounds]
    line = sorted({*samples, *ends, (0.0, history.last.total)})
    times, left = zip(*line, strict=True)
    axes.fill_between(times, left, color=BLUE, alpha=0.15, linewidth=0)
    axes.plot(times, left, color=BLUE, linewidth=1.6, label="left to send")
    if ends:
        axes.plot(*zip(*ends, strict=True), "o", color=RED, markersize=4,
                  label="dirty after a round")  # fmt: skip
    _pause(history, axes)
    _sizes(axes)
    axes.set_xlabel("seconds")
    _legend(axes, 3)


def draw_rates(history: History, rounds: list[RoundRecord], axes: Axes) -> None:
    """Bytes a second: what went over the wire, and what the guest dirtied."""
    times = [0.0] + [r.ended for r in rounds]
    if len(rounds) > 0:
        sent = [r.wire_bytes / r.seconds if r.seconds else 0.0 for r in rounds]
        axes.stairs(sent, times, color=BLUE, linewidth=1.6, baseline=None, label="sent")
        pages = [
            (r.pages * history.last.page_size) / r.seconds if r.seconds else 0.0 for r in rounds
        ]
        axes.stairs(pages, times, color=GREEN, linewidth=1.6, baseline=None, linestyle=(0, (4, 2)),
                    label="pages they stand for")  # fmt: skip
        axes.plot([r.ended for r in rounds if not r.paused],
                  [r.dirty_rate for r in rounds if not r.paused], "o-", color=RED, linewidth=1,
                  markersize=3.5, label="dirtied")  # fmt: skip
    _pause(history, axes)
    _sizes(axes, "/s")
    axes.set_xlabel("seconds")
    _legend(axes, 3)


def draw_kinds(_history: History, rounds: list[RoundRecord], axes: Axes) -> None:
    """Pages of each round, by how they were sent."""
    places = list(range(len(rounds)))
    floor = [0] * len(rounds)
    for name, colour in (("zero", SOFT), ("normal", AMBER), ("delta", GREEN)):
        counts = [getattr(r, name) for r in rounds]
        axes.bar(places, counts, 0.82, floor, color=colour,
                 label="whole" if name == "normal" else name)  # fmt: skip
        floor = [low + count for low, count in zip(floor, counts, strict=True)]
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _at: _thousands(value)))
    axes.set_ylabel("pages")
    axes.grid(visible=False, axis="x")
    _rounds_axis(rounds, axes)
    _legend(axes, 3)


def draw_hits(_history: History, rounds: list[RoundRecord], axes: Axes) -> None:
    """Of the pages that were looked up, how many were in the cache."""
    looked_up = [(at, r.hit_ratio * 100) for at, r in enumerate(rounds) if r.hit_ratio is not None]
    if looked_up:
        axes.plot(*zip(*looked_up, strict=True), "o-", color=GREEN, linewidth=1.6, markersize=4)
    else:
        axes.text(0.5, 0.5, "no page was looked up in the cache", color=SOFT, ha="center",
                  transform=axes.transAxes)  # fmt: skip
    axes.set_ylim(0, 106)
    axes.set_xlim(-0.6, max(len(rounds) - 0.4, 0.6))
    axes.set_yticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    _rounds_axis(rounds, axes)


def draw_downtime(history: History, rounds: list[RoundRecord], axes: Axes) -> None:
    """The pause as it was predicted after each round, and as it came."""
    predicted = [
        (at, r.expected_downtime * 1e3)
        for at, r in enumerate(rounds)
        if r.expected_downtime is not None and not r.paused and not r.unfinished
    ]
    if predicted:
        axes.plot(*zip(*predicted, strict=True), "o-", color=BLUE, linewidth=1.6, markersize=4,
                  label="predicted")  # fmt: skip
    real = history.last.downtime
    if real is not None and rounds:
        at = len(rounds) - 1
        axes.plot([at], [real * 1e3], "D", color=RED, markersize=6, label="real")
        axes.annotate(f"{real * 1e3:.0f} ms", (at, real * 1e3), textcoords="offset points",
                      xytext=(-8, 6), ha="right", color=RED, fontsize=9)  # fmt: skip
    values = [value for _, value in predicted] + ([real * 1e3] if real is not None else [])
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, max(values, default=1.0) * 1.2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _at: f"{value:g}"))
    axes.set_ylabel("milliseconds")
    axes.set_xlim(-0.6, max(len(rounds) - 0.4, 0.6))
    _rounds_axis(rounds, axes)
    _legend(axes, 2)


def draw_wire(_history: History, rounds: list[RoundRecord], axes: Axes) -> None:
    """What each round cost on the wire."""
    axes.bar(range(len(rounds)), [r.wire_bytes for r in rounds], 0.82, color=BLUE)
    if rounds and max(r.wire_bytes for r in rounds) > 50 * min(r.wire_bytes for r in rounds):
        axes.set_yscale("log")
        axes.minorticks_off()
    _sizes(axes)
    axes.grid(visible=False, axis="x")
    _rounds_axis(rounds, axes)


PLOTS: tuple[tuple[str, Draw], ...] = (
    ("Remaining and dirty", draw_remaining),
    ("Rates", draw_rates),
    ("Pages by kind, per round", draw_kinds),
    ("On the wire, per round", draw_wire),
    ("Cache hits, per round", draw_hits),
    ("Downtime, predicted after each round and real", draw_downtime),
)


def figures(history: History) -> list[tuple[str, str]]:
    """Title and SVG of each picture."""
    rounds = list(history.rounds())
    return [(title, _svg(index, draw, history, rounds)) for index, (title, draw) in
            enumerate(PLOTS)]  # fmt: skip


def _svg(index: int, draw: Draw, history: History, rounds: list[RoundRecord]) -> str:
    with mpl.rc_context(cast(Any, {**RC, "svg.hashsalt": f"xbmigrate-{index}"})):
        figure = Figure(figsize=INCHES, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(history, rounds, axes)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    svg = re.sub(r".*?(?=<svg)", "", written.getvalue(), count=1, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>p{index}-", svg)
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _pause(history: History, axes: Axes) -> None:
    """Where the guest stood still."""
    if history.paused_at is not None:
        end = max(history.last.total_time, history.paused_at)
        axes.axvspan(history.paused_at, end, color=RED, alpha=0.18, linewidth=0, label="pause")


def _sizes(axes: Axes, suffix: str = "") -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _at: format_size(value) + suffix))
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 4, 5, 10]))


def _thousands(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"


def _rounds_axis(rounds: list[RoundRecord], axes: Axes) -> None:
    """Names of rounds below, as many as there is room for."""
    step = -(-len(rounds) // 12) or 1
    places = range(0, len(rounds), step)
    axes.set_xticks(places, [f"{rounds[at].number}" for at in places])
    axes.set_xlabel("round")


def _legend(axes: Axes, columns: int) -> None:
    """Above the picture, where no line passes."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns,
                    borderaxespad=0.1, handlelength=1.4, columnspacing=1.2)  # fmt: skip
