"""A program that is measured while it runs.

CPU seconds are the kernel's own count (wait4). Memory is sampled every 20 ms from
/proc/PID/status of the program and all it has started: RssAnon + RssFile, that is, everything but
shared memory, which is where the guest is (a file in a tmpfs). A peak shorter than the
sampling interval can be missed.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from migrate.runtime.processes import start_time_of

SAMPLING_INTERVAL = 0.02


class ProgramError(Exception):
    """A program of the measurement did not do what it is needed for."""


@dataclass(frozen=True)
class Ended:
    """wall and cpu in seconds; memory: peak bytes beyond shared memory."""

    status: int
    wall: float
    cpu: float
    memory: int
    out: str
    err: str


class Measured:
    """A running program; as a context it leaves nothing of what it started behind.

    namespace -- the network namespace to run it in, "" for none
    """

    def __init__(self, command: Sequence[str], namespace: str = "") -> None:
        if namespace:
            command = ["ip", "netns", "exec", namespace, *command]
        self.command = command
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        self._err = tempfile.TemporaryFile()  # noqa: SIM115
        self._began = time.monotonic()
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err
        )
        self.pid = self.process.pid
        self.memory = 0
        self._family = {self.pid: start_time_of(self.pid)}
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def __enter__(self) -> Measured:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._sampler.join()
        for pid, started in self._family.items():
            if started and start_time_of(pid) == started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if self.process.returncode is None:
            self.process.wait()
        self._out.close()
        self._err.close()

    def wait(self, timeout: float) -> Ended:
        """Raises ProgramError where it has not ended after so many seconds."""
        descriptor = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            if not poll.poll(timeout * 1000):
                raise ProgramError(f"{self._name} has not ended after {timeout:.0f} s: {self.err}")
        finally:
            os.close(descriptor)
        wall = time.monotonic() - self._began
        self._stop.set()
        self._sampler.join()
        _, status, usage = os.wait4(self.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return Ended(
            self.process.returncode,
            wall, usage.ru_utime + usage.ru_stime, self.memory, self.out, self.err,
        )  # fmt: skip

    def expect(self, timeout: float) -> Ended:
        """Waits; raises ProgramError where it ends with another status than 0."""
        ended = self.wait(timeout)
        if ended.status != 0:
            raise ProgramError(f"{self._name} ended with status {ended.status}: {ended.err}")
        return ended

    def wait_for(self, pattern: str, timeout: float = 20) -> re.Match[str]:
        """Waits until it has written something to standard error that matches."""
        end = time.monotonic() + timeout
        while True:
            ended = self._ended()
            if found := re.search(pattern, self.err):
                return found
            if ended or time.monotonic() > end:
                raise ProgramError(f"{self._name} does not say {pattern!r}: {self.err}")
            time.sleep(0.01)

    @property
    def out(self) -> str:
        return _read(self._out.fileno())

    @property
    def err(self) -> str:
        return _read(self._err.fileno())

    @property
    def _name(self) -> str:
        return " ".join(os.path.basename(word) for word in self.command)

    def _ended(self) -> bool:
        """Whether it has ended; it stays to be waited for."""
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return ended is not None

    def _sample(self) -> None:
        while True:
            family = _family(self.pid)
            for pid in family:
                self._family.setdefault(pid, start_time_of(pid))
            self.memory = max(self.memory, sum(map(private_memory, family)))
            if self._stop.wait(SAMPLING_INTERVAL):
                return


def private_memory(pid: int) -> int:
    """Bytes resident in memory that are not shared memory, now; 0 for a process that is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(kib) for kib in re.findall(r"^Rss(?:Anon|File):\s+(\d+)", status, re.M)) * 1024


def _family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    family = [pid]
    for member in family:
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{member}/task").iterdir():
                family += map(int, (thread / "children").read_text().split())
    return family


def _read(descriptor: int) -> str:
    return os.pread(descriptor, 1 << 24, 0).decode(errors="replace")
