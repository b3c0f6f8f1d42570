"""Check a running demo guest: that it counts, and that each of its bytes is right.

Run as `python -I -m migrate.guests.demo.check [PID]`; without a PID, the only demo guest here.
"""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass

from migrate.errors import MigrationError, UsageError
from migrate.guests.demo.handle import DemoProcess
from migrate.guests.demo.layout import Owner
from migrate.guests.proc_view import command_line
from migrate.output import say
from migrate.output.run import run_program

WATCHED_SECONDS = 1.0


@dataclass(frozen=True)
class Verdict:
    """What a check has found.

    sweep_before, sweep_after -- how often the guest had counted through its hot bytes
    wrong                     -- the offset of the first wrong byte, or -1
    """

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
    """Let the guest run for `seconds`, pause it, check every byte, and let it run again.

    Raises UsageError if there is no such guest, or it is being moved.
    """
    process = DemoProcess.attach(pid)
    try:
        process.lock()
        if process.owner != Owner.OURS:
            raise UsageError(
                f"the demo guest in process {pid} is not ours to let run: it was given up to "
                "another machine, or never became whole"
            )
        before, _ = process.position
        await asyncio.sleep(seconds)
        await process.pause()
        after, _ = process.position
        wrong = process.first_wrong()
        await process.run()
        return Verdict(pid, process.shape.size, before, after, wrong)
    finally:
        process.close()


def guests_here() -> list[int]:
    """Return the processes of the demo guests of root and of our user that can be seen here."""
    processes = map(int, filter(str.isdecimal, os.listdir("/proc")))
    return [pid for pid in processes if "migrate.guests.demo.process" in command_line(pid)]


def only_guest() -> int:
    """Return the process of the only demo guest that can be seen here. Raises UsageError."""
    found = guests_here()
    if len(found) != 1:
        raise UsageError(f"{len(found)} demo guests run here: name one by its process id")
    return found[0]


def main() -> int:
    """Run the check that the command line asks for. Return the exit code."""
    try:
        if len(sys.argv) > 2 or not "".join(sys.argv[1:] or "0").isdecimal():
            raise UsageError("usage: python -I -m migrate.guests.demo.check [PID]")
        pid = int(sys.argv[1]) if len(sys.argv) == 2 else only_guest()
        verdict = asyncio.run(check(pid))
    except MigrationError as error:
        say(f"demo_check: {error}")
        return error.exit_code
    print(verdict, flush=True)
    return 0 if verdict.right else 1


if __name__ == "__main__":
    run_program("demo_check", main, waits=True)
