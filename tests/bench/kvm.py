"""A virtual machine under KVM over the same link: each way that QEMU has, and through us."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from tests import network
from tests.bench import qemu, rivals
from tests.bench.machine import version
from tests.bench.qemu import Emulator
from tests.bench.report import LeftOutError, Options, Part, Table, seconds
from tests.bench.rivals import milliseconds
from tests.bench.turns import in_turn, median
from tests.bench.workload import Attempt, Workload

MIB = 1 << 20
KVM = "/dev/kvm"
# Guest, hot set, stride.
ROWS = [(512, 128, 4096), (900, 384, 4096), (900, 700, 4096), (512, 128, 256)]
HEAD = ("", "completed", "s", "downtime ms", "ours says ms", "MiB on the link", "memory")


def run(options: Options) -> Part:
    network.check_usable()
    qemu.check_usable()
    if not os.access(KVM, os.R_OK | os.W_OK):
        raise LeftOutError(f"{KVM} cannot be used: this machine has no KVM.")
    rows = [(192, 64, 4096)] if options.quick else ROWS
    workloads = [
        Workload(size=size * MIB, hot=hot * MIB, stride=stride, rate=0)
        for size, hot, stride in rows
    ]
    left_out: list[str] = []
    emulators = find_emulators(left_out)
    tables, data, found = [], [], left_out
    for workload in workloads:
        for name, emulator in emulators.items():
            title = f"QEMU {name}: {workload.title}, each {workload.stride} bytes"
            options.say(f"{title}:")
            results = in_turn(
                contenders(workload, emulator), options.turns(5), options.say,
                again=lambda attempt: attempt.completed,
            )  # fmt: skip
            tables.append(table(title, results))
            found += [f"{title}: {note}" for note in trouble(results)]
            data.append({
                "workload": workload.numbers(),
                "title": title,
                "runs": {who: [run.numbers() for run in runs] for who, runs in results.items()},
            })  # fmt: skip
    one = workloads[0]
    return Part(
        "kvm", "A virtual machine under KVM, by QEMU and through xbmigrate",
        "The guest, two QEMUs and our two programs share one machine. The guest has random memory "
        f"and adds one to a byte each so many bytes of the hot set, in order, for ever, as fast as "
        f"it can. The link carries {one.link / 1e9:g} Gbit/s (two network namespaces, veth, tbf), "
        f"the downtime limit is {one.downtime_limit * 1e3:.0f} ms, QEMU's own page cache is as "
        f"large as the hot set, rounded up to a power of two. {options.counted(5)} An attempt is "
        f"given up after {one.patience:.0f} s, and who gives up is not tried again. Post-copy "
        "begins after the first round; the guest is not run at the destination before all is "
        "there, so its page faults are not in the table. Times and downtimes are what QEMU "
        "reports; the largest downtime stands in brackets.",
        tables, {"rows": data}, found,
    )  # fmt: skip


def find_emulators(left_out: list[str]) -> dict[str, Emulator]:
    """The QEMUs by version: the installed one, and Debian's backport where it can be had."""
    found = {version(qemu.PROGRAM): Emulator(accel="kvm")}
    try:
        emulator = qemu.later("kvm")
    except LeftOutError as error:
        left_out.append(str(error))
    else:
        found[version(emulator.command)] = emulator
    return found


def contenders(workload: Workload, emulator: Emulator) -> dict[str, Callable[[], Attempt]]:
    """Each way to move the guest, by its name in the table."""
    ways: dict[str, Callable[[], Attempt]] = {
        name: partial(qemu.attempt, workload, *capabilities, emulator=emulator)
        for name, capabilities in {
            "QEMU": [],
            "QEMU, multifd": ["multifd"],
            "QEMU, xbzrle": ["xbzrle"],
            "QEMU, post-copy": ["postcopy-ram"],
        }.items()
    }
    ways["through xbmigrate"] = partial(qemu.carried, workload, emulator=emulator)
    return {name: rivals.guarded(way) for name, way in ways.items()}


def table(title: str, results: dict[str, list[Attempt]]) -> Table:
    """One row for each way, with the medians of the runs that completed."""
    return Table(HEAD, [row(name, runs) for name, runs in results.items()], title)


def row(name: str, runs: list[Attempt]) -> list[str]:
    done = [run for run in runs if run.completed]
    often = f"{len(done)} of {len(runs)}"
    mebibytes = f"{median(run.link_bytes for run in done or runs) / MIB:.0f}"
    taken = seconds(median(run.seconds for run in done or runs))
    if not done:
        return [name, often, taken, "-", "-", mebibytes, "-"]
    downtimes = [run.downtime or 0.0 for run in done]
    ours = [run.detail["result"]["downtime"] / 1e3 for run in done if "result" in run.detail]
    return [
        name, often, taken,
        f"{milliseconds(median(downtimes))} ({milliseconds(max(downtimes))})",
        f"{milliseconds(median(ours))} ({milliseconds(max(ours))})" if ours else "-",
        mebibytes,
        ", ".join(sorted({run.memory for run in done})),
    ]  # fmt: skip


def trouble(results: dict[str, list[Attempt]]) -> list[str]:
    """Why runs did not complete."""
    return [
        f"{name}: {why}."
        for name, runs in results.items()
        for why in sorted({run.why for run in runs if not run.completed})
    ]
