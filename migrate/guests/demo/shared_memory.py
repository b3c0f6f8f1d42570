"""The memfd of a demo guest: laid out, found in another process, and checked before it is mapped.

Another user may have written all of it (see layout.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat

from migrate.errors import UsageError
from migrate.files.trust import is_trusted
from migrate.guests.demo.layout import (
    CONTROL_BYTES,
    SHAPE,
    SHAPE_WORDS,
    Command,
    DemoShape,
    Owner,
    Word,
    shape_words,
)
from migrate.policy.parameters import PAGE_SIZES
from migrate.runtime.machine_memory import machine_memory
from migrate.runtime.processes import Process
from migrate.units import format_size

# The name of the memfd. A demo guest is known by it.
MEMORY_NAME = "xbmigrate-demo"
MAX_BYTES = 1 << 62


def check_fits(shape: DemoShape, present: int = 0) -> None:
    """Raise UsageError if there is not enough free memory.

    present -- bytes that the guest has already
    """
    available = machine_memory()
    if available and shape.total - present > available:
        raise UsageError(
            f"a demo guest of {format_size(shape.size)} does not fit the "
            f"{format_size(available)} of free memory here"
        )


def map_memory(fd: int, shape: DemoShape) -> mmap.mmap:
    """Map the memory of a demo guest. Raises UsageError."""
    try:
        return mmap.mmap(fd, shape.total)
    except (OSError, ValueError, OverflowError) as error:
        raise no_memory(shape, error) from None


def no_memory(shape: DemoShape, error: Exception) -> UsageError:
    """Return what the user is told if there is no memory for a demo guest."""
    why = getattr(error, "strerror", None) or error
    return UsageError(
        f"the memory of a demo guest of {format_size(shape.size)} cannot be had: {why}"
    )


def lay_out(fd: int, shape: DemoShape, *, paused: bool) -> None:
    """Make a memfd the memory of a new demo guest."""
    os.ftruncate(fd, shape.total)
    with contextlib.suppress(OSError):  # some kernels have no seals
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    with mmap.mmap(fd, CONTROL_BYTES) as control, memoryview(control).cast("Q") as words:
        with shape_words(words) as described:
            described[:] = shape.pack()
        words[Word.COMMAND] = Command.PAUSE if paused else Command.RUN
        words[Word.OWNER] = Owner.INCOMPLETE if paused else Owner.OURS


def _open_demo_memory(path: str) -> int:
    """Open what a descriptor of a process refers to, if it is a demo guest's memory; else -1.

    The process may change the descriptor at any time, and a device would act on being opened: so
    the kind of file is known (O_PATH) before it is opened to read.
    """
    named = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        ours = f"/proc/self/fd/{named}"
        is_demo = os.readlink(ours).startswith(f"/memfd:{MEMORY_NAME}")
        if not is_demo or not stat.S_ISREG(os.fstat(named).st_mode):
            return -1
        return os.open(ours, os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.close(named)


def memory_of(process: Process) -> int:
    """Open the memory of a demo guest. Raises UsageError if the process has none."""
    what, base = f"no demo guest in process {process.pid}", f"/proc/{process.pid}/fd"
    fd = -1
    try:
        for name in os.listdir(base):
            with contextlib.suppress(OSError):
                fd = _open_demo_memory(f"{base}/{name}")
                if fd >= 0:
                    break
    except OSError as error:
        raise UsageError(f"{what}: {error.strerror}") from None
    if fd < 0:
        raise UsageError(f"{what}: it is another program")
    if process.ended():
        os.close(fd)
        raise UsageError(f"{what}: it has ended")
    return fd


def shape_of(fd: int, what: str) -> DemoShape:
    """Read what the memory of a demo guest says of itself. Another user may have written it.

    Raises UsageError, which begins with `what`, for what cannot be true.
    """
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size < CONTROL_BYTES:
        raise UsageError(what)
    try:
        shape = DemoShape.unpack(os.pread(fd, 8 * SHAPE_WORDS, 8 * SHAPE))
    except ValueError:
        raise UsageError(what) from None
    fits = shape.page_size in PAGE_SIZES and 0 < shape.hot <= shape.size < MAX_BYTES
    if not fits or not shape.stride or shape.total != found.st_size:
        raise UsageError(f"{what}: what it says of its size and pages cannot be")
    if not is_trusted(found.st_uid):
        _check_untrusted(fd, found, shape, what)
    return shape


def _check_untrusted(fd: int, found: os.stat_result, shape: DemoShape, what: str) -> None:
    """Raise UsageError if another user's guest could harm the program that reads it."""
    if not _keeps_its_size(fd):
        raise UsageError(
            f"{what}: user {found.st_uid} could take its memory away while it is read: start the "
            "guest with this release of migrate-src or migrate-dst"
        )
    try:
        check_fits(shape, found.st_blocks * 512)
    except UsageError as error:
        raise UsageError(f"{what} that can be moved: {error}") from None


def _keeps_its_size(fd: int) -> bool:
    """Return whether a seal keeps the memory from being made shorter."""
    with contextlib.suppress(OSError):
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    return False
