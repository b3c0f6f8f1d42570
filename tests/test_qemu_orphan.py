"""`migrate-src resolve` after QEMU was told that its guest has moved, and the socket keeper."""

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
from migrate.qemu import guest as qemu_guest
from migrate.qemu import orphan
from migrate.qemu.guest import QemuGuest
from migrate.qemu.orphan import OrphanGuest
from migrate.qemu.qmp.status import MachineStatus
from migrate.runtime import helper_process
from proto.wire.messages import MessageType
from tests.machine import Machine, Sweep, compare
from tests.programs import Program, crashing, destination
from tests.tap import Tap, of_kind

MIB = 1 << 20
SWEEP = Sweep(4 * MIB, fill=6 * MIB, rate=1_000_000)
pytestmark = [
    pytest.mark.qemu,
    pytest.mark.asyncio(loop_factories=["asyncio"]),
    pytest.mark.timeout(300),
]


class Moved:
    """A migration driven over QMP, whose programs are killed when GO passes."""

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
        """Migrate; call `kill` when GO passes. Return the address where migrate-dst listened."""
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


async def test_resolve_leaves_moved_guest_paused(tmp_path) -> None:
    async with moving(tmp_path) as (move, source, target):
        await move.dies(lambda near, _far: near.kill())
        await target.wait_run_state("paused")
        assert "the guest runs at the destination, and no more here" in await move.resolve()
        await source.wait_run_state("postmigrate")
        await compare(source, target)


async def test_resolve_lets_guest_run_here_if_go_was_lost(tmp_path) -> None:
    """QEMU takes its guest for moved, and only `resolve` tells it otherwise; it does so once."""

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
        assert "nothing to do" in await move.resolve(name)
        assert not (await source.execute("query-status"))["running"]
        await source.check_sweep()


@pytest.mark.parametrize("keep", ["source", "destination"])
async def test_resolve_does_not_guess_after_destination_crash_in_start(tmp_path, keep) -> None:
    """migrate-dst dies after it has recorded that the guest is its own. Nothing tells whether QEMU
    was given the guest."""
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
        assert "died while it gave the guest" in again.err
        assert await asyncio.to_thread(near.wait) == 9, near.err
        assert await target.ended() != 0
        assert not (await source.execute("query-status"))["running"]
        code, said = await move.asked()
        assert (code, "look whether the guest runs there" in said) == (1, True), said
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
async def test_socket_keeper_ends_when_qemu_hangs_up(tmp_path, family) -> None:
    """Over TCP that gives no POLLHUP, because our own end is still open."""
    await asyncio.to_thread(hang_up_on_keeper, tmp_path, family)


def hang_up_on_keeper(tmp_path: Path, family: socket.AddressFamily) -> None:
    with socket.socket(family) as server:
        server.bind(("127.0.0.1", 0) if family == socket.AF_INET else str(tmp_path / "socket"))
        server.listen(1)
        with socket.socket(family) as qemu:
            qemu.connect(server.getsockname())
            held, _ = server.accept()
            with held:
                keeper = subprocess.Popen(
                    helper_process.command(
                        "migrate.qemu.socket_keeper_process", str(held.fileno())
                    ),
                    pass_fds=[held.fileno()], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                )  # fmt: skip
            with keeper:
                assert keeper.stdin is not None
                assert keeper.stdout is not None
                assert keeper.stdout.read(1) == b"k"
                keeper.stdin.write(b"g")
                keeper.stdin.close()
                assert keeper.stdout.read(1) == b"k"
                with pytest.raises(subprocess.TimeoutExpired):
                    keeper.wait(0.3)  # it keeps the socket
                qemu.close()
                try:
                    assert keeper.wait(10) == 0
                finally:
                    keeper.kill()


@pytest.mark.parametrize("before", ["running", "paused", None])
async def test_resolve_keeps_paused_guest_paused(monkeypatch, before) -> None:
    """before -- the run state in the journal; None: a journal of an earlier release"""
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

    monkeypatch.setattr(orphan, "Machine", Standing)
    facts = {"pid": 0, "started": "", "qmp": "/x"} | ({"runstate": before} if before else {})
    guest = OrphanGuest(facts)
    await guest.resume()
    assert said == ([] if before == "paused" else ["cont"])
    assert ("does not run, as before (paused)" in guest.if_here) == (before == "paused")


async def test_orphan_without_keeper_and_qmp_is_refused() -> None:
    with pytest.raises(MigrationError, match="no process holds the stream .*query-status"):
        OrphanGuest({"kind": "qemu", "pid": 0, "started": ""})


async def test_qemu_that_does_not_complete_is_reported(monkeypatch) -> None:
    """The message does not blame the guest's memory."""

    class Busy:
        async def status(self) -> MachineStatus:
            return MachineStatus(status="device")

    monkeypatch.setattr(qemu_guest, "BEGIN_SECONDS", 0.01)
    guest = QemuGuest(None, "socket")
    with pytest.raises(QemuError, match="has not ended its migration in 0.01 s"):
        await guest._tell_moved(Busy())  # type: ignore[arg-type]
