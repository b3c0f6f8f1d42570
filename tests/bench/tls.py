"""What TLS costs: an array between two programs, plain and encrypted, with one channel and four."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.migration import python
from tests.bench.processes import Measured
from tests.bench.report import LeftOutError, Options, Part, Table, gigabytes, seconds, size_name
from tests.bench.turns import in_turn, median

FIRST = "plain, 1 channel"
TIMEOUT = 120.0


def run(options: Options) -> Part:
    if importlib.util.find_spec("cryptography") is None:
        raise LeftOutError("Certificates are made by cryptography (pip install '.[dev]').")
    return measure((256 << 20) if options.quick else (1 << 30), options)


def measure(size: int, options: Options) -> Part:
    with tempfile.TemporaryDirectory() as name:
        creds = certificates(Path(name))
        contenders: dict[str, Callable[[], dict[str, float]]] = {
            FIRST: partial(moved, size, 1),
            "plain, 4 channels": partial(moved, size, 4),
            "TLS, 1 channel": partial(moved, size, 1, creds),
            "TLS, 4 channels": partial(moved, size, 4, creds),
        }
        runs = in_turn(contenders, options.turns(5), options.say)
    medians = {name: median(one["seconds"] for one in taken) for name, taken in runs.items()}
    data = {"size": size, "runs": runs, "medians": medians}
    return Part(
        "tls", f"TLS, {size_name(size)}",
        "An array of random content that nobody writes, between two Python programs over loopback; "
        "both ends hold memory that was written before, and a digest of all of it is verified. "
        "TLS 1.3 with AES-256-GCM and certificates on both sides, encrypted and decrypted in the "
        f"thread of the event loop, whatever the number of channels. {options.counted(5)} Alone: "
        "`make bench BENCH=tls`.",
        [table(data)], data,
    )  # fmt: skip


def certificates(directory: Path) -> str:
    from tests.authority import Authority

    authority = Authority()
    authority.trust(directory)
    for party in ("server", "client"):
        authority.issue(directory, party)
    return str(directory)


def moved(size: int, channels: int, creds: str = "") -> dict[str, float]:
    words = [creds] if creds else []
    with Measured(python("tests.bench.arrays", "receive", str(size), *words)) as receiver:
        address = receiver.wait_for(r"listening on (\S+)", TIMEOUT)[1]
        sending = python(
            "tests.bench.arrays", "send", str(size), "random", address, str(channels), *words
        )
        with Measured(sending) as sender:
            sent = sender.expect(TIMEOUT)
            receiver.expect(TIMEOUT)
    result: dict[str, float] = json.loads(sent.out)
    return result


def table(data: dict[str, Any]) -> Table:
    first = data["medians"][FIRST]
    rows = [
        [name, seconds(taken), gigabytes(data["size"] / taken), f"{first / taken:.2f}"]
        for name, taken in data["medians"].items()
    ]
    return Table(("", "s", "GB/s", "of the first"), rows)
