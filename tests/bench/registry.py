"""The parts of the benchmark, in the order they run.

A part is a module with `run(options: Options) -> Part`. It raises LeftOutError where this machine
cannot run it. A plot for it, if any, goes to plots.PLOTS under the same name.
"""

from __future__ import annotations

from typing import Protocol

from tests.bench import (
    bulk,
    carry,
    channels,
    codec,
    compression,
    forecast,
    kvm,
    linux,
    lossy,
    rivals,
    scaling,
    size,
    tls,
)
from tests.bench.report import Options, Part


class PartModule(Protocol):
    """What a part's module offers."""

    def run(self, options: Options) -> Part: ...


PARTS: dict[str, PartModule] = {
    "codec": codec,
    "bulk": bulk,
    "scaling": scaling,
    "size": size,
    "bytes": compression,
    "channels": channels,
    "lossy": lossy,
    "tls": tls,
    "forecast": forecast,
    "rivals": rivals,
    "carry": carry,
    "kvm": kvm,
    "linux": linux,
}
