"""Runs one of the programs, and kills it at a line of its journal.

    python -m tests.crash before|after N migrate-src|migrate-dst ARGUMENTS...

N counts the lines that this program writes, from 1. It dies as by kill -9, in the very moment.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from migrate.cli import migrate_dst, migrate_src
from migrate.ownership.journal import Journal


def main() -> None:
    moment, number, program, *arguments = sys.argv[1:]
    append, written = Journal._append, 0

    def crashing(self: Journal, entry: dict[str, Any]) -> None:
        nonlocal written
        written += 1
        if moment == "before" and written == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, entry)
        if moment == "after" and written == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    Journal._append = crashing  # type: ignore[method-assign]
    sys.argv = [program, *arguments]
    (migrate_src if program == "migrate-src" else migrate_dst).main()


if __name__ == "__main__":
    main()
