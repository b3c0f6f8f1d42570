"""A virtual machine over the same link: QEMU by itself, and through us."""

from __future__ import annotations

from dataclasses import replace

from tests import network
from tests.bench import qemu, rivals
from tests.bench.report import Options, Part, size_name
from tests.bench.turns import in_turn
from tests.bench.workload import Workload

MIB = 1 << 20
ROWS = [(512, 128), (1100, 384), (1100, 767)]


def run(options: Options) -> Part:
    network.check_usable()
    qemu.check_usable()
    rows = [(192, 64)] if options.quick else ROWS
    workloads = [
        replace(Workload(rate=0), size=size * MIB, hot=hot * MIB, patience=60.0)
        for size, hot in rows
    ]
    data, found = [], []
    for workload in workloads:
        options.say(f"{workload.title}:")
        contenders = {
            "QEMU, xbzrle off": lambda w=workload: qemu.attempt(w),
            "QEMU, xbzrle on": lambda w=workload: qemu.attempt(w, "xbzrle"),
            "through xbmigrate": lambda w=workload: qemu.carried(w),
            "through xbmigrate, --auto-converge": lambda w=workload: qemu.carried(
                w, "--auto-converge"
            ),
        }
        guarded = {name: rivals.guarded(each) for name, each in contenders.items()}
        results = in_turn(guarded, options.turns(), options.say)
        found += rivals.notes(results)
        data.append({
            "workload": workload.numbers(),
            "title": workload.title,
            "runs": {name: [run.numbers() for run in runs] for name, runs in results.items()},
            "medians": {name: rivals.medians(runs) for name, runs in results.items()},
        })  # fmt: skip
    one = workloads[0]
    return Part(
        "carry", "A virtual machine, by QEMU and through xbmigrate",
        "QEMU (TCG) with random memory; its guest adds one to a byte each 4096 bytes of the hot "
        f"set, in order, for ever, as fast as it can. The link carries {one.link / 1e9:g} Gbit/s "
        "(two network namespaces, veth, tbf), the downtime limit is "
        f"{one.downtime_limit * 1e3:.0f} ms, QEMU's own page cache has the hot set's size "
        f"({', '.join(size_name(w.cache) for w in workloads)}), an attempt is given up after "
        f"{one.patience:.0f} s. {options.counted()} Times and downtimes are what QEMU reports.",
        [rivals.table(each) for each in data], {"workloads": data}, found,
    )  # fmt: skip
