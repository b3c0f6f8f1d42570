"""Files and directories that only root and we can change, and the way to them: see trust.py."""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from migrate.files.directory import Directory, sync_directory
from migrate.files.identity import Identity, identity_of
from migrate.files.trust import check_trusted
from migrate.files.walk import walk


def make_trusted(path: str) -> Directory:
    """Open a trusted directory, and first make the missing part of its path.

    Directories are made with mode 0700, and their names are brought to the disk. Raises OSError.
    """
    path = os.path.abspath(path)
    with contextlib.suppress(FileNotFoundError):
        return Directory(path, trusted=True)
    _make_path(path)
    return Directory(path, trusted=True)


def _make_path(path: str) -> None:
    missing: list[str] = []
    above = path
    while True:
        above, name = os.path.split(above)
        missing.append(name)
        try:
            fd = walk(above, trusted=True)
            break
        except FileNotFoundError:
            continue
    try:
        for name in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another program of ours was faster
                os.mkdir(name, 0o700, dir_fd=fd)
            with contextlib.suppress(
                PermissionError
            ):  # we may be allowed to write it, and not to read it
                sync_directory(fd)
            inner = walk(name, trusted=True, start=fd)
            os.close(fd)
            fd = inner
    finally:
        os.close(fd)


def open_trusted(path: str) -> int:
    """Open a regular file to read.

    Raises OSError, also if another user than root and us could have written or replaced it.
    """
    found = walk(os.path.join(os.getcwd(), path), trusted=True)
    try:
        mode = os.fstat(found).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        check_trusted(found, last=True)
        return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(found)


def leads_to(path: str, identity: Identity) -> bool:
    """Return whether an absolute path leads to one certain directory.

    False if another user than root and us can make it lead elsewhere.
    """
    with contextlib.suppress(OSError):
        fd = walk(path, trusted=True)
        try:
            return identity_of(os.fstat(fd)) == identity
        finally:
            os.close(fd)
    return False
