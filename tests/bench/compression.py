"""What compression brings: memories of several kinds over links of several speeds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb

from tests.bench.guest_files import random_file, shelf
from tests.bench.migration import Migration, migration
from tests.bench.processes import ProgramError
from tests.bench.report import Options, Part, Table, mebibytes, seconds, size_name
from tests.bench.turns import in_turn, median

MIB = 1 << 20
# Bytes per second; 0 is loopback, as fast as it goes.
RATES = (30_000_000, 117 * MIB, 0)
WORDS = ("accepted", "address", "answer", "closed", "connection", "database", "failed", "from",
         "migrated", "page", "query", "refused", "request", "row", "session", "table", "took",
         "transaction", "user", "value")  # fmt: skip


def run(options: Options) -> Part:
    size = 64 * MIB if options.quick else 512 * MIB
    rates = RATES[:2] if options.quick else RATES
    rows: list[list[str]] = []
    data: list[dict[str, Any]] = []
    with shelf(5 * size) as directory:
        guests = {
            "log": log_file(directory / "log", size),
            "LMDB database": lmdb_file(directory / "lmdb", size),
            "random": random_file(directory / "random", size),
        }
        for name, path in guests.items():
            for rate in rates:
                options.say(f"{name}, {rate_name(rate)}:")
                ways: dict[str, Callable[[], Migration]] = {
                    switch: lambda switch=switch, path=path, rate=rate: one(path, rate, switch)
                    for switch in ("on", "off")
                }
                results = in_turn(ways, options.turns(), options.say)
                rows.append(row(name, rate, results))
                data.append({
                    "guest": name,
                    "rate": rate,
                    "runs": {way: [run.numbers() for run in runs] for way, runs in results.items()},
                })  # fmt: skip
    head = ("guest, link", "MiB", "without", "ratio", "s", "without", "ratio", "CPU s", "without")
    return Part(
        "bytes", f"Compression, {size_name(size)}",
        "Files in a tmpfs, at rest, moved over loopback with `--max-bandwidth`, with "
        "`--capability zstd=on` and `off` in turn. The log has lines of a date, numbers and words; "
        "the database is LMDB's, with JSON objects of 100 to 400 bytes under random keys. CPU: "
        f"user and system seconds of both programs. {options.counted()}",
        [Table(head, rows)], {"rows": data}, [],
    )  # fmt: skip


def one(path: Path, rate: int, switch: str) -> Migration:
    output = path.with_suffix(".there")
    try:
        with migration(
            ["--guest", f"file:{path}", "--max-bandwidth", str(rate),
             "--capability", f"zstd={switch}"],
            ["--output", str(output)],
        ) as moved:  # fmt: skip
            if not moved.completed:
                raise ProgramError(f"the migration failed: {moved.why}")
            return moved
    finally:
        output.unlink(missing_ok=True)


def row(name: str, rate: int, results: dict[str, list[Migration]]) -> list[str]:
    def of(way: str, what: Callable[[Migration], float]) -> float:
        return median(what(run) for run in results[way])

    cells = [f"{name}, {rate_name(rate)}"]
    for what, shown in (
        (lambda run: float(run.result["ram"]["transferred"]), mebibytes),
        (lambda run: run.seconds, seconds),
    ):
        ours, without = of("on", what), of("off", what)
        cells += [shown(ours), shown(without), f"{ours / without:.2f}"]
    for way in ("on", "off"):
        cells.append(seconds(of(way, lambda run: run.source.cpu + run.destination.cpu)))
    return cells


def rate_name(rate: int) -> str:
    return f"{rate / 1e6:.0f} MB/s" if rate else "no limit"


def log_file(path: Path, size: int) -> Path:
    """Lines like those of a server's log."""
    chance = random.Random(1)
    with open(path, "wb") as file:
        while file.tell() < size:
            second = chance.randrange(86_400)
            lines = [
                f"2026-11-30T{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}."
                f"{chance.randrange(1000):03} {chance.choice(WORDS)}[{chance.randrange(30_000)}]: "
                f"{' '.join(chance.choices(WORDS, k=8))} {chance.getrandbits(40):x}\n"
                for _ in range(2000)
            ]
            file.write("".join(lines).encode())
        file.truncate(size)
    return path


def lmdb_file(path: Path, size: int) -> Path:
    """A database of about `size` bytes."""
    chance = random.Random(2)
    with lmdb.open(str(path), map_size=size, subdir=False, sync=False, writemap=True) as database:
        try:
            while True:
                with database.begin(write=True) as transaction:
                    for _ in range(2000):
                        value = {
                            "id": chance.getrandbits(50),
                            "name": " ".join(chance.choices(WORDS, k=3)),
                            "balance": chance.randrange(10**7) / 100,
                            "tags": chance.choices(WORDS, k=chance.randrange(20)),
                        }
                        key = chance.randbytes(12)
                        transaction.put(key, json.dumps(value).encode())
        except lmdb.MapFullError:
            pass
    path.with_name(path.name + "-lock").unlink(missing_ok=True)
    return path
