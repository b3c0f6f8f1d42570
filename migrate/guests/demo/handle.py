"""A handle on a demo guest: its process and its shared memory (see layout.py)."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import subprocess
from typing import Any

from migrate.errors import MigrationError, UsageError
from migrate.files.trust import is_trusted
from migrate.guests.demo.layout import (
    CONTROL_BYTES,
    Command,
    DemoShape,
    Owner,
    State,
    Word,
    shape_words,
)
from migrate.guests.demo.shared_memory import (
    MEMORY_NAME,
    check_fits,
    lay_out,
    map_memory,
    memory_of,
    no_memory,
    shape_of,
)
from migrate.memory._memory import first_wrong
from migrate.memory.memory import Memory, private_buffer
from migrate.runtime import helper_process
from migrate.runtime.processes import Process

# Another user's guest is checked in pieces of this size.
CHECK_BYTES = 1 << 20
# Seconds for the guest to obey a command.
ANSWER_SECONDS = 10.0
# Between two looks at its state, in seconds: the first pause, and the longest.
POLL_SECONDS = (0.0002, 0.01)

logger = logging.getLogger(__name__)


class DemoProcess:
    """A handle on a demo guest. Takes over `fd`, its memory, and `process`.

    new -- we have just started the process: it ends if there can be no handle on it

    Raises UsageError if `fd` is not a demo guest's memory, or cannot be mapped; `fd` and
    `process` are closed then.
    """

    def __init__(self, fd: int, process: Process, *, new: bool = False) -> None:
        self.fd = fd
        self._process = process
        self.pid, self.start_time = process.pid, process.start_time
        try:
            self.shape = shape_of(fd, f"process {process.pid} is not a demo guest")
            self._map = map_memory(fd, self.shape)
        except BaseException:
            if new:
                self.kill()
            os.close(fd)
            process.close()
            raise
        whole = memoryview(self._map)
        self._words = whole[:CONTROL_BYTES].cast("Q")
        start = self.shape.memory_offset
        self.marks = whole[CONTROL_BYTES : CONTROL_BYTES + self.shape.marks]
        self.memory = whole[start : start + self.shape.padded]

    @classmethod
    def create(cls, shape: DemoShape, *, paused: bool) -> DemoProcess:
        """Start a demo guest. Raises UsageError.

        paused -- it waits for its memory, and is locked; else it fills its memory and runs
        """
        check_fits(shape)
        try:
            fd = os.memfd_create(MEMORY_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise UsageError(
                f"a demo guest needs memfd_create(2), which cannot be had here: {error.strerror}"
            ) from None
        own = -1
        try:
            try:
                lay_out(fd, shape, paused=paused)
            except OSError as error:
                raise no_memory(shape, error) from None
            # Locked before the process could find the lock free; on a description of our own,
            # which the process does not inherit.
            own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
            if paused:
                fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            process = Process(_spawn(fd, [] if paused else ["--fill"]))
        except BaseException as error:
            if own >= 0:
                os.close(own)
            if isinstance(error, ProcessLookupError):
                raise UsageError("a demo guest ended as soon as it was started") from None
            raise
        finally:
            os.close(fd)
        logger.debug("started a demo guest of %d bytes: process %d", shape.size, process.pid)
        return cls(own, process, new=True)

    @classmethod
    def attach(cls, pid: int, start_time: str = "") -> DemoProcess:
        """Return a handle on the running demo guest of a process. Raises UsageError.

        start_time -- of that process, if it is known: another one may have its number now
        """
        try:
            return cls.of(Process(pid, start_time))
        except ProcessLookupError as error:
            raise UsageError(f"no demo guest in process {pid}: {error.strerror}") from None

    @classmethod
    def of(cls, process: Process) -> DemoProcess:
        """Return a handle on the demo guest of `process`, which it takes over.

        Raises UsageError.
        """
        try:
            fd = memory_of(process)
        except BaseException:
            process.close()
            raise
        return cls(fd, process)

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> DemoProcess:
        """Return a handle on the process that a journal names: see `facts`.

        Raises MigrationError if it has ended.
        """
        pid, start_time = int(facts["pid"]), str(facts["started"])
        try:
            if not start_time:
                raise ProcessLookupError
            process = Process(pid, start_time)
        except ProcessLookupError:
            raise MigrationError(f"the demo guest in process {pid} has ended") from None
        return cls.of(process)

    def facts(self) -> dict[str, Any]:
        """Return what a journal keeps of the guest."""
        return {"kind": "demo", "pid": self.pid, "started": self.start_time}

    def lock(self) -> None:
        """Take the right to pause the guest. Raises UsageError if another program has it."""
        own = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(own)
            raise UsageError(
                f"the demo guest in process {self.pid} is being moved by another program"
            ) from None
        os.close(self.fd)
        self.fd = own

    # -- the control block

    @property
    def state(self) -> int:
        """A State, unless the process writes nonsense."""
        return int(self._words[Word.STATE])

    @property
    def owner(self) -> int:
        """An Owner, unless the process writes nonsense."""
        return int(self._words[Word.OWNER])

    @owner.setter
    def owner(self, owner: Owner) -> None:
        self._words[Word.OWNER] = owner

    @property
    def throttle(self) -> int:
        """The percentage of its time that the guest loses."""
        return int(self._words[Word.THROTTLE])

    @throttle.setter
    def throttle(self, percent: int) -> None:
        self._words[Word.THROTTLE] = percent

    @property
    def position(self) -> tuple[int, int]:
        """How far the guest has counted: sweeps done, index of the next increment."""
        return self._words[Word.SWEEP], self._words[Word.INDEX]

    def set_load(self, shape: DemoShape, sweep: int, index: int) -> None:
        """Have the paused guest count as `shape` says, from a position on."""
        shape_words(self._words)[:] = shape.pack()
        self._words[Word.SWEEP], self._words[Word.INDEX] = sweep, index

    def command(self, command: Command) -> None:
        """Tell the guest what to do."""
        self._words[Word.COMMAND] = command

    async def run(self) -> None:
        """Let the guest run, and wait until it does. Raises MigrationError."""
        await self._change(Command.RUN, State.RUNNING)

    async def pause(self) -> None:
        """Stop the guest, and wait until it has stopped. Raises MigrationError."""
        await self._change(Command.PAUSE, State.PAUSED)

    async def _change(self, command: Command, state: State) -> None:
        self.command(command)
        loop = asyncio.get_running_loop()
        end = loop.time() + ANSWER_SECONDS
        pause, longest = POLL_SECONDS
        while self.state != state:
            if loop.time() > end or not self.alive():
                raise MigrationError(f"the demo guest (process {self.pid}) does not answer")
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, longest)

    # -- the process and its memory

    def alive(self) -> bool:
        """Return whether the process has not ended."""
        return not self._process.ended()

    def kill(self) -> None:
        """End the process, never a later one with its number."""
        with contextlib.suppress(ProcessLookupError):
            self._process.signal(signal.SIGKILL)

    def content(self) -> Memory:
        """Return the guest memory to read, good until `lock` replaces the descriptor.

        Reading holes through the mapping would fill them: the sparse guest of another user, who is
        not trusted, could exhaust the machine's memory. So that guest is read from its file.
        """
        shape = self.shape
        if is_trusted(os.fstat(self.fd).st_uid):
            return Memory(shape.size, self.memory)
        return Memory(shape.size, fd=self.fd, base=shape.memory_offset)

    def first_wrong(self) -> int:
        """Check every byte of the paused guest. Return the offset of the first wrong one, or -1."""
        shape, content = self.shape, self.content()
        load = (shape.hot, shape.stride, shape.random, *self.position)
        if content.view is not None:
            return first_wrong(self.memory[: shape.size], *load)
        buffer = private_buffer(CHECK_BYTES)
        for base in range(0, shape.size, CHECK_BYTES):
            part = buffer[: content.read(base, buffer)]
            if (wrong := first_wrong(part, *load, base, shape.size)) >= 0:
                return wrong
        return -1

    def close(self) -> None:
        """Close the handle, and with it the lock. The guest itself continues."""
        for view in (self._words, self.marks, self.memory):
            view.release()
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self.fd)
        self._process.close()


def _spawn(fd: int, arguments: list[str]) -> int:
    """Start a process that counts in the memory `fd`, and return its number."""
    process = subprocess.Popen(
        helper_process.command("migrate.guests.demo.process", str(fd), *arguments),
        env=helper_process.environment(), pass_fds=[fd], start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    process.returncode = 0  # it is to outlive this program: Popen must not warn of that
    return process.pid
