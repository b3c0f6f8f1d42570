"""`make headline`: the seed's claim, that a guest which never arrives without xbzrle does with it.

A guest of 1 GiB writes one byte in each page of a hot set of 512 MiB, for ever, at full speed; the
link carries 1 Gbit/s. Both runs have the default downtime limit of 300 ms.

The link is a real one: two network namespaces whose kernel keeps the rate, which takes root and
iproute2. Without those it is loopback, and migrate-src keeps the rate (--max-bandwidth 117m).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from migrate.cli.control import Control
from migrate.errors import MigrationError
from migrate.guests.demo.handle import DemoProcess
from tests.bench import machine
from tests.bench.processes import Measured
from tests.bench.report import LeftOutError, Table
from tests.network import FAR, Link
from tests.programs import BIN, end_guest, guest_pid, look_at

GUEST = "demo:1g,hot=512m,stride=4096,fill=random"
RATE = 10**9
SAMPLE_SECONDS = 0.05
PATIENCE = 300.0
RUNS = {
    "xbzrle off": ("--capability", "xbzrle=off"),
    "xbzrle on, cache 512m": ("--cache-size", "512m"),
}


@dataclass(frozen=True)
class Sample:
    """`seconds` after the start, bytes still to send in the round, and written since it began."""

    seconds: float
    remaining: int
    dirty: int


@dataclass
class Run:
    """How one migration went. `result` is what migrate-src prints with --json."""

    name: str
    result: dict[str, Any] = field(default_factory=dict)
    status: int = -1
    samples: list[Sample] = field(default_factory=list)
    verdict: str = ""

    @property
    def completed(self) -> bool:
        return self.status == 0

    def row(self) -> list[str]:
        ram, downtime = self.result["ram"], self.result.get("downtime")
        return [
            self.name,
            "completed and verified" if self.completed else "given up",
            f"{self.result['total-time'] / 1e3:.1f} s",
            f"{ram['transferred'] / 2**20:.0f} MiB",
            str(ram["dirty-sync-count"]),
            f"{self.result['expected-downtime']} ms",
            "-" if downtime is None else f"{downtime} ms",
            self.verdict,
        ]


@contextlib.contextmanager
def network() -> Iterator[tuple[str, str, list[str], str]]:
    """(the source's namespace, the destination's, options of migrate-src, address to listen on)"""
    try:
        with Link(RATE) as link:
            yield link.near, link.far, [], FAR
    except LeftOutError as error:
        print(f"{error} Over loopback, then: migrate-src keeps the rate.")
        yield "", "", ["--max-bandwidth", "117m"], "127.0.0.1"


def measure(name: str, guest: str, *more: str) -> Run:
    """One of RUNS; `more` are further options of migrate-src."""
    run = Run(name)
    with (
        network() as (near, far, options, host),
        tempfile.TemporaryDirectory() as directory,
        Measured([str(BIN / "migrate-dst"), "--listen", f"{host}:0"], far) as receiver,
    ):
        address = receiver.wait_for(r"listening on (\S+)")[1]
        socket = f"{directory}/src"
        command = [str(BIN / "migrate-src"), "--json", "--stay", "--qmp", f"unix:{socket}"]
        command += ["--guest", guest, *options, *RUNS[name], *more, address]
        with Measured(command, near) as source:
            sample(run, socket, guest_pid(source.wait_for(r"process \d+", 60)[0]))
            run.verdict = look(run, receiver, source)
            with Control(socket) as control:
                control.execute("quit")
            ended = source.wait(60)
            run.status, run.result = ended.status, json.loads(ended.out)
    return run


def sample(run: Run, socket: str, pid: int) -> None:
    """Follows a migration to its end: what it says of itself, and the guest's own dirty marks."""
    process = DemoProcess.attach(pid)
    try:
        with Control(socket) as control:
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:
                state = control.execute("query-migrate")
                if state.get("status") in ("active", "device"):
                    clean = process.marks.tobytes().count(0)
                    dirty = (len(process.marks) - clean) * process.shape.page_size
                    seconds = state["total-time"] / 1e3
                    run.samples.append(Sample(seconds, state["ram"]["remaining"], dirty))
                if state.get("status") in ("completed", "failed"):
                    run.status = 0 if state["status"] == "completed" else 1
                    return
                time.sleep(SAMPLE_SECONDS)
    finally:
        process.close()
    raise MigrationError(f"{run.name}: it has not ended after {PATIENCE:.0f} s")


def look(run: Run, receiver: Measured, source: Measured) -> str:
    """Where the guest runs now, every byte of it checked."""
    if run.completed:
        receiver.expect(60)
        pid, where = guest_pid(receiver.out), "destination"
    else:
        pid, where = guest_pid(source.err), "source"
    before, after, wrong = look_at(pid, 0.5)
    if run.completed:
        end_guest(pid)
    if wrong >= 0 or after <= before:
        return f"WRONG at byte {wrong}"
    return f"guest runs at the {where}"


def draw(runs: list[Run], path: Path) -> None:
    """Remaining and dirty bytes over time, one panel a run, on the same axes."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 10, "svg.hashsalt": "xbmigrate", "svg.fonttype": "none"})
    from matplotlib.figure import Figure

    from tests.bench.plots import BLUE, GREY, RED

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, len(runs), sharex=True, sharey=True)
    longest = max(run.result["total-time"] for run in runs) / 1e3
    for axes, run in zip(panels, runs, strict=True):
        seconds = [one.seconds for one in run.samples]
        mebibytes = [[one.remaining / 2**20, one.dirty / 2**20] for one in run.samples]
        remaining, dirty = zip(*mebibytes, strict=True)
        axes.fill_between(seconds, remaining, color=BLUE, alpha=0.18, linewidth=0)
        axes.plot(seconds, remaining, color=BLUE, linewidth=1.2, label="remaining in the round")
        axes.plot(seconds, dirty, color=RED, linewidth=1.2, label="written meanwhile (dirty)")
        end = run.result["total-time"] / 1e3
        axes.axvline(end, color=GREY, linestyle="--", linewidth=1)
        text = f"given up,\n{end:.0f} s"
        if run.completed:
            pause = run.result["downtime"]
            text = f"runs at the destination\nafter {end:.1f} s, stopped\nfor {pause} ms"
        late = end > longest / 2
        axes.annotate(
            text, (end, 1010), textcoords="offset points", xytext=(-5 if late else 5, 0), va="top",
            ha="right" if late else "left", fontsize=9,
        )  # fmt: skip
        axes.set_title(f"{run.name}: {run.result['ram']['transferred'] / 2**20:.0f} MiB sent")
        axes.set_xlabel("seconds")
        axes.set_xlim(0, longest * 1.03)
        axes.set_ylim(0, 1080)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("MiB")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def convincing(runs: list[Run]) -> bool:
    """Off never arrives, on does, with a pause that was foretold."""
    off, on = runs
    downtime, expected = on.result.get("downtime", 0), on.result["expected-downtime"]
    return (
        off.status == 7
        and on.completed
        and 0 < downtime < min(300, 2 * expected)
        and not any("WRONG" in run.verdict for run in runs)
    )


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.headline", description=__doc__)
    parser.add_argument(
        "--picture", type=Path, default=Path("build/headline.svg"), metavar="FILE",
        help="where the plot goes (default: build/headline.svg)",
    )  # fmt: skip
    args = parser.parse_args(words)
    print(f"{machine.sentence(machine.describe())}; guest {GUEST}", flush=True)
    runs = [measure(name, GUEST) for name in RUNS]
    head = ["", "outcome", "time", "on the wire", "rounds", "predicted downtime", "downtime", ""]
    print(Table(head, [run.row() for run in runs]).markdown())
    print(f"  {runs[0].result.get('error-desc', 'it converged, against all expectation')}")
    draw(runs, args.picture)
    print(f"plot: {args.picture}")
    good = convincing(runs)
    print("OK" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
