"""Where a guest lands that another QEMU brings: a QEMU that waits for it (`-incoming`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

from migrate.address import Address
from migrate.dialing import open_tcp
from migrate.errors import ConnectError, MigrationError
from migrate.guests.guest import Place
from migrate.qemu.machine import RUNNING, Changed, Machine, our_end
from migrate.qemu.reception import StreamReception
from migrate.threads import in_thread
from proto import ErrorCode
from proto.qemu import Command, Reply, order

CONNECT_SECONDS = 10.0
SEND_BYTES = 4 << 20
# It loads the devices, and answers; disks may have to be opened.
LOAD_SECONDS = 120.0
START_SECONDS = 50.0
# What reads our stream answers its first words at once.
MUTE_SECONDS = 20.0
FIRST_BYTES = 4096
# Of what must not reach QEMU before GO: the end of the stream and the description.
MAX_HELD = 80 << 20
# Ours among the PINGs; QEMU itself counts from 1.
PROOF = 0x58424D31
NEWS_SECONDS = 0.1
ENDED = (
    "has ended before the guest was there (most often it was started with other memory, another "
    "machine type or other devices)"
)


class NoQemuError(MigrationError):
    """No QEMU waits for a guest where one should."""

    exit_code = 2
    code = ErrorCode.NO_PLACE


class QemuPlace(Place):
    """A QEMU that was started with `-incoming`.

    address -- where it listens; None: it is told to (qmp; it was started with `-incoming defer`)

    What comes back from it is given to `on_return`, but for what concerns us alone.
    """

    reception = StreamReception
    irrevocable = True

    def __init__(self, address: Address | None, qmp: str = "") -> None:
        self._qmp = qmp
        self._given = address
        self.address = address or Address(path=qmp)
        self.on_return: Callable[[bytes], None] = lambda _data: None
        self.lost: asyncio.Future[None] | None = None
        """Done, with an exception, when QEMU has closed its end, or said that it failed."""
        self._socket: socket.socket | None = None
        self._poll = select.poll()
        self._held = bytearray()
        self._listening: asyncio.Task[None] | None = None
        self._proven = asyncio.Event()
        self._ended = asyncio.Event()
        self._shut: int | None = None
        self._closed = False
        self._asked_at: float | None = None
        self._first = True
        self._spoken = False
        self._changed: Changed = {}, {}

    async def ready(self) -> None:
        """Connects. Raises NoQemuError and QemuError."""
        if self._socket is not None:
            return
        connection = await self._open()
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        self._poll.register(connection, select.POLLOUT)
        self._socket = connection
        self.lost = asyncio.get_running_loop().create_future()
        self._listening = asyncio.create_task(self._listen(connection))

    async def _open(self) -> socket.socket:
        """The other end of what QEMU reads from."""
        if not self._qmp:
            return await self._connect(self.address)
        async with await Machine.connect(self._qmp) as machine:
            if self._given is not None:
                await machine.incoming(str(self._given))
                self._changed = machine.changed
                return await self._connect(self._given)
            connection = await our_end(machine.incoming)
            self._changed = machine.changed
            return connection

    async def _put_back(self) -> None:
        """What was off for us, in a QEMU that has its guest; one that cannot be asked is left, and
        nothing is raised: the guest runs."""
        with contextlib.suppress(Exception):
            async with await Machine.connect(self._qmp, timeout=1.0) as machine:
                machine.adopt(self._changed)
                await machine.restore()

    async def _connect(self, where: Address) -> socket.socket:
        try:
            if not where.path:
                return await open_tcp(where, CONNECT_SECONDS)
            return await self._connect_unix(where.path)
        except ConnectError as error:
            reason = str(error)
        except (OSError, TimeoutError) as error:
            number = getattr(error, "errno", None) or 0
            reason = os.strerror(number) if number > 0 else "nobody answers"
        raise NoQemuError(
            f"no QEMU waits for a guest at {where}: {reason}: start it with -incoming {where}"
        )

    async def _connect_unix(self, path: str) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.setblocking(False)
            async with asyncio.timeout(CONNECT_SECONDS):
                await asyncio.get_running_loop().sock_connect(connection, path)
        except BaseException:
            connection.close()
            raise
        return connection

    def _gone(self, reason: str) -> MigrationError:
        return MigrationError(f"the QEMU at {self.address} {reason}: its own messages say why")

    def announce(self, blocks: Sequence[tuple[bytes, int]], page_size: int) -> None:
        """What RAM blocks the stream will have: their names, and pages."""

    # -- to QEMU, in the worker thread

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Raises MigrationError where QEMU has gone."""
        assert self._socket is not None
        view = memoryview(data)
        if self._first:
            self._first = False
            if order(Command.OPEN_RETURN_PATH) in bytes(view[:FIRST_BYTES]):
                self._asked_at = time.monotonic()
        while view:
            self._check_hears()
            if self._closed:
                raise MigrationError("the guest is not wanted here any more")
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                self._poll.poll(NEWS_SECONDS * 1e3)
            except OSError as error:
                raise self._gone(f"does not take the guest ({error.strerror})") from None

    def _check_hears(self) -> None:
        """Raises MigrationError where QEMU reads nothing: its guest is not to wait for that."""
        asked = self._asked_at
        if asked is None or self._spoken or time.monotonic() - asked < MUTE_SECONDS:
            return
        raise MigrationError(
            f"the QEMU at {self.address} does not read what it is sent: does it wait for further "
            "connections? Switch the capabilities multifd and postcopy-preempt off there"
        )

    def hold(self, data: bytes) -> None:
        """What it gets when the guest is ours. Raises MigrationError where that is too much."""
        if len(self._held) + len(data) > MAX_HELD:
            raise MigrationError(f"the end of the stream is longer than {MAX_HELD} bytes")
        self._held += data

    # -- from QEMU

    async def _listen(self, connection: socket.socket) -> None:
        loop, rest = asyncio.get_running_loop(), b""
        assert self.lost is not None
        try:
            while data := await loop.sock_recv(connection, 1 << 16):
                rest += data
                while len(rest) >= 4:
                    kind, length = struct.unpack_from(">HH", rest)
                    if len(rest) < 4 + length:
                        break
                    self._hear(kind, rest[4 : 4 + length], rest[: 4 + length])
                    rest = rest[4 + length :]
            reason = ENDED
        except OSError as error:
            reason = f"is gone ({error.strerror})"
        self._ended.set()
        self.fail(reason)

    def fail(self, reason: str) -> None:
        """Whoever waits for this QEMU hears that it is of no use any more; nobody has to."""
        if self.lost is not None and not self.lost.done():
            self.lost.set_exception(self._gone(reason))
            self.lost.exception()

    def _hear(self, kind: int, data: bytes, whole: bytes) -> None:
        self._spoken = True
        if kind == Reply.PONG and data == PROOF.to_bytes(4, "big"):
            self._proven.set()
        elif kind == Reply.SHUT:
            self._shut = int.from_bytes(data, "big")
            self._ended.set()
        else:
            self.on_return(whole)

    async def prove(self, *, return_path: bool) -> None:
        """Returns when QEMU has loaded all that was sent. Raises MigrationError."""
        orders = b"" if return_path else order(Command.OPEN_RETURN_PATH)
        orders += order(Command.PING, PROOF.to_bytes(4, "big"))
        await in_thread(self.send, orders)
        proven = asyncio.ensure_future(self._proven.wait())
        assert self.lost is not None
        either: set[asyncio.Future[Any]] = {proven, self.lost}
        try:
            if self._asked_at is not None and not self._spoken:
                await asyncio.wait(
                    either, timeout=MUTE_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                self._check_hears()
            await asyncio.wait(either, timeout=LOAD_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not self._proven.is_set():
                if self.lost.done():
                    self.lost.result()
                raise MigrationError(
                    f"the QEMU at {self.address} has not loaded the guest in {LOAD_SECONDS:g} s"
                )
        finally:
            proven.cancel()

    # -- whose it is

    async def start(self, state: bytes) -> str:
        del state
        await in_thread(self.send, self._held)
        began = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                await self._ended.wait()
        if self._shut:
            raise MigrationError(f"the QEMU at {self.address} says that it failed ({self._shut})")
        if self._shut is None:
            waited = time.monotonic() - began
            return (
                f"the guest was given to the QEMU at {self.address}, which has not said in "
                f"{waited:.0f} s that it runs: look there"
            )
        if any(self._changed):
            await self._put_back()
        return f"the guest runs in the QEMU at {self.address}"

    async def look(self, running: str) -> str:
        """One that cannot be asked is taken to run."""
        if not self._qmp or self._shut is None:
            return running
        with contextlib.suppress(MigrationError):
            async with await Machine.connect(self._qmp, timeout=1.0) as machine:
                runstate = (await machine.status()).runstate
                self.runs = runstate == RUNNING
                if not self.runs:
                    return (
                        f"the guest is in the QEMU at {self.address}, and does not run yet "
                        f"({runstate})"
                    )
        return running

    def facts(self) -> dict[str, Any]:
        return {"kind": "qemu", "address": str(self.address)}

    def close(self) -> None:
        self._closed = True
        if self._listening is not None:
            self._listening.cancel()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def discard(self) -> None:
        """QEMU sees the end of its stream, and ends."""
        self.close()
