"""The two programs between two real machines, or between a machine and a snapshot."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.machine.qemu import MIB, SLOW, Machine, compare
from tests.machine.sweep import Sweep
from tests.programs import Program, destination
from tests.requirements import need

SWEEP = Sweep(4 * MIB, fill=6 * MIB, rate=1_000_000)


def later() -> str:
    """Return the path of Debian's backport of QEMU; skip the test if it cannot be had."""
    script = Path(__file__).with_name("later.sh")
    made = subprocess.run([script], capture_output=True, text=True, check=False)
    need(made.returncode == 0, f"a later QEMU than the system's: {made.stderr}")
    return made.stdout.strip()


class Carried:
    """Two machines, and the programs that carry the guest from one to the other."""

    def __init__(
        self, source: Machine, there: Machine, here: Program, far: Program, uri: str, qmp: str
    ) -> None:
        self.source, self.destination = source, there
        self.here, self.far = here, far
        self.uri, self.qmp = uri, qmp
        # Whether migrate-dst can ask its QEMU whether the guest runs.
        self.asked = False

    async def begin(self, *capabilities: str, passes: int = 3, return_path: bool = True) -> None:
        """Begin to migrate, slowly: it does not complete before `finish`."""
        path = ("return-path",) if return_path else ()
        await self.source.begin(self.uri, *path, *capabilities, passes=passes, bandwidth=SLOW)

    async def arrived(self) -> None:
        """Check that the guest is there with all its memory, and that the programs say so."""
        await self.destination.wait_run_state("paused")
        status = await asyncio.to_thread(self.here.wait)
        assert status == 0, self.here.err
        assert await asyncio.to_thread(self.far.wait) == 0, self.far.err
        assert "Migration status: completed" in self.here.out
        if self.asked:  # QEMU was started with -S, and says so over QMP
            assert "completed and verified: the guest is in the QEMU" in self.far.out
            assert "does not run yet (paused)" in self.far.out
        else:
            assert "completed and verified: the guest runs in the QEMU" in self.far.out
        await compare(self.source, self.destination)
        before = await self.source.check_sweep(), self.source.counted()
        assert before == (await self.destination.check_sweep(), self.destination.counted())
        await self.destination.cont()
        await self.destination.wait_for_more()

    async def stayed(self) -> None:
        """Check that the guest runs on at the source, undamaged, and not at the destination."""
        await self.source.wait_status("failed", "cancelled", "none")
        await self.source.wait_run_state("running")
        await self.source.wait_for_more()
        await self.source.stop()
        await self.source.check_sweep()
        with contextlib.suppress(Exception):
            assert not (await self.destination.execute("query-status"))["running"]


@asynccontextmanager
async def carried(
    *here: str, there: tuple[str, ...] = (), between: Callable[[str], Any] | None = None,
    incoming: str = "tcp:127.0.0.1:0", out: str = "tcp:127.0.0.1:0", sweep: Sweep = SWEEP,
    extra: Sequence[str] = (), first: Callable[[Machine], Awaitable[None]] | None = None,
    **options: Any,
) -> AsyncIterator[Carried]:  # fmt: skip
    """Start two machines, and the programs between them, until the source may migrate.

    here, there -- more arguments of migrate-src and migrate-dst
    between     -- makes a proxy between the programs, from the address of migrate-dst
    first       -- called with the source before the programs start
    """
    with tempfile.TemporaryDirectory(prefix="xbmigrate-carry-") as directory:
        incoming, out = incoming.format(directory), out.format(directory)
        qmp = f"{directory}/qmp"

        def machine(place: str, **more: Any) -> Machine:
            words = [*extra, "-qmp", f"unix:{place},server=on,wait=off"]
            return Machine(sweep, extra=words, **options, **more)

        source = machine(qmp)
        target = machine(f"{qmp}-in", incoming=incoming, before=source, paused=True)
        journals = ("--journal", f"{directory}/journals")
        async with source, target:
            await source.wait_for_count(sweep.every)
            if first is not None:
                await first(source)
            waits = f"qmp={qmp}-in" if incoming == "defer" else await target.uri()
            far, address = await asyncio.to_thread(
                destination, "--guest", f"qemu:{waits}", *journals, *there
            )
            async with contextlib.AsyncExitStack() as stack:
                stack.push_async_callback(asyncio.to_thread, end, far)
                if between is not None:
                    proxy = between(address)
                    address = proxy.__enter__().address
                    stack.push_async_callback(asyncio.to_thread, proxy.__exit__, None, None, None)
                guest = f"qemu:{out}" if not out.startswith("qmp=") else f"qemu:qmp={qmp}"
                near = Program("migrate-src", "--guest", guest, *journals, *here, address)
                stack.push_async_callback(asyncio.to_thread, end, near)
                uri = ""
                if not out.startswith("qmp="):
                    uri = (await asyncio.to_thread(near.read_line, r"waiting for QEMU at (\S+)"))[1]
                move = Carried(source, target, near, far, uri, qmp)
                move.asked = incoming == "defer"
                yield move


def end(program: Program) -> None:
    """Kill a program and print its output: pytest shows that of a test that fails."""
    program.kill()
    if program.process.returncode is None:
        program.wait()
    for stream in (program.process.stdout, program.process.stderr):
        if stream is not None:
            stream.close()
    print(f"{program.process.args}: {program.process.returncode}\n{program.out}{program.err}")


class Way:
    """Starts the programs between a machine, or a snapshot, and where it goes."""

    def __init__(self, directory: Path) -> None:
        self._here = directory
        self._journals = ("--journal", str(directory / "dst"))

    async def destination(self, *arguments: str) -> tuple[Program, str]:
        return await asyncio.to_thread(destination, *arguments, *self._journals)

    async def land(self, output: Path, *arguments: str) -> tuple[Program, str]:
        return await self.destination("--guest", "qemu", "--output", str(output), *arguments)

    async def source(self, guest: str, address: str, *arguments: str) -> tuple[Program, str]:
        """Start a migrate-src; return it, and where it waits for QEMU, or ""."""
        program = Program(
            "migrate-src", "--guest", guest, address, *arguments,
            "--journal", str(self._here / "src"),
        )  # fmt: skip
        if guest.startswith("snapshot"):
            return program, ""
        found = await asyncio.to_thread(program.read_line, r"waiting for QEMU at (\S+)")
        return program, found[1]

    async def landed(self, machine: Machine, output: Path, *capabilities: str) -> Program:
        """Save a machine as a snapshot after some passes over its memory; return migrate-dst."""
        receiver, address = await self.land(output)
        sender, where = await self.source("qemu:tcp:127.0.0.1:0", address)
        if (await machine.execute("query-status"))["running"]:
            await machine.begin(where, "return-path", *capabilities)
            await machine.finish()
        else:
            await machine.migrate(where, "return-path", *capabilities, max_bandwidth=0)
        await both(sender, receiver)
        await machine.wait_status("completed")
        return receiver

    async def lifted(self, snapshot: Path, machine: Machine) -> None:
        receiver, address = await self.destination("--guest", f"qemu:{await machine.uri()}")
        sender, _ = await self.source(f"snapshot:{snapshot}", address)
        await both(sender, receiver)
        await machine.wait_run_state("paused", "running")


async def both(*programs: Program) -> None:
    codes = [await asyncio.to_thread(one.wait) for one in programs]
    assert codes == [0, 0], "\n".join(one.err for one in programs)
