"""The guard: a process that slows a writer, and lets it go on if the source dies meanwhile.

Started by file.py, isolated (see isolated.py), with the arguments [--resume-cmd CMD] PID... It
reads one letter at a time:

    p   the writer is (about to be) stopped     r   it runs again
    g   it was given up: never resume it        (end of file: the source is gone)
    t   and a byte: so much percent of its time is taken from it while it runs (see duty.py)

and answers k; to p, a byte for each PID behind that: 1 where it stood still already, stopped by
somebody else, who alone may let it go on. The guard goes on with its part only after it has
answered: when p is answered, no SIGCONT of a duty cycle comes any more, so whoever stops the writer
after that has stopped it.

A writer that somebody else stops just while it stands still here goes on with the next run: the
kernel does not tell one stop from two.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

from migrate.guests.duty import RUN_SECONDS, stopped_seconds
from migrate.guests.process import state
from migrate.output import install, say

STOPPED = ("T", "t")


class Writers:
    """The processes that write the guest, and which of them stand still because of us."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._handles: dict[int, int] = {}  # a later process with the same number is none of ours
        self.pids = list(pids)
        self._stopped: list[int] = []
        for pid in self.pids:
            with contextlib.suppress(OSError):
                self._handles[pid] = os.pidfd_open(pid)

    def asleep(self) -> set[int]:
        """Those that somebody else has stopped."""
        return {pid for pid in self.pids if pid not in self._stopped and state(pid) in STOPPED}

    def stop(self) -> None:
        """For a while: those that run."""
        asleep = self.asleep()
        for pid in self.pids:
            if pid not in asleep and self._signal(pid, signal.SIGSTOP):
                self._stopped.append(pid)

    def let_go(self) -> None:
        """Undoes `stop`."""
        while self._stopped:
            self._signal(self._stopped.pop(), signal.SIGCONT)

    def forget(self) -> None:
        """Those that `stop` has stopped stay so: somebody else will let them go on."""
        self._stopped.clear()

    def _signal(self, pid: int, number: int) -> bool:
        try:
            signal.pidfd_send_signal(self._handles[pid], number)
        except (OSError, KeyError):
            return False  # it has ended, or is not ours to stop: the source will say so
        return True

    def resume(self, asleep: set[int]) -> None:
        for pid in self.pids:
            if pid in asleep:
                continue
            try:
                os.kill(pid, signal.SIGCONT)
            except OSError as error:
                say(f"cannot resume process {pid}: {error.strerror}")


class Guard:
    """One letter after the other; between them, the duty cycle."""

    def __init__(self, pids: list[int], command: str) -> None:
        self._writers = Writers(pids)
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
        elif letter == b"p":
            if self._state == b"r":
                self._asleep = self._writers.asleep()
                # Who stands still in the cycle is about to be stopped: it need not run before.
                self._writers.forget()
            self._percent = 0
            self._state = letter
            self._answer(bytes(pid in self._asleep for pid in self._writers.pids))
            return
        else:
            self._writers.let_go()
            self._state = letter
        self._answer()

    def _answer(self, said: bytes = b"") -> None:
        with contextlib.suppress(OSError):  # whoever asked may have died since
            os.write(1, b"k" + said)


def main() -> None:
    arguments = sys.argv[1:]
    command = ""
    if arguments[:1] == ["--resume-cmd"]:
        command = arguments[1]
        arguments = arguments[2:]
    Guard([int(text) for text in arguments], command).run()


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    install()
    main()
