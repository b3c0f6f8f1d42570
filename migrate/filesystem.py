"""Files that get their name when they are whole, and what that needs of the file system.

    hidden_name    the name of a file until then, beside its own
    open_nameless  a file without any name, where the file system has such files
    rename_new     gives a file its own name, and never takes that of another
    try_directory  does all of it once, with a file of a few bytes, before a guest comes

Not every file system has hard links, files without a name, RENAME_NOREPLACE or shared mappings
(exFAT, FUSE, CIFS, hugetlbfs): what it says it is tells less than one try.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import secrets
import stat
from collections.abc import Callable

from migrate.errors import UsageError

SUFFIX = ".xbmigrate"
NAME_MAX = 255
PATH_MAX = 4095
TRY_BYTES = 4096
_RENAME_NOREPLACE = 1
_AT_FDCWD = -100
_GET_FLAGS = 0x80086601  # FS_IOC_GETFLAGS, on 64 bits
_IMMUTABLE, _APPEND_ONLY = 0x10, 0x20
# The file system has no such operation, or not with this flag.
_LACKING = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EMLINK)
_NO_NAMELESS = (*_LACKING, errno.EISDIR, errno.ENOENT, errno.EACCES)
# File systems whose files are questions to the kernel.
KERNELS_OWN = (
    "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "efivarfs", "fusectl", "mqueue",
    "proc", "pstore", "securityfs", "selinuxfs", "sysfs", "tracefs",
)  # fmt: skip


def hidden_name(path: str, what: str = "--output", spare: int = 0) -> str:
    """The path of a file until it is whole: hidden, beside `path`, as no other one is called.

    It begins with the name it will have, cut where the file system takes no more bytes.

    spare -- bytes that are to be added to it later

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


def open_nameless(directory: str) -> int:
    """A file of our own without a name, or -1 where there is no such thing, or nothing that could
    give it one later (no /proc, no links). Raises OSError."""
    beside = hidden_name(os.path.join(directory, "nameless"))
    try:
        fd = _new_nameless(directory)
        try:
            name_file(fd, beside)  # and a file that has lost its name never gets one again
            os.unlink(beside)
        finally:
            os.close(fd)
        return _new_nameless(directory)
    except OSError as error:
        if error.errno not in _NO_NAMELESS:
            raise
        return -1


def _new_nameless(directory: str) -> int:
    return os.open(directory, os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE, 0o600)


def name_file(fd: int, path: str) -> None:
    """Gives a file of `open_nameless` a name. Raises OSError."""
    # A directory must be given for linkat(2) to be used, which follows the link.
    own = os.open("/proc/self/fd", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.link(str(fd), path, src_dir_fd=own, follow_symlinks=True)
    finally:
        os.close(own)


def rename_new(old: str, new: str) -> None:
    """Renames a file. Raises FileExistsError where something has the name, and other OSErrors.

    Where the file system can do neither RENAME_NOREPLACE nor hard links, a file with the old name
    in it takes the new one first, for an instant. One that a crash has left is known by that.
    """
    for way in (_rename_noreplace, _link_and_unlink, _take_and_rename):
        try:
            way(old, new)
            return
        except OSError as error:
            if error.errno not in _LACKING or way is _take_and_rename:
                raise


def _rename_noreplace(old: str, new: str) -> None:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    names = os.fsencode(old), os.fsencode(new)
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), new)


def _link_and_unlink(old: str, new: str) -> None:
    os.link(old, new, follow_symlinks=False)
    with contextlib.suppress(OSError):
        os.unlink(old)


def _take_and_rename(old: str, new: str) -> None:
    ours = os.fsencode(os.path.basename(old))
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(new, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if not _says(new, flags, ours):
            raise
        fd = -1
    try:
        if fd >= 0:
            with open(fd, "wb") as file:
                file.write(ours)
        os.rename(old, new)
    except OSError:
        os.unlink(new)
        raise


def _says(path: str, flags: int, text: bytes) -> bool:
    """Whether a file has this text in it, and no more."""
    with contextlib.suppress(OSError), open(os.open(path, flags), "rb") as file:
        return file.read(len(text) + 1) == text
    return False


# ---------------------------------------------------------------- what is there


def kind_of(mode: int) -> str:
    """What a st_mode is of, in words."""
    kinds = (
        (stat.S_ISREG, "a file"), (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"), (stat.S_ISLNK, "a symbolic link"),
    )  # fmt: skip
    return next((name for is_kind, name in kinds if is_kind(mode)), "something else")


def file_system_of(fd: int) -> str:
    """The type of the file system that an open file is on, as mount(8) has it; "" if unknown."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open(f"/proc/self/fdinfo/{fd}") as lines:
            mount = next(line.split()[1] for line in lines if line.startswith("mnt_id:"))
        for words in _mounts():
            if words[0] == mount:
                return words[words.index("-") + 1]
    return ""


def _mounts() -> list[list[str]]:
    with open("/proc/self/mountinfo", errors="surrogateescape") as lines:
        return [line.split() for line in lines]


def is_mount_point(path: str) -> bool:
    """Whether something is mounted there: also a file, as containers do it."""
    shown = os.path.realpath(path)
    for plain, escaped in (("\\", "\\134"), (" ", "\\040"), ("\t", "\\011"), ("\n", "\\012")):
        shown = shown.replace(plain, escaped)
    with contextlib.suppress(OSError, IndexError):
        return any(words[4] == shown for words in _mounts())
    return False


def unchangeable(path: str) -> str:
    """The attribute that keeps a file or directory from being changed, by chattr(1); or ""."""
    flags = 0
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            answer = fcntl.ioctl(fd, _GET_FLAGS, bytes(8))
            flags = int.from_bytes(answer[:4], "little")
        finally:
            os.close(fd)
    if flags & _IMMUTABLE:
        return "immutable (chattr -i makes it changeable)"
    return "append-only (chattr -a makes it changeable)" if flags & _APPEND_ONLY else ""


def check_writable(directory: str, what: str) -> None:
    """Raises UsageError where nothing can be made in `directory`. `what` begins the sentence."""
    if not os.path.isdir(directory):
        raise UsageError(f"{what}: there is no directory {directory}")
    if os.statvfs(directory).f_flag & os.ST_RDONLY:
        raise UsageError(f"{what}: {directory} is on a file system that is mounted read-only")
    if found := unchangeable(directory):
        raise UsageError(f"{what}: the directory {directory} is {found}")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UsageError(f"{what}: no permission to write in {directory}")


def check_replaceable(path: str, what: str) -> None:
    """Raises UsageError where an existing file cannot give its name to another one."""
    if found := unchangeable(path):
        raise UsageError(f"{what}: the file there is {found}")
    if is_mount_point(path):
        raise UsageError(
            f"{what}: something is mounted at that name, so it cannot be replaced: mount the "
            "directory, not the file"
        )
    above, there = os.stat(os.path.dirname(os.path.abspath(path))), os.lstat(path)
    ours = os.geteuid() in (0, above.st_uid, there.st_uid)
    if above.st_mode & stat.S_ISVTX and not ours:
        raise UsageError(
            f"{what}: the file there belongs to user {there.st_uid}, and only that user may "
            "replace it in a directory with the sticky bit"
        )


def check_file(path: str, what: str) -> None:
    """Raises UsageError where a file cannot be written later. One that is there stays as it is."""
    try:
        if os.path.exists(path):
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC))
            return
        beside = hidden_name(path, what)
        os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        os.unlink(beside)
    except OSError as error:
        raise UsageError(f"{what} {path}: it cannot be written: {error.strerror}") from None


# ---------------------------------------------------------------- the try


def try_directory(
    path: str, what: str, more: Callable[[int], str] = lambda _fd: "", *, mapped: bool = True
) -> None:
    """Does with a file of ours beside `path` what the output will need, and removes it.

    more   -- what else is to be tried with the file; it returns why not, or ""
    mapped -- whether the output is written through a shared mapping

    Raises UsageError that says what cannot be done there.
    """
    directory = os.path.dirname(os.path.abspath(path))
    name, renamed = hidden_name(path), hidden_name(path)
    doing = "make a file"
    try:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            doing = "write(2) to a file"
            os.pwrite(fd, bytes(TRY_BYTES), 0)
            doing = "set the size of a file"
            os.ftruncate(fd, TRY_BYTES + 1)
            os.ftruncate(fd, TRY_BYTES)
            doing = "give a file its room"
            os.posix_fallocate(fd, 0, TRY_BYTES)
            if mapped:
                doing = "map a file for writing"
                with mmap.mmap(fd, TRY_BYTES) as view:
                    view[0] = 1
            doing = "bring a file to the disk (fsync)"
            os.fdatasync(fd)
            os.fsync(fd)
            doing = "rename a file"
            rename_new(name, renamed)
            name = renamed
            why = more(fd)
        finally:
            os.close(fd)
            for one in (name, renamed):
                with contextlib.suppress(OSError):
                    os.unlink(one)
    except OSError as error:
        raise UsageError(
            f"{what}: it is not possible to {doing} in {directory}: {error.strerror}: "
            f"{_advice(error.errno, directory)}"
        ) from None
    if why:
        raise UsageError(f"{what}: {why}")


def _advice(number: int | None, directory: str) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "make room there, or name another directory"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "name a directory that can be written"
    kind = ""
    with contextlib.suppress(OSError):
        fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        kind = file_system_of(fd)
        os.close(fd)
    return f"name a directory on another file system{f' than this one ({kind})' if kind else ''}"
