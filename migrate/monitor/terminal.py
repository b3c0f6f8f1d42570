"""The monitor for people, on a socket or on standard input.

Standard input has a thread: it may be a file, and a terminal that is made non-blocking is so for
every program that has it. Standard output is that of migrate.output: a terminal that is stopped
(^S), or a pipe that nobody reads, holds up who types there, and no migration.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

from migrate.monitor.human import Human
from migrate.monitor.node import Node, Refused
from migrate.output import behind, say

MAX_LINE_BYTES = 4096
TOO_LONG = f"Error: a line has no more than {MAX_LINE_BYTES} bytes\n"
# So many pieces of standard input may wait while a line is executed.
MAX_ASKED = 16
# How often to look whether an answer was read.
READ_INTERVAL = 0.05


class Lines:
    """Cuts bytes into lines. One of more than MAX_LINE_BYTES is thrown away, and None instead."""

    def __init__(self) -> None:
        self._rest = b""
        self._too_long = False

    def feed(self, data: bytes) -> Iterator[str | None]:
        *whole, rest = (self._rest + data).split(b"\n")
        for line in whole:
            too_long = self._too_long or len(line) > MAX_LINE_BYTES
            self._too_long = False
            yield None if too_long else line.decode(errors="replace")
        self._too_long |= len(rest) > MAX_LINE_BYTES
        self._rest = b"" if self._too_long else rest


class Talk:
    """With one client of a socket (see server.Conversation). Lines end with CR LF, as QEMU's do."""

    def __init__(self, node: Node, version: str) -> None:
        self._human = Human(node)
        self._lines = Lines()
        self._greeting = f"xbmigrate {version} monitor - type 'help' for more information\n"

    def begin(self) -> bytes:
        return _bytes(self._greeting + self._human.prompt)

    async def replies(self, data: bytes) -> AsyncIterator[bytes]:
        for line in self._lines.feed(data):
            said = TOO_LONG if line is None else await self._human.run(line)
            yield _bytes(said + self._human.prompt)

    def event(self, message: dict[str, Any]) -> bytes:
        del message
        return b""

    def drop(self, error: Refused) -> bytes:
        return _bytes(f"{error}\n")


def _bytes(text: str) -> bytes:
    return text.replace("\n", "\r\n").encode(errors="backslashreplace")


class Terminal:
    """The monitor on standard input and output, as long as its context lasts.

    `closed` is set where nothing more will be asked: the end of standard input.
    """

    def __init__(self, node: Node, version: str) -> None:
        self._talk = Talk(node, version)
        self._asked: asyncio.Queue[bytes] = asyncio.Queue()
        self._room = threading.Semaphore(MAX_ASKED)
        self._task: asyncio.Task[None] | None = None
        self.closed = asyncio.Event()

    async def __aenter__(self) -> Terminal:
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(loop,), daemon=True).start()
        self._task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task})

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread of its own. os.read, not sys.stdin: a lock held at exit would be fatal."""
        while self._room.acquire():
            try:
                data = os.read(0, 4096)
            except OSError:
                data = b""
            try:
                loop.call_soon_threadsafe(self._asked.put_nowait, data)
            except RuntimeError:
                return  # the program has ended
            if not data:
                return

    async def _serve(self) -> None:
        try:
            await self._say(self._talk.begin())
            while data := await self._asked.get():
                self._room.release()
                async for reply in self._talk.replies(data):
                    await self._say(reply)
        except Exception as error:
            say(f"--monitor stdio goes no further: {error}")
        self.closed.set()  # not where it was cancelled

    async def _say(self, said: bytes) -> None:
        """Returns when it is read: no more is kept than one answer."""
        sys.stdout.write(said.decode().replace("\r\n", "\n"))
        sys.stdout.flush()
        while behind(sys.stdout):
            await asyncio.sleep(READ_INTERVAL)
