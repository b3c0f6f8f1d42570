"""Files of guest memory in a tmpfs, and room for them."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.machine import available_memory
from tests.bench.report import LeftOutError, size_name

PIECE = 1 << 20
SPARE = 1 << 30


@contextlib.contextmanager
def shelf(needed: int) -> Iterator[Path]:
    """A directory in a tmpfs with room for `needed` bytes, gone afterwards with all in it.

    It is in /dev/shm, or in a tmpfs mounted for it where that is too small and we are root.
    Raises LeftOutError where there is neither room nor memory.
    """
    if available_memory() < needed + SPARE:
        raise LeftOutError(
            f"{size_name(needed)} of guest files do not fit the "
            f"{available_memory() / 2**30:.1f} GiB of available memory."
        )
    room = os.statvfs("/dev/shm")
    own = room.f_bavail * room.f_frsize < needed + (64 << 20)
    if own and os.geteuid() != 0:
        raise LeftOutError(
            f"/dev/shm has no room for {size_name(needed)}, and only root can mount a larger tmpfs."
        )
    path = tempfile.mkdtemp(prefix="xbmigrate-bench-", dir=None if own else "/dev/shm")
    try:
        if own:
            size = f"size={needed + SPARE}"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", path], check=True)
        yield Path(path)
    finally:
        if own and os.path.ismount(path):
            subprocess.run(["umount", "--lazy", path], check=False)
        shutil.rmtree(path, ignore_errors=True)


def random_file(path: Path, size: int) -> Path:
    """Makes the file `size` bytes of random content: cuts it, or adds to it."""
    import numpy as np

    with open(path, "ab") as file:
        start = file.tell()
        file.truncate(min(start, size))
        generator = np.random.default_rng(start)
        for offset in range(start, size, PIECE):
            file.write(generator.bytes(min(PIECE, size - offset)))
    return path


def zero_file(path: Path, size: int) -> Path:
    """Zeros that take up memory."""
    zeros = bytes(PIECE)
    with open(path, "wb") as file:
        for offset in range(0, size, PIECE):
            file.write(zeros[: size - offset])
    return path


def sparse_file(path: Path, size: int) -> Path:
    """Zeros that take up none."""
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def reading_time(path: Path) -> float:
    """Seconds to read a file once, in pieces of 1 MiB, into one warm buffer."""
    buffer = mmap.mmap(-1, PIECE)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.preadv(descriptor, [buffer], 0)
        began = time.perf_counter()
        offset = 0
        while got := os.preadv(descriptor, [buffer], offset):
            offset += got
        return time.perf_counter() - began
    finally:
        os.close(descriptor)


def same_content(first: Path, second: Path) -> bool:
    """Compares two files byte by byte."""
    if first.stat().st_size != second.stat().st_size:
        return False
    with open(first, "rb") as one, open(second, "rb") as other:
        while piece := one.read(PIECE):
            if piece != other.read(PIECE):
                return False
    return True
