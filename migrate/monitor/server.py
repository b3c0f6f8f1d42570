"""The Unix sockets of --qmp and --monitor, each of which serves many clients.

A Conversation speaks the protocol, bytes in and bytes out: qmp.Conversation for machines,
terminal.HumanConversation for people.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from migrate.errors import UsageError
from migrate.files.socket_file import SocketFile
from migrate.monitor.monitored import CommandError

MAX_CLIENTS = 32
# How long a client may take to read a reply before it is dropped.
SEND_SECONDS = 10.0
# Bytes of events that may wait for a client that does not read them, before it is dropped.
MAX_WAITING = 1 << 20
# The pause after each reply, to all clients together. Without it, one client that sent requests
# without a pause starved the migration: a downtime of 8 ms became 5 s.
TURN_SECONDS = 0.002


class Conversation(Protocol):
    """The protocol that a client speaks, and the state of that client."""

    def begin(self) -> bytes:
        """Return the greeting."""

    def replies(self, data: bytes) -> AsyncIterator[bytes]:
        """Give the replies to what the client has sent. Raises CommandError to drop the client."""

    def event(self, message: dict[str, Any]) -> bytes:
        """Return what to send the client of a QMP event."""

    def drop(self, error: CommandError) -> bytes:
        """Return what to send last to a client that is dropped."""


class Server:
    """Serves one Unix socket from `open` to `close`.

    converse -- returns a conversation for a new client
    option   -- the option that names the socket, for messages
    """

    def __init__(self, path: str, converse: Callable[[], Conversation], option: str) -> None:
        self._path = path
        self._converse = converse
        self._option = option
        self._turn = asyncio.Lock()
        self._clients: dict[asyncio.StreamWriter, Conversation] = {}
        # The number of each client's last request, all clients counted together; 0: none yet.
        self._asked: dict[asyncio.StreamWriter, int] = {}
        self._count = itertools.count(1)
        self._server: asyncio.Server | None = None
        self._file: SocketFile | None = None

    async def open(self) -> None:
        """Listen. Raises ConnectError if the path is in use, UsageError if it is wrong."""
        self._file = SocketFile(self._path, self._option)
        self._server = await asyncio.start_unix_server(self._serve, sock=self._file.socket)

    def tell(self, message: dict[str, Any]) -> None:
        """Send an event to all clients; drop those that do not read."""
        for writer, conversation in list(self._clients.items()):
            if said := conversation.event(message):
                try:
                    if writer.transport.get_write_buffer_size() > MAX_WAITING:
                        writer.transport.abort()
                    elif not writer.transport.is_closing():
                        writer.write(said)
                except (OSError, RuntimeError):  # RuntimeError: uvloop, if the client has hung up
                    writer.transport.abort()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._file is not None:
            self._file.close()
        for writer in self._clients:
            _hang_up(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversation = self._converse()
        if len(self._clients) >= MAX_CLIENTS:
            self._make_room()
        self._clients[writer], self._asked[writer] = conversation, 0
        try:
            await _say(writer, conversation.begin())
            while data := await reader.read(4096):
                if writer in self._asked:
                    self._asked[writer] = next(self._count)
                async for reply in conversation.replies(data):
                    await _say(writer, reply)
                    async with self._turn:
                        await asyncio.sleep(TURN_SECONDS)
        except CommandError as error:
            with contextlib.suppress(OSError, TimeoutError):
                await _say(writer, conversation.drop(error))
        except (OSError, TimeoutError, RuntimeError, asyncio.CancelledError):
            # The client has hung up (uvloop: RuntimeError) or does not read its replies; or the
            # program ends: asyncio prints a traceback if the task of a stream is cancelled.
            pass
        finally:
            self._forget(writer)

    def _make_room(self) -> None:
        """Drop the client that has been silent for longest: an operator who cancels must get in.

        Clients that have never asked anything go first.
        """
        silent = min(self._clients, key=self._asked.__getitem__)
        gone = CommandError(f"{MAX_CLIENTS} clients are connected, and another one has come")
        if not silent.transport.is_closing():
            silent.write(self._clients[silent].drop(gone))
        self._forget(silent)

    def _forget(self, writer: asyncio.StreamWriter) -> None:
        self._clients.pop(writer, None)
        self._asked.pop(writer, None)
        _hang_up(writer)


def _hang_up(writer: asyncio.StreamWriter) -> None:
    """Close the connection; discard what the client has not read yet."""
    if writer.transport.get_write_buffer_size():
        writer.transport.abort()
    else:
        writer.close()


async def _say(writer: asyncio.StreamWriter, said: bytes) -> None:
    writer.write(said)
    async with asyncio.timeout(SEND_SECONDS):
        await writer.drain()


def parse_path(text: str, option: str = "--qmp") -> str:
    """Return the path of `unix:PATH`, with or without QEMU's server flags. Raises UsageError."""
    path = text.removeprefix("unix:").removesuffix(",server=on,wait=off").removesuffix(",server")
    if not text.startswith("unix:") or not path:
        raise UsageError(f"{option} {text!r} is not understood: write unix:PATH")
    return path
