"""The compiled walks over /proc find the same as a loop in Python."""

import contextlib
import os
import time

import pytest

from migrate.runtime._proc import find_descriptors, list_processes
from tests.requirements import need


@pytest.fixture
def table():
    fd = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def found_in_python(table: int, file: os.stat_result, writable: bool) -> list[int]:
    found = []
    for name in os.listdir(table):
        with contextlib.suppress(FileNotFoundError):
            link = os.stat(name, dir_fd=table, follow_symlinks=False)
            if os.path.samestat(os.stat(name, dir_fd=table), file):
                found += [int(name)] if link.st_mode & 0o200 or not writable else []
    return found


@pytest.mark.parametrize("writable", [False, True])
def test_finds_the_descriptors_of_one_file(tmp_path, table, writable):
    path = tmp_path / "file"
    path.touch()
    (tmp_path / "other").hardlink_to(path)
    with path.open(), path.open("r+"), (tmp_path / "other").open("a"), open("/dev/null", "r+"):
        file = path.stat()
        expected = found_in_python(table, file, writable)
        assert len(expected) == 2 if writable else 3
        os.lseek(table, 0, os.SEEK_SET)
        found, complete = find_descriptors(table, file.st_dev, file.st_ino, writable=writable)
        assert sorted(found) == sorted(expected)
        assert complete


def test_finds_block_devices_by_their_number(tmp_path, table):
    node = tmp_path / "node"
    try:
        os.mknod(node, 0o060600, os.makedev(7, 0))
        fd = os.open(node, os.O_RDONLY)
    except OSError as error:
        need(False, f"root, to open a block device: {error.strerror}")
    assert find_descriptors(table, os.makedev(7, 0), 0, block=True) == ([fd], True)
    os.close(fd)


def test_ends_at_its_deadline(table):
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(200)]
    found, complete = find_descriptors(table, 1, 1, deadline=time.thread_time())
    assert (found, complete) == ([], False)
    for fd in fds:
        os.close(fd)


def test_finds_a_bounded_number(tmp_path, table):
    fd = os.open(tmp_path, os.O_RDONLY)
    fds = [os.dup(fd) for _ in range(300)]
    file = os.fstat(fd)
    found, complete = find_descriptors(table, file.st_dev, file.st_ino)
    assert len(found) == 256
    assert not complete
    for one in (fd, *fds):
        os.close(one)


def test_folder_that_is_no_directory_is_an_error():
    with pytest.raises(OSError, match="fdopendir"):
        find_descriptors(0, 1, 1)
    with pytest.raises(OSError, match="dup"):
        list_processes(-1)


def test_lists_processes():
    table = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    processes = {pid: rest for pid, *rest in list_processes(table)}
    os.close(table)
    own = os.stat("/proc/self/")
    assert processes[os.getpid()] == [own.st_ino, own.st_uid]
    assert os.getppid() in processes
