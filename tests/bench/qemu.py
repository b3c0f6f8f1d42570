"""QEMU's attempt at the workload: two real QEMUs with the guest of tests/machine, driven by QMP."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.bench.guest_files import same_content, shelf
from tests.bench.migration import migration
from tests.bench.processes import Measured, ProgramError
from tests.bench.qmp import QMP
from tests.bench.report import LeftOutError
from tests.bench.workload import Attempt, Workload
from tests.machine.sweep import BASE, LINE, Sweep, assembled
from tests.network import FAR, Link

PROGRAM = "qemu-system-x86_64"
PORT = 4440
POLL = 0.05
ENDED = ("completed", "failed", "cancelled")


@dataclass(frozen=True)
class Emulator:
    """One QEMU: its command, and the accelerator that it runs its guest with."""

    command: str = PROGRAM
    accel: str = "tcg"


TCG = Emulator()


def check_usable() -> None:
    if shutil.which(PROGRAM) is None:
        raise LeftOutError(f"QEMU is left out: {PROGRAM} is not installed.")
    try:
        assembled()
    except (OSError, RuntimeError) as error:
        raise LeftOutError(f"QEMU is left out, its guest cannot be assembled: {error}") from error


class Machine:
    """A QEMU whose guest has the workload's memory from 1 MiB on."""

    def __init__(
        self, workload: Workload, emulator: Emulator, directory: Path, name: str, namespace: str,
        *extra: str,
    ) -> None:  # fmt: skip
        self.sweep = Sweep(
            workload.hot, stride=workload.stride, fill=workload.size, rate=workload.rate
        )
        image, path = directory / f"{name}.img", directory / f"{name}.qmp"
        image.write_bytes(self.sweep.image())
        self._serial = directory / f"{name}.serial"
        command = [
            emulator.command, "-nodefaults", "-display", "none",
            "-machine", f"pc,accel={emulator.accel}",
            "-m", f"{(BASE + workload.size) >> 20}M",
            "-bios", str(image), "-serial", f"file:{self._serial}",
            "-qmp", f"unix:{path},server=on,wait=off", *extra,
        ]  # fmt: skip
        with contextlib.ExitStack() as stack:
            self.program = stack.enter_context(Measured(command, namespace))
            self.qmp = stack.enter_context(QMP(str(path)))
            self._stack = stack.pop_all()

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def increments(self) -> int:
        """Return how many the guest has made: it keeps them in registers, see guest.S."""
        text = self.qmp.monitor("info registers")
        found = [re.search(rf"\b{name}=([0-9a-f]+)", text) for name in ("RBX", "RDI")]
        if None in found:
            raise ProgramError(f"QEMU's monitor says {text!r} of its guest's registers")
        sweeps, address = (int(one[1], 16) for one in found if one)
        turn = -(-self.sweep.size // self.sweep.stride)
        return sweeps * turn + (address - self.sweep.start) // self.sweep.stride

    def wait_counting(self, timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while not LINE.match(self._serial.read_bytes()):
            if time.monotonic() > end:
                raise ProgramError("QEMU's guest has not filled its memory in time")
            time.sleep(0.1)

    def rate(self, seconds: float = 1.0) -> float:
        """Increments a second that the guest really makes."""
        began, before = time.monotonic(), self.increments()
        time.sleep(seconds)
        after, ended = self.increments(), time.monotonic()
        return (after - before) / (ended - began)

    def prepare(self, workload: Workload, capabilities: Sequence[str]) -> None:
        """Capabilities and parameters; it has no limit of its own: the link has one."""
        switches = [{"capability": name, "state": True} for name in capabilities]
        self.qmp.execute("migrate-set-capabilities", capabilities=switches)
        self.qmp.execute(
            "migrate-set-parameters", max_bandwidth=0, xbzrle_cache_size=workload.cache,
            downtime_limit=round(workload.downtime_limit * 1e3),
        )  # fmt: skip

    def save_memory(self, path: Path, size: int) -> Path:
        self.qmp.execute("pmemsave", val=BASE, size=size, filename=str(path))
        return path


def attempt(workload: Workload, *capabilities: str, emulator: Emulator = TCG) -> Attempt:
    """Moves it, or cancels after the workload's patience.

    With postcopy-ram, the destination takes over after the first round.
    """
    # two files of saved memory beside the memories of both
    with (
        shelf(4 * workload.size) as directory,
        Link(workload.link) as link,
        Machine(
            workload, emulator, directory, "far", link.far, "-S", "-incoming", "defer"
        ) as far,
        Machine(workload, emulator, directory, "near", link.near) as near,
    ):  # fmt: skip
        near.wait_counting()
        rate = near.rate()
        for machine in (far, near):
            machine.prepare(workload, capabilities)
        far.qmp.execute("migrate-incoming", uri=f"tcp:{FAR}:{PORT}")
        before = link.carried()
        near.qmp.execute("migrate", uri=f"tcp:{FAR}:{PORT}")
        info = follow(near.qmp, workload.patience, postcopy="postcopy-ram" in capabilities)
        carried = link.carried() - before
        completed = info["status"] == "completed"
        memory = "-"
        if completed:
            memory = compare(near, far, workload, directory)
    return Attempt(
        completed=completed,
        why="" if completed else str(info.get("error-desc", "not converged")),
        seconds=info.get("total-time", 0) / 1e3,
        link_bytes=carried,
        downtime=info["downtime"] / 1e3 if completed else None,
        expected=info["expected-downtime"] / 1e3 if "expected-downtime" in info else None,
        memory=memory,
        detail={"rate": rate, "query-migrate": info},
    )


def carried(workload: Workload, *options: str, emulator: Emulator = TCG) -> Attempt:
    """The same two machines, and our two programs between them; the link is between those."""
    with (
        shelf(4 * workload.size) as directory,
        Link(workload.link) as link,
        Machine(
            workload, emulator, directory, "far", link.far, "-S", "-incoming",
            f"unix:{directory}/in",
        ) as far,
        Machine(
            workload, emulator, directory, "near", link.near,
            "-qmp", f"unix:{directory}/drive,server=on,wait=off",
        ) as near,
    ):  # fmt: skip
        near.wait_counting()
        rate = near.rate()
        with migration(
            [
                "--guest", f"qemu:qmp={directory}/drive", *options,
                "--downtime-limit", f"{workload.downtime_limit * 1e3:.0f}",
            ],
            ["--guest", f"qemu:unix:{directory}/in"],
            listen=f"{FAR}:0", namespaces=(link.near, link.far), timeout=workload.patience,
        ) as moved:  # fmt: skip
            info = near.qmp.execute("query-migrate")
            memory = compare(near, far, workload, directory) if moved.completed else "-"
            expected = moved.result.get("expected-downtime")
            # QEMU does not say it of a migration that was cancelled.
            total = info.get("total-time", moved.result.get("total-time", 0))
            return Attempt(
                completed=moved.completed,
                why="" if moved.completed else moved.why,
                seconds=total / 1e3,
                link_bytes=link.carried(),
                downtime=info["downtime"] / 1e3 if moved.completed else None,
                expected=None if expected is None else expected / 1e3,
                memory=memory,
                detail={**moved.numbers(), "rate": rate, "query-migrate": info},
            )


def follow(qmp: QMP, patience: float, *, postcopy: bool) -> dict[str, Any]:
    """The last query-migrate of a migration that has ended, by itself or because we cancelled.

    A forecast that was given while it ran is kept. With `postcopy` the destination takes over
    after the first round.
    """
    end = time.monotonic() + patience
    last: dict[str, Any] = {}
    while True:
        info: dict[str, Any] = qmp.execute("query-migrate")
        expected = last.get("expected-downtime")
        if expected is not None:
            info.setdefault("expected-downtime", expected)
        if info.get("status") in ENDED:
            time.sleep(0.2)  # right at the end the times can still be zero
            return {**info, **qmp.execute("query-migrate")}
        last = info
        if postcopy and info.get("ram", {}).get("dirty-sync-count", 0) > 1:
            qmp.execute("migrate-start-postcopy")
            postcopy = False
        if time.monotonic() > end:
            qmp.execute("migrate_cancel")
            while qmp.execute("query-migrate").get("status") not in ENDED:
                time.sleep(POLL)
            return {**last, "error-desc": f"not converged in {patience:.0f} s"}
        time.sleep(POLL)


def compare(near: Machine, far: Machine, workload: Workload, directory: Path) -> str:
    """Both stand still: the source for good, the destination because it was started with -S."""
    while far.qmp.execute("query-status")["status"] == "inmigrate":
        time.sleep(POLL)
    first = near.save_memory(directory / "near.mem", workload.size)
    second = far.save_memory(directory / "far.mem", workload.size)
    if not same_content(first, second):
        return "WRONG"
    far.qmp.execute("cont")
    return "equal" if far.rate(0.5) > 0 else "WRONG: does not run"
