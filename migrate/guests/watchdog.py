"""The watchdog: a helper process that throttles writers, and resumes them if the source dies.

Started by writer_control.py with the arguments [--resume-cmd CMD] PID:START_TIME..., one for each
process that writes the guest. Its requests (see migrate.runtime.helper_process) are:

    p                      the writers are stopped, or about to be; ends the throttle
    r                      they run again
    g                      the guest was relinquished: never resume them
    t and one byte         throttle them by this percentage while they run
    a and ADDED            one more writer: its number and start time
    (end of file)          the source has ended: resume the writers that are stopped

The answers to p and t have one byte of Found for each writer, in the order of the arguments; the
answer to a has one for the new writer. A writer that another program had stopped before is left
alone: only that program may resume it.

The watchdog answers before it continues. Once p is acknowledged, no SIGCONT of the duty cycle is on
its way any more, so that a SIGSTOP sent after that lasts.

The kernel does not tell one stop from another: a writer that another program stops while it is
stopped here runs again with the next turn of the duty cycle.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import subprocess
import sys
import time
from enum import Enum, IntEnum

from migrate.errors import MigrationError
from migrate.guests.duty_cycle import RUN_SECONDS, stopped_seconds
from migrate.output import say
from migrate.output.streams import install
from migrate.runtime.helper_process import ACKNOWLEDGED, ignore_signals
from migrate.runtime.processes import STOPPED, Process, state

ADDED = struct.Struct(">IQ")


class Found(IntEnum):
    """What the watchdog finds out about a writer."""

    RUNS = 0
    # Another program has stopped it.
    STOPPED_BEFORE = 1
    ENDED = 2
    # We may not stop it.
    FORBIDDEN = 3


class Writers:
    """The processes that write the guest, and which of them the duty cycle has stopped."""

    def __init__(self) -> None:
        # None: it has ended, or cannot be told from a later process with its number.
        self._handles: dict[int, Process | None] = {}
        self._stopped: list[int] = []

    @property
    def pids(self) -> list[int]:
        return list(self._handles)

    def add(self, pid: int, start_time: str) -> None:
        """Add a writer, also one that has ended: its answers keep their place."""
        self._handles[pid] = None
        with contextlib.suppress(ProcessLookupError, MigrationError):
            self._handles[pid] = Process(pid, start_time)

    def find(self, pid: int) -> Found:
        """Return what a writer does now."""
        try:
            self._signal(pid, 0)
        except ProcessLookupError:
            return Found.ENDED
        except OSError:
            return Found.FORBIDDEN
        stopped = pid not in self._stopped and state(pid) in STOPPED
        return Found.STOPPED_BEFORE if stopped else Found.RUNS

    def stopped_before(self) -> set[int]:
        """Return the writers that another program has stopped."""
        return {pid for pid in self._handles if self.find(pid) is Found.STOPPED_BEFORE}

    def stop(self) -> None:
        """Stop the writers that run, for a turn of the duty cycle."""
        before = self.stopped_before()
        for pid in self._handles:
            if pid not in before:
                with contextlib.suppress(OSError):
                    self._signal(pid, signal.SIGSTOP)
                    self._stopped.append(pid)

    def end_stop(self) -> None:
        """Undo `stop`."""
        while self._stopped:
            with contextlib.suppress(OSError):
                self._signal(self._stopped.pop(), signal.SIGCONT)

    def keep_stopped(self) -> None:
        """Leave those stopped that `stop` has stopped: the source resumes them."""
        self._stopped.clear()

    def resume(self, excluded: set[int]) -> None:
        """Let all writers run that are not `excluded`."""
        for pid in self._handles:
            if pid in excluded:
                continue
            try:
                self._signal(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue
            except OSError as error:
                say(f"cannot resume process {pid}: {error.strerror}")

    def _signal(self, pid: int, number: int) -> None:
        handle = self._handles[pid]
        if handle is None:
            raise ProcessLookupError
        handle.signal(number)


class State(Enum):
    """What the source has said of the guest."""

    RUNNING = b"r"
    PAUSED = b"p"
    RELINQUISHED = b"g"


class Watchdog:
    """Serves one request after the other; between them, the duty cycle runs."""

    def __init__(self, writers: Writers, resume_command: str) -> None:
        self._writers = writers
        self._resume_command = resume_command
        self._state = State.RUNNING
        self._percent = 0
        # The writers that were stopped before the pause.
        self._stopped_before: set[int] = set()

    def run(self) -> None:
        """Serve the source until it has ended; then resume the writers if they are stopped."""
        self._answer()
        while letter := self._next_letter():
            self._serve(letter)
        self._writers.end_stop()
        if self._state is State.PAUSED:
            self._writers.resume(self._stopped_before)
            if self._resume_command:
                subprocess.run(self._resume_command, shell=True, check=False)

    def _next_letter(self) -> bytes:
        """Run the duty cycle until a request comes. Return its letter; b"" at the end of file."""
        run_until, stop_until = time.monotonic() + RUN_SECONDS, 0.0
        while self._percent and self._state is State.RUNNING:
            until = stop_until or run_until
            ready, _, _ = select.select((0,), (), (), max(0.0, until - time.monotonic()))
            if ready:
                break
            now = time.monotonic()
            if stop_until:
                self._writers.end_stop()
                run_until, stop_until = now + RUN_SECONDS, 0.0
            else:
                self._writers.stop()
                stop_until = now + stopped_seconds(self._percent)
        return os.read(0, 1)

    def _serve(self, letter: bytes) -> None:
        if letter == b"t":
            self._percent = min(ord(os.read(0, 1) or b"\0"), 99)
            self._writers.end_stop()
            self._answer(bytes(map(self._writers.find, self._writers.pids)))
        elif letter == b"a":
            self._answer(bytes([self._add()]))
        elif letter == State.PAUSED.value:
            if self._state is State.RUNNING:
                self._stopped_before = self._writers.stopped_before()
                # A writer that the duty cycle has stopped need not run before the pause stops it.
                self._writers.keep_stopped()
            self._percent = 0
            self._state = State.PAUSED
            self._answer(bytes(map(self._found_before_pause, self._writers.pids)))
        else:
            self._writers.end_stop()
            self._state = State(letter)
            self._answer()

    def _add(self) -> Found:
        """Read a writer, add it, and return what it does."""
        data = b""
        while len(data) < ADDED.size and (more := os.read(0, ADDED.size - len(data))):
            data += more
        if len(data) < ADDED.size:
            return Found.ENDED  # the source has died in the middle of the request
        if self._state is State.RUNNING:
            self._writers.end_stop()  # the next turn of the duty cycle stops the new one too
        pid, start_time = ADDED.unpack(data)
        self._writers.add(pid, str(start_time))
        found = self._writers.find(pid)
        self._stopped_before.discard(pid)
        if found is Found.STOPPED_BEFORE:
            self._stopped_before.add(pid)
        return found

    def _found_before_pause(self, pid: int) -> Found:
        """Return what a writer did before the pause: now all of them may be stopped."""
        if pid in self._stopped_before:
            return Found.STOPPED_BEFORE
        found = self._writers.find(pid)
        return Found.RUNS if found is Found.STOPPED_BEFORE else found

    def _answer(self, answer: bytes = b"") -> None:
        with contextlib.suppress(OSError):  # the source may have died since
            os.write(1, ACKNOWLEDGED + answer)


def main() -> None:
    """Run the watchdog of the processes that the command line names."""
    arguments = sys.argv[1:]
    resume_command = ""
    if arguments[:1] == ["--resume-cmd"]:
        resume_command = arguments[1]
        arguments = arguments[2:]
    writers = Writers()
    for argument in arguments:
        pid, _, start_time = argument.partition(":")
        writers.add(int(pid), start_time)
    Watchdog(writers, resume_command).run()


if __name__ == "__main__":
    ignore_signals()
    install()
    main()
