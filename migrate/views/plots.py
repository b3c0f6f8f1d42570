"""The report's figures, as SVG that takes its colours from the page.

They are drawn in placeholder colours, which are then replaced by the page's CSS variables, so each
figure suits the light and the dark theme. This module loads matplotlib: it is imported after the
migration only.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from migrate.units import format_size
from migrate.views.history import History, RoundRecord, merge

INK, SOFT, LINE = "#010101", "#020202", "#030303"
BLUE, GREEN, AMBER, RED = "#040404", "#050505", "#060606", "#070707"
VARIABLES = {
    INK: "ink", SOFT: "soft", LINE: "line", BLUE: "blue", GREEN: "green", AMBER: "amber",
    RED: "red",
}  # fmt: skip
# A figure is half as wide as the page, or as wide as a phone.
INCHES = (5.4, 2.9)
# With more rounds than this, their markers would merge into one thick line.
MOST_MARKS = 60
# The shortest step in the figure of rates, as a share of the total time.
SHORTEST_STEP = 1 / 80
RC: dict[str, Any] = {
    "font.size": 10, "svg.fonttype": "none", "text.color": INK, "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE, "xtick.color": SOFT, "ytick.color": SOFT, "axes.grid": True,
    "grid.color": LINE, "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False, "xtick.major.size": 0,
    "ytick.major.size": 0, "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip

Draw = Callable[[History, list[RoundRecord], Axes], None]


def draw_remaining(history: History, rounds: list[RoundRecord], axes: Axes) -> None:
    """Draw what was left to send over time, and what was dirty after each round."""
    samples = [(one.time, one.remaining) for one in history.samples]
    ends = [(r.ended, r.remaining) for r in rounds]
    line = sorted({*samples, *ends, (0.0, history.last.total)})
    times, left = zip(*line, strict=True)
    axes.fill_between(times, left, color=BLUE, alpha=0.15, linewidth=0)
    axes.plot(times, left, color=BLUE, linewidth=1.6, label="left to send")
    if ends:
        style = "o" if len(ends) <= MOST_MARKS else "-"
        axes.plot(*zip(*ends, strict=True), style, color=RED, markersize=4, linewidth=1,
                  label="dirty after a round")  # fmt: skip
    _pause(history, axes)
    _sizes(axes)
    axes.set_xlabel("seconds")
    _from_zero(axes)
    _legend(axes, 3)


def draw_rates(history: History, rounds: list[RoundRecord], axes: Axes) -> None:
    """Draw bytes per second: sent on the wire, and dirtied by the guest."""
    steps = _steps(rounds, history.last.total_time * SHORTEST_STEP)
    page_size = history.last.page_size
    if steps:
        times = [steps[0].began, *(r.ended for r in steps)]
        for name, colour, dashes, values in (
            ("sent", BLUE, "-", [r.wire_bytes for r in steps]),
            ("pages they stand for", GREEN, (0, (4, 2)), [r.pages * page_size for r in steps]),
        ):
            rates = [value / max(r.seconds, 1e-9) for value, r in zip(values, steps, strict=True)]
            axes.stairs(rates, times, color=colour, linewidth=1.6, baseline=None, linestyle=dashes,
                        label=name)  # fmt: skip
        before = [r for r in steps if not r.paused and not r.unfinished]
        ends, dirty = [r.ended for r in before], [r.dirty_rate for r in before]
        axes.plot(ends, dirty, _marks("o", before), color=RED, linewidth=1, markersize=3.5,
                  label="dirtied")  # fmt: skip
    _pause(history, axes)
    _sizes(axes, "/s")
    axes.set_xlabel("seconds")
    _from_zero(axes)
    _legend(axes, 4)


def draw_kinds(_history: History, rounds: list[RoundRecord], axes: Axes) -> None:
    """Draw the pages of each round by kind; of merged rounds, their mean."""
    floor = [0.0] * len(rounds)
    for name, colour in (("zero", SOFT), ("normal", AMBER), ("delta", GREEN)):
        top = [low + getattr(r, name) / r.count for low, r in zip(floor, rounds, strict=True)]
        _bars(axes, top, floor, colour, "whole" if name == "normal" else name)
        floor = top
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _at: _thousands(value)))
    axes.set_ylabel("pages")
    axes.grid(visible=False, axis="x")
    _rounds_axis(rounds, axes)
    _legend(axes, 3)


def draw_hits(_history: History, rounds: list[RoundRecord], axes: Axes) -> None:
    """Draw the share of the pages looked up that were in the cache."""
    looked_up = [(at, r.hit_ratio * 100) for at, r in enumerate(rounds) if r.hit_ratio is not None]
    if looked_up:
        axes.plot(
            *zip(*looked_up, strict=True),
            _marks("o", looked_up),
            color=GREEN,
            linewidth=1.6,
            markersize=4,
        )
    else:
        axes.text(0.5, 0.5, "no page was looked up in the cache", color=SOFT, ha="center",
                  transform=axes.transAxes)  # fmt: skip
    axes.set_ylim(0, 106)
    axes.set_yticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    _rounds_axis(rounds, axes)


def draw_downtime(history: History, rounds: list[RoundRecord], axes: Axes) -> None:
    """Draw the downtime predicted after each round, and the real one."""
    predicted = [
        (at, r.expected_downtime * 1e3)
        for at, r in enumerate(rounds)
        if r.expected_downtime is not None and not r.paused and not r.unfinished
    ]
    if predicted:
        axes.plot(*zip(*predicted, strict=True), _marks("o", predicted), color=BLUE, linewidth=1.6,
                  markersize=4, label="predicted")  # fmt: skip
    real = history.last.downtime
    if real is not None and rounds:
        at = len(rounds) - 1
        axes.plot([at], [real * 1e3], "D", color=RED, markersize=6, label="real")
        axes.annotate(f"{real * 1e3:.0f} ms", (at, real * 1e3), textcoords="offset points",
                      xytext=(-8, 6), ha="right", color=RED, fontsize=9)  # fmt: skip
    values = [float(value) for line in axes.lines for value in np.ravel(line.get_ydata())]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.minorticks_off()
    else:
        axes.set_ylim(0, max(values, default=1.0) * 1.2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _at: f"{value:g}"))
    axes.set_ylabel("milliseconds")
    _rounds_axis(rounds, axes)
    _legend(axes, 3)


def draw_wire(_history: History, rounds: list[RoundRecord], axes: Axes) -> None:
    """Draw the bytes on the wire of each round."""
    costs = [r.wire_bytes / r.count for r in rounds]
    _bars(axes, costs, [0.0] * len(rounds), BLUE)
    if costs and max(costs) > 50 * min(costs) > 0:
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
)


def figures(history: History, limit: float | None = None) -> list[tuple[str, str]]:
    """Return title and SVG of each figure.

    limit -- the downtime limit in milliseconds, or None
    """
    # After a failure the last record may have nothing but the ERROR message.
    rounds = [r for r in history.rounds() if r.pages or not r.unfinished]

    def downtime(history: History, rounds: list[RoundRecord], axes: Axes) -> None:
        if limit:
            axes.axhline(limit, color=AMBER, linestyle=(0, (4, 2)), linewidth=1.2, label="allowed")
        draw_downtime(history, rounds, axes)

    plots = (*PLOTS, ("Downtime, predicted after each round and real", downtime))
    return [
        (title, _svg(index, draw, history, rounds)) for index, (title, draw) in enumerate(plots)
    ]


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
    """Shade the time in which the guest was paused."""
    if history.paused_at is not None:
        end = max(history.last.total_time, history.paused_at)
        axes.axvspan(history.paused_at, end, color=RED, alpha=0.18, linewidth=0, label="pause")


def _sizes(axes: Axes, suffix: str = "") -> None:
    """Put the ticks at round binary sizes: 32 MiB, not 38.1 MiB."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _at: format_size(value).replace(".0 ", " ") + suffix)
    )
    if axes.get_yscale() == "log":
        places = [32.0**power for power in range(10) if low <= 32.0**power <= high]
        axes.set_yticks(places)
        return
    unit = 1024.0 ** int(math.log(max(high, 1.0), 1024))
    unit /= 1 if high / unit >= 3 or unit == 1 else 4
    step = max(math.ceil(high / unit / 5), 1)
    step = step if step <= 2 else 1 << (step - 1).bit_length()
    axes.set_yticks([unit * tick for tick in range(0, int(high / unit) + 1, step)])
    axes.set_ylim(0, high)


def _from_zero(axes: Axes) -> None:
    """Start the time axis at 0, with its first label clear of the other axis."""
    end = axes.get_xlim()[1]
    axes.set_xlim(-0.02 * end, end)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _at: f"{value:g}"))


def _steps(rounds: list[RoundRecord], shortest: float) -> list[RoundRecord]:
    """Merge rounds shorter than `shortest` seconds, but never the paused one."""
    steps: list[RoundRecord] = []
    for r in rounds:
        if steps and steps[-1].seconds < shortest and not r.paused:
            steps[-1] = merge(steps[-1], r)
        else:
            steps.append(r)
    return steps


def _marks(mark: str, points: Sequence[object]) -> str:
    return f"{mark}-" if len(points) <= MOST_MARKS else "-"


def _bars(axes: Axes, tops: list[float], floor: list[float], colour: str, label: str = "") -> None:
    """Draw bars; very many become one outline, which keeps the SVG small."""
    if len(tops) > MOST_MARKS:
        edges = [at - 0.5 for at in range(len(tops) + 1)]
        axes.stairs(tops, edges, baseline=floor, fill=True, color=colour, label=label)
        return
    heights = [top - low for top, low in zip(tops, floor, strict=True)]
    axes.bar(range(len(tops)), heights, 0.82, floor, color=colour, label=label)


def _thousands(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"


def _rounds_axis(rounds: list[RoundRecord], axes: Axes) -> None:
    """Label the axis with round numbers, as many as there is room for."""
    most = 12 if not rounds or rounds[-1].number < 1000 else 7
    step = -(-len(rounds) // most) or 1
    places = range(0, len(rounds), step)
    axes.set_xticks(places, [f"{rounds[at].number}" for at in places])
    axes.set_xlabel("round")
    room = 0.6 + len(rounds) / 60
    axes.set_xlim(-room, max(len(rounds) - 1, 0) + room)


def _legend(axes: Axes, columns: int) -> None:
    """Put the legend above the figure, where it hides no line."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns,
                    borderaxespad=0.1, handlelength=1.4, columnspacing=1.2)  # fmt: skip
