"""What is said of a QEMU on the command line, and the socket that one is waited for at."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.cli.destination import destination_parser, qemu_of
from migrate.cli.program import qemu_words
from migrate.errors import UsageError
from tests.programs import Program

NOWHERE = "tcp:127.0.0.1:9"


@contextlib.contextmanager
def waiting(path: Path, *arguments: str) -> Iterator[Program]:
    """A migrate-src that waits for a QEMU there."""
    program = Program("migrate-src", "--guest", f"qemu:unix:{path}", *arguments, NOWHERE)
    try:
        program.read_line("waiting for QEMU")
        yield program
    finally:
        program.kill()
        program.wait()


def refused(path: Path) -> tuple[int, str]:
    """The exit code of another one for the same path, and what it says."""
    program = Program("migrate-src", "--guest", f"qemu:unix:{path}", NOWHERE)
    return program.wait(), program.err


def test_what_stands_where_qemu_is_to_come_is_left_alone(tmp_path) -> None:
    path = tmp_path / "disk.img"
    path.write_text("precious")
    status, said = refused(path)
    assert status == 2
    assert "is left as it is" in said
    assert path.read_text() == "precious"


def test_whoever_waits_for_qemu_is_not_disturbed_by_another_one(tmp_path) -> None:
    path = tmp_path / "stream"
    with waiting(path) as program:
        status, said = refused(path)
        assert status == 3
        assert "another program listens there" in said
        with socket.socket(socket.AF_UNIX) as there:
            there.connect(str(path))
            there.sendall(b"QEVX")
            assert program.wait() == 1
        assert "byte" in program.err


def test_a_socket_that_a_killed_program_has_left_is_taken_over(tmp_path) -> None:
    path = tmp_path / "stream"
    with waiting(path) as program:
        program.kill()
        program.wait()
        assert path.exists()
    with waiting(path) as program:
        program.kill(signal.SIGINT)
        assert program.wait() == 130
    assert not path.exists()


def test_only_its_own_socket_is_removed(tmp_path) -> None:
    path = tmp_path / "stream"
    with waiting(path) as program:
        os.unlink(path)
        path.write_text("another")
        program.kill(signal.SIGINT)
        assert program.wait() == 130
    assert path.read_text() == "another"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tcp:127.0.0.1:4440", ("tcp:127.0.0.1:4440", "")),
        ("unix:/a,b", ("unix:/a,b", "")),
        ("qmp=/run/vm.qmp", ("", "/run/vm.qmp")),
        ("qmp=unix:/run/vm.qmp", ("", "/run/vm.qmp")),
        ("unix:/a,qmp=/b", ("unix:/a", "/b")),
    ],
)
def test_where_a_qemu_is(text, words) -> None:
    assert qemu_words(text) == words


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "say where it is"),
        ("qmp=", "say where it is"),
        ("/run/vm.qmp", r"'qemu:/run/vm.qmp' is not understood: write .*qemu:qmp=PATH"),
        ("qmp=tcp:localhost:4445", "write unix:PATH"),
        ("qmp=/" + "x" * 120, "107"),
    ],
)
def test_what_is_wrong_with_it_is_said_at_once(text, why) -> None:
    with pytest.raises(UsageError, match=why):
        qemu_words(text)


def test_who_asks_for_a_snapshot_at_the_destination_hears_how_one_lands() -> None:
    args = destination_parser().parse_args(["--listen", "1", "--guest", "snapshot:/srv/vm"])
    with pytest.raises(UsageError, match="--guest qemu --output DIR"):
        qemu_of(args)
