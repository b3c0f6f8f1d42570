"""A program that runs up to a point, and is then killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


class KillableProgram:
    """A Python program that has run `code`, the body of a coroutine, and waits to be killed.

    arguments -- its sys.argv[1:]
    said      -- what it has printed
    """

    def __init__(self, code: str, *arguments: object) -> None:
        lines = "\n".join("    " + line for line in code.strip().splitlines())
        program = (
            "import asyncio, sys\n"
            f"async def main():\n{lines}\n    print('ready', flush=True)\n"
            "    await asyncio.sleep(1000)\nasyncio.run(main())\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE,
            text=True, cwd=ROOT,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.said = ""
        for line in self.process.stdout:
            if line == "ready\n":
                return
            self.said += line
        raise AssertionError(f"the program ended with {self.process.wait()}")

    def kill(self) -> None:
        """Kill the program with SIGKILL, so that it cannot clean up."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def __enter__(self) -> KillableProgram:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
