"""File guests whose writers are real programs, with the kernel's record of what they write.

XBMIGRATE_TEST_MIB=1024 makes each database about 1024 MiB (the default is 48).
"""

from __future__ import annotations

import asyncio
import contextlib
import filecmp
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import database_writers
from tests.machine.qemu import MIB, Machine
from tests.machine.sweep import Sweep
from tests.programs import Program, destination
from tests.recording import why_not
from tests.requirements import need_root

PROGRAMS = 3
SIZE = int(os.environ.get("XBMIGRATE_TEST_MIB", "48")) << 20

pytestmark = [
    pytest.mark.programs,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "the kernel records writes"),
    need_root("trace other processes, and see their mappings"),
]


@contextlib.contextmanager
def database(kind: str, path: Path) -> Iterator[None]:
    """Have several programs write to one database."""
    with contextlib.ExitStack() as stack:
        for number in range(PROGRAMS):
            writer = stack.enter_context(subprocess.Popen(
                [sys.executable, "-m", "tests.database_writers", kind, path, str(number),
                 str(SIZE // PROGRAMS)],
                stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent,
            ))  # fmt: skip
            stack.callback(writer.kill)
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"busy\n"
        yield


def move(guest: Path, output: Path, *options: str) -> dict[str, object]:
    """Move a file, with all its writers; return what migrate-src says with --json."""
    journals = [("--journal", str(output) + end) for end in (".jd", ".js")]
    receiver, address = destination("--output", str(output), *journals[0])
    source = Program(
        "migrate-src", "--guest", f"file:{guest}", "--pid", "auto", "--tracking", "kernel",
        "--json", "--downtime-limit", "5s", *journals[1], *options, address,
    )  # fmt: skip
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0, receiver.err
    return dict(json.loads(source.out), said=source.err)


@pytest.mark.parametrize("kind", ["lmdb", "sqlite"])
def test_database_with_writers_in_several_processes(shm: Path, kind: str) -> None:
    """LMDB writes through its mapping; SQLite by write(2) at each checkpoint, beside a mapping."""
    (shm / "there").mkdir()
    guest, output = shm / "base", shm / "there" / "base"
    with database(kind, guest):
        result = move(guest, output)
        assert filecmp.cmp(guest, output, shallow=False)
        if companion := database_writers.companion(kind, guest):
            shutil.copy(companion, output.parent)
    database_writers.check(kind, output, PROGRAMS)
    if kind == "lmdb":
        assert result["dirty-tracking"] == "kernel", result["said"]


@pytest.mark.qemu
@pytest.mark.asyncio
async def test_memory_of_a_virtual_machine_in_a_file(shm: Path) -> None:
    memory, output = shm / "memory", shm / "output"
    sweep = Sweep(40 * MIB, 2 * MIB)
    extra = (
        "-object", f"memory-backend-file,id=mem,size=64M,mem-path={memory},share=on",
        "-machine", "memory-backend=mem",
    )  # fmt: skip
    async with Machine(sweep, extra=extra) as machine:
        await machine.wait_for_count(sweep.every)
        result = await asyncio.to_thread(move, memory, output, "--max-bandwidth", "200m")
        assert result["dirty-tracking"] == "kernel", result["said"]
        assert filecmp.cmp(memory, output, shallow=False)
