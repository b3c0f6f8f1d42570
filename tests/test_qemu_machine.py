"""Machine and Client, with a real QEMU and with a fake control socket that misbehaves.

The tests with a real QEMU check what we rely on; it is the version that is installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate.errors import ConnectError, QemuError, UsageError
from migrate.qemu.place import NoQemuError, QemuPlace
from migrate.qemu.qmp.client import MAX_ANSWER_BYTES, Client
from migrate.qemu.qmp.events import MAX_KEPT_EVENTS
from migrate.qemu.qmp.machine import Machine
from migrate.qemu.qmp.messages import CLOSED
from migrate.qemu.qmp.settings import OFF
from migrate.qemu.qmp.status import MachineStatus
from migrate.transport.address import Address
from tests.requirements import need

PROGRAM = "qemu-system-x86_64"
PONG_AND_SHUT = bytes.fromhex("0002 0004 00000001  0001 0004 00000000")
SOON = 0.3
"""Seconds, for connections and answers that never come."""

pytestmark = pytest.mark.asyncio


# ---------------------------------------------------------------- real QEMUs


class Started:
    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        self.path = path
        self.process = process

    def machine(self) -> Awaitable[Machine]:
        return Machine.connect(f"unix:{self.path}", timeout=30)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Return a function that starts QEMUs, each with an idle guest of 16 MiB."""
    need(shutil.which(PROGRAM), f"{PROGRAM} is not installed")
    processes: list[subprocess.Popen[bytes]] = []

    def begin(*options: str) -> Started:
        path = tmp_path / f"{len(processes)}.qmp"
        command = [
            PROGRAM, "-nodefaults", "-display", "none", "-machine", "pc,accel=tcg", "-m", "16",
            "-qmp", f"unix:{path},server=on,wait=off", *options,
        ]  # fmt: skip
        processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
        return Started(path, processes[-1])

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def is_whole(stream: bytes) -> bool:
    """Return whether a stream ends with the description of the devices: 0x06, length, JSON."""
    at = stream.rfind(b"\x06", 0, stream.rfind(b'{"page_size"'))
    return at >= 0 and len(stream) == at + 5 + int.from_bytes(stream[at + 1 : at + 5], "big")


@contextlib.asynccontextmanager
async def sink(path: Path, *, reads: bool = True) -> AsyncIterator[str]:
    """Receive a stream as migrate-src does, and confirm it on the return path. Yield its URI."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    listener.setblocking(False)
    loop = asyncio.get_running_loop()

    async def take() -> None:
        sock, _ = await loop.sock_accept(listener)
        with sock:
            sock.setblocking(False)
            if not reads:
                await asyncio.sleep(3600)
            stream = b""
            while data := await loop.sock_recv(sock, 1 << 20):
                stream += data
                if is_whole(stream):
                    await loop.sock_sendall(sock, PONG_AND_SHUT)

    taking = asyncio.create_task(take())
    try:
        yield f"unix:{path}"
    finally:
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
        listener.close()


async def until_over(machine: Machine) -> MachineStatus:
    while (status := await machine.status()).going_on:
        await asyncio.sleep(0.01)
    return status


async def everything(machine: Machine) -> tuple[Any, Any]:
    return (
        await machine.execute("query-migrate-capabilities"),
        await machine.execute("query-migrate-parameters"),
    )


async def test_version_status_and_events_of_real_qemu(start) -> None:
    async with await start("-S").machine() as machine:
        assert machine.version >= (7, 2, 0)
        assert machine.ended is None
        assert await machine.status() == MachineStatus(runstate="prelaunch")
        assert not await machine.running()
        with machine.events() as events:
            await machine.cont()
            assert (await anext(events)).name == "RESUME"
        assert await machine.running()
        many = await asyncio.gather(*(machine.execute("query-version") for _ in range(50)))
        assert len(many) == 50


async def test_restore_puts_back_all_settings(start) -> None:
    """Settings that make a stream unfit for us are put back too."""
    async with await start("-S").machine() as machine:
        switches = ("postcopy-ram", "postcopy-preempt", "multifd", "release-ram", "auto-converge")
        await machine.execute(
            "migrate-set-capabilities",
            capabilities=[{"capability": name, "state": True} for name in switches],
        )
        await machine.execute(
            "migrate-set-parameters",
            **{"tls-creds": "tls0", "max-bandwidth": 12345678, "downtime-limit": 77},
        )
        before = await everything(machine)
        await machine.prepare(
            return_path=True, downtime_limit=0.0501, xbzrle=True, xbzrle_cache_size=1 << 20
        )
        capabilities, parameters = await everything(machine)
        on = {one["capability"] for one in capabilities if one["state"]}
        assert on == {"events", "return-path", "auto-converge", "xbzrle"}
        assert not on & (set(OFF) - {"xbzrle"})
        assert parameters["downtime-limit"] == 51
        assert parameters["max-bandwidth"] == 0
        assert parameters["tls-creds"] == ""
        assert parameters["xbzrle-cache-size"] == 1 << 20
        await machine.set_downtime_limit(1.5)
        parameters = await machine.execute("query-migrate-parameters")
        assert parameters["downtime-limit"] == 1500
        # a second prepare does not take the settings of the first for the original ones
        await machine.prepare(return_path=False, downtime_limit=0.3, max_bandwidth=5_000_000)
        known = await machine.set_switchover_bandwidth(1_000_000)
        assert known == ("avail-switchover-bandwidth" in before[1])
        assert await machine.restore() == ()
        assert await everything(machine) == before
        assert await machine.restore() == ()
        assert await everything(machine) == before


async def test_restore_keeps_settings_made_by_others(start) -> None:
    async with await start("-S").machine() as machine:
        await machine.prepare(return_path=True, downtime_limit=0.3)
        await machine.execute("migrate-set-parameters", **{"announce-rounds": 9})
        await machine.restore()
        parameters = await machine.execute("query-migrate-parameters")
        assert parameters["announce-rounds"] == 9
        assert parameters["max-bandwidth"] != 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"downtime_limit": 2001}, "expects an integer in the range"),
        ({"announce_rounds": 5000}, "announce_rounds"),
        ({"xbzrle_cache_size": 1000}, "power of two"),
        ({"zero_copy_send": True}, "Zero copy only available"),
        ({"warp_drive": True}, r"QEMU \d+\.\d+\.\d+ has no migration capability .* warp-drive"),
    ],
)
async def test_prepare_with_invalid_settings_changes_nothing(start, more, says) -> None:
    async with await start("-S").machine() as machine:
        before = await everything(machine)
        with pytest.raises(QemuError, match=says):
            await machine.prepare(**{"return_path": True, "downtime_limit": 0.3} | more)
        assert await everything(machine) == before


async def test_migration_completes_when_return_path_says_so(start, tmp_path: Path) -> None:
    """Afterwards the guest may run again here."""
    async with await start().machine() as machine, sink(tmp_path / "s") as uri:
        await machine.prepare(return_path=True, downtime_limit=0.3)
        with machine.events("STOP", "RESUME", "MIGRATION", "MIGRATION_PASS") as events:
            await machine.migrate(uri)
            seen = []
            while ("MIGRATION", "completed") not in seen:
                event = await anext(events)
                assert event.time > 0
                seen.append((event.name, event.data.get("status", event.data.get("pass"))))
            order = [seen.index(one) for one in (
                ("MIGRATION", "setup"), ("MIGRATION_PASS", 1), ("STOP", None),
                ("MIGRATION", "completed"),
            )]  # fmt: skip
            assert order == sorted(order)
            status = await until_over(machine)
            assert (status.status, status.runstate) == ("completed", "postmigrate")
            assert status.error == ""
            assert status.total > 16 << 20
            assert status.page_size == 4096
            assert status.dirty_sync_count >= 2
            assert 0 < status.transferred < status.total
            assert status.remaining == 0
            assert status.downtime is not None
            assert 0 <= status.downtime <= status.total_time
            assert status.total_time > 0
            assert status.expected_downtime is None
            with pytest.raises(QemuError, match="has moved; `cont` would let it run here again"):
                await machine.migrate(uri)
            await machine.cont()
            assert (await anext(events)).name == "RESUME"
        assert await machine.running()
        assert await machine.restore() == ()


async def test_stuck_migration_is_seen_and_cancelled(start, tmp_path: Path) -> None:
    """If nothing reads the stream the migration stays active, and the guest runs on."""
    async with await start().machine() as machine, sink(tmp_path / "s", reads=False) as uri:
        before = await everything(machine)
        await machine.prepare(return_path=True, downtime_limit=0.3)
        with machine.events("MIGRATION") as events:
            await machine.migrate(uri)
            assert [(await anext(events)).data["status"] for _ in range(2)] == ["setup", "active"]
            status = await machine.status()
            assert (status.status, status.runstate) == ("active", "running")
            assert status.remaining > 0
            assert status.dirty_sync_count == 1
            assert status.expected_downtime == 0.3
            assert status.downtime is None
            await machine.set_downtime_limit(0.5)  # also during a migration
            with pytest.raises(QemuError, match=r"is going on \(active\): wait .* or cancel it"):
                await machine.prepare(return_path=True, downtime_limit=0.3)
            with pytest.raises(QemuError, match="in progress: wait .* or cancel it") as caught:
                await machine.migrate(uri)
            assert (caught.value.command, caught.value.kind) == ("migrate", "GenericError")
            (fault,) = await machine.restore()
            assert fault.startswith("migrate-set-capabilities: QEMU says: There's a migration")
            status = await machine.cancel()
            # 7.2 shuts the return path down first. The stream uses the same socket, so it may
            # break before QEMU says that it is cancelling.
            assert status.status in ("cancelled", "failed")
            assert status.runstate == "running"
            ends = [(await anext(events)).data["status"]]
            if ends == ["cancelling"]:
                ends.append((await anext(events)).data["status"])
            assert ends in (["cancelling", "cancelled"], ["failed"])
        assert await machine.restore() == ()
        assert await everything(machine) == before


async def test_cancel_without_migration(start) -> None:
    async with await start("-S").machine() as machine:
        assert (await machine.cancel()).status == "none"


async def test_broken_or_refused_stream_fails_migration(start, tmp_path: Path) -> None:
    """QEMU accepts the command and reports the failure later; the guest runs on."""
    async with await start().machine() as machine:
        await machine.prepare(return_path=False, downtime_limit=0.3)
        with pytest.raises(QemuError, match="write unix:PATH or tcp:HOST:PORT"):
            await machine.migrate("carrier-pigeon:home")
        await machine.migrate(f"unix:{tmp_path}/nobody")
        status = await until_over(machine)
        assert status.status == "failed"
        assert "No such file" in status.error
        async with sink(tmp_path / "s", reads=False) as uri:
            with machine.events("MIGRATION") as events:
                await machine.migrate(uri)
                while (await anext(events)).data["status"] != "active":
                    pass
        status = await until_over(machine)
        assert (status.status, status.runstate) == ("failed", "running")


async def test_stream_into_passed_socket_leaves_no_descriptor_in_qemu(start) -> None:
    """QEMU closes its end also if it refuses the command."""
    loop = asyncio.get_running_loop()
    async with await start().machine() as machine:
        await machine.prepare(return_path=True, downtime_limit=0.3)
        for _ in range(2):
            ours, theirs = socket.socketpair()
            with ours, theirs:
                ours.setblocking(False)
                await machine.migrate(theirs)
                theirs.close()
                async with asyncio.timeout(60):
                    assert await loop.sock_recv(ours, 4) == b"QEVM"
                refused, end = socket.socketpair()
                with refused, end:
                    with pytest.raises(QemuError, match="with -incoming defer"):
                        await machine.incoming(end)
                    end.close()
                    refused.setblocking(False)
                    async with asyncio.timeout(60):
                        assert await loop.sock_recv(refused, 1) == b""
            assert (await until_over(machine)).status == "failed"
        assert (await machine.status()).runstate == "running"


async def test_prepare_refuses_guest_with_migration_blocker(start, tmp_path: Path) -> None:
    options = ("-device", "ivshmem-plain,memdev=m,master=off")
    memory = f"memory-backend-file,id=m,share=on,mem-path={tmp_path}/m,size=1M"
    async with await start("-S", "-object", memory, *options).machine() as machine:
        assert (await machine.status()).blocked
        with pytest.raises(QemuError, match="cannot migrate this guest: .*'ivshmem'"):
            await machine.prepare(return_path=True, downtime_limit=0.3)


async def test_migration_from_qemu_to_qemu(start, tmp_path: Path) -> None:
    async with (
        await start().machine() as source,
        await start("-incoming", "defer").machine() as destination,
    ):
        with pytest.raises(QemuError, match="it is a destination, no source"):
            await destination.prepare(return_path=True, downtime_limit=0.3)
        with pytest.raises(QemuError, match="it is a destination|this QEMU is a destination"):
            await destination.migrate(f"unix:{tmp_path}/s")
        with pytest.raises(QemuError, match="start that QEMU with -incoming defer"):
            await source.incoming(f"unix:{tmp_path}/s")
        assert (await destination.status()).runstate == "inmigrate"
        await source.prepare(return_path=True, downtime_limit=0.3)
        with destination.events("RESUME", "STOP") as events:
            await destination.incoming(f"unix:{tmp_path}/s")
            with pytest.raises(QemuError, match="start that QEMU anew, with -incoming defer"):
                await destination.incoming(f"unix:{tmp_path}/s")
            await source.migrate(f"unix:{tmp_path}/s")
            assert (await until_over(source)).status == "completed"
            assert (await anext(events)).name == "RESUME"
        assert await destination.running()
        assert not await source.running()


async def test_connect_error_while_monitor_serves_another_client(start) -> None:
    """The first client that waits is connected but not greeted; the third is not connected."""
    qemu = start("-S")
    async with await qemu.machine():
        with contextlib.ExitStack() as waiting:
            for _ in range(3):
                with pytest.raises(ConnectError, match="one client at a time, and another one"):
                    await Machine.connect(str(qemu.path), timeout=SOON)
                sock = waiting.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                sock.connect_ex(str(qemu.path))
    async with await qemu.machine() as machine:  # the monitor is free again
        assert not await machine.running()


async def test_quit_or_killed_qemu_ends_events_and_commands(start) -> None:
    qemu = start("-S")
    async with await qemu.machine() as machine:
        with machine.events("SHUTDOWN") as events:
            await machine.execute("quit")
            names = [event.name async for event in events]
            assert names == ["SHUTDOWN", CLOSED]
        with pytest.raises(
            QemuError, match=r"query-status: .* hung up: it was shut down \(host-qmp-quit\)"
        ):
            await machine.cont()
        with machine.events() as late:
            (event,) = [event async for event in late]
            assert event.data["error"] == machine.ended
    qemu = start("-S")
    async with await qemu.machine() as machine:
        await machine.prepare(return_path=True, downtime_limit=0.3)
        qemu.process.send_signal(signal.SIGSTOP)
        asking = asyncio.create_task(machine.status())
        await asyncio.sleep(0)
        qemu.process.kill()
        with pytest.raises(QemuError, match="query-status: .* hung up: it has ended, or crashed"):
            await asking
        faults = await machine.restore()
        assert len(faults) == 2
        assert all("has hung up" in fault for fault in faults)


async def test_command_to_stopped_qemu_times_out(start) -> None:
    qemu = start("-S")
    client = await Client.connect(str(qemu.path), timeout=30)
    try:
        assert await client.execute("query-name") == {}
        qemu.process.send_signal(signal.SIGSTOP)
        client.timeout = SOON
        with pytest.raises(QemuError, match="query-name: .* has not answered for 0.3 s"):
            await client.execute("query-name")
        qemu.process.send_signal(signal.SIGCONT)
        client.timeout = 30
        # the late answer is given to no other command
        assert (await client.execute("query-status"))["status"] == "prelaunch"
    finally:
        await client.close()


# ---------------------------------------------------------------- a fake control socket

GREETING = {"QMP": {"version": {"qemu": {"major": 8, "minor": 2, "micro": 1}, "package": ""}}}
Says = Callable[[dict[str, Any]], list[Any]]


@contextlib.asynccontextmanager
async def fake(
    path: Path, answers: Says, greeting: bytes | None = None
) -> AsyncIterator[dict[str, int]]:
    """Serve one client. `answers` returns what is sent for a request: objects, bytes, or None to
    hang up. Yield how often each command came."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    listener.setblocking(False)
    loop = asyncio.get_running_loop()
    came: dict[str, int] = {}

    async def serve() -> None:
        sock, _ = await loop.sock_accept(listener)
        with sock:
            sock.setblocking(False)
            hello = json.dumps(GREETING).encode() if greeting is None else greeting
            await loop.sock_sendall(sock, hello)
            if greeting is not None and b'{"QMP"' not in greeting:
                await loop.sock_recv(sock, 1)
                return
            while data := await loop.sock_recv(sock, 1 << 16):
                for line in data.splitlines():
                    request = json.loads(line)
                    name = request["execute"]
                    came[name] = came.get(name, 0) + 1
                    said = [answer(request)] if name == "qmp_capabilities" else answers(request)
                    for one in said:
                        if one is None:
                            return
                        sent = one if isinstance(one, bytes) else json.dumps(one).encode()
                        await loop.sock_sendall(sock, sent)

    serving = asyncio.create_task(serve())
    try:
        yield came
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        listener.close()


def answer(request: dict[str, Any], value: Any = None) -> dict[str, Any]:
    return {"return": {} if value is None else value, "id": request["id"]}


def event(name: str, **data: Any) -> dict[str, Any]:
    return {"event": name, "data": data, "timestamp": {"seconds": 5, "microseconds": 250000}}


@contextlib.contextmanager
def anothers(path: Path) -> Iterator[None]:
    """Have another user listen on a socket."""
    need(os.geteuid() == 0, "root, to be another user for a while")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        os.seteuid(65534)
        try:
            listener.listen()
        finally:
            os.seteuid(0)
        yield


@pytest.mark.parametrize("kind", ["qmp", "incoming"])
@pytest.mark.parametrize("where", ["anybody's", "root's", "the listener's"])
async def test_listener_of_another_user_is_refused(tmp_path: Path, where: str, kind: str) -> None:
    """In /tmp any user may have made the socket first. QEMU often runs as a user of its own, with
    its socket in a directory of that user (libvirt) or of root."""
    path, says = tmp_path / "q", "user 65534 listens there, .* have QEMU make its socket in a direc"
    tmp_path.chmod(0o1777 if where == "anybody's" else 0o755)
    if where == "the listener's":
        os.chown(tmp_path, 65534, 65534)
    with anothers(path):
        if kind == "incoming":
            place = QemuPlace(Address(path=str(path)))
            if where == "anybody's":
                with pytest.raises(NoQemuError, match=says):
                    await place._connect(place.address)
            else:
                (await place._connect(place.address)).close()
            return
        with pytest.raises(
            ConnectError, match=says if where == "anybody's" else "no QEMU greets on"
        ):
            await Client.connect(str(path), timeout=0.3)


async def test_event_before_greeting_is_ignored(tmp_path: Path) -> None:
    """QEMU sends events to a new client until it has noticed that the one before has left."""
    early = b'{"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 1}}\n'
    greeting = early + json.dumps(GREETING).encode()
    async with fake(
        tmp_path / "q", lambda request: [{"return": {}, "id": request["id"]}], greeting
    ):
        client = await Client.connect(str(tmp_path / "q"))
        assert client.version == (8, 2, 1)
        await client.close()


@pytest.mark.parametrize(
    ("greeting", "says"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak QMP as QEMU does: b'HTTP/1.1 "),
        (b"\x00\x01\x02 ", "does not speak QMP"),
        (b"}", "does not speak QMP"),
        (b'{"hello": 1}', "is no greeting"),
        (b'{"QMP": {"version": {"qemu": {"major": "x"}}}}', "is no greeting"),
        (
            b'{"QMP": {"version": {"qemu": {"major": 1e999, "minor": 1, "micro": 1}}}}',
            "no greeting",
        ),
        (b'{"QMP": {"version": 7}}', "is no greeting"),
        (b"[" * 100_000 + b"]" * 100_000, "is no JSON object"),
        (b"[" * (MAX_ANSWER_BYTES + 1), "more than 1048576 bytes at once"),
    ],
)
async def test_invalid_greeting_is_refused(tmp_path: Path, greeting: bytes, says: str) -> None:
    async with fake(tmp_path / "q", lambda _: [], greeting):
        with pytest.raises(QemuError, match=says):
            await Machine.connect(f"unix:{tmp_path}/q", timeout=30)


async def test_own_programs_are_no_qemu(tmp_path: Path) -> None:
    """Our programs have a --qmp too: it is easy to name the wrong socket."""
    own = {"QMP": {"version": {"qemu": {"major": 0, "minor": 1, "micro": 0},
                               "package": "xbmigrate 0.1.0"}}}  # fmt: skip
    async with fake(tmp_path / "q", lambda _: [], json.dumps(own).encode()):
        with pytest.raises(QemuError, match="'xbmigrate 0.1.0', no QEMU: name the socket"):
            await Machine.connect(f"unix:{tmp_path}/q", timeout=30)


async def test_hang_up_without_greeting(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    with listener:
        listener.bind(str(tmp_path / "q"))
        listener.listen()
        listener.setblocking(False)
        connecting = asyncio.create_task(Machine.connect(str(tmp_path / "q"), timeout=30))
        (await asyncio.get_running_loop().sock_accept(listener))[0].close()
        with pytest.raises(QemuError, match="hung up without a greeting: is it a QEMU"):
            await connecting


async def test_connect_to_path_without_listener(tmp_path: Path) -> None:
    with pytest.raises(ConnectError, match=r"no answer on .*/q: No such file .*server=on"):
        await Machine.connect(f"unix:{tmp_path}/q", timeout=SOON)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "q"))
        with pytest.raises(ConnectError, match="Connection refused"):
            await Machine.connect(f"unix:{tmp_path}/q", timeout=SOON)
    # an error that cannot pass is reported at once
    with pytest.raises(UsageError):
        await Machine.connect(f"unix:{tmp_path}/{'q' * 200}", timeout=3600)
    for address in ("tcp:localhost:4444", "", "unix:"):
        with pytest.raises(UsageError):
            await Machine.connect(address)


async def test_connect_without_permission_for_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "connect", denied)
        with pytest.raises(
            ConnectError, match=r"/q is not ours to use: Permission denied: do this"
        ):
            await Client.connect(f"unix:{tmp_path}/q", timeout=30)


async def test_connect_waits_for_starting_qemu(tmp_path: Path) -> None:
    connecting = asyncio.create_task(Machine.connect(f"unix:{tmp_path}/q", timeout=30))
    await asyncio.sleep(SOON)
    async with fake(tmp_path / "q", lambda _: []), await connecting as machine:
        assert machine.version == (8, 2, 1)


async def test_connect_can_be_cancelled(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "q"))
        listener.listen()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SOON):
                await Machine.connect(str(tmp_path / "q"), timeout=3600)


async def test_answers_out_of_order_reach_their_commands(tmp_path: Path) -> None:
    held: list[dict[str, Any]] = []

    def answers(request: dict[str, Any]) -> list[Any]:
        held.append(request)
        if len(held) < 8:
            return [event("TICK")]
        return [answer(one, one["arguments"]["n"]) for one in reversed(held)]

    async with fake(tmp_path / "q", answers), await Machine.connect(str(tmp_path / "q")) as machine:
        with machine.events() as events:
            got = await asyncio.gather(*(machine.execute("x", n=n) for n in range(8)))
            assert got == list(range(8))
            assert [(await anext(events)).name for _ in range(7)] == ["TICK"] * 7


async def test_unanswered_commands_are_bounded(tmp_path: Path) -> None:
    """A cancelled command frees its slot; its late answer is dropped."""
    held: list[dict[str, Any]] = []

    def answers(request: dict[str, Any]) -> list[Any]:
        if request["execute"] == "go":
            return [*(answer(one) for one in held), answer(request, "gone")]
        held.append(request)
        return []

    async with (
        fake(tmp_path / "q", answers) as came,
        await Machine.connect(str(tmp_path / "q"), timeout=30) as machine,
    ):
        tasks = [asyncio.create_task(machine.execute("wait")) for _ in range(20)]
        while len(held) < 8:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await machine.execute("go") == "gone"
        assert came["wait"] == 8


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ([None], "x: the QEMU on .* has hung up: it has ended, or crashed"),
        ([b'{"return": ', None], "has hung up"),
        ([b'{"return": {}}'], "an answer to nothing that was asked"),
        ([b'{"return": {}, "id": 99}'], "an answer to nothing that was asked"),
        ([b'{"return": {}, "id": true}'], "an answer to nothing that was asked"),
        ([b'{"return": {}, "id": [1]}'], "an answer to nothing that was asked"),
        ([b'{"error": {"class": "GenericError", "desc": "JSON parse"}}'], "nothing that was asked"),
        ([b'{"error": "no", "id": 2}'], "an answer that says nothing"),
        ([b'{"id": 2}'], "an answer that says nothing"),
        ([b'{"event": 5}'], "is no event"),
        ([b'{"event": "X", "data": []}'], "is no event"),
        ([b"nonsense\n"], "is no JSON object"),
        ([b'"' + b"x" * MAX_ANSWER_BYTES], "more than 1048576 bytes at once"),
    ],
)
async def test_invalid_answer_ends_connection(tmp_path: Path, said: list[Any], says: str) -> None:
    """Commands that wait fail, and so do later ones."""
    async with (
        fake(tmp_path / "q", lambda _: said),
        await Machine.connect(str(tmp_path / "q"), timeout=30) as machine,
    ):
        with machine.events("NONE_OF_THESE") as events:
            with pytest.raises(QemuError, match=says) as caught:
                await machine.execute("x")
            assert caught.value.command == "x"
            with pytest.raises(QemuError, match=re.escape(f"y: {machine.ended}")):
                await machine.execute("y")
            assert [one.name async for one in events] == [CLOSED]


async def test_refusal_quotes_qemu(tmp_path: Path) -> None:
    def answers(request: dict[str, Any]) -> list[Any]:
        kind = "CommandNotFound" if request["execute"] == "new" else "GenericError"
        return [{"error": {"class": kind, "desc": "not\x1b today"}, "id": request["id"]}]

    async with fake(tmp_path / "q", answers), await Machine.connect(str(tmp_path / "q")) as machine:
        with pytest.raises(QemuError, match=r"^old: QEMU says: not\\x1b today$") as caught:
            await machine.execute("old")
        assert (caught.value.desc, caught.value.kind) == (r"not\x1b today", "GenericError")
        with pytest.raises(QemuError, match=r"QEMU 8\.2\.1 is too old, or too new, for it"):
            await machine.execute("new")


async def test_unfetched_events_are_bounded(tmp_path: Path) -> None:
    """The latest events are kept, and CLOSED always; a timeout loses none."""
    many = [event("PASS", n=n) for n in range(MAX_KEPT_EVENTS + 10)]

    def answers(request: dict[str, Any]) -> list[Any]:
        return [*many, event("STOP"), answer(request)]

    async with fake(tmp_path / "q", answers), await Machine.connect(str(tmp_path / "q")) as machine:
        with machine.events() as all_of_them, machine.events("STOP") as some:
            await machine.execute("x")
            assert all_of_them.missed == 11
            first = await anext(all_of_them)
            assert (first.name, first.data["n"], first.time) == ("PASS", 11, 5.25)
            assert (await anext(some)).name == "STOP"
            assert some.missed == 0
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await anext(some)
            await machine.close()
            assert [one.name async for one in some] == [CLOSED]
            assert "was closed here" in str(machine.ended)
            assert [one.name async for one in all_of_them][-1] == CLOSED
    await machine.close()


async def test_settings_are_queried_and_not_guessed_from_version(tmp_path: Path) -> None:
    """A later QEMU has more capabilities and parameters."""
    capabilities = {
        "events": False,
        "return-path": True,
        "mapped-ram": True,
        "switchover-ack": True,
    }
    parameters = {"mode": "cpr-reboot", "tls-creds": "", "avail-switchover-bandwidth": 7,
                  "downtime-limit": 300, "max-bandwidth": 0}  # fmt: skip
    before = dict(capabilities), dict(parameters)

    def answers(request: dict[str, Any]) -> list[Any]:
        match request["execute"]:
            case "query-migrate-capabilities":
                listed = [{"capability": n, "state": s} for n, s in capabilities.items()]
                return [answer(request, listed)]
            case "query-migrate-parameters":
                return [answer(request, parameters)]
            case "migrate-set-capabilities":
                for one in request["arguments"]["capabilities"]:
                    assert one["capability"] in capabilities
                    capabilities[one["capability"]] = one["state"]
            case "migrate-set-parameters":
                assert request["arguments"].keys() <= parameters.keys()
                parameters.update(request["arguments"])
        return [answer(request)]

    async with fake(tmp_path / "q", answers), await Machine.connect(str(tmp_path / "q")) as machine:
        await machine.prepare(return_path=False, downtime_limit=0.0001)
        assert [name for name, on in capabilities.items() if on] == ["events"]
        assert parameters["mode"] == "normal"
        assert parameters["downtime-limit"] == 1  # with 0 the migration would never end
        assert await machine.set_switchover_bandwidth(1000)
        assert parameters["avail-switchover-bandwidth"] == 1000
        assert await machine.restore() == ()
        assert (capabilities, parameters) == before


async def test_migration_goes_on_during_finish_migrate(tmp_path: Path) -> None:
    """7.2 says `completed` before it knows the times, and refuses `cont` until then."""
    steps = iter([
        ("running", {"status": "active"}), ("finish-migrate", {"status": "completed"}),
        ("finish-migrate", {"status": "completed"}), ("finish-migrate", {"status": "completed"}),
        ("finish-migrate", {"status": "completed"}), ("finish-migrate", {"status": "completed"}),
        ("postmigrate", {"status": "completed", "total-time": 5}),
    ])  # fmt: skip
    now: tuple[str, Any] = ("", {})

    def answers(request: dict[str, Any]) -> list[Any]:
        nonlocal now
        if request["execute"] == "query-status":
            now = next(steps, now)
            return [answer(request, {"status": now[0]})]
        if request["execute"] == "cont" and now[0] == "finish-migrate":
            return [{"error": {"class": "GenericError", "desc": "x"}, "id": request["id"]}]
        return [answer(request, now[1])]

    async with fake(tmp_path / "q", answers), await Machine.connect(str(tmp_path / "q")) as machine:
        status = await machine.status()
        assert (status.runstate, status.status, status.going_on) == (
            "finish-migrate", "completed", True,
        )  # fmt: skip
        await machine.cont()
        status = await until_over(machine)
        assert (status.runstate, status.total_time) == ("postmigrate", 0.005)


async def test_cancel_times_out(tmp_path: Path) -> None:
    def answers(request: dict[str, Any]) -> list[Any]:
        return [answer(request, {"status": "cancelling"})]

    async with fake(tmp_path / "q", answers), await Machine.connect(str(tmp_path / "q")) as machine:
        with pytest.raises(QemuError, match="still migrates after 0.3 s"):
            await machine.cancel(timeout=SOON)


@pytest.mark.parametrize(
    "said",
    [
        b"[]", b'{"ram": {"remaining": "much"}}', b'{"ram": []}', b'{"total-time": "long"}',
        b'{"ram": {"total": 1e999}}', b'{"blocked-reasons": 5, "status": "active"}',
    ],
)  # fmt: skip
async def test_invalid_status_is_refused(tmp_path: Path, said: bytes) -> None:
    def answers(request: dict[str, Any]) -> list[Any]:
        return [b'{"id": %d, "return": %s}' % (request["id"], said)]

    async with fake(tmp_path / "q", answers), await Machine.connect(str(tmp_path / "q")) as machine:
        with pytest.raises(QemuError, match=r"query-\w+: QEMU's answer is not understood"):
            await machine.status()


async def test_nan_rate_is_read_as_zero(tmp_path: Path) -> None:
    def answers(request: dict[str, Any]) -> list[Any]:
        said = b'{"status": "running", "ram": {"mbps": NaN, "remaining": 4096}}'
        return [b'{"id": %d, "return": %s}' % (request["id"], said)]

    async with fake(tmp_path / "q", answers), await Machine.connect(str(tmp_path / "q")) as machine:
        status = await machine.status()
        assert (status.mbps, status.remaining) == (0, 4096)


async def test_closed_machines_leave_no_descriptors(start) -> None:
    before = len(os.listdir("/proc/self/fd"))
    qemu = start("-S")
    for _ in range(3):
        async with await qemu.machine() as machine:
            await machine.status()
    assert len(os.listdir("/proc/self/fd")) <= before + 1
