"""A QEMU's guest is moved by one program: real QEMUs, with one control socket and with two."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate import socket_file
from migrate.errors import ConnectError, MigrationError, QemuError, UsageError
from migrate.guests.hold import DirectoryHold, ProcessHold
from migrate.qemu.client import Client
from migrate.qemu.guest import QemuGuest
from migrate.qemu.machine import Machine
from tests.machine.qemu import PROGRAM
from tests.requirements import need

pytestmark = pytest.mark.asyncio
SETTINGS = {"downtime_limit": 0.3, "max_bandwidth": 1 << 16}


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[tuple[str, str, str]]:
    """Of one QEMU: two are for movers, the third to look on."""
    need(shutil.which(PROGRAM), f"{PROGRAM} (qemu-system-x86)")
    paths = tuple(f"{tmp_path}/{number}.qmp" for number in range(3))
    options = [word for path in paths for word in ("-qmp", f"unix:{path},server=on,wait=off")]
    qemu = subprocess.Popen(
        [PROGRAM, "-nodefaults", "-display", "none", "-machine", "pc,accel=tcg", "-m", "16",
         *options], stdin=subprocess.DEVNULL,
    )  # fmt: skip
    yield paths
    qemu.kill()
    qemu.wait()


@contextlib.asynccontextmanager
async def looking(path: str) -> AsyncIterator[Machine]:
    async with await Machine.connect(path, timeout=30) as machine:
        yield machine


def guest_of(path: str) -> QemuGuest:
    return QemuGuest(None, path, settings=SETTINGS)


async def everything(machine: Machine) -> tuple[object, object]:
    return (
        await machine.execute("query-migrate-capabilities"),
        await machine.execute("query-migrate-parameters"),
    )


@pytest.mark.parametrize("seen", [True, False], ids=["", "in another container"])
async def test_second_mover_through_another_socket_touches_nothing(sockets, monkeypatch, seen):
    async with looking(sockets[2]) as machine:
        first, second = guest_of(sockets[0]), guest_of(sockets[1])
        await first.started()
        settings = await everything(machine)
        assert (await machine.status()).going_on
        if not seen:  # then QEMU itself has the last word
            monkeypatch.setattr(Client, "process", 0)
        with pytest.raises(MigrationError, match="is moving it|is going on"):
            await second.started()
        await second.close()
        assert (await machine.status()).going_on, "the first one goes on"
        assert await everything(machine) == settings
        await first.close()
        assert not (await machine.status()).going_on
        assert await machine.running()


async def test_mover_that_qemu_itself_refuses_cancels_nothing(sockets, monkeypatch):
    """Both have prepared before either began."""
    monkeypatch.setattr(Client, "process", 0)
    async with looking(sockets[2]) as machine:
        first, second = guest_of(sockets[0]), guest_of(sockets[1])
        prepare = Machine.prepare

        # `first` begins inside the second's preparation, with the true `prepare`
        async def once(self: Machine, **settings: object) -> None:
            monkeypatch.setattr(Machine, "prepare", prepare)
            await prepare(self, **settings)  # type: ignore[arg-type]
            await first.started()

        monkeypatch.setattr(Machine, "prepare", once)
        with pytest.raises(QemuError, match="migration process in progress"):
            await second.started()
        await second.close()
        assert (await machine.status()).going_on, "the first one goes on"
        await first.close()
        assert await machine.running()


async def test_guest_that_has_moved_is_not_moved_again_nor_woken(sockets, tmp_path):
    """A second mover has waited for the socket that serves one client at a time."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{tmp_path}/sink")
    listener.listen()
    async with looking(sockets[2]) as machine:
        await machine.prepare(return_path=False, downtime_limit=0.3)
        await machine.migrate(f"unix:{tmp_path}/sink")
        stream, _ = await asyncio.to_thread(listener.accept)
        with listener, stream:
            await asyncio.to_thread(lambda: [None for _ in iter(lambda: stream.recv(1 << 20), b"")])
            while (await machine.status()).going_on:
                await asyncio.sleep(0.01)
        assert (await machine.status()).runstate == "postmigrate"
        second = guest_of(sockets[0])
        with pytest.raises(QemuError, match="the guest of this QEMU has moved"):
            await second.started()
        await second.close()
        assert (await machine.status()).runstate == "postmigrate"


async def test_qemu_is_held_by_its_process_until_the_guest_is_closed(sockets):
    async with looking(sockets[2]) as machine:
        pid = machine.process
        assert pid
        guest = guest_of(sockets[0])
        await guest.started()
        other = ProcessHold(pid, "the guest")
        with pytest.raises(UsageError, match=f"process {os.getpid()}\\) is moving it"):
            await other.take()
        another = ProcessHold(os.getpid(), "another process")
        await another.take()
        another.close()
        await guest.close()
        other = ProcessHold(pid, "the guest")
        await other.take()
        other.close()


async def test_snapshot_is_lifted_once_at_a_time(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    first = DirectoryHold(str(tmp_path), "guest snapshot")
    await first.take()
    second = DirectoryHold(str(tmp_path / "link"), "guest snapshot")
    with pytest.raises(UsageError, match="is moving it"):
        await second.take()
    first.close()
    third = DirectoryHold(str(tmp_path), "guest snapshot")
    await third.take()
    third.close()


async def test_dead_socket_is_taken_over_by_one_program(tmp_path, monkeypatch):
    """Two see the same dead socket; the second must not remove the new one of the first."""
    path = f"{tmp_path}/s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    seen: list[socket_file.SocketFile] = []
    room = socket_file._make_room_for

    def meanwhile(*arguments: Any) -> None:
        """Another thread begins as soon as we have looked, and cannot go on before us."""
        monkeypatch.setattr(socket_file, "_make_room_for", room)
        other = asyncio.get_running_loop().run_in_executor(None, socket_file.SocketFile, path, "")
        others.append(other)
        room(*arguments)

    others: list[asyncio.Future[socket_file.SocketFile]] = []
    monkeypatch.setattr(socket_file, "_make_room_for", meanwhile)
    seen.append(socket_file.SocketFile(path, "--guest"))
    with pytest.raises(ConnectError, match="another program listens there"):
        seen.append(await others[0])

    def meet() -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            seen[0].socket.accept()[0].close()

    await asyncio.to_thread(meet)
    for one in seen:
        one.close()
