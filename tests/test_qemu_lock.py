"""A QEMU's guest is moved by one program at a time: real QEMUs with several control sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from migrate.errors import ConnectError, MigrationError, QemuError, UsageError
from migrate.files import socket_file
from migrate.files.directory import Directory
from migrate.files.lock import DirectoryLock, ProcessLock
from migrate.qemu.guest import QemuGuest
from migrate.qemu.qmp.client import Client
from migrate.qemu.qmp.machine import Machine
from tests.machine.qemu import PROGRAM
from tests.requirements import need

pytestmark = pytest.mark.asyncio
SETTINGS = {"downtime_limit": 0.3, "max_bandwidth": 1 << 16}


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[tuple[str, str, str]]:
    """Start a QEMU with three control sockets: two for movers, the third to look on."""
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
async def test_second_migration_through_another_socket_touches_nothing(sockets, monkeypatch, seen):
    async with looking(sockets[2]) as machine:
        first, second = guest_of(sockets[0]), guest_of(sockets[1])
        await first.make_ready()
        settings = await everything(machine)
        assert (await machine.status()).going_on
        if not seen:  # then QEMU itself has the last word
            monkeypatch.setattr(Client, "process", 0)
        with pytest.raises(MigrationError, match="is moving it|is going on"):
            await second.make_ready()
        await second.close()
        assert (await machine.status()).going_on, "the first one goes on"
        assert await everything(machine) == settings
        await first.close()
        assert not (await machine.status()).going_on
        assert await machine.running()


async def test_migration_refused_by_qemu_cancels_nothing(sockets, monkeypatch):
    """Both have prepared before one begins."""
    monkeypatch.setattr(Client, "process", 0)
    async with looking(sockets[2]) as machine:
        first, second = guest_of(sockets[0]), guest_of(sockets[1])
        prepare = Machine.prepare

        # `first` begins during the preparation of `second`, with the real `prepare`
        async def once(self: Machine, **settings: object) -> None:
            monkeypatch.setattr(Machine, "prepare", prepare)
            await prepare(self, **settings)  # type: ignore[arg-type]
            await first.make_ready()

        monkeypatch.setattr(Machine, "prepare", once)
        with pytest.raises(QemuError, match="migration process in progress"):
            await second.make_ready()
        await second.close()
        assert (await machine.status()).going_on, "the first one goes on"
        await first.close()
        assert await machine.running()


async def test_guest_that_has_moved_is_not_moved_again_nor_woken(sockets, tmp_path):
    """A second mover has waited for the socket, which serves one client at a time."""
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
            await second.make_ready()
        await second.close()
        assert (await machine.status()).runstate == "postmigrate"


async def test_qemu_is_locked_by_process_until_guest_is_closed(sockets):
    async with looking(sockets[2]) as machine:
        pid = machine.process
        assert pid
        guest = guest_of(sockets[0])
        await guest.make_ready()
        other = ProcessLock(pid, "the guest")
        with pytest.raises(UsageError, match=f"process {os.getpid()}\\) is moving it"):
            await other.acquire()
        another = ProcessLock(os.getpid(), "another process")
        await another.acquire()
        another.close()
        await guest.close()
        other = ProcessLock(pid, "the guest")
        await other.acquire()
        other.close()


async def test_snapshot_is_moved_once_at_a_time(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    first = DirectoryLock(str(tmp_path), "guest snapshot")
    await first.acquire()
    second = DirectoryLock(str(tmp_path / "link"), "guest snapshot")
    with pytest.raises(UsageError, match="is moving it"):
        await second.acquire()
    first.close()
    third = DirectoryLock(str(tmp_path), "guest snapshot")
    await third.acquire()
    third.close()


async def test_dead_socket_is_replaced_by_one_program(tmp_path, monkeypatch):
    """Two programs see the same dead socket; the second must not remove the first one's new one."""
    path = f"{tmp_path}/s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    seen: list[socket_file.SocketFile] = []
    look = Directory.lstat

    def meanwhile(directory: Directory, name: str) -> os.stat_result:
        """Start the other program, as a thread, when the first one looks at the dead socket."""
        monkeypatch.setattr(Directory, "lstat", look)
        other = asyncio.get_running_loop().run_in_executor(None, socket_file.SocketFile, path, "")
        others.append(other)
        return look(directory, name)

    others: list[asyncio.Future[socket_file.SocketFile]] = []
    monkeypatch.setattr(Directory, "lstat", meanwhile)
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
