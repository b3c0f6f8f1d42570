"""The human monitor on a socket or on standard input.

A thread reads standard input: it may be a file, and O_NONBLOCK would affect every program that
shares a terminal. Standard output is written through migrate.output, so a terminal that is stopped
(^S), or a pipe without a reader, delays the monitor but not the migration.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

from migrate.monitor.human import HumanMonitor
from migrate.monitor.monitored import CommandError, MonitoredProgram
from migrate.output import say
from migrate.output.streams import behind

MAX_LINE_BYTES = 4096
TOO_LONG = f"Error: a line has no more than {MAX_LINE_BYTES} bytes\n"
# How many pieces of standard input may wait while a line is executed.
MAX_WAITING_PIECES = 16
# How often to check whether an answer has been read, in seconds.
CHECK_SECONDS = 0.05


class Lines:
    """Cuts bytes into lines. Gives None in place of a line of more than MAX_LINE_BYTES."""

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


class HumanConversation:
    """A conversation with one client (server.Conversation). Lines end with CR LF, as in QEMU."""

    def __init__(self, program: MonitoredProgram, version: str) -> None:
        self._human = HumanMonitor(program)
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

    def drop(self, error: CommandError) -> bytes:
        return _bytes(f"{error}\n")


def _bytes(text: str) -> bytes:
    return text.replace("\n", "\r\n").encode(errors="backslashreplace")


class Terminal:
    """The monitor on standard input and output, as long as its context lasts.

    `closed` is set at the end of standard input, when all its lines are answered.
    """

    def __init__(self, program: MonitoredProgram, version: str) -> None:
        self._talk = HumanConversation(program, version)
        self._asked: asyncio.Queue[bytes] = asyncio.Queue()
        self._room = threading.Semaphore(MAX_WAITING_PIECES)
        self._tasks: list[asyncio.Task[None]] = []
        self.closed = asyncio.Event()

    async def __aenter__(self) -> Terminal:
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(loop,), daemon=True).start()
        self._tasks.append(asyncio.create_task(self._serve()))
        return self

    async def __aexit__(self, *exception: object) -> None:
        for task in self._tasks:
            task.cancel()
            await asyncio.wait({task})

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read standard input, in a thread, up to its end.

        Not through sys.stdin: this thread would hold its lock at exit, and Python would abort.
        """
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
            say(f"--monitor stdio stops: {error}")
        self.closed.set()

    async def _say(self, said: bytes) -> None:
        """Print an answer, and wait until it is read, so that answers do not pile up."""
        sys.stdout.write(said.decode().replace("\r\n", "\n"))
        sys.stdout.flush()
        while behind(sys.stdout):
            await asyncio.sleep(CHECK_SECONDS)
