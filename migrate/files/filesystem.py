"""Files that get their name when they are complete, and what that needs of the file system.

    hidden_name    choose the name of a file until then, beside its own
    write_whole    put a small file in the place of what was there
    try_directory  do once, with a file of a few bytes, what a guest's file needs later

Not every file system has hard links, files without a name, RENAME_NOREPLACE or shared mappings
(exFAT, FUSE, CIFS, hugetlbfs). One try tells more than the type of the file system.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import stat
from collections.abc import Callable, Iterator

from migrate.errors import UsageError
from migrate.files.directory import SUFFIX, Directory
from migrate.files.identity import identity_of
from migrate.files.mounts import mounts
from migrate.files.removal import remove_file

NAME_MAX = 255
PATH_MAX = 4095
TRY_BYTES = 4096
_GET_FLAGS = 0x80086601  # FS_IOC_GETFLAGS, on 64 bits
_IMMUTABLE, _APPEND_ONLY = 0x10, 0x20
# File systems whose files have no contents of their own: the kernel makes them as they are read.
KERNELS_OWN = (
    "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "efivarfs", "fusectl", "mqueue",
    "proc", "pstore", "securityfs", "selinuxfs", "sysfs", "tracefs",
)  # fmt: skip


def hidden_name(path: str, what: str = "--output", spare: int = 0) -> str:
    """Choose the path of a file until it is complete: a hidden name beside `path` that no file has.

    The name begins with the final name, cut to the length that the file system allows.

    what  -- the option that names `path`, for messages
    spare -- bytes that will be added to the name later

    Raises UsageError if no name fits there.
    """
    directory, name = os.path.split(os.path.abspath(path))
    longest, stem = _longest_name(directory), os.fsencode(name)
    if len(stem) > longest:
        raise UsageError(
            f"{what} {path}: the name has {len(stem)} bytes, and no more than {longest} are "
            "possible there"
        )
    token = f".{secrets.token_hex(4)}{SUFFIX}"
    most = min(longest, PATH_MAX - len(os.fsencode(directory)) - 1)
    room = most - len(token) - 1 - spare
    if room < 1:
        raise UsageError(
            f"{what} {path}: the path is too long: until the guest is whole it has a hidden name "
            f"there of {len(token) + 2 + spare} bytes or more: use a directory with a shorter path"
        )
    if len(stem) > room:
        while stem[room] & 0xC0 == 0x80:  # not in the middle of a character
            room -= 1
        stem = stem[:room]
    return os.path.join(directory, f".{os.fsdecode(stem)}{token}")


def _longest_name(directory: str) -> int:
    with contextlib.suppress(OSError):
        return os.statvfs(directory).f_namemax or NAME_MAX
    return NAME_MAX


def write_whole(path: str, data: bytes, what: str, mode: int = 0o644) -> None:
    """Write a file and put it in the place of what was there: no reader ever sees a part of it.

    Raises OSError, UsageError.
    """
    where, name = os.path.split(os.path.abspath(path))
    beside = os.path.basename(hidden_name(path, what))
    with Directory(where) as directory, open(directory.create_file(beside, mode), "wb") as file:
        made = identity_of(os.fstat(file.fileno()))
        try:
            file.write(data)
            file.flush()
            directory.rename(made, beside, name, overwrite=True)
        except OSError:
            directory.remove_file(beside, made)
            raise


# ---------------------------------------------------------------- what is there


def kind_of(mode: int) -> str:
    """Name the kind of file that a st_mode is of."""
    kinds = (
        (stat.S_ISREG, "a file"), (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"), (stat.S_ISLNK, "a symbolic link"),
    )  # fmt: skip
    return next((name for is_kind, name in kinds if is_kind(mode)), "something else")


def file_system_of(fd: int) -> str:
    """Return the type of the file system of an open file, as mount(8) shows it; "" if unknown."""
    with contextlib.suppress(OSError):
        with open(f"/proc/self/fdinfo/{fd}") as lines:
            numbers = [int(line.split()[1]) for line in lines if line.startswith("mnt_id:")]
        return next((mount.kind for mount in mounts() if mount.number in numbers), "")
    return ""


def is_mount_point(path: str) -> bool:
    """Return whether something is mounted at `path`, if only a file, as containers do it."""
    here = os.path.realpath(path)
    with contextlib.suppress(OSError):
        return any(mount.point == here for mount in mounts())
    return False


def unchangeable(path: str) -> str:
    """Name the attribute (chattr(1)) that keeps a file or directory from being changed; or ""."""
    flags = 0
    where, name = os.path.split(os.path.abspath(path))
    with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
        if os.path.isdir(path):
            fd = opened.enter_context(Directory(path)).fd
        else:
            directory = opened.enter_context(Directory(where))
            fd = opened.enter_context(directory.reading(name))
        flags = int.from_bytes(fcntl.ioctl(fd, _GET_FLAGS, bytes(8))[:4], "little")
    if flags & _IMMUTABLE:
        return "immutable (chattr -i makes it changeable)"
    return "append-only (chattr -a makes it changeable)" if flags & _APPEND_ONLY else ""


def check_writable(directory: str, what: str) -> None:
    """Check that files can be made in `directory`. Raises UsageError that begins with `what`."""
    if not os.path.isdir(directory):
        raise UsageError(f"{what}: there is no directory {directory}")
    if os.statvfs(directory).f_flag & os.ST_RDONLY:
        raise UsageError(f"{what}: {directory} is on a file system that is mounted read-only")
    if found := unchangeable(directory):
        raise UsageError(f"{what}: the directory {directory} is {found}")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UsageError(f"{what}: no permission to write in {directory}")


def check_replaceable(path: str, what: str) -> None:
    """Check that another file can take the name of an existing one. Raises UsageError."""
    if found := unchangeable(path):
        raise UsageError(f"{what}: the file there is {found}")
    if is_mount_point(path):
        raise UsageError(
            f"{what}: something is mounted at that name, so it cannot be replaced: mount the "
            "directory, not the file"
        )
    above, existing = os.stat(os.path.dirname(os.path.abspath(path))), os.lstat(path)
    ours = os.geteuid() in (0, above.st_uid, existing.st_uid)
    if above.st_mode & stat.S_ISVTX and not ours:
        raise UsageError(
            f"{what}: the file there belongs to user {existing.st_uid}, and only that user may "
            "replace it in a directory with the sticky bit"
        )


def check_file(path: str, what: str) -> None:
    """Check that `write_whole` can write the file later. Raises UsageError.

    An existing file is not changed, and not opened for writing: it could be a device by now.
    """
    where, beside = os.path.split(hidden_name(path, what))
    name = os.path.basename(os.path.abspath(path))
    try:
        with Directory(where) as directory:
            fd = directory.create_file(beside)
            try:
                remove_file(directory.fd, beside, identity_of(os.fstat(fd)))
            finally:
                os.close(fd)
            if directory.exists(name):
                check_replaceable(path, f"{what} {path}")
                if stat.S_ISREG(directory.lstat(name).st_mode) and not os.access(
                    name, os.W_OK, dir_fd=directory.fd, effective_ids=True
                ):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UsageError(f"{what} {path}: it cannot be written: {error.strerror}") from None


# ---------------------------------------------------------------- the try


def try_directory(
    path: str, what: str, more: Callable[[int], str] = lambda _fd: "", *, mapped: bool = True
) -> None:
    """Do with a small file beside `path` what the output will need, and remove that file.

    more   -- called with the file's descriptor, for further attempts; returns what has failed, or
              ""
    mapped -- the output is written through a shared mapping

    Raises UsageError that says what cannot be done there.
    """
    where, name = os.path.split(hidden_name(path))
    renamed = os.path.basename(hidden_name(path))
    doing = "open a directory"
    try:
        with Directory(where) as directory:
            doing = "make a file"
            fd = directory.create_file(name)
            made = identity_of(os.fstat(fd))
            try:
                for doing, attempt in _attempts(directory, fd, (name, renamed), mapped):  # noqa: B007
                    attempt()
                why = more(fd)
            finally:
                for one in (name, renamed):
                    directory.remove_file(one, made)
                os.close(fd)
    except OSError as error:
        raise UsageError(
            f"{what}: it is not possible to {doing} in {where}: {error.strerror}: "
            f"{_advice(error.errno, where)}"
        ) from None
    if why:
        raise UsageError(f"{what}: {why}")


def _attempts(
    directory: Directory, fd: int, names: tuple[str, str], mapped: bool
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield each attempt with a new file, in words and as a function."""
    yield "write(2) to a file", lambda: os.pwrite(fd, bytes(TRY_BYTES), 0)
    yield "set the size of a file", lambda: os.ftruncate(fd, TRY_BYTES + 1)
    yield "set the size of a file", lambda: os.ftruncate(fd, TRY_BYTES)
    yield "give a file its room", lambda: os.posix_fallocate(fd, 0, TRY_BYTES)
    if mapped:
        yield "map a file for writing", lambda: _write_mapped(fd)
    yield "bring a file to the disk (fsync)", lambda: os.fdatasync(fd)
    yield "bring a file to the disk (fsync)", lambda: os.fsync(fd)
    made = identity_of(os.fstat(fd))
    yield "rename a file", lambda: directory.rename(made, *names, overwrite=False)


def _write_mapped(fd: int) -> None:
    with mmap.mmap(fd, TRY_BYTES) as view:
        view[0] = 1


def _advice(number: int | None, directory: str) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "make room there, or name another directory"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "name a directory that can be written"
    if number == errno.ESTALE:
        return "name a directory that no other user changes"
    kind = ""
    with contextlib.suppress(OSError):
        fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        kind = file_system_of(fd)
        os.close(fd)
    return f"name a directory on another file system{f' than this one ({kind})' if kind else ''}"
