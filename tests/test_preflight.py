"""Migrations that would fail at their end: the programs refuse them at the start."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.programs import Program, destination
from tests.requirements import need

SIZE = 100_000


@pytest.fixture
def guest(shm: Path) -> Path:
    path = shm / "guest"
    path.write_bytes(os.urandom(SIZE))
    return path


def move(guest: Path, output: Path, *options: str) -> tuple[Program, Program]:
    """The source and the destination, which have both ended."""
    receiver, address = destination("--output", str(output), *options)
    source = Program("migrate-src", "--guest", f"file:{guest}", address)
    try:
        source.wait()
        receiver.wait()
    finally:
        for one in (source, receiver):
            one.kill()
    return source, receiver


def run(*words: str | Path) -> str:
    tools = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env=os.environ | {"PATH": tools}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def exfat(tmp_path: Path) -> Iterator[Path]:
    """A file system without hard links, RENAME_NOREPLACE, owners and nameless files."""
    need(os.geteuid() == 0, "root, to mount file systems")
    for tool, package in (("mkfs.exfat", "exfatprogs"), ("mount.exfat-fuse", "exfat-fuse")):
        need(shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"), package)
    path, image = tmp_path / "exfat", tmp_path / "image"
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    run("mkfs.exfat", image)
    device = run("losetup", "-f", "--show", image)
    try:
        run("mount.exfat-fuse", device, path)
        yield path
        run("umount", path)
    finally:
        run("losetup", "-d", device)


@pytest.mark.programs
@pytest.mark.parametrize("overwrite", [False, True])
def test_output_without_hard_links(guest, exfat, overwrite):
    output = exfat / "out"
    if overwrite:
        output.write_bytes(b"before")
    source, receiver = move(guest, output, *(["--overwrite"] if overwrite else []))
    assert source.process.returncode == 0, source.err
    assert output.read_bytes() == guest.read_bytes()
    assert [item.name for item in exfat.iterdir()] == ["out"]
    assert overwrite or "could not be 644" in receiver.out, "that it has no modes is said"
    other, _ = destination_refused(str(output))
    assert "it exists" in other


def destination_refused(output: str) -> tuple[str, int]:
    program = Program("migrate-dst", "--listen", "127.0.0.1:0", "--output", output)
    return (program.err if program.wait() else ""), program.process.returncode


@pytest.mark.programs
@pytest.mark.parametrize("letter", ["n", "é"])
def test_output_with_longest_name(guest, shm, letter):
    output = shm / (letter * (255 // len(letter.encode())))
    source, receiver = move(guest, output)
    assert source.process.returncode == 0, source.err
    assert receiver.process.returncode == 0, receiver.err
    assert output.read_bytes() == guest.read_bytes()


@pytest.mark.programs
def test_output_has_mode_and_owner_of_guest(guest, shm):
    need(os.geteuid() == 0, "root, to give files away")
    guest.chmod(0o664)
    os.chown(guest, 65534, 65533)
    source, _ = move(guest, shm / "out")
    assert source.process.returncode == 0, source.err
    here = (shm / "out").stat()
    assert (stat.S_IMODE(here.st_mode), here.st_uid, here.st_gid) == (0o664, 65534, 65533)


@pytest.mark.programs
def test_mode_and_owner_options(guest, shm):
    need(os.geteuid() == 0, "root, to give files away")
    move(guest, shm / "out", "--mode", "640", "--owner", "root:65533")
    here = (shm / "out").stat()
    assert (stat.S_IMODE(here.st_mode), here.st_uid, here.st_gid) == (0o640, 0, 65533)


@pytest.mark.programs
def test_growing_guest_fails_before_pause(guest, shm):
    guest.write_bytes(os.urandom(1 << 20))
    receiver, address = destination("--output", str(shm / "out"))
    paused = shm / "paused"
    source = Program(
        "migrate-src", "--guest", f"file:{guest}", "--max-bandwidth", "1m", "--retry", "0",
        "--pause-cmd", f"touch {paused}", "--resume-cmd", "true", address,
    )  # fmt: skip
    receiver.read_line("receiving a file guest")
    with guest.open("ab") as file:
        file.write(b"more")
    assert source.wait() == 1
    assert f"it had {1 << 20} bytes at the start and has {(1 << 20) + 4} now" in source.err
    assert not paused.exists()
    assert receiver.wait() != 0
    assert not (shm / "out").exists()


@pytest.mark.programs
def test_guest_cannot_replace_itself(guest, shm):
    """Both programs on one machine, and the same path: the writer would go on in a lost file."""
    before = guest.read_bytes()
    receiver, address = destination("--output", str(guest), "--overwrite")
    source = Program("migrate-src", "--guest", f"file:{guest}", address)
    assert source.wait() != 0
    assert "moves that very file: a guest cannot replace itself" in source.err
    receiver.kill(signal.SIGTERM)
    receiver.wait()
    assert guest.read_bytes() == before
    assert [item.name for item in shm.iterdir()] == ["guest"]


@pytest.mark.programs
def test_on_complete_timeout(guest, shm):
    go, up = shm / "go", shm / "up"
    source, receiver = move(
        guest, shm / "out", "--on-complete-timeout", "200ms", "--on-complete",
        f"exec >/dev/null 2>&1; while [ ! -e {go} ]; do sleep 0.05; done; touch {up}",
    )  # fmt: skip
    assert source.process.returncode == 0
    assert receiver.process.returncode == 10
    assert "takes more than 0.2 s: it goes on, as process" in receiver.err
    go.touch()
    appears(up)


@pytest.mark.programs
def test_signal_ends_wait_for_service_only(guest, shm):
    go, up, begun = shm / "go", shm / "up", shm / "begun"
    receiver, address = destination(
        "--output", str(shm / "out"), "--on-complete",
        f"exec >/dev/null 2>&1; touch {begun}; while [ ! -e {go} ]; do sleep 0.05; done; "
        f"touch {up}",
    )  # fmt: skip
    assert Program("migrate-src", "--guest", f"file:{guest}", address).wait() == 0
    appears(begun)
    receiver.kill(signal.SIGTERM)
    assert receiver.wait() == 10
    assert "is not waited for any longer: it goes on, as process" in receiver.err
    go.touch()
    appears(up)


def appears(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)
