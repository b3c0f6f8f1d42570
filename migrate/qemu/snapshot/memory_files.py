"""The files of a snapshot that hold the RAM blocks, and the thread that flushes them.

A file is a whole number of pages while it is written, since QEMU sends whole pages; a block may end
within its last page, and so does its file in the end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from migrate.memory.memory import private_buffer
from migrate.qemu.snapshot.files import SnapshotFiles
from migrate.qemu.snapshot.layout import (
    CONTENT_BYTES,
    Hash,
    StoredBlock,
    block_file,
    contents,
)
from proto.qemu.kernel import RamApplier
from proto.qemu.parts import (
    BlockList,
)

# The interval of flushing files while they are written, so that little is left for the
# end, when the guest is paused.
FLUSH_SECONDS = 1.0


class MemoryFiles:
    """The files of the RAM blocks. The constructor and `finish` raise OSError."""

    def __init__(self, files: SnapshotFiles, listed: BlockList, page_size: int) -> None:
        self._page_size = page_size
        self._blocks: list[tuple[str, bytes, int, int]] = []  # path, name, size, descriptor
        pages = []
        for number, block in enumerate(listed.blocks):
            path = block_file(number, block.name)
            fd = files.make(path)
            pages.append(block.pages(page_size))
            os.ftruncate(fd, pages[-1] * page_size)
            self._blocks.append((path, block.name, block.size, fd))
        descriptors = [fd for _, _, _, fd in self._blocks]
        self.applier = RamApplier(pages, descriptors, page_size)
        self.flusher = Flusher(descriptors)

    def finish(self, check_wanted: Callable[[], None]) -> list[StoredBlock]:
        """Cut the files to size; return their names, sizes and hashes.

        check_wanted -- called before each piece; raises if the snapshot is not wanted any more
        """
        buffer, found = private_buffer(CONTENT_BYTES), []
        for path, name, size, fd in self._blocks:
            os.ftruncate(fd, size)
            digest = Hash(size, self._page_size)
            for _, pages, data in contents(fd, size, self._page_size, buffer):
                check_wanted()
                digest.update(pages, data)
            found.append(StoredBlock(path, size, digest.hexdigest(), name.decode("latin-1")))
        return found


class Flusher:
    """A thread that flushes files to the disk while they are written."""

    def __init__(self, files: list[int]) -> None:
        """files -- descriptors, which must stay open until `stop`"""
        self._files = files
        self._stopped = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="flush", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # fdatasync leaves out times of access and change, which are not part of the snapshot.
        try:
            while not self._stopped.wait(FLUSH_SECONDS):
                for fd in self._files:
                    os.fdatasync(fd)
        except OSError as error:
            self._error = error  # the kernel reports it once, so a later fsync would succeed

    def stop(self) -> None:
        """End the thread. May be called again."""
        self._stopped.set()
        self._thread.join()

    def check(self) -> None:
        """Raise OSError if something could not be written."""
        if self._error is not None:
            raise self._error
