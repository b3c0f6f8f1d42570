"""The monitor for people, on a socket or on standard input.

Standard input is read by a thread: it may be a file, and a terminal that is made non-blocking is so
for every program that has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

from migrate.monitor.human import Human
from migrate.monitor.node import Node, Refused

MAX_LINE_BYTES = 4096
# So many pieces of standard input may wait while a line is executed.
MAX_ASKED = 16


class Lines:
    """Cuts bytes into lines. Raises Refused where one grows over MAX_LINE_BYTES."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[str]:
        *whole, rest = (self._rest + data).split(b"\n")
        for line in whole:
            _check(line)
            yield line.decode(errors="replace")
        _check(rest)
        self._rest = rest


def _check(line: bytes) -> None:
    if len(line) > MAX_LINE_BYTES:
        raise Refused(f"a line has no more than {MAX_LINE_BYTES} bytes")


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
            yield _bytes(await self._human.run(line) + self._human.prompt)

    def event(self, message: dict[str, Any]) -> bytes:
        del message
        return b""

    def drop(self, error: Refused) -> bytes:
        return _bytes(f"{error}\n")


def _bytes(text: str) -> bytes:
    return text.replace("\n", "\r\n").encode()


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
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

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
        self._say(self._talk.begin())
        while data := await self._asked.get():
            self._room.release()
            try:
                async for reply in self._talk.replies(data):
                    self._say(reply)
            except Refused as error:
                self._say(self._talk.drop(error))
                break
        self.closed.set()

    def _say(self, said: bytes) -> None:
        with contextlib.suppress(OSError):
            sys.stdout.write(said.decode().replace("\r\n", "\n"))
            sys.stdout.flush()
