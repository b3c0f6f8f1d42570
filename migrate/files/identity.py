"""Which file a name is expected to lead to: its device and inode."""

from __future__ import annotations

import contextlib
import os

Identity = tuple[int, int]
"""Device and inode."""


def identity_of(status: os.stat_result) -> Identity:
    """Return the device and inode of a file."""
    return status.st_dev, status.st_ino


def entry_is(directory: int, name: str, identity: Identity) -> bool:
    """Return whether an entry of an open directory is one certain file. Raises nothing."""
    with contextlib.suppress(OSError):
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        return identity_of(status) == identity
    return False


def parse_identity(found: object) -> Identity:
    """Parse a device and inode in a journal. Raises ValueError."""
    if isinstance(found, list) and [type(one) for one in found] == [int, int]:
        return found[0], found[1]
    raise ValueError("no device and inode")
