"""A network of our own: two hosts with addresses, and a switch between them that can fail.

    near: link0 ---- near |        switch        | far ---- link0 :far
                          |  a bridge, or two     |
                          |  with a wire between  |

Three network namespaces. The hosts are joined by pairs of interfaces (veth) to the switch, which
keeps the rate (tc, tbf or htb), so that what is too much is dropped there, as on a real network,
and no host hears of it. Where there is to be delay, loss, or worse, the switch is two bridges with
a wire of ours between them (tests/wire.py).

Whoever wants to use it must be root and have ip and tc (iproute2).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from tests.bench.report import LeftOutError

NEAR, FAR = "10.173.0.1", "10.173.0.2"
NEAR6, FAR6 = "fd73::1", "fd73::2"
MACS = {"near": "02:00:00:00:00:01", "far": "02:00:00:00:00:02"}
OTHER = {"near": "far", "far": "near"}
WIRE = Path(__file__).with_name("wire.py")
# Frames that wait for the wire: more than all senders together may have under way.
WIRE_QUEUE = 50_000
CLONE_NEWNET = 0x40000000

_numbers = itertools.count(1)


def check_usable() -> None:
    """Raise LeftOutError if no such network can be made."""
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        raise LeftOutError(f"The link needs iproute2: {' and '.join(missing)} not found.")
    if os.geteuid() != 0:
        raise LeftOutError("The link needs network namespaces, which only root can make.")


class Link:
    """Two hosts and what joins them; gone after the context, with all that still runs there.

    rate           -- bits per second that the switch passes on, each way; 0 for all it can
    per_connection -- each TCP connection has that rate for itself, and there is none for all
    delay          -- seconds, each way
    loss, duplicates, reordered -- shares of the frames, 0 to 1, each way
    congestion     -- how TCP finds its pace there; what this machine is set to makes no difference

    near, far      -- the names of the hosts' namespaces
    """

    def __init__(
        self, rate: int = 0, *, per_connection: bool = False, delay: float = 0.0,
        loss: float = 0.0, duplicates: float = 0.0, reordered: float = 0.0,
        congestion: str = "cubic",
    ) -> None:  # fmt: skip
        self.rate = rate
        self.per_connection = per_connection
        self.delay = delay
        self.trouble = (delay, loss, duplicates, reordered)
        self.congestion = congestion
        name = f"xbmigrate-{os.getpid()}-{next(_numbers)}"
        self.near, self.far, self.switch = f"{name}-near", f"{name}-far", f"{name}-switch"
        self._limited: list[str] = []
        self._wire: subprocess.Popen[str] | None = None

    def __enter__(self) -> Link:
        check_usable()
        try:
            for name in self._namespaces:
                call("ip", "netns", "add", name)
            self._set_up_switch()
            for host, mine, address, address6 in (
                ("near", self.near, NEAR, NEAR6), ("far", self.far, FAR, FAR6)
            ):  # fmt: skip
                self._set_up_host(host, mine, address, address6)
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

    # -- what can happen to it

    def cut(self, *hosts: str, above: int = 0) -> None:
        """From now on no frame of more than `above` bytes arrives at these hosts, "near" and "far"
        (default: at neither).

        Not even what is under way. No host can notice by anything but the silence: its interface
        is up and takes what is sent.
        """
        # Load the length; jump if it is greater; TC_ACT_SHOT; TC_ACT_OK.
        program = f"4,128 0 0 0,37 0 1 {above},6 0 0 2,6 0 0 0"
        for host in hosts or OTHER:
            call("tc", "-n", self._namespace(host), "-batch", "-", text=(
                "qdisc add dev link0 clsact\n"
                f"filter add dev link0 ingress protocol all bpf da bytecode '{program}'\n"
            ))  # fmt: skip

    def mend(self) -> None:
        """Everything arrives again."""
        for host in OTHER:
            with contextlib.suppress(LeftOutError):
                call("tc", "-n", self._namespace(host), "qdisc", "delete", "dev", "link0", "clsact")

    def set_rate(self, rate: int) -> None:
        """Pass on this many bits per second from now on. For a link that has a rate, not
        per connection."""
        self.rate = rate
        text = "\n".join(self._limit(device) for device in self._limited)
        call("tc", "-n", self.switch, "-batch", "-", text=text)

    def carried(self) -> int:
        """Bytes that the switch has handed to the hosts so far, both together."""
        total = 0
        for port in OTHER:
            text = call("ip", "-n", self.switch, "-s", "-j", "link", "show", "dev", port)
            total += int(json.loads(text)[0]["stats64"]["tx"]["bytes"])
        return total

    @contextlib.contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """What this thread opens, and the threads it starts, are on that host."""
        libc = ctypes.CDLL(None, use_errno=True)
        with (
            open("/proc/thread-self/ns/net", "rb") as here,
            open(f"/run/netns/{self._namespace(host)}", "rb") as there,
        ):
            _set_namespace(libc, there.fileno())
            try:
                yield
            finally:
                _set_namespace(libc, here.fileno())

    # -- making it

    @property
    def _namespaces(self) -> tuple[str, ...]:
        return self.near, self.far, self.switch

    def _namespace(self, host: str) -> str:
        return {"near": self.near, "far": self.far}[host]

    def _set_up_switch(self) -> None:
        lines = []
        for host in OTHER:
            lines.append(
                f"link add {host} type veth peer name link0 address {MACS[host]} "
                f"netns {self._namespace(host)}"
            )
        ways_out = {"far": "far", "near": "near"}
        bridges = {"bridge": ["near", "far"]}
        if any(self.trouble):
            for host in OTHER:
                # A TAP takes no large segments: the kernel cuts them to frames before the wire
                # sees them, so that what is lost is what would be on a real line.
                lines.append(f"tuntap add dev wire-{host} mode tap")
                lines.append(f"link set wire-{host} txqueuelen {WIRE_QUEUE}")
            bridges = {f"bridge-{host}": [host, f"wire-{host}"] for host in OTHER}
            # The rate is kept before the wire: it never sees more than that.
            ways_out = {host: f"wire-{OTHER[host]}" for host in OTHER}
        for bridge, ports in bridges.items():
            lines.append(f"link add {bridge} type bridge")
            lines += [f"link set {port} master {bridge}" for port in ports]
        lines += [f"link set {name} up" for name in [*bridges, *itertools.chain(*bridges.values())]]
        call("ip", "-n", self.switch, "-batch", "-", text="\n".join(lines))
        if self.rate:
            self._limited = [*ways_out.values()]
            self.set_rate(self.rate)
        if any(self.trouble):
            self._start_wire()

    def _limit(self, device: str) -> str:
        # What waits at most: a round trip's worth, which keeps one connection at full speed.
        waits = max(0.02, 2 * self.delay)
        if self.per_connection:
            return classes(self.rate, waits, device)
        burst = min(max(self.rate // 800, 16 << 10), 256 << 10)
        return (
            f"qdisc replace dev {device} root tbf rate {self.rate}bit burst {burst} "
            f"latency {waits * 1e3:.0f}ms"
        )

    def _start_wire(self) -> None:
        self._wire = subprocess.Popen(
            ["ip", "netns", "exec", self.switch, sys.executable, "-ES", str(WIRE),
             *(f"wire-{host}" for host in OTHER), *map(str, self.trouble)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._wire.stdout is not None
        assert self._wire.stderr is not None
        if self._wire.stdout.readline() != "ready\n":
            why = self._wire.stderr.read().strip().rpartition("\n")[2]
            raise LeftOutError(f"No link with delay or loss: {why}.")

    def _set_up_host(self, host: str, name: str, address: str, address6: str) -> None:
        # The other's hardware address is known for ever: where nothing comes through, nobody
        # asks for it in vain, and hears of it.
        peer, peer6 = (FAR, FAR6) if host == "near" else (NEAR, NEAR6)
        lines = [
            "link set lo up",
            "link set link0 up",
            f"address add {address}/24 dev link0",
            f"address add {address6}/64 dev link0 nodad",
            # On the routes: a namespace may not choose what this machine does not allow to all.
            f"route change 10.173.0.0/24 dev link0 proto kernel scope link src {address} "
            f"congctl {self.congestion}",
            f"route change fd73::/64 dev link0 proto kernel metric 256 "
            f"congctl {self.congestion}",
            *(f"neighbour add {one} lladdr {MACS[OTHER[host]]} dev link0 nud permanent"
              for one in (peer, peer6)),
        ]  # fmt: skip
        call("ip", "-n", name, "-batch", "-", text="\n".join(lines))

    def _remove(self) -> None:
        for name in self._namespaces:
            _end_all_in(name)
        if self._wire is not None:
            self._wire.kill()
            self._wire.communicate()
            self._wire = None
        for port in OTHER:
            # By name: a namespace lasts as long as sockets in it that still try to say good-bye.
            with contextlib.suppress(LeftOutError):
                call("ip", "-n", self.switch, "link", "delete", port)
        for name in self._namespaces:
            with contextlib.suppress(LeftOutError):
                call("ip", "netns", "delete", name)


def classes(rate: int, waits: float, device: str) -> str:
    """A class of its own for each value of a source port's low byte. Two connections share one
    with a probability of 1 in 256."""
    queue = max(int(rate / 8 * waits), 256 << 10)
    lines = [f"qdisc add dev {device} root handle 1: htb"]
    for low in range(256):
        number = f"{low + 1:x}"
        lines += [
            f"class add dev {device} parent 1: classid 1:{number} htb rate {rate}bit burst 256kb",
            f"qdisc add dev {device} parent 1:{number} bfifo limit {queue}",
            f"filter add dev {device} parent 1: protocol ip prio 1 u32 "
            f"match ip protocol 6 0xff match ip sport {low} 0x00ff flowid 1:{number}",
        ]
    return "\n".join(lines)


def _end_all_in(namespace: str) -> None:
    """Ends what runs in a namespace of ours; returns when it is gone."""
    for _ in range(200):
        with contextlib.suppress(LeftOutError):
            pids = [int(pid) for pid in call("ip", "netns", "pids", namespace).split()]
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if pids:
                time.sleep(0.01)
                continue
        return


def _set_namespace(libc: ctypes.CDLL, descriptor: int) -> None:
    if libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def call(*command: str, text: str | None = None) -> str:
    """Run a command; return its output. Raise LeftOutError if it fails."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LeftOutError(f"No link: {' '.join(command)}: {done.stderr.strip()}.")
    return done.stdout
