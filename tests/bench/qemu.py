"""Moves of a guest between two real QEMUs that QMP drives: by QEMU alone, and through us."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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
# What is on in one attempt is off in the next.
SWITCHED = ("xbzrle", "multifd")
LATER = Path(__file__).parents[1] / "machine" / "later.sh"


@dataclass(frozen=True)
class Emulator:
    """One QEMU: its command, and the accelerator that it runs its guest with."""

    command: str = PROGRAM
    accel: str = "tcg"


TCG = Emulator()


def later(accel: str = "tcg") -> Emulator:
    """Return Debian's later QEMU. Raise LeftOutError if it cannot be had."""
    done = subprocess.run([LATER], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LeftOutError(f"Debian's later QEMU is left out: {done.stderr.strip()}")
    return Emulator(done.stdout.strip(), accel)


def check_usable() -> None:
    if shutil.which(PROGRAM) is None:
        raise LeftOutError(f"QEMU is left out: {PROGRAM} is not installed.")
    try:
        assembled()
    except (OSError, RuntimeError) as error:
        raise LeftOutError(f"QEMU is left out, its guest cannot be assembled: {error}") from error


class Running:
    """A running QEMU, its QMP connection, and what its guest prints on the serial port.

    words     -- what is special of it: memory, firmware or kernel, how it starts
    name      -- of its files in the directory
    namespace -- the network namespace that it runs in, "" for none

    guest     -- what our programs have to be told as their --guest
    """

    def __init__(
        self, words: Sequence[str], emulator: Emulator, directory: Path, name: str,
        namespace: str = "",
    ) -> None:  # fmt: skip
        self.directory, self.name, self.namespace = directory, name, namespace
        self._serial = directory / f"{name}.serial"
        sockets = [directory / f"{name}.qmp", directory / f"{name}.drive"]
        command = [
            emulator.command, "-nodefaults", "-display", "none",
            "-machine", f"pc,accel={emulator.accel}", "-serial", f"file:{self._serial}",
            *(word for path in sockets for word in ("-qmp", f"unix:{path},server=on,wait=off")),
            *words,
        ]  # fmt: skip
        self.guest = f"qemu:qmp={sockets[1]}"
        with contextlib.ExitStack() as stack:
            self.program = stack.enter_context(Measured(command, namespace))
            self.qmp = stack.enter_context(QMP(str(sockets[0])))
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    @property
    def serial(self) -> bytes:
        """What the guest has printed here so far."""
        return self._serial.read_bytes() if self._serial.exists() else b""

    def prepare(self, workload: Workload, capabilities: Sequence[str], **parameters: Any) -> None:
        """Set capabilities and parameters. QEMU has no limit of its own: the link has one."""
        switches = [
            {"capability": name, "state": name in capabilities}
            for name in {*SWITCHED, *capabilities}
        ]
        self.qmp.execute("migrate-set-capabilities", capabilities=switches)
        values = {
            "max_bandwidth": 0,
            "xbzrle_cache_size": workload.cache,
            "downtime_limit": round(workload.downtime_limit * 1e3),
            **parameters,
        }
        self.qmp.execute("migrate-set-parameters", **values)

    def wait_loaded(self) -> None:
        """Wait until the guest that comes here is complete. It stands still after -S."""
        while self.qmp.execute("query-status")["status"] == "inmigrate":
            time.sleep(POLL)

    def save_memory(self, start: int, size: int) -> Path:
        path = self.directory / f"{self.name}.mem"
        self.qmp.execute("pmemsave", val=start, size=size, filename=str(path))
        return path


class Machine(Running):
    """A QEMU whose guest has the workload's memory from 1 MiB on."""

    def __init__(
        self, workload: Workload, emulator: Emulator, directory: Path, name: str, namespace: str,
        *extra: str,
    ) -> None:  # fmt: skip
        self.workload = workload
        self.sweep = Sweep(
            workload.hot, stride=workload.stride, fill=workload.size, rate=workload.rate
        )
        image = directory / f"{name}.img"
        image.write_bytes(self.sweep.image())
        words = ["-m", f"{(BASE + workload.size) >> 20}M", "-bios", str(image), *extra]
        super().__init__(words, emulator, directory, name, namespace)

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
        while not LINE.match(self.serial):
            if time.monotonic() > end:
                raise ProgramError("QEMU's guest has not filled its memory in time")
            time.sleep(0.1)

    def rate(self, seconds: float = 1.0) -> float:
        """Increments a second that the guest really makes."""
        began, before = time.monotonic(), self.increments()
        time.sleep(seconds)
        after, ended = self.increments(), time.monotonic()
        return (after - before) / (ended - began)

    def arrived_from(self, near: Machine) -> str:
        """Compare the memory of both, then run on; return the verdict."""
        if not same_memory(near, self, BASE, self.workload.size):
            return "WRONG"
        self.qmp.execute("cont")
        return "equal" if self.rate(0.5) > 0 else "WRONG: does not run"


def attempt(workload: Workload, *capabilities: str, emulator: Emulator = TCG) -> Attempt:
    """Move the guest by QEMU alone; see `direct`."""
    return _checked(workload, emulator, lambda near, far, link: direct(
        near, far, workload, capabilities, link=link
    ))  # fmt: skip


def carried(workload: Workload, *options: str, emulator: Emulator = TCG) -> Attempt:
    """Move the same guest by our two programs, with these options of migrate-src."""
    return _checked(workload, emulator, lambda near, far, link: through(
        near, far, workload, options, link=link
    ))  # fmt: skip


def _checked(
    workload: Workload, emulator: Emulator, move: Callable[[Machine, Machine, Link], Attempt]
) -> Attempt:
    """Move the guest between two machines of its own; add its pace, and what became of it."""
    with _pair(workload, emulator) as (near, far, link):
        rate = near.rate()
        done = move(near, far, link)
        memory = far.arrived_from(near) if done.completed else "-"
    return replace(done, memory=memory, detail={"rate": rate, **done.detail})


@contextlib.contextmanager
def _pair(workload: Workload, emulator: Emulator) -> Iterator[tuple[Machine, Machine, Link]]:
    """Two machines, the first of which counts, and the link between them."""
    waiting = ("-S", "-incoming", "defer")
    # two files of saved memory beside the memories of both
    with (
        shelf(4 * workload.size) as directory,
        Link(workload.link) as link,
        Machine(workload, emulator, directory, "far", link.far, *waiting) as far,
        Machine(workload, emulator, directory, "near", link.near) as near,
    ):  # fmt: skip
        near.wait_counting()
        yield near, far, link


def direct(
    near: Running, far: Running, workload: Workload, capabilities: Sequence[str], *,
    link: Link, address: str = FAR, **parameters: Any,
) -> Attempt:  # fmt: skip
    """Move a guest by QEMU alone, or cancel after the workload's patience.

    The memory is not compared yet. With postcopy-ram, the destination takes over after the first
    round.

    address    -- the one of the host that `far` is on
    parameters -- more of QEMU's, with underscores for their dashes
    """
    for machine in (far, near):
        machine.prepare(workload, capabilities, **parameters)
    uri = f"tcp:{address}:{PORT}"
    far.qmp.execute("migrate-incoming", uri=uri)
    before = link.carried()
    near.qmp.execute("migrate", uri=uri)
    info = follow(near.qmp, workload.patience, postcopy="postcopy-ram" in capabilities)
    link_bytes = link.carried() - before
    completed = info["status"] == "completed"
    if completed:
        far.wait_loaded()
    return Attempt(
        completed=completed,
        why="" if completed else str(info.get("error-desc", "not converged")),
        seconds=info.get("total-time", 0) / 1e3,
        link_bytes=link_bytes,
        downtime=info["downtime"] / 1e3 if completed else None,
        expected=info["expected-downtime"] / 1e3 if "expected-downtime" in info else None,
        memory="-",
        detail={"query-migrate": info},
    )


def through(
    near: Running, far: Running, workload: Workload, options: Sequence[str] = (), *,
    link: Link | None = None, address: str = FAR,
) -> Attempt:  # fmt: skip
    """Move a guest by our two programs between the two machines; see `direct`.

    Without a link both programs are on this host, and no bytes are counted.
    """
    before = link.carried() if link else 0
    with migration(
        [
            "--guest", near.guest, *options,
            "--downtime-limit", f"{workload.downtime_limit * 1e3:.0f}",
        ],
        ["--guest", far.guest],
        listen=f"{address}:0", namespaces=(near.namespace, far.namespace),
        timeout=workload.patience,
    ) as moved:  # fmt: skip
        info = near.qmp.execute("query-migrate")
        if moved.completed:
            far.wait_loaded()
        expected = moved.result.get("expected-downtime")
        # QEMU does not say it of a migration that was cancelled.
        total = info.get("total-time", moved.result.get("total-time", 0))
        return Attempt(
            completed=moved.completed,
            why="" if moved.completed else moved.why,
            seconds=total / 1e3,
            link_bytes=link.carried() - before if link else 0,
            downtime=info["downtime"] / 1e3 if moved.completed else None,
            expected=None if expected is None else expected / 1e3,
            memory="-",
            detail={**moved.numbers(), "query-migrate": info},
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


def same_memory(near: Running, far: Running, start: int, size: int) -> bool:
    """Compare the memory of two guests that stand still: the source for good, the destination
    because it was started with -S."""
    return same_content(*(machine.save_memory(start, size) for machine in (near, far)))
