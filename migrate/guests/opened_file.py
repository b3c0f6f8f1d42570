"""A guest's file or block device, opened to read."""

from __future__ import annotations

import os
import stat

from migrate.errors import MigrationError, UsageError
from migrate.files.filesystem import KERNELS_OWN, file_system_of, kind_of
from migrate.files.identity import identity_of
from migrate.files.lock import reopen
from migrate.files.walk import existing_file
from migrate.guests.device import mounts_of, number_of, open_direct
from migrate.guests.guest import check_size


class OpenedFile:
    """A file or block device. A device is read past all caches, if that is possible (O_DIRECT).

    size  -- in bytes
    align -- bytes that offsets, lengths and addresses of a read must be multiples of; 0: any

    Raises UsageError if it cannot be moved.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.align = 0
        try:
            with existing_file(path) as found:
                mode = os.fstat(found).st_mode
                self.is_device = stat.S_ISBLK(mode)
                if not stat.S_ISREG(mode) and not self.is_device:
                    raise UsageError(
                        f"guest file {path}: it is neither a file nor a block device, but "
                        f"{kind_of(mode)}"
                    )
                self.fd = reopen(found, os.O_RDONLY)
            try:
                self.size = self._measure()
                if self.is_device:
                    self._read_past_caches()
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise UsageError(f"guest file {path}: {error.strerror}") from None

    def _measure(self) -> int:
        """Return the size in bytes. Raises UsageError for a file that cannot be moved."""
        system = file_system_of(self.fd)
        if system in KERNELS_OWN and not self.is_device:
            raise UsageError(
                f"guest file {self.path}: it is on {system}: such a file is made as it is read, "
                "and cannot be moved"
            )
        size = os.lseek(self.fd, 0, os.SEEK_END)
        if size == 0:
            raise UsageError(f"guest file {self.path}: it is empty, there is nothing to move")
        check_size(size, f"guest file {self.path}")
        return size

    def _read_past_caches(self) -> None:
        try:
            direct, self.align = open_direct(self.fd)
        except OSError as error:
            if mounts_of(number_of(self.fd)):
                raise UsageError(
                    f"guest {self.path}: a file system is mounted on it, and it cannot be read "
                    f"past the page cache, which has old blocks (O_DIRECT: {error.strerror}): "
                    "unmount it"
                ) from None
            return
        self.close()
        self.fd = direct

    def check(self) -> None:
        """Check that the path still leads to this file, and that its size is the same.

        Raises MigrationError.
        """
        try:
            same = identity_of(os.stat(self.path)) == identity_of(os.fstat(self.fd))
        except OSError:
            same = False
        if not same:
            raise MigrationError(
                f"guest file {self.path}: it was removed or replaced by another file meanwhile: "
                "move the new one"
            )
        size = os.lseek(self.fd, 0, os.SEEK_END)
        if size != self.size:
            raise MigrationError(
                f"guest file {self.path}: it had {self.size} bytes at the start and has {size} "
                "now: a guest must keep its size while it moves"
            )

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)
