"""The lookout: a process that looks for the writers of a guest while it moves.

Started by file.py, isolated (see isolated.py), with the arguments FD PID: the guest, and the
process that moves it, which is no writer. It reads a line of JSON for each look, [number, what,
stopped]:

    what     "all", or "new": see Census.look and look_at_new
    stopped  the processes that stand still, for "new"

and answers each with [number, writers, seconds of a whole look, seconds of one at what is new],
a writer being [pid, born, name]; the number is that of the question. A question that comes while
another one is being looked into ends that look: nobody waits for its answer any more.

It is a process of its own since a look is thousands of short system calls. In a thread of the
source each of them would wait for the interpreter's lock, 5 ms at worst, just when the source is
busy with the last round; and a look at a process that hangs in the kernel would hang with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import sys
from collections.abc import Iterable

from migrate.errors import MigrationError
from migrate.guests import isolated
from migrate.guests.writers import Census, Writer

PATIENCE = 30.0
LINE_BYTES = 16 << 20


class Lookout:
    """The source's end. One question at a time; one that is cancelled is over.

    seconds, new_seconds -- what a whole look takes, and one at what is new, as far as is known
    """

    def __init__(self, fd: int, seconds: float = 0.0, new_seconds: float = 0.0) -> None:
        self.seconds, self.new_seconds = seconds, new_seconds
        self._fd = fd
        self._number = 0
        self._process: asyncio.subprocess.Process | None = None

    async def open(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *isolated.command("migrate.guests.lookout", str(self._fd), str(os.getpid())),
            env=isolated.environment(), pass_fds=[self._fd], limit=LINE_BYTES,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    async def look(self) -> list[Writer]:
        """All writers there are. Raises MigrationError where that is not to be found out."""
        return await self._ask("all", ())

    async def look_at_new(self, stopped: Iterable[int]) -> list[Writer]:
        """The writers, by a short look: see Census.look_at_new. Raises MigrationError."""
        return await self._ask("new", stopped)

    async def _ask(self, what: str, stopped: Iterable[int]) -> list[Writer]:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._number += 1
        with contextlib.suppress(OSError, RuntimeError):  # the answer that does not come says so
            question = json.dumps([self._number, what, list(stopped)])
            self._process.stdin.write(f"{question}\n".encode())
        try:
            async with asyncio.timeout(PATIENCE):
                while line := await self._process.stdout.readline():
                    number, writers, seconds, new_seconds = json.loads(line)
                    self.seconds = seconds or self.seconds  # not of the very first look
                    self.new_seconds = new_seconds or self.new_seconds
                    if number == self._number:
                        return [Writer(*writer) for writer in writers]
        except TimeoutError:
            raise MigrationError(
                f"who writes the guest could not be looked at in {PATIENCE:g} s: a process hangs "
                "in the kernel"
            ) from None
        raise MigrationError("the process that looks for writers of the guest has died")

    async def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._process.wait()
                return
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


def _asked() -> bool:
    return bool(select.select((0,), (), (), 0)[0])


def _own(inherited: int) -> int:
    """The guest as a description of our own: a lock that is held with the source's ends with it."""
    try:
        own = os.open(f"/proc/self/fd/{inherited}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return inherited
    os.close(inherited)
    return own


def main() -> None:
    census = Census(_own(int(sys.argv[1])), but=int(sys.argv[2]))
    # Unbuffered: what is read of a line here is not there for `_asked`, so lines come one by one.
    buffer = b""
    while data := os.read(0, 1 << 20):
        buffer += data
        *lines, buffer = buffer.split(b"\n")
        for line in lines[-1:]:
            number, what, stopped = json.loads(line)
            found = census.look(_asked) if what == "all" else census.look_at_new(set(stopped))
            writers = [[one.pid, one.born, one.name] for one in found]
            answer = json.dumps([number, writers, census.seconds, census.new_seconds])
            sys.stdout.write(f"{answer}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):
        main()
    os._exit(0)  # without another attempt to write what could not be written
