"""The sockets on which a program is asked: many clients each, and a person or a machine behind.

A conversation says what is talked (qmp.Conversation, terminal.Talk): bytes in, bytes out.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from migrate.errors import UsageError
from migrate.monitor.node import Refused
from migrate.socket_file import SocketFile

MAX_CLIENTS = 32
SEND_PATIENCE = 10.0
# What may wait for a client that does not read its events: more, and it is dropped.
MAX_WAITING = 1 << 20
# Requests are served no faster than this: one client that asked without pause took the loop from
# the migration, and made a pause of 8 ms one of 5 s.
TURN_SECONDS = 0.002


class Conversation(Protocol):
    """With one client. `replies` and `drop` are for what it sent; `event` for what happens."""

    def begin(self) -> bytes: ...

    def replies(self, data: bytes) -> AsyncIterator[bytes]: ...

    def event(self, message: dict[str, Any]) -> bytes: ...

    def drop(self, error: Refused) -> bytes: ...


class Server:
    """Serves one socket until it is closed.

    converse -- begins a conversation with a client
    """

    def __init__(self, path: str, converse: Callable[[], Conversation], option: str) -> None:
        self._path = path
        self._converse = converse
        self._option = option
        self._turn = asyncio.Lock()
        self._clients: dict[asyncio.StreamWriter, Conversation] = {}
        self._asked: dict[asyncio.StreamWriter, int] = {}
        """When each has asked last, counted in requests of all; 0: never."""
        self._count = itertools.count(1)
        self._server: asyncio.Server | None = None
        self._file: SocketFile | None = None

    async def open(self) -> None:
        """Raises ConnectError where another program has the path, UsageError where it cannot be."""
        self._file = SocketFile(self._path, self._option)
        self._server = await asyncio.start_unix_server(self._serve, sock=self._file.socket)

    def tell(self, message: dict[str, Any]) -> None:
        """Sends an event to all clients; one that does not read is dropped."""
        for writer, conversation in list(self._clients.items()):
            if said := conversation.event(message):
                try:
                    if writer.transport.get_write_buffer_size() > MAX_WAITING:
                        writer.transport.abort()
                    elif not writer.transport.is_closing():
                        writer.write(said)
                except (OSError, RuntimeError):  # uvloop's for one that has hung up
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
                    async with self._turn:  # all clients together: a migration goes on beside them
                        await asyncio.sleep(TURN_SECONDS)
        except Refused as error:
            with contextlib.suppress(OSError, TimeoutError):
                await _say(writer, conversation.drop(error))
        except (OSError, TimeoutError, RuntimeError, asyncio.CancelledError):
            # It hung up, or does not read what it asked for (uvloop: RuntimeError); or the program
            # ends, and asyncio's streams make a traceback of a task that was cancelled.
            pass
        finally:
            self._forget(writer)

    def _make_room(self) -> None:
        """Drops who has been silent the longest, before all others who never asked anything: an
        operator who wants to cancel must come in."""
        silent = min(self._clients, key=self._asked.__getitem__)
        gone = Refused(f"{MAX_CLIENTS} clients are connected, and another one came")
        if not silent.transport.is_closing():
            silent.write(self._clients[silent].drop(gone))
        self._forget(silent)

    def _forget(self, writer: asyncio.StreamWriter) -> None:
        self._clients.pop(writer, None)
        self._asked.pop(writer, None)
        _hang_up(writer)


def _hang_up(writer: asyncio.StreamWriter) -> None:
    """What its client has not made room for by now is not sent any more."""
    if writer.transport.get_write_buffer_size():
        writer.transport.abort()
    else:
        writer.close()


async def _say(writer: asyncio.StreamWriter, said: bytes) -> None:
    writer.write(said)
    async with asyncio.timeout(SEND_PATIENCE):
        await writer.drain()


def parse_path(text: str, option: str = "--qmp") -> str:
    """The path of `unix:PATH`. Raises UsageError."""
    path = text.removeprefix("unix:").removesuffix(",server=on,wait=off").removesuffix(",server")
    if not text.startswith("unix:") or not path:
        raise UsageError(f"{option} {text!r} is not understood: write unix:PATH")
    return path
