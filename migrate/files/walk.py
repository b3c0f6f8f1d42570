"""Open what a path leads to, step by step, through no symbolic link of another user.

The kernel follows every link on a path, so another user who can write in one directory on the way
can lead us anywhere. Here each name is looked up in the directory that the step before has opened,
and a link is followed only if it belongs to root or to us.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from migrate.files.trust import check_trusted, is_trusted, may_be_root

MAX_LINKS = 40  # in a row; the kernel has the same limit (MAXSYMLINKS)
# An entry is opened, and not what it leads to; a FIFO does not let us wait.
NO_LINK = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def walk(path: str, *, trusted: bool, start: int = -1) -> int:
    """Open what `path` leads to, from the root or from the open directory `start`.

    trusted -- refuse every directory, the last one included, whose entries another user than root
               and us can replace

    Returns a descriptor that says what it is (O_PATH) or can list a directory. Raises OSError.
    """
    links, names = 0, path.split("/")[::-1]
    fd = _open_root() if path.startswith("/") else os.dup(start)
    try:
        while True:
            while names and names[-1] in ("", "."):
                names.pop()
            if trusted and stat.S_ISDIR(os.fstat(fd).st_mode):
                check_trusted(fd, last=not names, sticky=True)
            if not names:
                return fd
            inner, target = _step(fd, names.pop())
            os.close(fd)
            fd = inner
            names += target.split("/")[::-1]
            links += bool(target)
            if links > MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    except BaseException:
        os.close(fd)
        raise


def walk_to_directory(path: str, *, trusted: bool, start: int = -1) -> int:
    """Open a directory: see `walk`. With `trusted`, no other user may write in it either."""
    fd = walk(path, trusted=trusted, start=start)
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        if trusted:
            check_trusted(fd, last=True)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def existing_file(path: str) -> Iterator[int]:
    """Open what is at `path`, and follow a link there.

    The descriptor says what the file is and can be reopened (O_PATH), so nothing is opened for
    reading before its kind is known. Links on the way are followed as `walk` follows them. A link
    at the end may also belong to the owner of the file that it leads to: that user could have moved
    the file there. Raises OSError.
    """
    where, name = os.path.split(os.path.abspath(path))
    with contextlib.ExitStack() as stack:

        def closing(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        at, link_owners = closing(walk_to_directory(where, trusted=False)), dict[int, str]()
        for _ in range(MAX_LINKS + 1):
            fd = closing(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at))
            status = os.fstat(fd)
            if stat.S_ISLNK(status.st_mode):
                if not is_trusted(status.st_uid):
                    link_owners[status.st_uid] = name
                if target := _target(fd, status):
                    directory, name = os.path.split(target)
                    at = closing(walk_to_directory(directory, trusted=False, start=at))
                    continue
                fd = closing(os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=at))
                status = os.fstat(fd)
            for owner, link in link_owners.items():
                if owner != status.st_uid:
                    raise _foreign_link(link, owner, "file")
            yield fd
            return
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)


def _open_root() -> int:
    return os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _step(fd: int, name: str) -> tuple[int, str]:
    """Open an entry of a directory; return it, and the rest of the path that a link leads to."""
    # To open a directory for listing mounts what autofs mounts on demand; O_PATH does not.
    with contextlib.suppress(OSError):
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | NO_LINK, dir_fd=fd), ""
    inner = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    status = os.fstat(inner)
    if not stat.S_ISLNK(status.st_mode):
        return inner, ""
    try:
        if not is_trusted(status.st_uid) and not may_be_root(status.st_uid):
            raise _foreign_link(name, status.st_uid, "directory")
        target = _target(inner, status)
    finally:
        os.close(inner)
    if not target:
        return os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=fd), ""
    return _open_root() if target.startswith("/") else os.dup(fd), target


def _target(link: int, status: os.stat_result) -> str:
    """Return the path in an open symbolic link; "" for a link of /proc, which no path replaces."""
    target = os.readlink("", dir_fd=link)
    return target if status.st_size == len(os.fsencode(target)) else ""


def _foreign_link(name: str, owner: int, what: str) -> OSError:
    return OSError(
        errno.ELOOP,
        f"{name} is a symbolic link of user {owner}, who could have it lead anywhere: name the "
        f"{what} itself",
    )
