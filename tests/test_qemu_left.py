"""`migrate-src resolve` where QEMU was told that its guest has moved: nothing is held then."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from migrate.errors import MigrationError, QemuError
from migrate.guests import isolated
from migrate.qemu import guest as qemu_guest
from migrate.qemu import left
from migrate.qemu.guest import QemuGuest
from migrate.qemu.left import LeftGuest
from migrate.qemu.machine import MachineStatus
from proto.messages import MessageType
from tests.machine import Machine, Sweep, compare
from tests.programs import Program, crashing, destination
from tests.tap import Tap, of_kind

MIB = 1 << 20
SWEEP = Sweep(4 * MIB, fill=6 * MIB, rate=1_000_000)
pytestmark = [
    pytest.mark.asyncio(loop_factories=["asyncio"]),
    pytest.mark.timeout(300),
]


class Moved:
    """A guest on its way over QMP, and programs that are killed as GO comes by."""

    def __init__(self, tmp_path: Path) -> None:
        self.directory = tmp_path
        self.journal = ("--journal", str(tmp_path / "journals"))
        self.words = ("--guest", f"qemu:qmp={tmp_path}/in", *self.journal)
        self.programs: list[Program] = []
        self.taps: list[Tap] = []

    def machine(self, name: str, **options: Any) -> Machine:
        qmp = ["-qmp", f"unix:{self.directory}/{name},server=on,wait=off"]
        return Machine(SWEEP, extra=qmp, **options)

    async def dies(self, kill: Callable[[Program, Program], None]) -> str:
        """The address where migrate-dst listened."""
        far, address = await asyncio.to_thread(destination, *self.words, "--stay")
        tap = Tap(address, of_kind(MessageType.GO))
        near = Program(
            "migrate-src", "--guest", f"qemu:qmp={self.directory}/out", "--downtime-limit", "2000",
            *self.journal, tap.address,
        )  # fmt: skip
        self.programs += [near, far]
        tap.act = lambda: kill(near, far)
        self.taps.append(tap)
        await asyncio.to_thread(near.wait)
        return address.removeprefix("tcp:")

    async def asked(self, *words: str) -> tuple[int, str]:
        program = Program("migrate-src", "resolve", *words, *self.journal)
        code = await asyncio.to_thread(program.wait)
        return code, program.out + program.err

    async def resolve(self, *words: str) -> str:
        code, said = await self.asked(*words)
        assert code == 0, said
        return said

    def close(self) -> None:
        for tap in self.taps:
            tap.close()
        for program in self.programs:
            program.kill()
            with contextlib.suppress(ValueError):
                program.wait()


@contextlib.asynccontextmanager
async def moving(tmp_path: Path) -> AsyncIterator[tuple[Moved, Machine, Machine]]:
    move = Moved(tmp_path)
    async with move.machine("out") as source:
        await source.wait_for_count(SWEEP.every)
        options: dict[str, Any] = {"incoming": "defer", "before": source, "paused": True}
        async with move.machine("in", **options) as target:
            try:
                yield move, source, target
            finally:
                await asyncio.to_thread(move.close)


async def test_a_guest_that_has_moved_is_left_as_it_is(tmp_path) -> None:
    async with moving(tmp_path) as (move, source, target):
        await move.dies(lambda near, _far: near.kill())
        await target.wait_run_state("paused")
        assert "the guest runs at the destination, and no more here" in await move.resolve()
        await source.wait_run_state("postmigrate")
        await compare(source, target)


async def test_a_guest_that_never_arrives_is_let_go_on_here_once(tmp_path) -> None:
    """QEMU takes it for moved; nobody else would tell it that it is not."""

    def kill(near: Program, far: Program) -> None:
        near.kill()
        far.kill()
        raise OSError("GO is lost")

    async with moving(tmp_path) as (move, source, target):
        listen = await move.dies(kill)
        await target.ended()
        await source.wait_run_state("postmigrate")
        again, _ = await asyncio.to_thread(destination, *move.words, listen=listen)
        move.programs.append(again)
        said = await move.resolve()
        assert "ABORTED: the guest runs here" in said
        await source.wait_for_more()
        await source.stop()
        name = said.partition("migration ")[2].partition(":")[0]
        assert "nothing more is done" in await move.resolve(name)
        assert not (await source.execute("query-status"))["running"]
        await source.check_sweep()


@pytest.mark.parametrize("keep", ["source", "destination"])
async def test_nobody_says_that_it_runs_where_nobody_knows(tmp_path, keep) -> None:
    """migrate-dst dies when it has written that the guest is its own, and has given it to no QEMU;
    or has it? Nothing that is left could tell."""
    async with moving(tmp_path) as (move, source, target):
        words = ["--listen", "127.0.0.1:0", *move.words]
        far = crashing("migrate-dst", words, "after", "3")
        address = (await asyncio.to_thread(far.read_line, r"listening on (\S+)"))[1]
        near = Program(
            "migrate-src", "--guest", f"qemu:qmp={tmp_path}/out", "--downtime-limit", "2000",
            "--resolve-timeout", "2", *move.journal, address,
        )  # fmt: skip
        move.programs += [near, far]
        await asyncio.to_thread(far.wait)
        again, _ = await asyncio.to_thread(
            destination, *move.words, listen=address.removeprefix("tcp:")
        )
        move.programs.append(again)
        assert "has died as it gave the guest" in again.err
        assert await asyncio.to_thread(near.wait) == 9, near.err
        assert await target.ended() != 0
        assert not (await source.execute("query-status"))["running"]
        code, said = await move.asked()
        assert (code, "look whether it runs there" in said) == (1, True), said
        name = said.partition("migrate-dst resolve ")[2].partition(" ")[0]
        again.kill()
        await asyncio.to_thread(again.wait)
        decided = Program("migrate-dst", "resolve", name, "--keep", keep, "--force", *move.journal)
        assert await asyncio.to_thread(decided.wait) == 0, decided.err
        last, _ = await asyncio.to_thread(
            destination, *move.words, listen=address.removeprefix("tcp:")
        )
        move.programs.append(last)
        said = await move.resolve()
        if keep == "source":
            assert "ABORTED: the guest runs here" in said
            await source.wait_for_more()
        else:
            assert "DONE: the guest runs at the destination" in said


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
async def test_a_holder_ends_where_its_qemu_has_hung_up(tmp_path, family) -> None:
    """Over TCP that is no POLLHUP: our own end is still open."""
    await asyncio.to_thread(hang_up_on_a_holder, tmp_path, family)


def hang_up_on_a_holder(tmp_path: Path, family: socket.AddressFamily) -> None:
    with socket.socket(family) as server:
        server.bind(("127.0.0.1", 0) if family == socket.AF_INET else str(tmp_path / "socket"))
        server.listen(1)
        with socket.socket(family) as qemu:
            qemu.connect(server.getsockname())
            held, _ = server.accept()
            with held:
                holder = subprocess.Popen(
                    isolated.command("migrate.qemu.holder", str(held.fileno())),
                    pass_fds=[held.fileno()], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                )  # fmt: skip
            with holder:
                assert holder.stdin is not None
                assert holder.stdout is not None
                assert holder.stdout.read(1) == b"k"
                holder.stdin.write(b"g")
                holder.stdin.close()
                assert holder.stdout.read(1) == b"k"
                with pytest.raises(subprocess.TimeoutExpired):
                    holder.wait(0.3)  # it holds
                qemu.close()
                try:
                    assert holder.wait(10) == 0
                finally:
                    holder.kill()


@pytest.mark.parametrize("before", ["running", "paused", None])
async def test_a_guest_that_was_paused_is_not_let_go_on(monkeypatch, before) -> None:
    """It stands still in a QEMU that takes it for moved; None: a journal of an earlier release."""
    said = []

    class Standing:
        @classmethod
        async def connect(cls, _path: str) -> Standing:
            return cls()

        async def __aenter__(self) -> Standing:
            return self

        async def __aexit__(self, *_: object) -> None:
            pass

        async def settled(self) -> MachineStatus:
            return MachineStatus(runstate="postmigrate", status="completed")

        async def cont(self) -> None:
            said.append("cont")

    monkeypatch.setattr(left, "Machine", Standing)
    facts = {"pid": 0, "started": "", "qmp": "/x"} | ({"runstate": before} if before else {})
    guest = LeftGuest(facts)
    await guest.resume()
    assert said == ([] if before == "paused" else ["cont"])
    assert ("does not run, as before (paused)" in guest.ours) == (before == "paused")


async def test_a_qemu_that_nothing_leads_to_has_to_be_asked() -> None:
    with pytest.raises(MigrationError, match="nobody holds the stream .*query-status"):
        LeftGuest({"kind": "qemu", "pid": 0, "started": ""})


async def test_a_qemu_that_does_not_end_is_named_as_what_it_is(monkeypatch) -> None:
    """It is no memory that cannot be read."""

    class Busy:
        async def status(self) -> MachineStatus:
            return MachineStatus(status="device")

    monkeypatch.setattr(qemu_guest, "BEGIN_SECONDS", 0.01)
    guest = QemuGuest(None, "socket")
    with pytest.raises(QemuError, match="has not ended its migration in 0.01 s"):
        await guest._tell_moved(Busy())  # type: ignore[arg-type]
