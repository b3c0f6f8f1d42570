"""Whether time grows with the size of the guest, and no faster; and memory not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.bench import bulk
from tests.bench.guest_files import random_file, shelf
from tests.bench.machine import available_memory
from tests.bench.migration import move_file
from tests.bench.report import (
    LeftOutError,
    Options,
    Part,
    Table,
    gigabytes,
    mebibytes,
    seconds,
    size_name,
)
from tests.bench.turns import median

GIB = 1 << 30
SIZES = (1 * GIB, 2 * GIB, 4 * GIB, 8 * GIB)
QUICK_SIZES = (GIB // 4, GIB // 2, GIB)
TIMEOUT = 120.0


def run(options: Options) -> Part:
    return measure(QUICK_SIZES if options.quick else SIZES, options)


def measure(sizes: tuple[int, ...], options: Options) -> Part:
    """`sizes` in bytes, rising."""
    fitting = [size for size in sizes if 2 * size + GIB < available_memory()]
    notes = [
        f"{size_name(size)} is left out: the guest and its copy do not fit the memory here."
        for size in sizes
        if size not in fitting
    ]
    if not fitting:
        raise LeftOutError("There is not enough memory for a guest and its copy.")
    runs: dict[int, list[dict[str, Any]]] = {size: [] for size in fitting}
    with shelf(2 * fitting[-1]) as directory:
        for turn in range(1, options.turns() + 1):
            for size in list(fitting):
                options.say(f"{size_name(size)} ({turn} of {options.turns()})")
                numbers = one(directory, size)
                if not numbers["completed"]:
                    fitting = [other for other in fitting if other < size]
                    notes.append(
                        f"{size_name(size)} did not arrive within {TIMEOUT:.0f} s: it and all "
                        "larger ones are left out."
                    )
                    break
                bare = bulk.ceiling(size, directory / "arrived")
                runs[size].append({**numbers, "stream": bare["seconds"]})
    medians = {str(size): medians_of(runs[size], size) for size in runs if runs[size]}
    data = {"runs": {str(size): taken for size, taken in runs.items()}, "medians": medians}
    return Part(
        "scaling", "Scaling with the size of the guest",
        "A file of random content that nobody writes, moved over loopback with default settings. "
        f"{options.counted()} Memory is the peak of RssAnon + "
        "RssFile of each program, sampled each 20 ms: all but the guest itself. Bare stream: as "
        "many bytes through one TCP connection into a new file by two bare processes. It runs "
        "second and finds memory that was freed a moment ago; new memory is what a virtual "
        "machine pays most for.",
        [table(medians)], data, notes,
    )  # fmt: skip


def one(directory: Path, size: int) -> dict[str, Any]:
    """One file serves all sizes: it grows within a turn, and is cut for the next."""
    guest = random_file(directory / "guest", size)
    return move_file(guest, directory / "arrived", timeout=TIMEOUT).numbers()


def medians_of(runs: list[dict[str, Any]], size: int) -> dict[str, float]:
    names = (
        "seconds", "wall", "cpu_source", "cpu_destination", "memory_source", "memory_destination",
        "stream",
    )  # fmt: skip
    result = {name: median(run[name] for run in runs) for name in names}
    result["speed"] = size / result["seconds"]
    result["seconds_per_gib"] = result["seconds"] * GIB / size
    return result


def table(medians: dict[str, dict[str, float]]) -> Table:
    first = next(iter(medians.values()), None)
    rows = []
    for size, numbers in medians.items():
        assert first is not None
        rows.append([
            size_name(int(size)),
            seconds(numbers["seconds"]),
            gigabytes(numbers["speed"]),
            seconds(numbers["seconds_per_gib"]),
            f"{numbers['seconds_per_gib'] / first['seconds_per_gib']:.2f}",
            seconds(numbers["stream"]),
            seconds(numbers["cpu_source"]),
            seconds(numbers["cpu_destination"]),
            mebibytes(numbers["memory_source"]),
            mebibytes(numbers["memory_destination"]),
        ])  # fmt: skip
    head = (
        "guest", "s", "GB/s", "s per GiB", "of the first", "bare stream s", "CPU s, source",
        "CPU s, dest.", "MiB, source", "MiB, dest.",
    )  # fmt: skip
    return Table(head, rows)
