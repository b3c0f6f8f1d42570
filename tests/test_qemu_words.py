"""The options that name a QEMU, and the unix socket where migrate-src waits for one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.cli.destination_options import destination_parser, qemu_of
from migrate.cli.options import qemu_words
from migrate.errors import UsageError
from tests.programs import Program

NOWHERE = "tcp:127.0.0.1:9"


@contextlib.contextmanager
def waiting(path: Path, *arguments: str) -> Iterator[Program]:
    """Start a migrate-src that waits for a QEMU at a path."""
    program = Program("migrate-src", "--guest", f"qemu:unix:{path}", *arguments, NOWHERE)
    try:
        program.read_line("waiting for QEMU")
        yield program
    finally:
        program.kill()
        program.wait()


def refused(path: Path) -> tuple[int, str]:
    """Return the exit code of a second migrate-src for the same path, and its messages."""
    program = Program("migrate-src", "--guest", f"qemu:unix:{path}", NOWHERE)
    return program.wait(), program.err


def test_file_at_socket_path_is_kept(tmp_path) -> None:
    path = tmp_path / "disk.img"
    path.write_text("precious")
    status, said = refused(path)
    assert status == 2
    assert "is left as it is" in said
    assert path.read_text() == "precious"


def test_second_source_for_socket_path_is_refused(tmp_path) -> None:
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


def test_socket_of_killed_program_is_replaced(tmp_path) -> None:
    path = tmp_path / "stream"
    with waiting(path) as program:
        program.kill()
        program.wait()
        assert path.exists()
    with waiting(path) as program:
        program.kill(signal.SIGINT)
        assert program.wait() == 130
    assert not path.exists()


def test_foreign_file_at_socket_path_is_kept_at_exit(tmp_path) -> None:
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
def test_qemu_option_is_parsed(text, words) -> None:
    assert qemu_words(text) == words


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "missing address"),
        ("qmp=", "missing address"),
        ("/run/vm.qmp", r"'qemu:/run/vm.qmp' is not understood: write .*qemu:qmp=PATH"),
        ("qmp=tcp:localhost:4445", "write unix:PATH"),
        ("qmp=/" + "x" * 120, "107"),
    ],
)
def test_invalid_qemu_option_is_refused(text, why) -> None:
    with pytest.raises(UsageError, match=why):
        qemu_words(text)


def test_snapshot_as_destination_guest_is_refused() -> None:
    args = destination_parser().parse_args(["--listen", "1", "--guest", "snapshot:/srv/vm"])
    with pytest.raises(UsageError, match="--guest qemu --output DIR"):
        qemu_of(args)
