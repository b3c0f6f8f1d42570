"""The files of a snapshot while it is saved.

On file systems that can do that (O_TMPFILE) the files have no names until the snapshot is whole:
nothing is left of a migration that fails, however it ends. Elsewhere they are in a directory with
a hidden name, which is removed on failure.
"""

from __future__ import annotations

import os

import xxhash

from migrate.errors import MigrationError
from migrate.files.directory import Directory
from migrate.files.filesystem import hidden_name
from migrate.files.partial_output import PartialOutput
from migrate.qemu.snapshot.layout import BLOCKS_DIRECTORY
from migrate.units import format_size

# Added to the hidden name of a snapshot: where the snapshot that it replaces is moved.
ASIDE = ".before"
# The largest section of a device, that of a graphics card with its video memory, has some ten MiB.
MAX_DEVICES_BYTES = 512 << 20


class SnapshotFiles:
    """New files for the directory `path`. Raises OSError, as all its methods do.

    directory -- the directory above `path`
    name      -- the hidden name that the snapshot has in `directory` until it gets its own
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        where, self.name = os.path.split(hidden_name(path, spare=len(ASIDE)))
        self.directory = Directory(where)
        # The directories of the snapshot and of its blocks, once files have names.
        self._made: tuple[Directory, Directory] | None = None
        self._open: dict[str, int] = {}

    @property
    def temporary(self) -> str:
        """The hidden path of the snapshot."""
        return os.path.join(self.directory.path, self.name)

    def make(self, name: str) -> int:
        """Make a file; return its descriptor, to read and write. `close` closes it."""
        fd = -1
        if self._made is None:
            fd = self.directory.create_unnamed_file()
            if fd < 0:
                self._give_names()
        if self._made is not None:
            directory, own = _place_of(self._made, name)
            fd = directory.create_file(own)
        self._open[name] = fd
        return fd

    def _give_names(self) -> tuple[Directory, Directory]:
        """Make the directories, and give the files that have no names theirs."""
        if self._made is None:
            top = self.directory.create_directory(self.name)
            self._made = top, top.create_directory(BLOCKS_DIRECTORY)
            for name, fd in self._open.items():
                directory, own = _place_of(self._made, name)
                directory.link(fd, own)
        return self._made

    def finish(self) -> PartialOutput:
        """Bring all files to the disk, with their names. Return the directory that has them."""
        for fd in self._open.values():
            os.fsync(fd)
        top, blocks = self._give_names()
        for directory in (blocks, top):
            directory.sync()
        return PartialOutput(self.path, self.directory.path, self.name, top.identity, tree=True)

    def close(self) -> None:
        """Close the files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def remove(self) -> None:
        """Remove the files, whether they have names or not."""
        self.close()
        if self._made is not None:
            self.directory.remove_tree(self.name, self._made[0].identity)
        self.free()

    def free(self) -> None:
        """Close the directories. May be called again."""
        for directory in (*(self._made or ()), self.directory):
            directory.close()


def _place_of(made: tuple[Directory, Directory], name: str) -> tuple[Directory, str]:
    """Return the directory that a file is in, and its name there."""
    top, blocks = made
    within, _, own = name.rpartition("/")
    return blocks if within else top, own


class DeviceFile:
    """devices.bin while it is written. size -- bytes so far"""

    def __init__(self, fd: int) -> None:
        self.size = 0
        self._fd = fd
        self._hash = xxhash.xxh3_128()

    def append(self, data: memoryview) -> None:
        """Write what comes next. Raises OSError, and MigrationError if it becomes too long."""
        if self.size + len(data) > MAX_DEVICES_BYTES:
            most = format_size(MAX_DEVICES_BYTES)
            raise MigrationError(f"the state of the devices is longer than {most}")
        write_all(self._fd, data)
        self._hash.update(data)
        self.size += len(data)

    def read(self, at: int, size: int) -> bytes:
        return os.pread(self._fd, size, at)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def write_all(fd: int, data: memoryview) -> None:
    """Write all of `data`, however often write(2) has to be called. Raises OSError."""
    while data:
        data = data[os.write(fd, data) :]
