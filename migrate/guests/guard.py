"""The guard: a process that lets a stopped writer go on if the source dies while it is stopped.

Run as `python -m migrate.guests.guard [--resume-cmd CMD] PID...`. It reads one letter at a time:

    p   the writer is (about to be) stopped     r   it runs again
    g   it was given up: never resume it        (end of file: the source is gone)
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys


def resume(pids: list[int], command: str) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGCONT)
        except OSError as error:
            print(f"cannot resume process {pid}: {error.strerror}", file=sys.stderr)
    if command:
        subprocess.run(command, shell=True, check=False)


def main() -> None:
    arguments = sys.argv[1:]
    command = ""
    if arguments[:1] == ["--resume-cmd"]:
        command = arguments[1]
        arguments = arguments[2:]
    pids = [int(text) for text in arguments]
    os.write(1, b"k")
    state = b"r"
    while letter := os.read(0, 1):
        state = letter
        with contextlib.suppress(OSError):  # whoever asked may have died since
            os.write(1, b"k")
    if state == b"p":
        resume(pids, command)


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    main()
