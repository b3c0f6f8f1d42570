"""The file that a file guest lands in: complete and verified under its name, or not at all."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import stat
from typing import Any

from migrate.errors import MigrationError, UsageError
from migrate.guests.guest import Place
from migrate.guests.reservation import NameTaken, Reservation
from migrate.memory import Memory
from migrate.quantities import format_size
from proto.messages import MAX_PAGES, GuestInfo


class FilePlace(Place):
    """`--output PATH`: appears under its name when it is complete, or not at all.

    Until then it has a hidden name beside that, and none at all before that name is written down,
    where the file system can do that (O_TMPFILE). Pages that were never written stay holes.
    """

    lasting = True

    def __init__(self, info: GuestInfo, path: str, overwrite: bool, temporary: str = "") -> None:
        """temporary -- what an earlier program has left of this guest: it is gone on with.

        Raises UsageError.
        """
        self.path = path
        self.held = bool(temporary)
        self._size = info.size
        self._page_size = info.page_size
        self._padded = info.pages * info.page_size
        self._directory = os.path.dirname(os.path.abspath(path))
        self._temporary = temporary or self._hidden_name()
        self._overwrite = overwrite
        if info.pages > MAX_PAGES:
            raise UsageError(f"a guest of {format_size(info.size)} is larger than any output")
        check_output(path, overwrite)
        self._reservation: Reservation | None = None
        if temporary:
            self._reserve()  # what came before stays as it was, if another program has the name
        self._nameless = False
        try:
            self.fd = os.open(temporary, os.O_RDWR | os.O_CLOEXEC) if temporary else self._make()
            try:
                os.ftruncate(self.fd, self._padded)
                self._map = mmap.mmap(self.fd, self._padded)
            except OSError:
                os.close(self.fd)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._temporary)
                raise
        except OSError as error:
            raise UsageError(f"--output {path}: {error.strerror}") from None
        self.memory = memoryview(self._map)
        self.reads = Memory(info.size, fd=self.fd)

    def _make(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            fd = os.open(self._directory, flags | os.O_TMPFILE, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
                raise
            return os.open(self._temporary, flags | os.O_CREAT | os.O_EXCL, 0o600)
        self._nameless = True
        return fd

    def _reserve(self) -> None:
        """Raises NameTaken."""
        if self._reservation is None:
            self._reservation = Reservation(self.path)

    async def ready(self) -> None:
        self._reserve()

    def persist(self) -> None:
        if not self._nameless:
            return
        try:
            # A directory must be given for linkat(2) to be used, which follows the link.
            own = os.open("/proc/self/fd", os.O_RDONLY)
            try:
                os.link(str(self.fd), self._temporary, src_dir_fd=own, follow_symlinks=True)
            finally:
                os.close(own)
        except OSError as error:
            raise MigrationError(f"--output {self.path}: {error.strerror}") from None
        self._nameless = False

    def _hidden_name(self) -> str:
        name = f".{os.path.basename(self.path)}.{secrets.token_hex(4)}.xbmigrate"
        return os.path.join(self._directory, name)

    def make_room(self, page: int) -> None:
        os.posix_fallocate(self.fd, page * self._page_size, self._page_size)

    def sync(self) -> None:
        os.fdatasync(self.fd)

    async def prepare(self, state: bytes) -> None:
        try:
            os.ftruncate(self.fd, self._size)
            os.fsync(self.fd)
        except OSError as error:
            raise MigrationError(f"--output {self.path}: {error.strerror}") from None

    def unprepare(self) -> None:
        os.ftruncate(self.fd, self._padded)

    def facts(self) -> dict[str, Any]:
        here = os.fstat(self.fd)
        return {
            "kind": "file", "path": os.path.abspath(self.path), "temporary": self._temporary,
            "overwrite": self._overwrite, "size": self._size, "inode": [here.st_dev, here.st_ino],
        }  # fmt: skip

    @classmethod
    def reopen(cls, facts: dict[str, Any]) -> FilePlace:
        """A file that an earlier program had prepared: complete, under its hidden name."""
        place = cls.__new__(cls)
        place.path, place._temporary = facts["path"], facts["temporary"]
        place._overwrite, place._size = facts["overwrite"], facts["size"]
        place._directory = os.path.dirname(place.path)
        place._reservation = None
        with contextlib.suppress(NameTaken):  # `start` asks again
            place._reserve()
        for name in (place._temporary, place.path):
            with contextlib.suppress(OSError):
                place.fd = os.open(name, os.O_RDWR)
                here = os.fstat(place.fd)
                if [here.st_dev, here.st_ino] == facts["inode"]:
                    break
                os.close(place.fd)
        else:
            raise MigrationError(f"what was prepared for {place.path} is gone")
        if name == place.path:
            place._temporary = ""  # it has its name already
        place._map = mmap.mmap(place.fd, max(place._size, 1))
        place.memory = memoryview(place._map)
        return place

    async def start(self, state: bytes) -> str:
        if self._temporary:
            self._reserve()
        try:
            if not self._temporary:
                pass
            elif self._overwrite:
                os.rename(self._temporary, self.path)
            else:
                os.link(self._temporary, self.path)
                os.unlink(self._temporary)
            self._temporary = ""
        except OSError as error:
            raise MigrationError(f"--output {self.path}: {error.strerror}") from None
        # It stands under its name now: nothing below may say that it was not started.
        with contextlib.suppress(OSError):
            directory = os.open(self._directory, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)
        return f"{self.path} is complete, {format_size(self._size)}"

    def close(self) -> None:
        with contextlib.suppress(BufferError):
            self.memory.release()
            self._map.close()
        os.close(self.fd)
        if self._reservation is not None:
            self._reservation.close()
            self._reservation = None

    async def discard(self) -> None:
        if self._temporary:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
        self.close()


def check_output(path: str, overwrite: bool) -> None:
    """Raises UsageError where `path` cannot become the output."""
    directory = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(directory):
        raise UsageError(f"--output {path}: there is no directory {directory}")
    if not os.access(directory, os.W_OK):
        raise UsageError(f"--output {path}: no permission to write in {directory}")
    if os.path.lexists(path):
        if os.path.exists(path) and stat.S_ISBLK(os.stat(path).st_mode):
            raise UsageError(
                f"--output {path}: it is a block device, and a guest lands in a file: name a file, "
                "and copy that to the device when it has arrived"
            )
        if not overwrite:
            raise UsageError(f"--output {path}: it exists: remove it or give --overwrite")
        if not os.path.isfile(path):
            raise UsageError(f"--output {path}: it is no plain file, and cannot be replaced")
