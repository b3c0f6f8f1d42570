"""What several connections carry on a path that limits each of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.bench.migration import migration
from tests.bench.report import Options, Part, Table, mebibytes, seconds, size_name
from tests.bench.turns import in_turn, median
from tests.network import FAR, Link

COUNTS = (1, 2, 4)
RATE = 160_000_000


def run(options: Options) -> Part:
    size = (64 << 20) if options.quick else (256 << 20)
    contenders: dict[str, Callable[[], dict[str, Any]]] = {
        str(count): partial(moved, size, count) for count in COUNTS
    }
    runs = in_turn(contenders, options.turns(), options.say)
    medians = {
        name: {key: median(one[key] for one in taken) for key in taken[0]}
        for name, taken in runs.items()
    }
    data = {"size": size, "rate": RATE, "runs": runs, "medians": medians}
    return Part(
        "channels", "Channels on a path that limits each connection",
        f"A demo guest of {size_name(size)} of random content that writes one byte in each page of "
        "a quarter of it, for ever, over a veth between two network namespaces on which each "
        f"connection gets {RATE // 1000000} Mbit/s (tc htb, a class for each source port). "
        f"{options.counted()}",
        [table(data)], data,
    )  # fmt: skip


def moved(size: int, channels: int) -> dict[str, Any]:
    shape = f"demo:{size},hot={size // 4},stride=4096,rate=20000,fill=random"
    with Link(RATE, per_connection=True) as link, migration(
        ["--guest", shape, "--cache-size", str(size), "--channels", str(channels)],
        listen=f"{FAR}:0", namespaces=(link.near, link.far),
    ) as migrated:  # fmt: skip
        numbers = migrated.numbers()
        ram = numbers["result"]["ram"]
        return {
            "seconds": numbers["seconds"],
            "speed": ram["transferred"] / numbers["seconds"],
            "downtime": numbers["result"].get("downtime", 0) / 1e3,
            "memory_source": numbers["memory_source"],
            "memory_destination": numbers["memory_destination"],
        }


def table(data: dict[str, Any]) -> Table:
    first = data["medians"]["1"]["speed"]
    rows = [
        [
            count,
            seconds(numbers["seconds"]),
            f"{numbers['speed'] / 1e6:.1f}",
            f"{numbers['speed'] / first:.2f}",
            f"{numbers['downtime'] * 1e3:.0f}",
            mebibytes(numbers["memory_source"]),
            mebibytes(numbers["memory_destination"]),
        ]
        for count, numbers in data["medians"].items()
    ]
    head = ("channels", "s", "MB/s", "times one", "downtime ms", "MiB, source", "MiB, dest.")
    return Table(head, rows)
