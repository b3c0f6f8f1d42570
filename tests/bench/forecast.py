"""What --dry-run predicts against what the migration then takes, for demo guests that differ."""

from __future__ import annotations

import json
from typing import Any

from tests.bench.migration import migration
from tests.bench.processes import Measured
from tests.bench.report import Options, Part, Table, mebibytes, seconds, size_name
from tests.programs import BIN

BANDWIDTH = "50m"
TIMEOUT = 300.0
HOT = "hot=128m,stride=4096,fill=random"
NO_DELTAS = ["--capability", "xbzrle=off"]
LOADS: dict[str, tuple[str, list[str]]] = {
    "a byte in each page, at full speed": (HOT, ["--cache-size", "128m"]),
    "the same, a cache of a quarter": (HOT, ["--cache-size", "32m"]),
    "80000 bytes a second": (f"{HOT},rate=80000", ["--cache-size", "128m"]),
    "8000 pages a second, no deltas": (f"{HOT},rate=8000", NO_DELTAS),
    "40000 pages a second, no deltas": (f"{HOT},rate=40000", NO_DELTAS),
    "the same, --auto-converge": (f"{HOT},rate=40000", [*NO_DELTAS, "--auto-converge"]),
}
QUICK = 3


def run(options: Options) -> Part:
    loads = dict(list(LOADS.items())[:QUICK]) if options.quick else LOADS
    size = (64 if options.quick else 256) << 20
    data: dict[str, Any] = {}
    for name, (shape, words) in loads.items():
        options.say(name)
        guest = f"demo:{size},{shape.replace('128m', '32m') if options.quick else shape}"
        data[name] = both(guest, [*words, "--max-bandwidth", BANDWIDTH])
    return Part(
        "forecast", "The dry run against the migration",
        f"A demo guest of {size_name(size)} of random content of which half is written, over "
        f"loopback with `--max-bandwidth {BANDWIDTH}`: first with `--dry-run`, which looks at it "
        "for two seconds, then for good. One run of each.",
        [table(data)], data,
    )  # fmt: skip


def both(guest: str, words: list[str]) -> dict[str, Any]:
    """The prediction, and what came of it."""
    source = ["--guest", guest, *words]
    with Measured([str(BIN / "migrate-dst"), "--listen", "127.0.0.1:0"]) as receiver:
        address = receiver.wait_for(r"listening on (\S+)")[1]
        command = [str(BIN / "migrate-src"), "--dry-run", "--json", *source, address]
        with Measured(command) as dry:
            predicted = json.loads(dry.wait(TIMEOUT).out)
    with migration(source, timeout=TIMEOUT) as moved:
        return {"predicted": predicted, "real": moved.result}


def table(data: dict[str, Any]) -> Table:
    rows = []
    for name, found in data.items():
        predicted, real = found["predicted"], found["real"]
        times = [one["total-time"] / 1e3 for one in (predicted, real)]
        sent = [one["ram"]["transferred"] for one in (predicted, real)]
        rows.append([
            name, real["status"] if real["status"] == predicted["status"] else "otherwise",
            *map(seconds, times), off(*times), *map(mebibytes, sent), off(*sent),
            pause(predicted), pause(real),
        ])  # fmt: skip
    return Table(
        ("", "outcome", "s, predicted", "s", "off", "MiB, predicted", "MiB", "off",
         "downtime ms, predicted", "ms"),
        rows,
    )  # fmt: skip


def off(predicted: float, real: float) -> str:
    return f"{100 * (predicted / real - 1):+.0f} %" if real else "-"


def pause(result: dict[str, Any]) -> str:
    """Of one that did not converge, what it would have been."""
    return str(result["downtime"] if "downtime" in result else result.get("expected-downtime", "-"))
