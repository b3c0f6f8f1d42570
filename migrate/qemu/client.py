"""A client of QEMU's control socket: commands and their answers, and the events between them.

    <- {"QMP": {"version": ..., "capabilities": [...]}}
    -> {"execute": NAME, "arguments": {...}, "id": N}       the first is qmp_capabilities
    <- {"return": ..., "id": N}  or  {"error": {"class": ..., "desc": ...}, "id": N}
    <- {"event": NAME, "data": {...}, "timestamp": ...}     at any time

One task reads all that comes. When the connection ends, for whatever reason, every command that
waits fails, and every iterator of events gets CLOSED as its last one. It knows no command.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import struct
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from migrate.address import parse_address
from migrate.errors import ConnectError, QemuError, UsageError
from migrate.monitor.node import Refused
from migrate.monitor.qmp import JsonStream
from migrate.output import printable
from migrate.qemu.messages import (
    CLOSED,
    Event,
    Garbage,
    closed,
    event_in,
    parse,
    short,
    version_in,
)

MAX_ANSWER_BYTES = 1 << 20
# With more than these unanswered QEMU stops reading its socket.
MAX_UNDER_WAY = 8
MAX_KEPT_EVENTS = 1024
READ_BYTES = 64 << 10
RETRY_INTERVAL = 0.05
# A QEMU that is still starting, or whose queue of connections is full.
MAY_COME = (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN)

# What QEMU refuses (a part of its words), and what to do.
ADVICE = (
    ("migration process in progress", "wait until that migration has ended, or cancel it"),
    ("paused due to previous migration", "the guest has moved; `cont` would let it run here again"),
    ("not finalized yet", "wait until that migration has ended"),
    ("waiting for an incoming migration", "no guest is here yet: this QEMU is a destination"),
    ("'-incoming' was not specified", "start that QEMU with -incoming defer"),
    ("migration has already been started", "start that QEMU anew, with -incoming defer"),
    ("valid migration protocol", "write unix:PATH or tcp:HOST:PORT"),
    ("Reset", "`system_reset` must come before it can run again"),
)


class Events:
    """The events from now on, as long as its context lasts; the iterator ends after CLOSED.

    names -- only these, and CLOSED; none: all

    Of those that nobody fetches the latest MAX_KEPT_EVENTS are kept; `missed` counts the others.
    """

    def __init__(self, client: Client, names: tuple[str, ...]) -> None:
        self.missed = 0
        self._client = client
        self._names = frozenset(names)
        self._kept: deque[Event] = deque(maxlen=MAX_KEPT_EVENTS)
        self._news = asyncio.Event()
        self._over = False

    def __enter__(self) -> Events:
        self._client.listeners.add(self)
        if self._client.ended is not None:
            self.take(closed(self._client.ended))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._client.listeners.discard(self)

    def take(self, event: Event) -> None:
        if event.name == CLOSED or not self._names or event.name in self._names:
            self.missed += len(self._kept) == MAX_KEPT_EVENTS
            self._kept.append(event)
            self._over = event.name == CLOSED
            self._news.set()

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> Event:
        """May be cancelled, as by a timeout: no event is lost by that."""
        while not self._kept:
            if self._over:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._kept.popleft()


class Client:
    """A connection, open from `connect` to `close` or until QEMU ends it (`ended` says why).

    version -- (major, minor, micro)
    """

    def __init__(
        self, path: str, timeout: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.path = path
        self.version = (0, 0, 0)
        self.ended: str | None = None
        self.listeners: set[Events] = set()
        self.timeout = timeout
        self._reader = reader
        self._writer = writer
        self._stream = JsonStream(MAX_ANSWER_BYTES)
        self._greeting: asyncio.Future[tuple[int, int, int] | None]
        self._greeting = asyncio.get_running_loop().create_future()
        # None is given to those that wait when the connection ends.
        self._waiting: dict[int, asyncio.Future[dict[str, Any] | None]] = {}
        self._asked = 0
        self._turn = asyncio.Semaphore(MAX_UNDER_WAY)
        self._shutdown = ""
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def connect(cls, address: str, timeout: float = 5.0) -> Client:
        """A QEMU that is just starting is waited for.

        address -- PATH or unix:PATH
        timeout -- seconds for this, and then for the answer of each command

        Raises UsageError, ConnectError where nobody answers there or somebody else is served,
        QemuError where it is no QEMU.
        """
        path = control_path(address)
        wait = _Wait(path)
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await wait.connected()
                client = cls(path, timeout, reader, writer)
                try:
                    await client._negotiate()
                except BaseException:
                    await client.close()
                    raise
                return client
        except TimeoutError:
            raise ConnectError(wait.sentence()) from None

    async def _negotiate(self) -> None:
        version = await self._greeting
        if version is None:
            raise QemuError(str(self.ended))
        self.version = version
        await self.execute("qmp_capabilities")

    @property
    def process(self) -> int:
        """The PID of the QEMU; 0 where we cannot see it, or another program made its socket."""
        sock = self._writer.transport.get_extra_info("socket")
        with contextlib.suppress(OSError, AttributeError):
            peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            pid = int(struct.unpack("3i", peer)[0])
            with open(f"/proc/{pid}/comm") as file:
                return pid if file.read().startswith(("qemu", "kvm")) else 0
        return 0

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, file: int | None = None
    ) -> Any:
        """What the command returns. Several may be under way. Raises QemuError.

        file -- a descriptor that QEMU gets with it (`getfd`)
        """
        try:
            async with asyncio.timeout(self.timeout), self._turn:
                answer = await self._ask(command, arguments or {}, file)
        except TimeoutError:
            raise QemuError(
                f"{command}: the QEMU on {self.path} has not answered for {self.timeout:g} s: it "
                "is stopped, or very busy",
                command,
            ) from None
        if answer is None:
            raise QemuError(f"{command}: {self.ended}", command)
        if "error" in answer:
            raise self._refusal(command, answer["error"])
        return answer["return"]

    async def _ask(
        self, command: str, arguments: Mapping[str, Any], file: int | None
    ) -> dict[str, Any] | None:
        if self.ended is not None:
            return None
        self._asked += 1
        number = self._asked
        request = {"execute": command, "arguments": arguments, "id": number}
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            with contextlib.suppress(OSError, RuntimeError):  # the task that reads says why
                await self._send(json.dumps(request).encode() + b"\n", file)
            answer: dict[str, Any] | None = await waiting
            return answer
        finally:
            self._waiting.pop(number, None)

    async def _send(self, data: bytes, file: int | None) -> None:
        if file is not None:
            transport = self._writer.transport
            while transport.get_write_buffer_size():  # it goes behind what was said before
                await asyncio.sleep(RETRY_INTERVAL)
            number = os.dup(transport.get_extra_info("socket").fileno())
            with socket.socket(fileno=number) as sock:
                sock.setblocking(False)
                sent = 0
                while not sent:
                    try:
                        sent = socket.send_fds(sock, [data], [file])
                    except BlockingIOError:
                        await asyncio.sleep(RETRY_INTERVAL)
            data = data[sent:]
        self._writer.write(data)
        await self._writer.drain()

    def _refusal(self, command: str, error: dict[str, Any]) -> QemuError:
        kind, desc = str(error.get("class", "")), printable(str(error.get("desc", "")))
        sentence = f"{command}: QEMU says: {desc}"
        if kind == "CommandNotFound":
            sentence += f": QEMU {'.'.join(map(str, self.version))} is too old, or too new, for it"
        else:
            sentence += next((f": {advice}" for part, advice in ADVICE if part in desc), "")
        return QemuError(sentence, command, desc, kind)

    def events(self, *names: str) -> Events:
        return Events(self, names)

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self._end(f"the connection to {self.path} was closed here")
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    # -- what comes

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(READ_BYTES):
                for text in self._stream.feed(data):
                    self._take(parse(text))
            self._end(self._hung_up())
        except Refused:
            self._end(f"what is on {self.path} sent more than {MAX_ANSWER_BYTES} bytes at once")
        except Garbage as error:
            self._end(f"what is on {self.path} does not speak QMP as QEMU does: {error}")
        except OSError:  # it had not read all that was sent
            self._end(self._hung_up())

    def _hung_up(self) -> str:
        if not self._greeting.done():
            return f"what is on {self.path} has hung up without a greeting: is it a QEMU?"
        why = "it has ended, or crashed: its own output may say why"
        if self._shutdown:
            why = f"it was shut down ({self._shutdown})"
        return f"the QEMU on {self.path} has hung up: {why}"

    def _take(self, message: dict[str, Any]) -> None:
        """Raises Garbage where this is not what may come now."""
        if not self._greeting.done():
            if "event" not in message:  # one that was meant for whoever was served before us
                self._greeting.set_result(version_in(message))
        elif "event" in message:
            event = event_in(message)
            if event.name == "SHUTDOWN":
                self._shutdown = printable(str(event.data.get("reason", "for no reason given")))
            self._tell(event)
        else:
            number = message.get("id")
            if type(number) is not int or not 0 < number <= self._asked:
                raise Garbage(f"an answer to nothing that was asked ({short(message)})")
            if "return" not in message and not isinstance(message.get("error"), dict):
                raise Garbage(f"an answer that says nothing ({short(message)})")
            waiting = self._waiting.get(number)
            if waiting is not None and not waiting.done():  # else whoever asked has gone
                waiting.set_result(message)

    def _tell(self, event: Event) -> None:
        for listener in list(self.listeners):
            listener.take(event)

    def _end(self, why: str) -> None:
        """Nothing comes any more. The first reason stands."""
        if self.ended is not None:
            return
        self.ended = why
        self._writer.transport.abort()
        if not self._greeting.done():
            self._greeting.set_result(None)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result(None)
        self._tell(closed(why))


class _Wait:
    """For a connection, and for the greeting on it; what to say when it was in vain."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fault: OSError | None = None

    async def connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Tries until it is cancelled. Raises ConnectError where trying again is no use.

        A unix socket connects at once or not at all. Where the queue is full asyncio would take
        the socket for connected, and uvloop gives up.
        """
        while True:
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            try:
                sock.connect(self._path)
                self._fault = None
                return await asyncio.open_unix_connection(sock=sock)
            except OSError as error:
                sock.close()
                self._fault = error
                if error.errno not in MAY_COME:
                    raise ConnectError(self.sentence()) from None
            except asyncio.CancelledError:
                sock.close()
                raise
            await asyncio.sleep(RETRY_INTERVAL)

    def sentence(self) -> str:
        if self._fault is None or self._fault.errno == errno.EAGAIN:
            return (
                f"no QEMU greets on {self._path}: it serves one client at a time, and another one "
                "is connected (libvirt, a shell, another migration?), or QEMU is stopped: close "
                "that connection, or give QEMU one more -qmp socket for this"
            )
        if self._fault.errno == errno.EACCES:
            return (
                f"the control socket {self._path} is not ours to use: {self._fault.strerror}: do "
                "this as the user that its QEMU runs as, or let this one write to the socket"
            )
        return (
            f"nobody answers on {self._path}: {self._fault.strerror or self._fault}: does a QEMU "
            "with -qmp unix:PATH,server=on,wait=off run there?"
        )


def control_path(address: str) -> str:
    """The path of a QMP socket that is given as PATH or unix:PATH. Raises UsageError."""
    if not address or address.startswith("tcp:"):
        raise UsageError(f"QEMU's control socket {address!r} is not understood: write unix:PATH")
    return parse_address(address if address.startswith("unix:") else f"unix:{address}").path
