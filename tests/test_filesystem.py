"""Files that get their name last, on file systems that lack this or that."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from migrate.errors import UsageError
from migrate.files.directory import SUFFIX, Directory
from migrate.files.filesystem import (
    NAME_MAX,
    PATH_MAX,
    check_file,
    check_replaceable,
    check_writable,
    hidden_name,
    is_mount_point,
    try_directory,
    unchangeable,
)
from migrate.files.mounts import Mount, parse_mount
from tests.requirements import need


@pytest.mark.parametrize("count", [1, 234, 235, 236, 254, 255])
@pytest.mark.parametrize("letter", ["n", "é", "\U0001f600", "\udcff"])
def test_hidden_name_exists_for_every_name(tmp_path, count, letter):
    name = (letter * count).encode("utf-8", "surrogateescape")[:NAME_MAX]
    while letter != "\udcff" and name.decode(errors="ignore").encode() != name:
        name = name[:-1]
    path = os.path.join(tmp_path, os.fsdecode(name))
    hidden = hidden_name(path)
    assert hidden != hidden_name(path), "no other one is called so"
    assert os.path.dirname(hidden) == str(tmp_path)
    bare = os.fsencode(os.path.basename(hidden))
    assert len(bare) <= NAME_MAX
    assert bare.endswith(SUFFIX.encode())
    assert name.startswith(bare[1:].partition(b".")[0]), "one can see whose it is"
    if letter != "\udcff":
        bare.decode()  # no character is cut in two
    Path(hidden).touch()
    with Directory(str(tmp_path)) as directory:
        directory.rename_noreplace(os.path.basename(hidden), os.path.basename(path))
    assert [os.fsencode(one.name) for one in tmp_path.iterdir()] == [name]


def test_impossible_name_or_path_is_refused(tmp_path):
    with pytest.raises(UsageError, match="the name has 256 bytes, and no more than 255"):
        hidden_name(str(tmp_path / ("n" * 256)))
    room = PATH_MAX - len(str(tmp_path)) - 2
    deep = str(tmp_path) + "/d" * (room // 2)
    with pytest.raises(UsageError, match="the path is too long: .* shorter path"):
        hidden_name(deep)
    assert len(hidden_name(deep[: -2 * 20])) <= PATH_MAX


# ---------------------------------------------------------------- the try


@pytest.mark.parametrize(
    ("where", "name", "says"),
    [
        (os, "pwrite", "write"), (os, "ftruncate", "set the size of"),
        (os, "posix_fallocate", "give a file its room"), (mmap, "mmap", "map a file"),
        (os, "fdatasync", "fsync"), (os, "fsync", "fsync"),
        (Directory, "rename_noreplace", "rename"),
    ],
)  # fmt: skip
def test_missing_file_system_operation_is_named(tmp_path, monkeypatch, where, name, says):
    def lacking(*_arguments):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(where, name, lacking)
    with pytest.raises(UsageError, match=rf"^--output x: .*{says}.*Operation not supported: name"):
        try_directory(str(tmp_path / "x"), "--output x")
    assert list(tmp_path.iterdir()) == []


def test_try_directory_leaves_nothing_and_runs_callers_attempt(tmp_path):
    try_directory(str(tmp_path / "x"), "--output x")
    with pytest.raises(UsageError, match="^--output x: not like that$"):
        try_directory(str(tmp_path / "x"), "--output x", lambda _fd: "not like that")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def mounted(tmp_path):
    """Mounts a file system: give its type and options."""
    need(os.geteuid() == 0, "root, to mount file systems")
    places: list[Path] = []

    def mount(kind: str, *options: str) -> Path:
        place = tmp_path / f"mounted-{len(places)}"
        place.mkdir()
        words = ["mount", "-t", kind, *options, "none", str(place)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        need(done.returncode == 0, f"to mount {kind}: {done.stderr.strip()}")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


def test_read_only_mount_is_named(mounted):
    with pytest.raises(UsageError, match=r"^x: .* mounted read-only$"):
        check_writable(str(mounted("tmpfs", "-o", "ro")), "x")


def test_full_file_system_is_named(mounted):
    place = mounted("tmpfs", "-o", "size=4k")
    (place / "all").write_bytes(bytes(4096))
    with pytest.raises(UsageError, match="No space left on device: make room"):
        try_directory(str(place / "x"), "--output x")


def test_hugetlbfs_is_named(mounted):
    with pytest.raises(UsageError, match=r"write\(2\) to a file .* another .* \(hugetlbfs\)"):
        try_directory(str(mounted("hugetlbfs") / "x"), "--output x")


def test_mounted_file_cannot_be_replaced(tmp_path):
    need(os.geteuid() == 0, "root, to mount a file")
    file = tmp_path / "a file"
    file.touch()
    assert not is_mount_point(str(file))
    check_replaceable(str(file), "x")
    subprocess.run(["mount", "--bind", str(file), str(file)], check=True)
    try:
        with pytest.raises(UsageError, match="something is mounted at that name"):
            check_replaceable(str(file), "x")
    finally:
        subprocess.run(["umount", str(file)], check=True)


@pytest.mark.parametrize(("flag", "says"), [("i", "immutable"), ("a", "append-only")])
def test_immutable_and_append_only_are_named(tmp_path, flag, says):
    need(os.geteuid() == 0, "root, to set attributes")
    need(shutil.which("chattr"), "chattr (e2fsprogs)")
    file = tmp_path / "file"
    file.touch()
    done = subprocess.run(["chattr", f"+{flag}", file], capture_output=True, check=False)
    need(done.returncode == 0, f"a file system with the attribute {flag}")
    try:
        with pytest.raises(UsageError, match=f"the file there is {says}"):
            check_replaceable(str(file), "x")
    finally:
        subprocess.run(["chattr", f"-{flag}", file], check=True)


def test_check_file_does_not_open_the_file(tmp_path, monkeypatch):
    """The name may be a link to a device that reacts to being opened."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    reading = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    check_file(str(tmp_path / "link"), "--report")
    assert poll.poll(0) == [], "nobody has had it open for writing"
    os.close(reading)
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: pytest.fail("a link was followed"))
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(__file__)
    assert unchangeable(str(tmp_path / "link")) == ""


def test_check_file_refuses_read_only_file():
    """Root may write to any file, so that root becomes another user for this."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        file = Path(directory, "file")
        file.touch(0o400)
        before = os.geteuid()
        if before == 0:
            for path in (directory, file):
                os.chown(path, 65534, 65534)
            os.seteuid(65534)
        try:
            with pytest.raises(UsageError, match="it cannot be written: Permission denied"):
                check_file(str(file), "--report")
        finally:
            os.seteuid(before)


def test_check_file_refuses_unwritable_file_and_leaves_it(tmp_path):
    file = tmp_path / "file"
    check_file(str(file), "--report")
    assert list(tmp_path.iterdir()) == []
    file.write_bytes(b"before")
    check_file(str(file), "--report")
    assert file.read_bytes() == b"before"
    with pytest.raises(UsageError, match="^--report .*: it cannot be written: Not a directory$"):
        check_file(str(file / "x"), "--report")


def test_mount_with_blanks_in_its_path() -> None:
    line = rb"36 35 98:0 /m /mnt\040a\134b rw,noatime master:1 shared:2 - ext3 /dev/r rw,errors=x"
    assert parse_mount(line) == Mount(
        36, "98:0", "/mnt a\\b", ["rw", "noatime"], "ext3", "/dev/r", ["rw", "errors=x"]
    )


def test_mount_without_a_source() -> None:
    """As by mount -t tmpfs "" /mnt: the kernel writes two blanks."""
    mount = parse_mount(b"40 35 0:43 / /mnt ro,relatime - tmpfs  rw,size=4k")
    assert (mount.source, mount.super_options, mount.read_only) == ("", ["rw", "size=4k"], True)
