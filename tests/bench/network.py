"""A real link: two network namespaces joined by a pair of interfaces that carry so much a second.

Whoever wants to use it must be root and have ip and tc (iproute2). The kernel keeps the limit, in
both directions, whatever the programs at its ends think of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from types import TracebackType

from tests.bench.report import LeftOutError

NEAR, FAR = "10.173.0.1", "10.173.0.2"


def check_usable() -> None:
    """Raises LeftOutError where there can be no such link."""
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        raise LeftOutError(f"The link needs iproute2: {' and '.join(missing)} not found.")
    if os.geteuid() != 0:
        raise LeftOutError("The link needs network namespaces, which only root can make.")


class Link:
    """A link of `rate` bits per second; gone after the context, with both namespaces.

    per_connection -- each TCP connection from the near side has that rate for itself
    """

    def __init__(self, rate: int, *, per_connection: bool = False) -> None:
        self.rate = rate
        self.per_connection = per_connection
        self.near, self.far = f"xbmigrate-{os.getpid()}-near", f"xbmigrate-{os.getpid()}-far"

    def __enter__(self) -> Link:
        check_usable()
        try:
            for name in (self.near, self.far):
                _call("ip", "netns", "add", name)
            _call(
                "ip", "link", "add", "link0", "netns", self.near, "type", "veth",
                "peer", "name", "link0", "netns", self.far,
            )  # fmt: skip
            for name, address in ((self.near, NEAR), (self.far, FAR)):
                _call("ip", "-n", name, "address", "add", f"{address}/24", "dev", "link0")
                _call("ip", "-n", name, "link", "set", "lo", "up")
                _call("ip", "-n", name, "link", "set", "link0", "up")
                if self.per_connection:
                    _call("tc", "-n", name, "-batch", "-", text=_classes(self.rate))
                    continue
                _call(
                    "tc", "-n", name, "qdisc", "add", "dev", "link0", "root", "tbf",
                    "rate", f"{self.rate}bit", "burst", "256kb", "latency", "20ms",
                )  # fmt: skip
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()

    def carried(self) -> int:
        """Bytes sent so far, both directions together, as the interfaces count them."""
        total = 0
        for name in (self.near, self.far):
            text = _call("ip", "-n", name, "-s", "-j", "link", "show", "dev", "link0")
            total += int(json.loads(text)[0]["stats64"]["tx"]["bytes"])
        return total

    def _remove(self) -> None:
        with contextlib.suppress(LeftOutError):
            _call("ip", "-n", self.near, "link", "delete", "link0")
        for name in (self.near, self.far):
            with contextlib.suppress(LeftOutError):
                _call("ip", "netns", "delete", name)


def _classes(rate: int) -> str:
    """A class of its own for each value of a source port's low byte. Two connections share one
    with a probability of 1 in 256."""
    lines = ["qdisc add dev link0 root handle 1: htb"]
    for low in range(256):
        number = f"{low + 1:x}"
        lines += [
            f"class add dev link0 parent 1: classid 1:{number} htb rate {rate}bit burst 256kb",
            f"qdisc add dev link0 parent 1:{number} pfifo limit 1000",
            "filter add dev link0 parent 1: protocol ip prio 1 u32 "
            f"match ip protocol 6 0xff match ip sport {low} 0x00ff flowid 1:{number}",
        ]
    return "\n".join(lines) + "\n"


def _call(*command: str, text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LeftOutError(f"No link: {' '.join(command)}: {done.stderr.strip()}.")
    return done.stdout
