"""How fast a guest moves that nobody writes, against what a TCP connection can carry."""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.arrays import warm
from tests.bench.guest_files import (
    random_file,
    reading_time,
    shelf,
    sparse_file,
    zero_file,
)
from tests.bench.migration import move_file, python
from tests.bench.processes import Measured, ProgramError
from tests.bench.report import Options, Part, Table, gigabytes, mebibytes, seconds, size_name
from tests.bench.turns import in_turn, median

CEILING = "one TCP connection"
CEILING_FILE = "the same into a new file"
WARM = "random array, warm"
WARM_ZERO = "array of zeros, warm"
RANDOM = "random guest"
ZERO = "guest of zeros"
SPARSE = "guest of holes"
READ_ZERO = "reading the zeros"
READ_SPARSE = "reading the holes"
READ_WARM = "reading an array"
MOVED = (RANDOM, ZERO, SPARSE)
# What each is measured against: a stream that ends in a new file costs new memory too.
BOUNDS = {RANDOM: CEILING_FILE, ZERO: READ_ZERO, SPARSE: READ_SPARSE, WARM_ZERO: READ_WARM}
TIMEOUT = 120.0
READ_PIECE = 256 << 10


def run(options: Options) -> Part:
    size = (512 << 20) if options.quick else (2 << 30)
    return measure(size, 2 * size, options)


def measure(size: int, ceiling_bytes: int, options: Options) -> Part:
    """`size`: bytes of each guest; `ceiling_bytes`: what the bare connection carries."""
    options.say(f"making guests of {size_name(size)}")
    with shelf(3 * size) as directory:
        contenders = contenders_in(directory, size, ceiling_bytes)
        results = in_turn(contenders, options.turns(5), options.say)
    data = {
        "size": size,
        "ceiling_bytes": ceiling_bytes,
        "runs": results,
        "medians": {name: medians(runs) for name, runs in results.items()},
    }
    return Part(
        "bulk", f"Bulk speed, {size_name(size)}",
        "The guest is a file in a tmpfs that nobody writes, moved by migrate-src to migrate-dst "
        "over loopback with default settings; a digest of all of it is verified. The warm arrays "
        "move between two Python programs whose memory was written before: this machine's first "
        "touch of new memory, which the file needs, is in the same table as a stream that is "
        "written to a new file. "
        f"The ceiling is {size_name(ceiling_bytes)} through one loopback TCP connection between "
        f"two bare Python processes with buffers of 1 MiB. {options.counted(5)} "
        "Seconds are migrate-src's total time; wall adds the start and end of the program. "
        "Memory is the peak of RssAnon + RssFile, sampled each 20 ms: all but the guest itself.",
        [table(data)], data, notes(data),
    )  # fmt: skip


def contenders_in(
    directory: Path, size: int, ceiling_bytes: int
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Makes the guests; what is measured with them, in turn."""
    random = random_file(directory / "random", size)
    zero = zero_file(directory / "zero", size)
    sparse = sparse_file(directory / "sparse", size)
    output = directory / "arrived"
    return {
        CEILING: lambda: ceiling(ceiling_bytes),
        CEILING_FILE: lambda: ceiling(size, output),
        WARM: lambda: array_moved(size, "random"),
        WARM_ZERO: lambda: array_moved(size, "zero"),
        READ_WARM: lambda: {"seconds": array_reading_time(size), "bytes": size},
        RANDOM: lambda: moved(random, output),
        ZERO: lambda: moved(zero, output),
        SPARSE: lambda: moved(sparse, output),
        READ_ZERO: lambda: {"seconds": reading_time(zero), "bytes": size},
        READ_SPARSE: lambda: {"seconds": reading_time(sparse), "bytes": size},
    }


def ceiling(size: int, output: Path | None = None) -> dict[str, Any]:
    """`size` bytes between two bare processes, to nowhere or into a file that is removed."""
    where = [] if output is None else [str(output)]
    try:
        return _stream(size, where)
    finally:
        if output is not None:
            output.unlink(missing_ok=True)


def _stream(size: int, where: list[str]) -> dict[str, Any]:
    with Measured(python("tests.bench.stream", "receive", "127.0.0.1", "0", *where)) as receiver:
        port = receiver.wait_for(r"listening on (\d+)")[1]
        with Measured(python("tests.bench.stream", "send", "127.0.0.1", port, str(size))) as sender:
            sent = sender.expect(TIMEOUT)
            received = receiver.expect(TIMEOUT)
    result = json.loads(received.out)
    if result["bytes"] != size:
        raise ProgramError(f"of {size} bytes {result['bytes']} arrived")
    return {
        **result,
        "wall": sent.wall,
        "cpu_source": sent.cpu,
        "cpu_destination": received.cpu,
        "memory_source": sent.memory,
        "memory_destination": received.memory,
    }


def array_moved(size: int, fill: str) -> dict[str, Any]:
    """An array of a Python program; CPU seconds and memory are not told, since they are mostly
    those of making it."""
    with Measured(python("tests.bench.arrays", "receive", str(size))) as receiver:
        address = receiver.wait_for(r"listening on (\S+)", TIMEOUT)[1]
        with Measured(python("tests.bench.arrays", "send", str(size), fill, address)) as sender:
            sent = sender.expect(TIMEOUT)
            receiver.expect(TIMEOUT)
    result: dict[str, Any] = json.loads(sent.out)
    return result


def array_reading_time(size: int) -> float:
    """Seconds to copy warm memory to one warm buffer, in pieces of 256 KiB."""
    memory = memoryview(warm(size, "zero"))
    buffer = memoryview(mmap.mmap(-1, READ_PIECE))
    buffer[:] = memory[:READ_PIECE]
    began = time.perf_counter()
    for offset in range(0, size, READ_PIECE):
        buffer[:] = memory[offset : offset + READ_PIECE]
    return time.perf_counter() - began


def moved(path: Path, output: Path) -> dict[str, Any]:
    migration = move_file(path, output, timeout=TIMEOUT)
    return {**migration.numbers(), "bytes": path.stat().st_size, "why": migration.why}


def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The median of each number; "speed" in bytes per second. {} where a run did not complete."""
    if not all(run.get("completed", True) for run in runs):
        return {}
    names = [name for name, value in runs[0].items() if isinstance(value, int | float)]
    result = {name: median(run[name] for run in runs) for name in names}
    result["speed"] = median(run["bytes"] / max(run["seconds"], 1e-6) for run in runs)
    return result


def table(data: dict[str, Any]) -> Table:
    top = data["medians"][CEILING]["speed"]
    rows = []
    for name, numbers in data["medians"].items():
        if not numbers:
            rows.append([name, *["-"] * 9])
            continue
        both = "cpu_source" in numbers
        rows.append([
            name,
            seconds(numbers["seconds"]),
            seconds(numbers["wall"]) if both else "-",
            gigabytes(numbers["speed"]),
            f"{numbers['speed'] / top:.2f}",
            bound_ratio(name, data),
            seconds(numbers["cpu_source"]) if both else "-",
            seconds(numbers["cpu_destination"]) if both else "-",
            mebibytes(numbers["memory_source"]) if both else "-",
            mebibytes(numbers["memory_destination"]) if both else "-",
        ])  # fmt: skip
    head = (
        "", "s", "wall s", "GB/s", "of the first", "of its bound", "CPU s, source",
        "CPU s, dest.", "MiB, source", "MiB, dest.",
    )  # fmt: skip
    return Table(head, rows)


def bound_ratio(name: str, data: dict[str, Any]) -> str:
    """Zeros cost the link nothing: their bound is how fast memory is read."""
    bound = BOUNDS.get(name)
    if bound is None:
        return "-"
    return f"{data['medians'][name]['speed'] / data['medians'][bound]['speed']:.2f}"


def notes(data: dict[str, Any]) -> list[str]:
    found = []
    for name in MOVED:
        if data["medians"][name]:
            continue
        whys = [run["why"] for run in data["runs"][name] if not run["completed"]]
        found.append(f"{name}: did not arrive in {len(whys)} runs: {whys[0]}.")
    return found
