"""The writer watch: a process that searches for the writers of a guest while the guest moves.

WriterWatch is the source's end; `main` is the process. FileGuest starts it, isolated (see
helper_process.py), with the arguments FD PID: the guest, and the process that moves the guest,
which is not a writer. Each request is a line of JSON, [number, what, stopped]:

    what     "all" or "new": see WriterSearch.search and search_new
    stopped  for "new", the processes that are stopped

The answer is [number, writers, seconds of a whole search, seconds of one for what is new, processes
that no search had the time for]. A writer is [pid, start_time, name]; the number is that of the
request. A new request ends the search for the one before: its answer is not wanted any more.

A search is thousands of short system calls. In a thread of the source each of them would wait for
the interpreter's lock, up to 5 ms, just when the source is busy with the last round. And a search
that hangs, since a process of root or of the guest's owner hangs in the kernel, would hang the
source. At a process of another user, no search hangs for long: see WriterSearch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import sys
from collections.abc import Iterable

from migrate.errors import MigrationError
from migrate.guests.writer_search import Writer, WriterSearch
from migrate.runtime import helper_process

PATIENCE = 30.0
LINE_BYTES = 16 << 20


class WriterWatch:
    """The source's end of the writer watch. A search may be cancelled; the next one replaces it.

    seconds, new_seconds -- what a whole search takes, and one for what is new, as far as is known
    skipped              -- see WriterSearch
    """

    def __init__(
        self, process: asyncio.subprocess.Process, seconds: float, new_seconds: float
    ) -> None:
        self.seconds, self.new_seconds = seconds, new_seconds
        self.skipped = 0
        # What the last search has found.
        self.found: list[Writer] = []
        assert process.stdin
        assert process.stdout
        self._process, self._requests, self._answers = process, process.stdin, process.stdout
        self._number = 0

    @classmethod
    async def start(cls, fd: int, seconds: float = 0.0, new_seconds: float = 0.0) -> WriterWatch:
        """Start the process.

        fd                   -- the guest
        seconds, new_seconds -- what searches took before
        """
        process = await asyncio.create_subprocess_exec(
            *helper_process.command("migrate.guests.writer_watch", str(fd), str(os.getpid())),
            env=helper_process.environment(), pass_fds=[fd], limit=LINE_BYTES,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        return cls(process, seconds, new_seconds)

    async def search(self) -> list[Writer]:
        """Find all writers. Raises MigrationError if that is not possible."""
        return await self._ask("all", ())

    async def search_new(self, stopped: Iterable[int]) -> list[Writer]:
        """Find the writers by a short search: see WriterSearch. Raises MigrationError."""
        return await self._ask("new", stopped)

    async def _ask(self, what: str, stopped: Iterable[int]) -> list[Writer]:
        self._number += 1
        question = json.dumps([self._number, what, list(stopped)])
        with contextlib.suppress(OSError, RuntimeError):  # without an answer, we raise below
            self._requests.write(f"{question}\n".encode())
        try:
            async with asyncio.timeout(PATIENCE):
                while line := await self._answers.readline():
                    number, writers, seconds, new_seconds, self.skipped = json.loads(line)
                    self.seconds = seconds or self.seconds  # 0 for the very first search
                    self.new_seconds = new_seconds or self.new_seconds
                    if number == self._number:
                        self.found = [Writer(*writer) for writer in writers]
                        return self.found
        except TimeoutError:
            raise MigrationError(
                f"the search for writers of the guest did not end in {PATIENCE:g} s: a process "
                "hangs in the kernel"
            ) from None
        raise MigrationError("the process that looks for writers of the guest has died")

    async def close(self) -> None:
        """End the process."""
        self._requests.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await self._process.wait()
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


def _asked() -> bool:
    return bool(select.select((0,), (), (), 0)[0])


def _own(inherited: int) -> int:
    """Open the guest anew, and close the inherited descriptor.

    A lock of the source belongs to its open file: this process must not keep that file open.
    """
    try:
        own = os.open(f"/proc/self/fd/{inherited}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return inherited
    os.close(inherited)
    return own


def main() -> None:
    search = WriterSearch(_own(int(sys.argv[1])), but=int(sys.argv[2]))
    # Unbuffered, since `_asked` sees only what is left in the pipe. Of several requests only the
    # last one is wanted.
    buffer = b""
    while data := os.read(0, 1 << 20):
        buffer += data
        *lines, buffer = buffer.split(b"\n")
        for line in lines[-1:]:
            number, what, stopped = json.loads(line)
            found = search.search(_asked) if what == "all" else search.search_new(set(stopped))
            writers = [[one.pid, one.start_time, one.name] for one in found]
            seconds = search.seconds, search.new_seconds
            answer = json.dumps([number, writers, *seconds, search.skipped])
            sys.stdout.write(f"{answer}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    helper_process.ignore_signals()
    with contextlib.suppress(BrokenPipeError):
        main()
    os._exit(0)  # without another attempt to flush what could not be written
