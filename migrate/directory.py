"""A directory that is held: whoever owns it, what we do in it is done in it, and to our own files.

Another user who owns a directory may rename and replace what is in it, and at its own name put
a link to somewhere else, between any two looks of ours. So it is opened once, and names in it are
looked up by its descriptor; files are made new (O_EXCL), links are never followed (O_NOFOLLOW),
and what an earlier program has left is taken over only where it is the very file (device, inode,
owner, one name). Who gives a file its name looks afterwards whether that file has it.

In a directory of another user nothing keeps him from replacing a file later: what is said of it
was so when it was said. What programs obey (journals, certificates) is therefore read only from a
trusted place: each directory on the way belongs to root or to us, and nobody else can write there,
or it is sticky, as /tmp is. Then nobody else can replace anything on the way, then or later.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import grp
import os
import pwd
import secrets
import shlex
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

SUFFIX = ".xbmigrate"  # of all hidden names
MAX_LINKS = 40  # in a row, as the kernel has it
# A directory of others may grow while it is removed: what is left of it then stays.
DROP_SECONDS = 60.0
_RENAME_NOREPLACE = 1
_ACCESS, _DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_THERE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LISTED = os.O_RDONLY | os.O_DIRECTORY | _THERE
# The file system has no such operation, or not with this flag.
_LACKING = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EMLINK)
_NO_NAMELESS = (*_LACKING, errno.EISDIR, errno.ENOENT, errno.EACCES)

Identity = tuple[int, int]
"""Device and inode."""


class Directory:
    """`path`, opened; `fd` is good for looking names up alone (O_PATH).

    trusted -- refuse it unless root and we alone can write in it, or replace it

    All names are of entries of it. All methods raise OSError.
    """

    def __init__(self, path: str, *, trusted: bool = False) -> None:
        self.path = os.path.abspath(path)
        self.fd = _opened(self.path, trusted=trusted)
        self._owner = -1
        self._nameless: bool | None = None

    def close(self) -> None:
        """May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Directory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    @property
    def identity(self) -> Identity:
        return identity_of(os.fstat(self.fd))

    @property
    def owner(self) -> int:
        """The user that files of ours belong to here: some file systems know but one."""
        if self._owner < 0:
            fd, name = self.make_nameless(), f".{secrets.token_hex(8)}.try"
            if fd < 0:
                fd = self.make(name)
                self.unlink(name)
            self._owner = os.fstat(fd).st_uid
            os.close(fd)
        return self._owner

    def sync(self) -> None:
        """What names there are is on the disk."""
        _sync(self.fd)

    def names(self) -> list[str]:
        fd = _readable(self.fd)
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    # -- files

    def make(self, name: str, mode: int = 0o600) -> int:
        """A new file, to read and write, with no access list: see `_without_acl`."""
        return _without_acl(os.open(name, _NEW, mode, dir_fd=self.fd))

    def make_nameless(self) -> int:
        """A new file without a name, for `link`; -1 where there is no such thing, or nothing that
        could give it a name later (no /proc, no links)."""
        try:
            if self._nameless is None:
                self._nameless = self._tried_nameless()
            return self._new_nameless() if self._nameless else -1
        except OSError as error:
            if error.errno not in _NO_NAMELESS:
                raise
            self._nameless = False
            return -1

    def _tried_nameless(self) -> bool:
        fd, name = self._new_nameless(), f".{secrets.token_hex(8)}.try"
        try:
            self.link(fd, name)  # and a file that has lost its name never gets one again
            self.unlink(name)
        finally:
            os.close(fd)
        return True

    def _new_nameless(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE
        return _without_acl(os.open(".", flags, 0o600, dir_fd=self.fd))

    def take(self, name: str, known: Identity, owner: int | None = None) -> int:
        """A file that an earlier program of ours has left, to read and write.

        owner -- that program may have given it to this user
        """
        fd = os.open(name, os.O_RDWR | _THERE, dir_fd=self.fd)
        there = os.fstat(fd)
        mine = stat.S_ISREG(there.st_mode) and there.st_nlink == 1
        if not mine or identity_of(there) != known or there.st_uid not in (owner, self.owner):
            os.close(fd)
            raise _replaced(name)
        return fd

    def existing(self, name: str) -> int:
        """What has a name, whatever it is but a link, to read and write."""
        try:
            return os.open(name, os.O_RDWR | _THERE, dir_fd=self.fd)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise OSError(errno.ELOOP, f"{name} is a symbolic link: name the file itself") from None

    @contextlib.contextmanager
    def opened(self, path: str) -> Iterator[int]:
        """A plain file of it, or of a directory in it, to read: no link is followed."""
        *within, name = path.split("/")
        with contextlib.ExitStack() as stack:
            directory = self
            for one in within:
                directory = stack.enter_context(directory.inner(one))
            fd = os.open(name, os.O_RDONLY | _THERE, dir_fd=directory.fd)
            stack.callback(os.close, fd)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "it is no plain file")
            yield fd

    def look(self, name: str) -> os.stat_result:
        """Of the entry itself, where it is a link too."""
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False)

    def there(self, name: str) -> bool:
        """Whether an entry has that name, be it a link that leads nowhere."""
        try:
            self.look(name)
        except FileNotFoundError:
            return False
        return True

    def has(self, name: str, known: Identity) -> bool:
        """Whether a name is that of one certain file."""
        with contextlib.suppress(OSError):
            return identity_of(self.look(name)) == known
        return False

    # -- names

    def link(self, fd: int, name: str) -> None:
        """Gives an open file another name, or its first one."""
        # A directory must be given for linkat(2) to be used, which follows the link.
        own = os.open("/proc/self/fd", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.link(str(fd), name, src_dir_fd=own, dst_dir_fd=self.fd, follow_symlinks=True)
        finally:
            os.close(own)

    def give_name(self, known: Identity, old: str, new: str, *, overwrite: bool) -> None:
        """Renames one certain file. Raises FileExistsError where something has the name, unless it
        is to be overwritten; where another file was put in its place, an OSError that says so."""
        if not self.has(old, known):
            raise _replaced(old)
        try:
            if overwrite:
                os.rename(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            else:
                self.rename_new(old, new)
        except OSError:
            if not self.has(new, known):  # a file server may have done it, and say that it failed
                raise
        if not self.has(new, known):
            raise _replaced(new)

    def rename_new(self, old: str, new: str) -> None:
        """Renames a file. Raises FileExistsError where something has the name.

        Where the file system can do neither RENAME_NOREPLACE nor hard links, a file with the old
        name in it takes the new one first, for an instant. One that a crash has left is known by
        that.
        """
        ways = (self._rename_noreplace, self._link_and_unlink, self._take_and_rename)
        for number, way in enumerate(ways, 1):
            try:
                way(old, new)
                return
            except OSError as error:
                if error.errno not in _LACKING or number == len(ways):
                    raise

    def _rename_noreplace(self, old: str, new: str) -> None:
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if rename is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        names = os.fsencode(old), os.fsencode(new)
        if rename(self.fd, names[0], self.fd, names[1], _RENAME_NOREPLACE):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), new)

    def _link_and_unlink(self, old: str, new: str) -> None:
        os.link(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd, follow_symlinks=False)
        with contextlib.suppress(OSError):
            self.unlink(old)

    def _take_and_rename(self, old: str, new: str) -> None:
        ours = os.fsencode(old)
        try:
            fd = self.make(new)
        except FileExistsError:
            if not self._says(new, ours):
                raise
            fd = -1
        try:
            if fd >= 0:
                with open(fd, "wb") as file:
                    file.write(ours)
            os.rename(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except OSError:
            self.unlink(new)
            raise

    def _says(self, name: str, text: bytes) -> bool:
        """Whether a file has this text in it, and no more."""
        with contextlib.suppress(OSError):
            fd = os.open(name, os.O_RDONLY | _THERE, dir_fd=self.fd)
            with open(fd, "rb") as file:
                return file.read(len(text) + 1) == text
        return False

    def unlink(self, name: str) -> None:
        os.unlink(name, dir_fd=self.fd)

    def drop(self, name: str, known: Identity | None = None) -> None:
        """Removes a file, or a directory with all that is in it, where it can be: one certain
        one, or whatever has the name. No link in it is followed. Raises nothing."""
        with contextlib.suppress(OSError):
            there = self.look(name)
            if known is not None and identity_of(there) != known:
                return
            if not stat.S_ISDIR(there.st_mode):
                self.unlink(name)
                return
            fd = os.open(name, _LISTED, dir_fd=self.fd)
            try:
                if identity_of(os.fstat(fd)) == identity_of(there):
                    _Emptying(fd).run()
            finally:
                os.close(fd)
            os.rmdir(name, dir_fd=self.fd)

    def drop_later(self, name: str, known: Identity) -> None:
        """Does what `drop` does in a thread, which the program waits for at its end. This
        directory may be closed meanwhile. Raises nothing."""

        def run(held: Directory) -> None:
            with held:
                held.drop(name, known)

        with contextlib.suppress(OSError, RuntimeError):  # there may be no more threads
            threading.Thread(target=run, args=(self.inner("."),), name="drop").start()

    # -- directories

    def make_directory(self, name: str) -> Directory:
        """A new one, of ours alone."""
        os.mkdir(name, 0o700, dir_fd=self.fd)
        made = self.inner(name)
        try:
            if os.fstat(made.fd).st_uid != self.owner or made.names():
                raise _replaced(name)  # by another one that is there
            os.close(_without_acl(_readable(made.fd)))
            return made
        except OSError:
            made.close()
            raise

    def inner(self, name: str) -> Directory:
        """One in it, and no link."""
        inner = Directory.__new__(Directory)
        inner.path = os.path.join(self.path, name)
        inner._owner, inner._nameless = self._owner, self._nameless
        inner.fd = os.open(name, os.O_PATH | os.O_DIRECTORY | _THERE, dir_fd=self.fd)
        return inner


class _Emptying:
    """Removes all that is in an open directory, however deep, for DROP_SECONDS at most.

    A directory in it that is not empty is moved to the top under a number, to be emptied when it
    is its turn. So two directories are open at most, and two numbers are all that is remembered.
    What something is mounted on cannot be moved, and stays.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._mark = f".{secrets.token_hex(8)}."
        self._moved = 0
        self._end = time.monotonic() + DROP_SECONDS

    def run(self) -> None:
        self._empty(self._top)
        turn = 0
        while turn < self._moved and not self._late():
            name = f"{self._mark}{turn}"
            turn += 1
            with contextlib.suppress(OSError):
                fd = os.open(name, _LISTED, dir_fd=self._top)
                try:
                    self._empty(fd)
                finally:
                    os.close(fd)
                os.rmdir(name, dir_fd=self._top)

    def _late(self) -> bool:
        return time.monotonic() > self._end

    def _empty(self, fd: int) -> None:
        """Removes or moves each entry. Some file systems show one more where others go: it looks
        until there is nothing left that it could take."""
        took = True
        while took and not self._late():
            took = False
            with contextlib.suppress(OSError), os.scandir(fd) as entries:
                for entry in entries:
                    if self._late():
                        return
                    took |= not entry.name.startswith(self._mark) and self._take(fd, entry)

    def _take(self, fd: int, entry: os.DirEntry[str]) -> bool:
        """Whether it is gone from there."""
        try:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=fd)
                return True
            with contextlib.suppress(OSError):
                os.rmdir(entry.name, dir_fd=fd)
                return True
            name = f"{self._mark}{self._moved}"
            os.rename(entry.name, name, src_dir_fd=fd, dst_dir_fd=self._top)
        except OSError:
            return False
        self._moved += 1
        return True


@dataclass(frozen=True)
class Left:
    """What an earlier program of ours has left under a hidden name, as its journal has it.

    name  -- in `directory`, where the output `path` is too
    known -- device and inode
    """

    path: str
    directory: str
    name: str
    known: Identity

    @classmethod
    def read(cls, facts: dict[str, Any]) -> Left:
        """From the facts of a place. Raises ValueError where they are none that we write."""
        path, hidden, known = facts.get("path"), facts.get("temporary"), facts.get("inode")
        if not isinstance(path, str) or not isinstance(hidden, str) or not os.path.isabs(path):
            raise ValueError("no paths")
        directory, name = os.path.split(hidden)
        beside = directory == os.path.dirname(path) and path == os.path.normpath(path)
        if not (beside and name.startswith(".") and name.endswith(SUFFIX)):
            raise ValueError("no hidden name beside the output")
        return cls(path, directory, name, read_identity(known))

    @property
    def there(self) -> bool:
        with contextlib.suppress(OSError), Directory(self.directory) as directory:
            return directory.has(self.name, self.known)
        return False

    def drop(self) -> None:
        """Removes it, where it is there and can be removed."""
        with contextlib.suppress(OSError), Directory(self.directory) as directory:
            directory.drop(self.name, self.known)


def _without_acl(fd: int) -> int:
    """Takes from something new what access lists it has: the owner of the directory, who wrote
    them (setfacl -d), is not asked who may read a guest. Raises OSError; `fd` is closed then."""
    try:
        for name in (_ACCESS, _DEFAULT):
            try:
                os.getxattr(fd, name)
            except OSError:
                continue  # it has none, or the file system
            os.removexattr(fd, name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def identity_of(there: os.stat_result) -> Identity:
    return there.st_dev, there.st_ino


def read_identity(found: object) -> Identity:
    """From a journal. Raises ValueError."""
    if isinstance(found, list) and [type(one) for one in found] == [int, int]:
        return found[0], found[1]
    raise ValueError("no device and inode")


def _replaced(name: str) -> OSError:
    return OSError(
        errno.ESTALE,
        f"{name} was removed or replaced meanwhile: leave the directory alone until the guest is "
        "there",
    )


@contextlib.contextmanager
def existing_file(path: str) -> Iterator[int]:
    """What is at `path`, a link followed: a descriptor that says what it is and can be reopened
    (O_PATH), so that nothing is opened for reading before its kind is known.

    Links on the way are followed as a `Directory` has them; one at the end too if it belongs to
    the owner of what it leads to: that user could have moved the file there. Raises OSError.
    """
    where, name = os.path.split(os.path.abspath(path))
    with contextlib.ExitStack() as stack:

        def held(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        at, theirs = held(_opened(where, trusted=False)), dict[int, str]()
        for _ in range(MAX_LINKS + 1):
            fd = held(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at))
            there = os.fstat(fd)
            if stat.S_ISLNK(there.st_mode):
                if not is_trusted(there.st_uid):
                    theirs[there.st_uid] = name
                if target := _target(fd, there):
                    directory, name = os.path.split(target)
                    at = held(_opened(directory, trusted=False, start=at))
                    continue
                fd = held(os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=at))
                there = os.fstat(fd)
            for owner, link in theirs.items():
                if owner != there.st_uid:
                    raise _foreign_link(link, owner, "file")
            yield fd
            return
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)


def make_trusted(path: str) -> Directory:
    """Open a trusted directory; first make what is missing of it, with mode 0700, and bring the
    new names to the disk. Raises OSError."""
    path = os.path.abspath(path)
    with contextlib.suppress(FileNotFoundError):
        return Directory(path, trusted=True)
    _make(path)
    return Directory(path, trusted=True)


def _make(path: str) -> None:
    missing: list[str] = []
    above = path
    while True:
        above, name = os.path.split(above)
        missing.append(name)
        try:
            fd = _walked(above, trusted=True)
            break
        except FileNotFoundError:
            continue
    try:
        for name in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another program of ours was faster
                os.mkdir(name, 0o700, dir_fd=fd)
            with contextlib.suppress(PermissionError):  # who may write there need not read it
                _sync(fd)
            inner = _walked(name, trusted=True, start=fd)
            os.close(fd)
            fd = inner
    finally:
        os.close(fd)


def open_trusted(path: str) -> int:
    """Open a plain file to read. Raises OSError, also where somebody other than root and us could
    have written or replaced it."""
    held = _walked(os.path.join(os.getcwd(), path), trusted=True)
    try:
        there = os.fstat(held)
        if stat.S_ISDIR(there.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(there.st_mode):
            raise OSError(errno.EINVAL, "it is no plain file")
        _check_trusted(held, last=True)
        return os.open(f"/proc/self/fd/{held}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(held)


def leads_to(path: str, known: Identity) -> bool:
    """Whether an absolute path leads to one certain directory, and nobody but root and us can make
    it lead elsewhere."""
    with contextlib.suppress(OSError):
        fd = _walked(path, trusted=True)
        try:
            return identity_of(os.fstat(fd)) == known
        finally:
            os.close(fd)
    return False


def distrust(fd: int, *, sticky: bool = False) -> str:
    """Say why somebody other than root and us could write to an open file or directory; "" where
    nobody can.

    sticky -- let a directory pass where each user can replace his own entries only
    """
    there = os.fstat(fd)
    mode = stat.S_IMODE(there.st_mode)
    shared = bool(mode & 0o022) and not (sticky and mode & stat.S_ISVTX)
    if not is_trusted(there.st_uid) and (shared or not _is_hidden_root(there.st_uid)):
        return f"it belongs to user {there.st_uid}"
    if not shared:
        return ""
    if not mode & 0o002 and _is_private(there.st_gid) and not _has_access_list(fd):
        return ""  # what a user with umask 002 makes
    return f"others may write there (mode {mode:o})"


def is_trusted(uid: int) -> bool:
    """Whether a user is root, or the one that we run as."""
    return uid in (0, os.geteuid())


def _is_hidden_root(uid: int) -> bool:
    """Whether a user may be root, whom the namespace of users that we are in does not show: what
    is his there belongs to "nobody", `/` for one."""
    try:
        overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
        lines = Path("/proc/self/uid_map").read_text().splitlines()
    except (OSError, ValueError):
        return False
    return uid == overflow and not any(line.split()[1] == "0" for line in lines)


def _is_private(gid: int) -> bool:
    """Whether a group is a user's own, who is us: it has his name, and nobody else is in it."""
    with contextlib.suppress(KeyError):
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
        ours = user.pw_gid == gid and group.gr_name == user.pw_name
        names = {*group.gr_mem, *(one.pw_name for one in pwd.getpwall() if one.pw_gid == gid)}
        return ours and user.pw_uid != 0 and names <= {user.pw_name}
    return False


def _has_access_list(fd: int) -> bool:
    """Or may have: with one, the mode does not say who the group's rights are for."""
    try:
        os.getxattr(f"/proc/self/fd/{fd}", "system.posix_acl_access")
    except OSError as error:
        return error.errno not in (errno.ENODATA, errno.EOPNOTSUPP)
    return True


def _check_trusted(fd: int, *, last: bool, sticky: bool = False) -> None:
    """Raises PermissionError, with what to do, where an open file or directory is not trusted.

    last -- it is what was named, and not a directory on the way there
    """
    if not (why := distrust(fd, sticky=sticky)):
        return
    path, there = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd)
    shown = shlex.quote(path)
    remedy = f"`chmod go-w {shown}` mends that"
    if not is_trusted(there.st_uid):
        remedy = f"`chown {os.geteuid()} {shown}; chmod go-w {shown}` mends that"
        if not last:
            remedy = "name another place"
    elif stat.S_ISDIR(there.st_mode) and there.st_mode & stat.S_ISVTX:
        remedy = "name a directory in it"
    raise PermissionError(errno.EPERM, f"{path} is not trusted, because {why}: {remedy}")


def _sync(fd: int) -> None:
    readable = _readable(fd)
    try:
        os.fsync(readable)
    finally:
        os.close(readable)


def _readable(fd: int) -> int:
    return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)


def _opened(path: str, *, trusted: bool, start: int = -1) -> int:
    fd = _walked(path, trusted=trusted, start=start)
    try:
        there = os.fstat(fd)
        if not stat.S_ISDIR(there.st_mode):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        if trusted:
            _check_trusted(fd, last=True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _walked(path: str, *, trusted: bool, start: int = -1) -> int:
    """Open what has this path, from the root or from an open directory. Links to it, and on the
    way to it, are followed where they are of somebody who is trusted with that.

    trusted -- refuse directories, it too, whose entries somebody other than root and us can replace
    """
    links, names = 0, path.split("/")[::-1]
    fd = _root() if path.startswith("/") else os.dup(start)
    try:
        while True:
            while names and names[-1] in ("", "."):
                names.pop()
            if trusted and stat.S_ISDIR(os.fstat(fd).st_mode):
                _check_trusted(fd, last=not names, sticky=True)
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


def _root() -> int:
    return os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _step(fd: int, name: str) -> tuple[int, str]:
    """An entry of a directory, opened; and where it is a link, where to go on from there."""
    with contextlib.suppress(OSError):  # what is mounted when it is looked at, is mounted by this
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | _THERE, dir_fd=fd), ""
    inner = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    there = os.fstat(inner)
    if not stat.S_ISLNK(there.st_mode):
        return inner, ""
    try:
        if not is_trusted(there.st_uid) and not _is_hidden_root(there.st_uid):
            raise _foreign_link(name, there.st_uid, "directory")
        target = _target(inner, there)
    finally:
        os.close(inner)
    if not target:
        return os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=fd), ""
    return _root() if target.startswith("/") else os.dup(fd), target


def _target(link: int, there: os.stat_result) -> str:
    """Where an open symbolic link leads to; "" for one of /proc, which leads where no name may."""
    target = os.readlink("", dir_fd=link)
    return target if there.st_size == len(os.fsencode(target)) else ""


def _foreign_link(name: str, owner: int, what: str) -> OSError:
    return OSError(
        errno.ELOOP,
        f"{name} is a symbolic link of user {owner}, who could have it lead anywhere: name the "
        f"{what} itself",
    )
