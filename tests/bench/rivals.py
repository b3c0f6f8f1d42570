"""The same guest over the same link: we, QEMU, rsync and a plain copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests import network
from tests.bench import copies, ours, qemu
from tests.bench.processes import ProgramError
from tests.bench.qmp import QMPError
from tests.bench.report import LeftOutError, Options, Part, Table, seconds, size_name
from tests.bench.turns import in_turn, median
from tests.bench.workload import Attempt, Workload

PACED, FULL_SPEED = Workload(), Workload(rate=0)


def run(options: Options) -> Part:
    workloads = [PACED, FULL_SPEED]
    if options.quick:
        workloads = [quick(workload) for workload in workloads]
    return measure(workloads, options)


def quick(workload: Workload) -> Workload:
    return replace(workload, size=192 << 20, hot=64 << 20, patience=15.0)


def measure(workloads: list[Workload], options: Options) -> Part:
    """All contenders on each workload, in turn. The workloads differ in their rate alone."""
    network.check_usable()
    found: list[str] = []
    data = []
    for workload in workloads:
        options.say(f"{workload.title}:")
        left_out: list[str] = []
        contenders = contenders_for(workload, left_out)
        results = in_turn(contenders, options.turns(), options.say)
        found += [line for line in left_out if line not in found]
        pace = "Paced" if workload.rate else "At full speed"
        found += [f"{pace}, {line}" for line in notes(results)]
        data.append({
            "workload": workload.numbers(),
            "title": workload.title,
            "runs": {name: [run.numbers() for run in runs] for name, runs in results.items()},
            "medians": {name: medians(runs) for name, runs in results.items()},
        })  # fmt: skip
    one = workloads[0]
    return Part(
        "rivals", "The same guest over the same link",
        f"A guest of {size_name(one.size)} of random content that adds one to a byte each "
        f"{one.stride} bytes of {size_name(one.hot)}, in order, for ever, "
        f"over a link of {one.link / 1e9:g} Gbit/s (two network namespaces, veth, tbf: the "
        "kernel keeps the limit, no program has one of its own). The downtime aimed at is "
        f"{one.downtime_limit * 1e3:.0f} ms, page caches have {size_name(one.cache)}, an "
        f"attempt is given up after {one.patience:.0f} s. {options.counted()} "
        "MB are 10^6 bytes, both directions, as the link counts them; times are "
        "what each program reports, for rsync and the copy what a clock says.",
        [table(each) for each in data], {"workloads": data}, found,
    )  # fmt: skip


def contenders_for(
    workload: Workload, left_out: list[str]
) -> dict[str, Callable[[], Attempt]]:  # fmt: skip
    """Those that can run here; the others add a sentence to `left_out`."""
    contenders: dict[str, Callable[[], Attempt]] = {
        "xbmigrate, deltas": lambda: ours.demo_guest(workload, True),
        "xbmigrate, deltas, a file": lambda: ours.file_guest(workload),
        "xbmigrate, no deltas": lambda: ours.demo_guest(workload, False),
    }
    try:
        qemu.check_usable()
        contenders["QEMU, xbzrle on"] = lambda: qemu.attempt(workload, "xbzrle")
        contenders["QEMU, xbzrle off"] = lambda: qemu.attempt(workload)
    except LeftOutError as error:
        left_out.append(str(error))
    if shutil.which("rsync") is None:
        left_out.append("rsync is left out: it is not installed.")
    else:
        contenders["rsync in passes"] = lambda: copies.rsync(workload)
    contenders["stop, copy, start"] = lambda: copies.plain_copy(workload)
    return {name: guarded(measure) for name, measure in contenders.items()}


def guarded(attempt: Callable[[], Attempt]) -> Callable[[], Attempt]:
    """A contender that breaks is a result: the others go on."""

    def guard() -> Attempt:
        try:
            return attempt()
        except (ProgramError, QMPError) as error:
            return Attempt(False, f"failed: {error}", 0.0, 0, None, None, "-", {})

    return guard


def medians(runs: list[Attempt]) -> dict[str, Any]:
    """Medians of the runs that completed; of all, where none did."""
    done = [run for run in runs if run.completed]
    counted = done or runs
    expected = [run.expected for run in counted if run.expected is not None]
    return {
        "completed": bool(done),
        "times_completed": len(done),
        "runs": len(runs),
        "why": "" if done else runs[0].why,
        "seconds": median(run.seconds for run in counted),
        "link_bytes": median(run.link_bytes for run in counted),
        "downtime": median(run.downtime or 0.0 for run in done) if done else None,
        "expected": median(expected) if expected else None,
        "memory": runs[0].memory if len({run.memory for run in counted}) == 1 else "differs",
    }


def table(data: dict[str, Any]) -> Table:
    limit = data["workload"]["downtime_limit"]
    rows = []
    for name, numbers in data["medians"].items():
        rows.append([
            name,
            outcome(numbers, limit),
            seconds(numbers["seconds"]),
            f"{numbers['link_bytes'] / 1e6:.0f}",
            milliseconds(numbers["downtime"]),
            milliseconds(numbers["expected"]),
            numbers["memory"],
        ])  # fmt: skip
    head = ("", "outcome", "s", "MB on the link", "downtime ms", "last forecast ms", "memory")
    return Table(head, rows, data["title"])


def outcome(numbers: dict[str, Any], limit: float) -> str:
    if not numbers["completed"]:
        return "gave up"
    often = ""
    if numbers["times_completed"] < numbers["runs"]:
        often = f" {numbers['times_completed']} of {numbers['runs']} times"
    over = ", limit missed" if numbers["downtime"] > limit else ""
    return f"completed{often}{over}"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value * 1e3:.0f}"


def thousands(value: float) -> str:
    return f"{round(value, -3):,.0f}".replace(",", " ")


def notes(results: dict[str, list[Attempt]]) -> list[str]:
    found = []
    rates = {
        name: median(measured)
        for name, runs in results.items()
        if (measured := [run.detail["rate"] for run in runs if "rate" in run.detail])
    }
    if rates:
        text = ", ".join(f"{name}: {thousands(rate)}" for name, rate in rates.items())
        found.append(f"increments a second, measured: {text}.")
    for name, runs in results.items():
        whys = {run.why for run in runs if not run.completed}
        found += [f"{name}: {why}." for why in sorted(whys)]
        passes = [run.detail["passes"] for run in runs if "passes" in run.detail]
        if passes:
            text = ", ".join(f"{taken:.1f}" for taken in passes[0])
            found.append(
                f"{name}: the passes of the first run took {text} s, the last with the writer "
                "stopped."
            )
    return found
