"""A directory that another user may own: what we do in it happens in it, and to our own files.

The owner of a directory may rename and replace what is in it, and may put a link to somewhere else
at its own path, between any two system calls of ours. So:

    the directory is opened once, and names in it are looked up by its descriptor
    new files are made with O_EXCL, and links are never followed (O_NOFOLLOW)
    a file of an earlier program is taken over only if it is the very file that its journal names:
    same device, inode and owner, and no second name
    only what we have made is removed, by its device and inode: see removal.py
    after giving a file its name, we check that the name leads to that file

The owner can still replace a file later. What we say of a file was true when we said it. What our
programs obey is read only from trusted places: see trusted_places.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from types import TracebackType

from migrate.files.identity import Identity, entry_is, identity_of
from migrate.files.removal import remove_file, remove_in_thread, remove_tree
from migrate.files.trust import ACCESS_LIST
from migrate.files.walk import NO_LINK, walk_to_directory

SUFFIX = ".xbmigrate"  # of all hidden names
DEFAULT_ACCESS_LIST = "system.posix_acl_default"
_RENAME_NOREPLACE = 1  # linux/fs.h
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# The file system has no such operation, or not with this flag.
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EMLINK)
_NO_UNNAMED = (*_UNSUPPORTED, errno.EISDIR, errno.ENOENT, errno.EACCES)


class Directory:
    """An open directory.

    path    -- absolute
    fd      -- good for looking up names alone (O_PATH)
    trusted -- refuse it unless only root and we can write in it or replace it

    Every name that a method takes is that of an entry of this directory. All methods raise OSError.
    """

    def __init__(self, path: str, *, trusted: bool = False) -> None:
        self.path = os.path.abspath(path)
        self.fd = walk_to_directory(self.path, trusted=trusted)
        self._owner = -1
        self._has_unnamed: bool | None = None

    def close(self) -> None:
        """Close the descriptor. May be called again."""
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
        """Its device and inode."""
        return identity_of(os.fstat(self.fd))

    @property
    def owner(self) -> int:
        """The user that our new files belong to here: some file systems know only one user."""
        if self._owner < 0:
            fd, name = self.create_unnamed_file(), f".{secrets.token_hex(8)}.try"
            if fd < 0:
                fd = self.create_file(name)
                self.remove_file(name, identity_of(os.fstat(fd)))
            self._owner = os.fstat(fd).st_uid
            os.close(fd)
        return self._owner

    def sync(self) -> None:
        """Bring the names in it to the disk."""
        sync_directory(self.fd)

    def names(self) -> list[str]:
        """List its entries."""
        fd = _listable(self.fd)
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    # -- files

    def create_file(self, name: str, mode: int = 0o600) -> int:
        """Create a file and open it to read and write. It has no access list."""
        return _without_access_list(os.open(name, _NEW, mode, dir_fd=self.fd))

    def create_unnamed_file(self) -> int:
        """Create a file without a name, to be given one by `link`.

        Returns a descriptor, or -1 if the file system has no such files, or if one could
        not be given a name later (no /proc, no hard links).
        """
        try:
            if self._has_unnamed is None:
                self._has_unnamed = self._try_unnamed()
            return self._create_unnamed() if self._has_unnamed else -1
        except OSError as error:
            if error.errno not in _NO_UNNAMED:
                raise
            self._has_unnamed = False
            return -1

    def _try_unnamed(self) -> bool:
        fd, name = self._create_unnamed(), f".{secrets.token_hex(8)}.try"
        try:
            self.link(fd, name)  # a file that has lost its last name cannot be linked again
            remove_file(self.fd, name, identity_of(os.fstat(fd)))
        finally:
            os.close(fd)
        return True

    def _create_unnamed(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE
        return _without_access_list(os.open(".", flags, 0o600, dir_fd=self.fd))

    def reopen_file(self, name: str, identity: Identity, owner: int | None = None) -> int:
        """Open the file of an earlier program of ours, to read and write.

        identity -- that its journal names
        owner    -- a user whom that program may have given the file to

        Raises OSError (ESTALE) if another file has the name.
        """
        fd = os.open(name, os.O_RDWR | NO_LINK, dir_fd=self.fd)
        status = os.fstat(fd)
        ours = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
        ours = ours and status.st_uid in (owner, self.owner)
        if not ours or identity_of(status) != identity:
            os.close(fd)
            raise _replaced(name)
        return fd

    def open_existing(self, name: str) -> int:
        """Open an entry of any kind except a link, to read and write."""
        try:
            return os.open(name, os.O_RDWR | NO_LINK, dir_fd=self.fd)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise OSError(errno.ELOOP, f"{name} is a symbolic link: name the file itself") from None

    @contextlib.contextmanager
    def reading(self, path: str) -> Iterator[int]:
        """Open a regular file in it, or in a directory in it, to read. Follow no link."""
        *inner, name = path.split("/")
        with contextlib.ExitStack() as stack:
            directory = self
            for one in inner:
                directory = stack.enter_context(directory.open_directory(one))
            fd = os.open(name, os.O_RDONLY | NO_LINK, dir_fd=directory.fd)
            stack.callback(os.close, fd)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file")
            yield fd

    def lstat(self, name: str) -> os.stat_result:
        """Return the status of an entry; of a link, its own."""
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False)

    def exists(self, name: str) -> bool:
        """Return whether an entry has that name, if only a link that leads nowhere."""
        try:
            self.lstat(name)
        except FileNotFoundError:
            return False
        return True

    def entry_is(self, name: str, identity: Identity) -> bool:
        """Return whether an entry is one certain file. Raises nothing."""
        return entry_is(self.fd, name, identity)

    # -- names

    def link(self, fd: int, name: str) -> None:
        """Give an open file another name, or its first one."""
        # linkat(2) must be called, which follows the link in /proc: os.link calls it only if it is
        # given a directory.
        own = os.open("/proc/self/fd", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.link(str(fd), name, src_dir_fd=own, dst_dir_fd=self.fd, follow_symlinks=True)
        finally:
            os.close(own)

    def rename(self, identity: Identity, old: str, new: str, *, overwrite: bool) -> None:
        """Rename one certain file.

        Raises FileExistsError if something has the new name and is not to be overwritten, and
        OSError (ESTALE) if another file was put in the place of ours.
        """
        if not self.entry_is(old, identity):
            raise _replaced(old)
        try:
            if overwrite:
                os.rename(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            else:
                self.rename_noreplace(old, new)
        except OSError:
            # A file server may have renamed it, and say that it failed.
            if not self.entry_is(new, identity):
                raise
        if not self.entry_is(new, identity):
            raise _replaced(new)

    def rename_noreplace(self, old: str, new: str) -> None:
        """Rename an entry. Raises FileExistsError if something has the new name.

        If the file system has neither RENAME_NOREPLACE nor hard links, a small file that contains
        the old name has the new one for an instant. If a crash leaves that file, the next attempt
        recognizes it by its contents.
        """
        ways: tuple[Callable[[str, str], None], ...] = (
            self._renameat2, self._link_and_unlink, self._reserve_and_rename,
        )  # fmt: skip
        for number, way in enumerate(ways, 1):
            try:
                way(old, new)
                return
            except OSError as error:
                if error.errno not in _UNSUPPORTED or number == len(ways):
                    raise

    def _renameat2(self, old: str, new: str) -> None:
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
            self.remove_file(old, identity_of(self.lstat(new)))

    def _reserve_and_rename(self, old: str, new: str) -> None:
        contents = os.fsencode(old)
        try:
            fd = self.create_file(new)
            reserved = identity_of(os.fstat(fd))
        except FileExistsError:
            if not self._contains(new, contents):
                raise
            fd, reserved = -1, identity_of(self.lstat(new))
        try:
            if fd >= 0:
                with open(fd, "wb") as file:
                    file.write(contents)
            os.rename(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except OSError:
            self.remove_file(new, reserved)
            raise

    def _contains(self, name: str, contents: bytes) -> bool:
        with contextlib.suppress(OSError):
            fd = os.open(name, os.O_RDONLY | NO_LINK, dir_fd=self.fd)
            with open(fd, "rb") as file:
                return file.read(len(contents) + 1) == contents
        return False

    def remove_file(self, name: str, identity: Identity) -> None:
        """Remove a file that we have made, if it still has the name. Raises nothing."""
        with contextlib.suppress(OSError):
            remove_file(self.fd, name, identity)

    def remove_tree(self, name: str, identity: Identity) -> None:
        """Remove a directory that we have made, with all that is in it, as far as possible, if it
        still has the name. Raises nothing."""
        remove_tree(self.fd, name, identity)

    def remove_later(self, name: str, identity: Identity) -> None:
        """Remove a directory in a thread: see `remove_in_thread`. Raises nothing.

        This directory may be closed meanwhile.
        """
        with contextlib.suppress(OSError, RuntimeError):  # there may be no more threads
            path = os.path.join(self.path, name)
            remove_in_thread(os.dup(self.fd), name, identity, path)

    # -- directories

    def create_directory(self, name: str) -> Directory:
        """Create a directory for our user alone, and open it."""
        os.mkdir(name, 0o700, dir_fd=self.fd)
        made = self.open_directory(name)
        try:
            if os.fstat(made.fd).st_uid != self.owner or made.names():
                raise _replaced(name)  # by another directory that was there before
            os.close(_without_access_list(_listable(made.fd)))
            return made
        except OSError:
            made.close()
            raise

    def open_directory(self, name: str) -> Directory:
        """Open a directory in this one. No link is followed."""
        inner = Directory.__new__(Directory)
        inner.path = os.path.join(self.path, name)
        inner._owner, inner._has_unnamed = self._owner, self._has_unnamed
        inner.fd = os.open(name, os.O_PATH | os.O_DIRECTORY | NO_LINK, dir_fd=self.fd)
        return inner


def _without_access_list(fd: int) -> int:
    """Remove the access lists that a new file or directory inherits from its directory.

    The owner of that directory wrote them (setfacl -d), and does not decide who may read a guest.
    Returns `fd`. Raises OSError; `fd` is closed then.
    """
    try:
        for name in (ACCESS_LIST, DEFAULT_ACCESS_LIST):
            try:
                os.getxattr(fd, name)
            except OSError:
                continue  # the file has none, or the file system
            os.removexattr(fd, name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _replaced(name: str) -> OSError:
    return OSError(
        errno.ESTALE,
        f"{name} was removed or replaced meanwhile: leave the directory alone until the guest is "
        "there",
    )


def sync_directory(fd: int) -> None:
    """Bring the names in a directory to the disk.

    fd -- of the directory; O_PATH is enough
    """
    listable = _listable(fd)
    try:
        os.fsync(listable)
    finally:
        os.close(listable)


def _listable(fd: int) -> int:
    return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
