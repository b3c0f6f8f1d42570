"""Start the two programs as a user would, for the demo, the headline and the tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from migrate.errors import UsageError
from migrate.guests.demo.check import check
from migrate.guests.demo.handle import DemoProcess
from migrate.guests.demo.layout import Owner
from tests.processes import numbers, stat_of

BIN = Path(sys.executable).parent


def breaks_are_final(name: str, arguments: Sequence[str]) -> list[str]:
    """Return `arguments`, with --retry 0 unless they say otherwise: tests do not reconnect."""
    final = name != "migrate-ctl" and not {"--retry", "resolve"} & set(arguments)
    return [*arguments, *(["--retry", "0"] if final else [])]


_begun: list[Program] = []


@contextlib.contextmanager
def ended() -> Iterator[None]:
    """End the programs started within, so that a failed test does not disturb the next ones."""
    before = len(_begun)
    yield
    for program in _begun[before:]:
        program.end()
    del _begun[before:]


class Program:
    """A running migrate-src or migrate-dst; `out` and `err` are whole once it has ended.

    namespace -- the network namespace to run it in, "" for none
    environment -- what is other there than here
    stdin     -- a file with this to read from; None: what we read from ourselves
    stdout    -- a descriptor to print to; then `out` stays empty
    """

    def __init__(
        self, name: str, *arguments: str, show: bool = False, namespace: str = "",
        stdin: str | None = None, environment: dict[str, str] | None = None,
        stdout: int = subprocess.PIPE,
    ) -> None:  # fmt: skip
        entering = ["ip", "netns", "exec", namespace] if namespace else []
        with contextlib.ExitStack() as stack:
            given = None
            if stdin is not None:
                given = stack.enter_context(tempfile.TemporaryFile())
                given.write(stdin.encode())
                given.seek(0)
            self.process = subprocess.Popen(
                [*entering, str(BIN / name), *breaks_are_final(name, arguments)], stdin=given,
                env=os.environ | (environment or {}),
                stdout=stdout, stderr=None if show else subprocess.PIPE, text=True,
            )  # fmt: skip
        self.out = self.err = ""
        _begun.append(self)

    def end(self) -> None:
        """Kill the program, and each demo guest whose process it printed."""
        self.kill()
        with contextlib.suppress(ValueError, subprocess.TimeoutExpired):  # all of it was read
            self.wait(10)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        for pid in re.findall(r"process (\d+)", self.out + self.err):
            with contextlib.suppress(OSError):
                if b"guests.demo.process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(int(pid), signal.SIGKILL)

    def wait(self, timeout: float = 100) -> int:
        out, err = self.process.communicate(timeout=timeout)
        self.out += out or ""
        self.err += err or ""
        return self.process.returncode

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def read_line(self, pattern: str) -> re.Match[str]:
        """Read standard error up to a line that matches."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.err += line
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no line matches {pattern!r}: {self.err}")


def crashing(name: str, words: Sequence[str], moment: str, number: str) -> Program:
    """Start a program that is killed at a line of its journal: see crash.py."""
    program = Program.__new__(Program)
    program.process = subprocess.Popen(
        [sys.executable, "-m", "tests.crash", moment, number, name, *breaks_are_final(name, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    program.out = program.err = ""
    _begun.append(program)
    return program


def destination(
    *arguments: str, listen: str = "127.0.0.1:0", namespace: str = ""
) -> tuple[Program, str]:
    """Start a migrate-dst; return it and the address it listens on."""
    program = Program("migrate-dst", "--listen", listen, *arguments, namespace=namespace)
    return program, program.read_line(r"listening on (\S+)")[1]


def guest_pid(text: str) -> int:
    """Return the demo guest's process number, from what a program printed."""
    found = re.search(r"process (\d+)", text)
    assert found, text
    return int(found[1])


def look_at(pid: int, seconds: float = 0.0) -> tuple[int, int, int]:
    """Lets a demo guest run for a while, checks every byte: (sweep before, after, first wrong).

    A program that has just ended its migration may hold the guest for a moment yet.
    """
    end = time.monotonic() + 60
    while True:
        try:
            verdict = asyncio.run(check(pid, seconds))
            return verdict.sweep_before, verdict.sweep_after, verdict.wrong
        except UsageError as error:
            if "being moved" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.1)


def free_port() -> int:
    """Return a TCP port of all addresses that was free a moment ago."""
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def ended_or_given_up(pid: int) -> bool:
    """Return whether a demo guest can no longer run here."""
    try:
        process = DemoProcess.attach(pid)
    except Exception:  # it is gone
        return True
    return process.owner == Owner.RELINQUISHED


def children(pid: int) -> list[int]:
    """Return the child processes of a process."""
    found = []
    for other in numbers():
        with contextlib.suppress(OSError):
            if int(stat_of(other)[1]) == pid:
                found.append(other)
    return found


def end_guest(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    while os.path.exists(f"/proc/{pid}"):
        with open(f"/proc/{pid}/stat") as stat:
            if " Z " in stat.read():
                return
        time.sleep(0.01)
