"""The guard: a process that slows writers, and lets them go on if the source dies meanwhile.

Started by file.py, isolated (see isolated.py), with the arguments [--resume-cmd CMD] PID:BORN...,
each a process and its start time. It reads one letter at a time:

    p   the writers are (about to be) stopped   r   they run again
    g   they were given up: never resume them   (end of file: the source is gone)
    t   and a byte: so much percent of their time is taken from them while they run (see duty.py)
    a   and 12 bytes (number and start time, see ADDED): one more writer

and answers k; to p, t and a with a byte more for each PID, for a only for the new one: what was
found of it (see Found). Who stood still already was stopped by somebody else, who alone may let it
go on. The guard goes on with its part only after it has answered: when p is answered, no SIGCONT of
a duty cycle comes any more, so whoever stops the writer after that has stopped it.

A writer that somebody else stops just while it stands still here goes on with the next run: the
kernel does not tell one stop from two.
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
from enum import IntEnum

from migrate.errors import MigrationError
from migrate.guests.duty import RUN_SECONDS, stopped_seconds
from migrate.guests.process import STOPPED, Process, state
from migrate.output import install, say

ADDED = struct.Struct(">IQ")


class Found(IntEnum):
    """What the guard finds of a writer."""

    RUNS = 0
    ASLEEP = 1
    """Somebody else has stopped it."""
    ENDED = 2
    FORBIDDEN = 3
    """It may not be stopped."""


class Writers:
    """The processes that write the guest, and which of them stand still because of us."""

    def __init__(self) -> None:
        self._handles: dict[int, Process | None] = {}
        self._stopped: list[int] = []

    @property
    def pids(self) -> list[int]:
        return list(self._handles)

    def add(self, pid: int, born: str) -> None:
        self._handles[pid] = None
        with contextlib.suppress(ProcessLookupError, MigrationError):
            self._handles[pid] = Process(pid, born)

    def find(self, pid: int) -> Found:
        try:
            self._signal(pid, 0)
        except ProcessLookupError:
            return Found.ENDED
        except OSError:
            return Found.FORBIDDEN
        asleep = pid not in self._stopped and state(pid) in STOPPED
        return Found.ASLEEP if asleep else Found.RUNS

    def asleep(self) -> set[int]:
        """Those that somebody else has stopped."""
        return {pid for pid in self._handles if self.find(pid) is Found.ASLEEP}

    def stop(self) -> None:
        """For a while: those that run."""
        asleep = self.asleep()
        for pid in self._handles:
            if pid not in asleep:
                with contextlib.suppress(OSError):
                    self._signal(pid, signal.SIGSTOP)
                    self._stopped.append(pid)

    def let_go(self) -> None:
        """Undoes `stop`."""
        while self._stopped:
            with contextlib.suppress(OSError):
                self._signal(self._stopped.pop(), signal.SIGCONT)

    def forget(self) -> None:
        """Those that `stop` has stopped stay so: somebody else will let them go on."""
        self._stopped.clear()

    def _signal(self, pid: int, number: int) -> None:
        handle = self._handles[pid]
        if handle is None:
            raise ProcessLookupError
        handle.signal(number)

    def resume(self, asleep: set[int]) -> None:
        for pid in self._handles:
            if pid in asleep:
                continue
            try:
                self._signal(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue
            except OSError as error:
                say(f"cannot resume process {pid}: {error.strerror}")


class Guard:
    """One letter after the other; between them, the duty cycle."""

    def __init__(self, writers: Writers, command: str) -> None:
        self._writers = writers
        self._command = command
        self._state = b"r"
        self._percent = 0
        self._asleep: set[int] = set()

    def run(self) -> None:
        self._answer()
        while letter := self._next_letter():
            self._obey(letter)
        self._writers.let_go()
        if self._state == b"p":
            self._writers.resume(self._asleep)
            if self._command:
                subprocess.run(self._command, shell=True, check=False)

    def _next_letter(self) -> bytes:
        """b"" when the source is gone. Until then the writer runs, and stands still, in turn."""
        run_until, stop_until = time.monotonic() + RUN_SECONDS, 0.0
        while self._percent and self._state == b"r":
            until = stop_until or run_until
            ready, _, _ = select.select((0,), (), (), max(0.0, until - time.monotonic()))
            if ready:
                break
            now = time.monotonic()
            if stop_until:
                self._writers.let_go()
                run_until, stop_until = now + RUN_SECONDS, 0.0
            else:
                self._writers.stop()
                stop_until = now + stopped_seconds(self._percent)
        return os.read(0, 1)

    def _obey(self, letter: bytes) -> None:
        if letter == b"t":
            self._percent = min(ord(os.read(0, 1) or b"\0"), 99)
            self._writers.let_go()
            self._answer(bytes(map(self._writers.find, self._writers.pids)))
        elif letter == b"a":
            self._answer(bytes([self._add()]))
        elif letter == b"p":
            if self._state == b"r":
                self._asleep = self._writers.asleep()
                # Who stands still in the cycle is about to be stopped: it need not run before.
                self._writers.forget()
            self._percent = 0
            self._state = letter
            self._answer(bytes(map(self._known, self._writers.pids)))
        else:
            self._writers.let_go()
            self._state = letter
            self._answer()

    def _add(self) -> Found:
        words = b""
        while len(words) < ADDED.size and (more := os.read(0, ADDED.size - len(words))):
            words += more
        if len(words) < ADDED.size:
            return Found.ENDED  # the source has died in the middle of the word
        if self._state == b"r":
            self._writers.let_go()  # the next turn of the duty cycle has all of them
        pid, born = ADDED.unpack(words)
        self._writers.add(pid, str(born))
        found = self._writers.find(pid)
        self._asleep.discard(pid)
        if found is Found.ASLEEP:
            self._asleep.add(pid)
        return found

    def _known(self, pid: int) -> Found:
        """In a pause: which were asleep before it."""
        if pid in self._asleep:
            return Found.ASLEEP
        found = self._writers.find(pid)
        return Found.RUNS if found is Found.ASLEEP else found

    def _answer(self, said: bytes = b"") -> None:
        with contextlib.suppress(OSError):  # whoever asked may have died since
            os.write(1, b"k" + said)


def main() -> None:
    arguments = sys.argv[1:]
    command = ""
    if arguments[:1] == ["--resume-cmd"]:
        command = arguments[1]
        arguments = arguments[2:]
    writers = Writers()
    for argument in arguments:
        pid, _, born = argument.partition(":")
        writers.add(int(pid), born)
    Guard(writers, command).run()


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    install()
    main()
