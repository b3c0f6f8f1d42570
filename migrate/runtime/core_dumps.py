"""Keep guest memory out of core dumps, unless MIGRATE_COREDUMPS=1 asks for it.

The programs become undumpable as a whole. The process of a demo guest must stay open to other
programs of its user, which attach to it through /proc/PID/fd: the kernel closes that directory of
an undumpable process to everyone without CAP_SYS_PTRACE. So only its guest memory is left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os

VARIABLE = "MIGRATE_COREDUMPS"
PR_SET_DUMPABLE = 4  # linux/prctl.h


def allowed() -> bool:
    """Return whether the user asks for core dumps with guest memory in them."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def disable() -> None:
    """Let this process dump no core. Programs that it starts are not affected."""
    if not allowed():
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def exclude(mapping: mmap.mmap) -> None:
    """Leave a mapping of guest memory out of the core dumps of this process."""
    if not allowed():
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_DONTDUMP)
