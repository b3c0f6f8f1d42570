"""A client of QEMU's control socket: it sends commands, and receives answers and events.

    <- {"QMP": {"version": ..., "capabilities": [...]}}
    -> {"execute": NAME, "arguments": {...}, "id": N}       the first is qmp_capabilities
    <- {"return": ..., "id": N}  or  {"error": {"class": ..., "desc": ...}, "id": N}
    <- {"event": NAME, "data": {...}, "timestamp": ...}     at any time

The library qemu.qmp (0.0.6) cannot do this for us: it passes descriptors through a private
attribute that sockets of uvloop lack, keeps every event without bound, and takes an event that
comes before the greeting for a wrong greeting.

One task reads everything that arrives. When the connection ends, for whatever reason, that task
fails every command that waits for its answer, and CLOSED becomes the last event of every
listener. The client knows no command but the first; machine.py has the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
from collections.abc import Mapping
from typing import Any

from migrate.errors import ConnectError, QemuError
from migrate.monitor.monitored import CommandError
from migrate.monitor.qmp import JsonStream
from migrate.output import printable
from migrate.qemu.qmp.connecting import RETRY_SECONDS, ConnectAttempt, control_path
from migrate.qemu.qmp.events import Events, Listeners
from migrate.qemu.qmp.messages import (
    InvalidMessage,
    event_in,
    parse,
    short,
    version_in,
)
from migrate.qemu.qmp.refusals import refusal
from migrate.runtime.processes import command_name

logger = logging.getLogger(__name__)

# The commands that we send are answered in a few KiB. This bounds what is kept of a program that is
# no QEMU.
MAX_ANSWER_BYTES = 1 << 20
# QEMU stops reading its socket when more commands than these are unanswered.
MAX_UNANSWERED = 8
READ_BYTES = 64 << 10


class Client:
    """A connection to QEMU, open from `connect` until `close`, or until QEMU ends it.

    version -- of QEMU: (major, minor, micro)
    timeout -- seconds that QEMU may take to answer a command
    """

    def __init__(
        self, path: str, timeout: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.path = path
        self.version = (0, 0, 0)
        self.timeout = timeout
        self._reader = reader
        self._writer = writer
        self._stream = JsonStream(MAX_ANSWER_BYTES)
        # The result of these futures is None if the connection ends first.
        self._greeting: asyncio.Future[tuple[int, int, int] | None]
        self._greeting = asyncio.get_running_loop().create_future()
        self._unanswered: dict[int, asyncio.Future[dict[str, Any] | None]] = {}
        self._listeners = Listeners()
        self._last_id = 0
        self._slots = asyncio.Semaphore(MAX_UNANSWERED)
        self._shutdown_reason = ""
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def connect(cls, address: str, timeout: float = 5.0) -> Client:
        """Connect to a QEMU; wait for one that is just starting.

        address -- PATH or unix:PATH
        timeout -- seconds for this, and later for the answer to each command

        Raises UsageError; ConnectError if nothing answers, QEMU serves another client, or the
        listener is not trusted (see `check_listener`); QemuError if it is no QEMU.
        """
        path = control_path(address)
        attempt = ConnectAttempt(path)
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await attempt.connected()
                client = cls(path, timeout, reader, writer)
                try:
                    await client._negotiate()
                except BaseException:
                    await client.close()
                    raise
                logger.debug("%s: connected to QEMU %d.%d.%d", path, *client.version)
                return client
        except TimeoutError:
            raise ConnectError(attempt.failure()) from None

    async def _negotiate(self) -> None:
        version = await self._greeting
        if version is None:
            raise QemuError(str(self.ended))
        self.version = version
        await self.execute("qmp_capabilities")

    @property
    def ended(self) -> str | None:
        """Why the connection has ended; None while it is open."""
        return self._listeners.ended

    @property
    def process(self) -> int:
        """The PID of QEMU; 0 if it cannot be seen from here, or another program made the socket.

        libvirt may make the socket and hand it to QEMU; SO_PEERCRED then names libvirt.
        """
        sock = self._writer.transport.get_extra_info("socket")
        with contextlib.suppress(OSError, AttributeError, IndexError):
            peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            pid = int(struct.unpack("3i", peer)[0])
            return pid if command_name(pid).startswith(("qemu", "kvm")) else 0
        return 0

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, file: int | None = None
    ) -> Any:
        """Run a command and return its result. Several may run at once.

        file -- a descriptor that is passed along with the command (`getfd`)

        Raises QemuError if QEMU refuses, gives no answer within `timeout`, or has ended.
        """
        try:
            async with asyncio.timeout(self.timeout), self._slots:
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
            raise refusal(command, answer["error"], self.version)
        return answer["return"]

    async def _ask(
        self, command: str, arguments: Mapping[str, Any], file: int | None
    ) -> dict[str, Any] | None:
        """Send a command and wait for its answer; return None if the connection ends first."""
        if self.ended is not None:
            return None
        self._last_id += 1
        number = self._last_id
        request = {"execute": command, "arguments": arguments, "id": number}
        logger.debug("%s > %s %s", self.path, command, arguments)
        waiting = self._unanswered[number] = asyncio.get_running_loop().create_future()
        try:
            with contextlib.suppress(OSError, RuntimeError):  # the reading task reports the end
                await self._send(json.dumps(request).encode() + b"\n", file)
            answer: dict[str, Any] | None = await waiting
            logger.debug("%s < %s: %s", self.path, command, answer)
            return answer
        finally:
            self._unanswered.pop(number, None)

    async def _send(self, data: bytes, file: int | None) -> None:
        """Send the bytes of a request, and a descriptor with the first of them.

        Neither asyncio nor uvloop can send a descriptor. The transport's buffer is drained first,
        so that the bytes that go past it keep their order.
        """
        if file is not None:
            transport = self._writer.transport
            while transport.get_write_buffer_size():
                await asyncio.sleep(RETRY_SECONDS)
            number = os.dup(transport.get_extra_info("socket").fileno())
            with socket.socket(fileno=number) as sock:
                sock.setblocking(False)
                sent = 0
                while not sent:
                    try:
                        sent = socket.send_fds(sock, [data], [file])
                    except BlockingIOError:
                        await asyncio.sleep(RETRY_SECONDS)
            data = data[sent:]
        self._writer.write(data)
        await self._writer.drain()

    def events(self, *names: str) -> Events:
        """Return an iterator over these events; without names, over all events."""
        return Events(self._listeners, names)

    async def close(self) -> None:
        """End the connection. May be called again."""
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self._end(f"the connection to {self.path} was closed here")
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    # -- what arrives

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(READ_BYTES):
                for text in self._stream.feed(data):
                    self._receive(parse(text))
            self._end(self._hung_up())
        except CommandError:
            self._end(f"what is on {self.path} sent more than {MAX_ANSWER_BYTES} bytes at once")
        except InvalidMessage as error:
            self._end(f"what is on {self.path} does not speak QMP as QEMU does: {error}")
        except OSError:  # QEMU closed the socket with some of our bytes unread
            self._end(self._hung_up())

    def _hung_up(self) -> str:
        if not self._greeting.done():
            return f"what is on {self.path} has hung up without a greeting: is it a QEMU?"
        why = "it has ended, or crashed: its own output may say why"
        if self._shutdown_reason:
            why = f"it was shut down ({self._shutdown_reason})"
        return f"the QEMU on {self.path} has hung up: {why}"

    def _receive(self, message: dict[str, Any]) -> None:
        """Route a message. Raises InvalidMessage if QEMU sends no such message at this point."""
        if not self._greeting.done():
            # QEMU takes a new client for the one before until it has noticed that this one left,
            # so an event for the earlier client may come first.
            if "event" not in message:
                self._greeting.set_result(version_in(message))
        elif "event" in message:
            event = event_in(message)
            if event.name == "SHUTDOWN":
                reason = event.data.get("reason", "for no reason given")
                self._shutdown_reason = printable(str(reason))
            logger.debug("%s < event %s %s", self.path, event.name, event.data)
            self._listeners.publish(event)
        else:
            number = message.get("id")
            if type(number) is not int or not 0 < number <= self._last_id:
                raise InvalidMessage(f"an answer to nothing that was asked ({short(message)})")
            if "return" not in message and not isinstance(message.get("error"), dict):
                raise InvalidMessage(f"an answer that says nothing ({short(message)})")
            waiting = self._unanswered.get(number)
            if waiting is not None and not waiting.done():  # else the command was cancelled
                waiting.set_result(message)

    def _end(self, why: str) -> None:
        """Fail everything that waits: nothing arrives any more. The first reason stands."""
        if self.ended is not None:
            return
        self._writer.transport.abort()
        if not self._greeting.done():
            self._greeting.set_result(None)
        for waiting in self._unanswered.values():
            if not waiting.done():
                waiting.set_result(None)
        logger.debug("%s closed: %s", self.path, why)
        self._listeners.end(why)
