"""The mounted file systems, as /proc/PID/mountinfo shows them (proc(5)).

Users mount as well (FUSE), and choose the mount point, the source and a part of the type. Of these
names the kernel escapes blank, tab, newline and backslash alone: see migrate/runtime/proc_lines.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from typing import NamedTuple

from migrate.runtime.proc_lines import proc_lines

# Types of file systems on block devices that have numbers of their own, since they may have several
# devices. Only root mounts them.
NUMBERED_ITSELF = frozenset({"btrfs", "bcachefs"})
_ESCAPED = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    """A mounted file system.

    device        -- "major:minor" of its files
    point         -- the directory or file that it is mounted at
    options       -- of this mount
    kind          -- the type of the file system
    source        -- what is mounted: often the path of a device; may be empty, and any text if a
                     user has mounted it, so see `block_device`
    super_options -- of the file system, which may be mounted more than once
    """

    number: int
    device: str
    point: str
    options: list[str]
    kind: str
    source: str
    super_options: list[str]

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written through this mount."""
        return "ro" in self.options or "ro" in self.super_options

    @property
    def block_device(self) -> tuple[int, int]:
        """The device that the file system is on, as (major, minor); (0, 0) if it is on none.

        A file system on one device has that number. One with a number of its own (major 0) is on
        a device only if it is of a type that needs one; its source names that device then.
        """
        major, minor = map(int, self.device.split(":"))
        if major:
            return major, minor
        if self.kind in NUMBERED_ITSELF and self.source.startswith("/"):
            with contextlib.suppress(OSError, ValueError):
                here = os.stat(self.source)
                if stat.S_ISBLK(here.st_mode):
                    return os.major(here.st_rdev), os.minor(here.st_rdev)
        return 0, 0


def mounts(pid: int | str = "self") -> Iterator[Mount]:
    """Yield the mounts that a process sees. Raises OSError."""
    yield from map(parse_mount, proc_lines(f"/proc/{pid}/mountinfo"))


def parse_mount(line: bytes) -> Mount:
    """Parse a line of mountinfo."""
    head, _, tail = line.partition(b" - ")
    number, _, device, _, point, options = head.split(b" ")[:6]
    kind, source, super_options = tail.split(b" ", 2)
    return Mount(
        int(number), device.decode(), unescaped(point), os.fsdecode(options).split(","),
        unescaped(kind), unescaped(source), os.fsdecode(super_options).split(","),
    )  # fmt: skip


def unescaped(name: bytes) -> str:
    """Return a path of /proc, where blanks and backslashes are three octal digits."""
    return os.fsdecode(_ESCAPED.sub(lambda found: bytes([int(found[1], 8)]), name))
