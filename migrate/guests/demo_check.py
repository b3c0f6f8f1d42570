"""Checks a running demo guest: that it counts, and that each of its bytes is right.

Run as `python -I -m migrate.guests.demo_check [PID]`; without a PID, the one demo guest there is.
"""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass

from migrate import output
from migrate.errors import MigrationError, UsageError
from migrate.guests.demo import OURS, OWNER, PAUSE, PAUSED, RUN, RUNNING, DemoProcess

WATCHED_SECONDS = 1.0


@dataclass(frozen=True)
class Verdict:
    """sweep_before, sweep_after: how often it had counted through its hot bytes; wrong: the offset
    of the first byte that is not what it must be, or -1."""

    pid: int
    size: int
    sweep_before: int
    sweep_after: int
    wrong: int

    @property
    def right(self) -> bool:
        return self.wrong < 0 and self.sweep_after > self.sweep_before

    def __str__(self) -> str:
        text = (
            f"the demo guest in process {self.pid} went from sweep {self.sweep_before} to "
            f"{self.sweep_after}"
        )
        if self.wrong >= 0:
            return f"{text}, and byte {self.wrong} of {self.size} is WRONG"
        if not self.right:
            return f"{text}: it does NOT run"
        return f"{text}, and every one of its {self.size} bytes is right"


async def check(pid: int, seconds: float = WATCHED_SECONDS) -> Verdict:
    """Lets the guest run so long, stops it, looks at every byte, and lets it go on.

    Raises UsageError where there is no such guest, or it is being moved.
    """
    process = DemoProcess.attach(pid)
    try:
        process.lock()
        if process.words[OWNER] != OURS:
            raise UsageError(
                f"the demo guest in process {pid} is not ours to let run: it was given up to "
                "another machine, or never became whole"
            )
        before = process.place()[0]
        await asyncio.sleep(seconds)
        await process.command(PAUSE, PAUSED)
        after = process.place()[0]
        wrong = process.first_wrong()
        await process.command(RUN, RUNNING)
        return Verdict(pid, process.shape.size, before, after, wrong)
    finally:
        process.close()


def only_guest() -> int:
    """The process of the only demo guest that can be seen here. Raises UsageError."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as command:
                if b"migrate.guests.demo_process" in command.read().split(b"\0"):
                    found.append(int(name))
        except OSError:
            continue  # it has ended, or is not ours to look at
    if len(found) != 1:
        raise UsageError(f"{len(found)} demo guests run here: name one by its process id")
    return found[0]


def main() -> int:
    try:
        if len(sys.argv) > 2 or not "".join(sys.argv[1:] or "0").isdecimal():
            raise UsageError("usage: python -I -m migrate.guests.demo_check [PID]")
        pid = int(sys.argv[1]) if len(sys.argv) == 2 else only_guest()
        verdict = asyncio.run(check(pid))
    except MigrationError as error:
        output.say(f"demo_check: {error}")
        return error.exit_code
    print(verdict, flush=True)
    return 0 if verdict.right else 1


if __name__ == "__main__":
    output.program("demo_check", main, waits=True)
