"""A memory file or block device that other processes map and write."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from migrate.errors import MigrationError, UsageError
from migrate.filesystem import KERNELS_OWN, file_system_of, kind_of
from migrate.guests.command import COMMAND_PATIENCE, run_command
from migrate.guests.guest import MemoryGuest
from migrate.guests.process import start_time, state
from migrate.guests.rights import Rights
from migrate.memory import Memory

STOP_PATIENCE = 5.0


class FileGuest(MemoryGuest):
    """`file:PATH`. Its writer is stopped by `pids` (SIGSTOP) or by commands; with neither, nobody
    stops it, and the digest at the end tells whether it wrote during the last round.
    """

    kind = "file"

    def __init__(
        self, path: str, pids: Sequence[int] = (), pause_cmd: str = "", resume_cmd: str = "",
        command_timeout: float = COMMAND_PATIENCE,
    ) -> None:  # fmt: skip
        if bool(pause_cmd) != bool(resume_cmd):
            raise UsageError(
                "--pause-cmd and --resume-cmd go together: a guest that is paused must be able "
                "to go on where the migration fails"
            )
        self._fd, size = _open(path)
        self.path = path
        self.description = os.path.basename(path)[:200]
        self.memory = Memory(size, fd=self._fd)
        self.pids = tuple(pids)
        self.pause_cmd = pause_cmd
        self.resume_cmd = resume_cmd
        self._command_timeout = command_timeout
        self.stoppable = bool(self.pids or pause_cmd)
        self.can_throttle = bool(self.pids)
        self._guard: asyncio.subprocess.Process | None = None
        self._asking = asyncio.Lock()
        self._asleep: set[int] = set()
        self._paused = False
        self._given_up = False
        for pid in self.pids:
            if not Path(f"/proc/{pid}").exists():
                raise UsageError(f"--pid {pid}: there is no such process")
            if pid == os.getpid():
                raise UsageError(f"--pid {pid}: that is migrate-src itself")

    async def started(self) -> None:
        """Starts the guard: it must be there before anything is stopped."""
        if not self.stoppable:
            return
        self._asleep = {pid for pid in self.pids if state(pid) in ("T", "t")}
        command = ["--resume-cmd", self.resume_cmd] if self.resume_cmd else []
        self._guard = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "migrate.guests.guard", *command, *map(str, self.pids),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        await self._guard_answers(0)

    async def _tell_guard(self, letter: bytes, more: int = 0) -> bytes:
        """Tells it, and returns so many bytes of its answer; also where it is cancelled, it has
        been told and has answered: the next answer is not this one."""
        return await asyncio.shield(self._ask_guard(letter, more))

    async def _ask_guard(self, letter: bytes, more: int) -> bytes:
        async with self._asking:
            if self._guard is None or self._guard.stdin is None:
                return bytes(more)
            # Where it has died (uvloop: RuntimeError), the answer that does not come says so.
            with contextlib.suppress(OSError, RuntimeError):
                self._guard.stdin.write(letter)
            answer = await self._guard_answers(more)
            if letter == b"p":
                self._asleep = {pid for pid, flag in zip(self.pids, answer, strict=True) if flag}
            return answer

    async def _guard_answers(self, more: int) -> bytes:
        assert self._guard is not None
        assert self._guard.stdout is not None
        answer = b""
        with contextlib.suppress(asyncio.IncompleteReadError, TimeoutError):
            async with asyncio.timeout(STOP_PATIENCE):
                answer = await self._guard.stdout.readexactly(1 + more)
        if answer[:1] != b"k":
            raise MigrationError("the guard process of the guest has died: nothing was stopped")
        return answer[1:]

    async def throttle(self, percent: int) -> None:
        """By SIGSTOP and SIGCONT, which the guard sends: it outlives us."""
        if self._paused:
            return  # which has ended the duty cycle; it stands still, perhaps for good
        try:
            await self._tell_guard(b"t" + bytes([percent]))
        except MigrationError:
            # It may have died while the writer stood still.
            self._let_go()
            raise

    def _let_go(self) -> None:
        for pid in self.pids:
            if pid not in self._asleep:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGCONT)

    async def pause(self) -> None:
        self._paused = True  # also where this is cancelled: the guard has been told
        try:
            await self._tell_guard(b"p", len(self.pids))
        except MigrationError:
            self._paused = False
            raise
        for pid in self.pids:
            try:
                os.kill(pid, signal.SIGSTOP)
            except ProcessLookupError:
                continue  # it has ended: it writes no more
            except OSError as error:
                raise MigrationError(f"cannot stop process {pid}: {error.strerror}") from None
        for pid in self.pids:
            await self._stopped(pid)
        if self.pause_cmd:
            await run_command(self.pause_cmd, "--pause-cmd", self._command_timeout)
        self.check()

    def check(self) -> None:
        """The file must still be the one we opened, under its name and as long as it was."""
        ours = os.fstat(self._fd)
        try:
            named = os.stat(self.path)
        except OSError:
            named = None
        if named is None or (named.st_dev, named.st_ino) != (ours.st_dev, ours.st_ino):
            raise MigrationError(
                f"guest file {self.path}: it was removed or replaced by another file meanwhile: "
                "move the new one"
            )
        size = os.lseek(self._fd, 0, os.SEEK_END)
        if size != self.memory.size:
            raise MigrationError(
                f"guest file {self.path}: it had {self.memory.size} bytes at the start and has "
                f"{size} now: a guest must keep its size while it moves"
            )

    async def _stopped(self, pid: int) -> None:
        """Waits until every thread of the process has stopped."""
        loop = asyncio.get_running_loop()
        end = loop.time() + STOP_PATIENCE
        while True:
            states = set()
            with contextlib.suppress(OSError):
                for task in os.listdir(f"/proc/{pid}/task"):
                    line = Path(f"/proc/{pid}/task/{task}/stat").read_text()
                    states.add(line.rpartition(")")[2].split()[0])
            if states <= set("TtZX"):
                return
            if loop.time() > end:
                raise MigrationError(f"process {pid} does not stop")
            await asyncio.sleep(0.0005)

    async def resume(self) -> None:
        if not self._paused or self._given_up:
            return
        self._paused = False
        async with self._asking:
            pass  # a pause that was cancelled may not have been answered yet
        self._let_go()
        if self.resume_cmd:
            await run_command(self.resume_cmd, "--resume-cmd", self._command_timeout)
        await self._tell_guard(b"r")

    def state(self) -> bytes:
        """Mode and owner of the file; of a device they are none of a file's."""
        here = os.fstat(self._fd)
        return Rights.of(here).pack() if stat.S_ISREG(here.st_mode) else b""

    async def give_up(self) -> None:
        await self._tell_guard(b"g")
        self._given_up = True

    async def take_back(self) -> None:
        self._given_up = False
        await self._tell_guard(b"p", len(self.pids))

    async def release(self) -> None:
        """The writer stays stopped: it would write to a copy that is no longer the guest."""

    def facts(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "path": os.path.abspath(self.path),
            "pids": [[pid, start_time(pid)] for pid in self.pids],
            "resume_cmd": self.resume_cmd,
        }

    @classmethod
    def reopen(cls, facts: dict[str, Any]) -> FileGuest:
        """A guest that an earlier program had given up: its writer is stopped, and has no guard."""
        pids = [pid for pid, started in facts["pids"] if started and start_time(pid) == started]
        command = facts["resume_cmd"]
        guest = cls(facts["path"], pids, "true" if command else "", command)
        guest._paused = guest._given_up = True
        return guest

    async def close(self) -> None:
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_PATIENCE):
                    await self._guard.wait()
        os.close(self._fd)


def _open(path: str) -> tuple[int, int]:
    """A descriptor of the guest's file, and its size. Raises UsageError."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise UsageError(
                f"guest file {path}: it is neither a file nor a block device, but {kind_of(mode)}"
            )
        # O_NONBLOCK: should it be a FIFO by now, the open returns all the same.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"guest file {path}: {error.strerror}") from None
    try:
        system = file_system_of(fd)
        if system in KERNELS_OWN and stat.S_ISREG(mode):
            raise UsageError(
                f"guest file {path}: it is on {system}: such a file is made as it is read, and "
                "cannot be moved"
            )
        size = os.lseek(fd, 0, os.SEEK_END)
        if size == 0:
            raise UsageError(f"guest file {path}: it is empty, there is nothing to move")
    except OSError as error:
        os.close(fd)
        raise UsageError(f"guest file {path}: {error.strerror}") from None
    except UsageError:
        os.close(fd)
        raise
    return fd, size
