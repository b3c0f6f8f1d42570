"""One migration by migrate-src and migrate-dst, in processes of their own, measured."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.processes import Ended, Measured, ProgramError
from tests.programs import BIN

GRACE = 60.0


@dataclass(frozen=True)
class Migration:
    """`result` is what migrate-src prints with --json; {} where it ended before it had one."""

    result: dict[str, Any]
    source: Ended
    destination: Ended

    @property
    def completed(self) -> bool:
        return self.source.status == 0

    @property
    def seconds(self) -> float:
        """What migrate-src gives as its total time."""
        return float(self.result.get("total-time", 0)) / 1e3

    @property
    def why(self) -> str:
        """The reason of a migration that did not complete."""
        return str(self.result.get("error-desc") or self.source.err.strip().rpartition("\n")[2])

    def numbers(self) -> dict[str, Any]:
        """Seconds and bytes, for bench.json."""
        return {
            "completed": self.completed,
            "seconds": self.seconds,
            "wall": self.source.wall,
            "cpu_source": self.source.cpu,
            "cpu_destination": self.destination.cpu,
            "memory_source": self.source.memory,
            "memory_destination": self.destination.memory,
            "result": self.result,
        }


@contextlib.contextmanager
def migration(
    source: Sequence[str],
    destination: Sequence[str] = (),
    *,
    listen: str = "127.0.0.1:0",
    namespaces: tuple[str, str] = ("", ""),
    timeout: float = 120,
) -> Iterator[Migration]:
    """A migration that has ended; on leaving, whatever it started ends too (the demo guest).

    timeout -- seconds after which migrate-src is told to give up
    """
    receiver_command = [str(BIN / "migrate-dst"), "--listen", listen, *destination]
    near, far = namespaces
    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(Measured(receiver_command, far))
        address = receiver.wait_for(r"listening on (\S+)")[1]
        command = [str(BIN / "migrate-src"), "--json", "--progress", "never"]
        command += ["--timeout", f"{timeout:.0f}s", *source, address]
        sender = stack.enter_context(Measured(command, near))
        sent = sender.wait(timeout + GRACE)
        received = receiver.wait(GRACE)
        if sent.status == 0 and received.status != 0:
            raise ProgramError(f"migrate-src completed, migrate-dst did not: {received.err}")
        yield Migration(json.loads(sent.out) if sent.out.strip() else {}, sent, received)


def move_file(path: Path, output: Path, *, timeout: float = 120) -> Migration:
    """Moves a file that nobody writes over loopback, and removes what arrived."""
    try:
        with migration(
            ["--guest", f"file:{path}"], ["--output", str(output)], timeout=timeout
        ) as moved:
            return moved
    finally:
        output.unlink(missing_ok=True)


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs one of our modules."""
    return [sys.executable, "-m", module, *arguments]
