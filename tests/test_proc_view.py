"""What is read of other processes is bounded, and of strangers only what cannot be made long."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrate.guests.demo.check import guests_here
from migrate.guests.file_place import opened_by
from migrate.guests.proc_view import COMMAND_LINE_BYTES, command_line
from migrate.runtime import processes
from migrate.runtime.processes import command_name
from tests.requirements import need_root

LONG = "n" * 100_000
DEMO = "migrate.guests.demo.process"
STRANGER = 1234


Start = Callable[..., int]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a shell with this argument 0, and more; return its process."""
    started = []

    def begin(name: str, *more: str, user: int | None = None, stdin: int | None = None) -> int:
        child = subprocess.Popen(
            [name, "-c", "echo 1; kill -STOP $$", *more], executable="/bin/sh", cwd="/",
            stdin=stdin, stdout=subprocess.PIPE, user=user,
        )  # fmt: skip
        started.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == b"1\n"
        return child.pid

    yield begin
    for child in started:
        child.kill()
        child.communicate()


def test_command_line_is_read_up_to_its_bound(start) -> None:
    assert command_line(start("me", "one", "two"))[-2:] == ["one", "two"]
    words = command_line(start("me", LONG))
    assert words[0] == "me"
    assert len("\0".join(words)) == COMMAND_LINE_BYTES
    assert command_line(0) == []


@need_root("become another user")
def test_command_line_of_a_stranger_is_not_read(start) -> None:
    assert command_line(start("me", DEMO, user=STRANGER)) == []


@need_root("become another user")
def test_check_of_demo_guest_passes_over_strangers(start) -> None:
    strangers, ours = start("me", DEMO, user=STRANGER), start("me", DEMO)
    assert strangers not in (found := guests_here())
    assert ours in found


def test_opener_is_named_without_its_arguments(tmp_path: Path, start) -> None:
    path = tmp_path / "out"
    path.touch()
    with path.open() as file:
        pid = start(LONG, stdin=file.fileno())
    [(found, name)] = opened_by(str(path))
    assert (found, name) == (pid, command_name(pid))
    assert 0 < len(name) <= 15


def test_name_of_a_program_makes_no_field_of_its_status() -> None:
    """The name may hold any bytes but a line feed, also those that Python takes for line ends."""
    libc = ctypes.CDLL(None)
    before = Path("/proc/self/comm").read_bytes().strip()
    try:
        libc.prctl(15, b"x\rFake:\t7", 0, 0, 0)  # PR_SET_NAME, of this thread
        fields = processes.status(os.getpid())
    finally:
        libc.prctl(15, before, 0, 0, 0)
    assert fields["Name"] == "x\rFake:\t7"
    assert "Fake" not in fields
    assert processes.user_ids(os.getpid()) == {os.getuid(), os.geteuid()}


@need_root("have more groups")
def test_status_of_a_process_with_many_groups_is_read_up_to_its_bound() -> None:
    code = "import os, time; os.setgroups(range(1, 60000)); print(1, flush=True); time.sleep(60)"
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert processes.user_ids(child.pid) == {0}
        assert sum(map(len, processes.status(child.pid).values())) < processes.STATUS_BYTES
        child.kill()
