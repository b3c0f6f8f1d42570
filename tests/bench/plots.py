"""SVG plots of what the parts found, drawn from the numbers in bench.json.

PLOTS has a function for each part that has a plot: it takes the part's data and draws on a figure.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, GREY, RED = "#3b6ea8", "#9aa0a6", "#c0504d"


def draw_codec(data: dict[str, Any], figure: Figure) -> None:
    """Bars of how many times QEMU's multiple of memcmp each pattern reaches."""
    figure.set_size_inches(7.5, 3.6)
    axes = figure.add_subplot()
    ratios = data["ratios"]
    _bars(axes, list(ratios), list(ratios.values()), [f"{one:.1f}" for one in ratios.values()],
          [BLUE] * len(ratios), floor=0.5)  # fmt: skip
    axes.axvline(1, color=RED, linestyle="--", linewidth=1)
    axes.set_xlabel("times QEMU's AVX-512 encoder, each as a multiple of its memcmp")
    axes.set_title(f"Encoding pages of 4 KiB by what changed in them ({data['simd'][0]})")


def draw_channels(data: dict[str, Any], figure: Figure) -> None:
    """Speed over the number of channels, and as many times one."""
    figure.set_size_inches(7.5, 3.2)
    axes = figure.add_subplot()
    counts = [int(count) for count in data["medians"]]
    speeds = [numbers["speed"] / 1e6 for numbers in data["medians"].values()]
    axes.plot(counts, [speeds[0] * count / counts[0] for count in counts], "--", color=GREY,
              label="so many times one")  # fmt: skip
    axes.plot(counts, speeds, "o-", color=BLUE, label="measured")
    for count, speed in zip(counts, speeds, strict=True):
        axes.annotate(
            f"{speed:.0f}", (count, speed), textcoords="offset points", xytext=(6, -10), fontsize=9
        )
    axes.set_ylim(0, speeds[0] * counts[-1] / counts[0] * 1.15)
    axes.set_xticks(counts)
    axes.set_xlabel("channels")
    axes.set_ylabel("MB/s (10$^6$ bytes)")
    axes.set_title(f"A path that gives each connection {data['rate'] // 10**6} Mbit/s")
    axes.legend(loc="upper left", frameon=False)
    _plain(axes)


def draw_lossy(data: dict[str, Any], figure: Figure) -> None:
    """Speed over the number of channels, a line for each link; dashed: what it carries."""
    figure.set_size_inches(7.5, 3.6)
    axes = figure.add_subplot()
    for link, colour in zip(data["links"], (GREY, RED, BLUE), strict=False):
        medians = link["medians"]
        counts = [name for name in medians if name.isdecimal()]
        speeds = [medians[name]["speed"] * 8 / 1e6 for name in counts]
        axes.plot(range(len(counts)), speeds, "o-", color=colour,
                  label=f"{link['rate'] // 10**6} Mbit/s")  # fmt: skip
        axes.axhline(medians["without loss"]["speed"] * 8 / 1e6, color=colour, linestyle="--",
                     linewidth=1)  # fmt: skip
        axes.set_xticks(range(len(counts)), counts)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("channels")
    axes.set_ylabel("Mbit/s")
    axes.set_title(
        f"{data['delay'] * 2e3:.0f} ms of round trip, {data['loss']:.0%} of loss each way"
        " (dashed: one connection without loss)"
    )
    axes.legend(loc="center left", frameon=False)
    _plain(axes)


def draw_bulk(data: dict[str, Any], figure: Figure) -> None:
    """Bars of speed, the ceiling as a line."""
    figure.set_size_inches(7.5, 2.8)
    axes = figure.add_subplot()
    medians = {name: numbers for name, numbers in data["medians"].items() if numbers}
    ceiling = medians.get("one TCP connection", {}).get("speed")
    names = [name for name in medians if not name.startswith("reading")]
    speeds = [medians[name]["speed"] / 1e9 for name in names]
    _bars(axes, names, speeds, [f"{speed:.2f}" for speed in speeds],
          [GREY, *[BLUE] * (len(names) - 1)])  # fmt: skip
    if ceiling:
        axes.axvline(ceiling / 1e9, color=GREY, linestyle="--", linewidth=1)
    axes.set_xlabel("GB/s of guest memory (10$^9$ bytes), logarithmic")
    axes.set_title("Moving a guest that nobody writes, against a bare TCP connection")


def draw_scaling(data: dict[str, Any], figure: Figure) -> None:
    """Seconds over size, with the line that the smallest guest foretells."""
    figure.set_size_inches(7.5, 3.6)
    axes = figure.add_subplot()
    gib = [int(size) / 2**30 for size in data["medians"]]
    taken = [numbers["seconds"] for numbers in data["medians"].values()]
    if not gib:
        return
    linear = [taken[0] * size / gib[0] for size in gib]
    axes.plot(gib, linear, "--", color=GREY, label="in proportion to the smallest")
    axes.plot(gib, taken, "o-", color=BLUE, label="measured")
    for size, seconds in zip(gib, taken, strict=True):
        axes.annotate(
            f"{seconds:.2f} s", (size, seconds), textcoords="offset points", xytext=(-5, 6),
            ha="right", fontsize=9, bbox={"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.8},
        )  # fmt: skip
    axes.set_xlim(0, gib[-1] * 1.08)
    axes.set_ylim(0, max(*taken, *linear) * 1.18)
    axes.set_xticks(gib, [f"{size:g}" for size in gib])
    axes.set_xlabel("guest, GiB of random content")
    axes.set_ylabel("total time, s")
    axes.set_title("Time against the size of the guest")
    axes.legend(loc="upper left", frameon=False)
    _plain(axes)


def draw_rivals(data: dict[str, Any], figure: Figure) -> None:
    """A row for each workload, three panels in it; hatched where it gave up."""
    workloads = data["workloads"]
    most = max(len(one["medians"]) for one in workloads)
    figure.set_size_inches(11, len(workloads) * (1.1 + 0.3 * most))
    rows = _rows(figure.subfigures(len(workloads), 1))
    for row, one in zip(rows, workloads, strict=True):
        _draw_workload(one, row)


def _rows(rows: Any) -> list[Any]:
    """One row comes without its array."""
    return list(rows) if hasattr(rows, "__len__") else [rows]


def _draw_workload(one: dict[str, Any], figure: Any) -> None:
    contenders = one["medians"]
    names = list(contenders)
    limit = one["workload"]["downtime_limit"] * 1e3
    panels = (
        ("seconds", 1.0, "total time, s", False),
        ("downtime", 1e3, f"downtime, ms (dashed: the {limit:.0f} aimed at)", True),
        ("link_bytes", 1e-6, "on the link, MB (10$^6$ bytes)", False),
    )
    for index, (key, scale, label, logarithmic) in enumerate(panels):
        axes = figure.add_subplot(1, 3, index + 1)
        values = [(contenders[name].get(key) or 0.0) * scale for name in names]
        texts = [_label(contenders[name], key, scale) for name in names]
        colours = [BLUE if name.startswith("xbmigrate") else GREY for name in names]
        bars = _bars(axes, names, values, texts, colours, logarithmic=logarithmic, floor=1.0)
        for bar, name in zip(bars, names, strict=True):
            if not contenders[name]["completed"]:
                bar.set(hatch="////", facecolor="white", edgecolor=RED)
        if logarithmic:
            axes.axvline(limit, color=RED, linestyle="--", linewidth=1, zorder=0)
        axes.set_xlabel(label, fontsize=9)
        axes.tick_params(labelleft=index == 0)
    figure.suptitle(one["title"], fontsize=11)


def _label(numbers: dict[str, Any], key: str, scale: float) -> str:
    value = numbers.get(key)
    if value is None:
        return "never" if not numbers["completed"] else "-"
    text = f"{value * scale:.1f}" if key == "seconds" else f"{value * scale:.0f}"
    return f"{text}, gave up" if key == "seconds" and not numbers["completed"] else text


PLOTS: dict[str, Callable[[dict[str, Any], Figure], None]] = {
    "codec": draw_codec,
    "bulk": draw_bulk,
    "channels": draw_channels,
    "lossy": draw_lossy,
    "scaling": draw_scaling,
    "rivals": draw_rivals,
}


def save(name: str, data: dict[str, Any], directory: Path, suffix: str = "svg") -> Path | None:
    """Draws a part's plot; None where it has none. Raises ImportError without matplotlib."""
    if name not in PLOTS:
        return None
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 10, "svg.hashsalt": "xbmigrate", "svg.fonttype": "none"})
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    PLOTS[name](data, figure)
    path = directory / f"{name}.{suffix}"
    figure.savefig(path, dpi=110, metadata={"Date": None} if suffix == "svg" else None)
    return path


def _bars(
    axes: Axes, names: list[str], values: list[float], texts: list[str], colours: list[str],
    *, logarithmic: bool = True, floor: float = 0.0,
) -> Any:  # fmt: skip
    """Horizontal bars from top to bottom, the value written after each.

    floor -- where a logarithmic axis begins; 0: below the smallest value
    """
    positions = range(len(names))
    floor = floor or min((value for value in values if value > 0), default=1.0) / 3
    lengths = [max(value, floor) if logarithmic and value > 0 else value for value in values]
    bars = axes.barh(positions, lengths, color=colours, height=0.62)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(floor, max([*values, floor * 10]) * 6)
    else:
        axes.set_xlim(0, max([*values, 1e-9]) * 1.55)
    start = floor if logarithmic else 0.0
    for position, value, text in zip(positions, lengths, texts, strict=True):
        axes.annotate(
            text, (value or start, position), textcoords="offset points", xytext=(4, 0),
            va="center", fontsize=9,
            bbox={"fc": "white", "ec": "none", "pad": 0.3, "alpha": 1},
        )  # fmt: skip
    axes.set_yticks(positions, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    _plain(axes)
    return bars


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
