"""What several connections carry on a path that is long and loses packets."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.bench.migration import migration, python
from tests.bench.processes import Measured
from tests.bench.report import LeftOutError, Options, Part, Table, seconds
from tests.bench.turns import in_turn, median
from tests.network import FAR, Link

COUNTS = (1, 2, 4, 8, 16, 32, 64)
RATES = (20_000_000, 50_000_000, 100_000_000)
DELAY, LOSS = 0.025, 0.01
# One connection that finds its pace with cubic gets about so many bytes a second there.
ALONE = 350_000
BBR = "1, bbr"
MIB = 1 << 20


def run(options: Options) -> Part:
    counts, rates, lasts = COUNTS, RATES, 12.0
    if options.quick:
        counts, rates, lasts = (1, 4, 16), (20_000_000,), 5.0
    tables, links, notes = [], [], []
    for rate in rates:
        options.say(f"{rate // 10**6} Mbit/s:")
        contenders: dict[str, Callable[[], dict[str, float]]] = {
            "without loss": partial(bare, rate, lasts)
        }
        for count in counts:
            contenders[str(count)] = partial(moved, rate, count, lasts)
        if bbr_is_there():
            contenders[BBR] = partial(moved, rate, 1, lasts, congestion="bbr")
        else:
            notes = ["TCP's bbr is left out: this kernel does not have it."]
        runs = in_turn(contenders, options.turns(1), options.say)
        medians = {
            name: {key: median(one[key] for one in taken) for key in taken[0]}
            for name, taken in runs.items()
        }
        links.append({"rate": rate, "runs": runs, "medians": medians})
        tables.append(table(links[-1]))
    return Part(
        "lossy", "Channels on a long path that loses packets",
        f"A demo guest of random content that writes on, over links with {2 * DELAY * 1e3:.0f} ms "
        f"of round trip that lose {LOSS:.0%} of the packets each way (network namespaces, tbf, a "
        "wire of ours for delay and loss; TCP's cubic). It is as large as so many channels carry "
        f"in about {lasts:.0f} s; its pages over the total time, setup and all, are the speed. "
        "Without loss: one bare TCP connection over the same link, which loses nothing but what "
        f"is too much for it. {options.counted(1)}",
        tables, {"delay": DELAY, "loss": LOSS, "links": links}, notes,
    )  # fmt: skip


def moved(rate: int, channels: int, lasts: float, congestion: str = "cubic") -> dict[str, float]:
    fair = rate / 8 if congestion != "cubic" else min(rate / 8, channels * ALONE)
    size = max(int(fair * lasts) // MIB, 1) * MIB
    shape = f"demo:{size},hot={MIB},stride=4096,rate=20000,fill=random"
    with Link(rate, delay=DELAY, loss=LOSS, congestion=congestion) as link, migration(
        ["--guest", shape, "--channels", str(channels)], listen=f"{FAR}:0",
        namespaces=(link.near, link.far), timeout=10 * lasts + 60,
    ) as migrated:  # fmt: skip
        if not migrated.completed:
            raise LeftOutError(f"{channels} channels did not complete: {migrated.why}.")
        return {
            "size": size,
            "seconds": migrated.seconds,
            "setup": migrated.result["setup-time"] / 1e3,
            "speed": size / migrated.seconds,
            "downtime": migrated.result["downtime"] / 1e3,
        }


def bare(rate: int, lasts: float) -> dict[str, float]:
    """One connection between two bare processes, on a link that loses nothing by itself."""
    with (
        Link(rate, delay=DELAY) as link,
        Measured(python("tests.bench.stream", "receive", FAR, "0"), link.far) as receiver,
    ):
        port = receiver.wait_for(r"listening on (\d+)")[1]
        size = str(int(rate / 8 * lasts))
        with Measured(python("tests.bench.stream", "send", FAR, port, size), link.near) as sender:
            sender.expect(60 + 10 * lasts)
            result = json.loads(receiver.expect(60).out)
    return {
        "size": result["bytes"],
        "seconds": result["seconds"],
        "speed": result["bytes"] / result["seconds"],
    }


def bbr_is_there() -> bool:
    try:
        with Link(congestion="bbr"):
            return True
    except LeftOutError:
        with Link():  # where there can be no link at all, that is the reason to give
            return False


def table(link: dict[str, Any]) -> Table:
    whole = link["medians"]["without loss"]["speed"]
    rows = []
    for name, numbers in link["medians"].items():
        ours = name != "without loss"
        rows.append([
            name,
            f"{numbers['size'] / MIB:.0f}",
            seconds(numbers["seconds"]),
            f"{numbers['speed'] * 8 / 1e6:.1f}",
            f"{numbers['speed'] / whole:.2f}",
            seconds(numbers["setup"]) if ours else "-",
            f"{numbers['downtime'] * 1e3:.0f}" if ours else "-",
        ])  # fmt: skip
    head = ("channels", "MiB", "s", "Mbit/s", "of without loss", "setup s", "downtime ms")
    return Table(head, rows, f"{link['rate'] // 10**6} Mbit/s")
