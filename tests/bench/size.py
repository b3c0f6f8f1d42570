"""The pause as a file guest grows: by the kernel's record of writes, and by comparing."""

from __future__ import annotations

import mmap
import time
from pathlib import Path
from typing import Any

from migrate.tracking._kernel import address_of, open_own
from migrate.tracking.protection import Protection
from proto.codec.pageset import PageSet
from tests.bench.guest_files import random_file, shelf
from tests.bench.machine import available_memory
from tests.bench.migration import migration, python
from tests.bench.processes import Measured
from tests.bench.report import LeftOutError, Options, Part, Table, size_name
from tests.bench.turns import median

GIB = 1 << 30
SIZES = (1 * GIB, 2 * GIB, 4 * GIB, 8 * GIB)
QUICK_SIZES = (GIB // 4, GIB // 2)
HOT = 84 << 20
PAGE = 4096
# Writes of one byte in a second, each to the next page of the hot set: all of it every half second.
RATE = 2 * HOT // PAGE
TIMEOUT = 90.0
WAYS = ("kernel", "compare")
SWEEPS = 20


def run(options: Options) -> Part:
    sizes = [
        size
        for size in (QUICK_SIZES if options.quick else SIZES)
        if 2 * size + GIB < available_memory()
    ]
    if not sizes:
        raise LeftOutError("There is not enough memory for a guest and its copy.")
    runs: dict[str, list[dict[str, Any]]] = {}
    with shelf(2 * sizes[-1]) as directory:
        free, first = writer_speed(random_file(directory / "guest", sizes[0]))
        for turn in range(1, options.turns() + 1):
            for size in sizes:
                for way in WAYS:
                    options.say(f"{size_name(size)}, {way} ({turn} of {options.turns()})")
                    runs.setdefault(f"{size} {way}", []).append(one(directory, size, way))
    return Part(
        "size", "The pause as a file guest grows",
        f"A file of random content of which {size_name(HOT)}, spread over all of it, are written "
        "twice a second by another process; moved over loopback with default settings and "
        f"`--tracking kernel` or `compare`. {options.counted()} Looking: what the last look for "
        "written pages took, which is part of the pause. Downtime: of the runs that completed; the "
        "others were given up since the pause would have been longer than the limit of 300 ms. The "
        "writer: one byte of each page of the hot set, in a shared mapping of the smallest file, "
        f"increased by NumPy; medians of {SWEEPS} sweeps that nothing records, and of as many that "
        "are the first after a look.",
        [table(sizes, runs), speed_table(free, first)],
        {"runs": runs, "writer": {"free": free, "first": first}}, [],
    )  # fmt: skip


def one(directory: Path, size: int, way: str) -> dict[str, Any]:
    """Move one guest while it is written."""
    guest, output = random_file(directory / "guest", size), directory / "arrived"
    stride = size // (HOT // PAGE) // PAGE * PAGE
    words = (str(guest), str(stride * (HOT // PAGE)), str(stride), str(RATE))
    try:
        with Measured(python("tests.bench.writer", *words)) as writer:
            writer.wait_for("writing")
            source = ["--guest", f"file:{guest}", "--pid", str(writer.pid), "--tracking", way]
            with migration(source, ["--output", str(output)], timeout=TIMEOUT) as moved:
                return moved.numbers()
    finally:
        output.unlink(missing_ok=True)


def table(sizes: list[int], runs: dict[str, list[dict[str, Any]]]) -> Table:
    rows = []
    for size in sizes:
        row = [size_name(size)]
        for way in WAYS:
            taken = runs[f"{size} {way}"]
            completed = [one["result"] for one in taken if one["completed"]]
            looks = [one["result"].get("dirty-tracking-time", 0.0) for one in taken]
            row += [
                f"{len(completed)} of {len(taken)}",
                f"{median(looks):.1f}",
                f"{median(one['downtime'] for one in completed):.0f}" if completed else "-",
            ]
        rows.append(row)
    head = ["guest"]
    for way in WAYS:
        head += [f"{way}: completed", "looking ms", "downtime ms"]
    return Table(tuple(head), rows)


def writer_speed(path: Path) -> tuple[float, float]:
    """Return the seconds of a sweep over the hot set, and of one that is the first after a look."""
    import numpy as np

    stride = path.stat().st_size // (HOT // PAGE) // PAGE * PAGE
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    bytes_ = np.frombuffer(memory, np.uint8)[::stride][: HOT // PAGE]

    def sweep() -> float:
        began = time.perf_counter()
        np.add(bytes_, 1, out=bytes_)
        return time.perf_counter() - began

    sweep()
    free = median([sweep() for _ in range(SWEEPS)])
    start = address_of(memoryview(memory))
    protection = Protection(open_own(), "self")
    first = []
    try:
        protection.begin(start, start + len(memory))
        for _ in range(SWEEPS):
            protection.collect(start, start + len(memory), 0, PAGE, PageSet(len(memory) // PAGE))
            first.append(sweep())
    finally:
        protection.close()
    return free, median(first)


def speed_table(free: float, first: float) -> Table:
    pages = HOT // PAGE
    rows = [
        [name, f"{seconds * 1e3:.2f}", f"{seconds / pages * 1e9:.0f}", f"{seconds / free:.1f}"]
        for name, seconds in (("not recorded", free), ("first write after a look", first))
    ]
    return Table(("writer", f"ms for {size_name(HOT)}", "ns a page", "ratio"), rows)
