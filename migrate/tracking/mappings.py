"""Where a process has a file mapped: shared mappings, from /proc/PID/maps."""

from __future__ import annotations

import re
from typing import NamedTuple

PAGE = 4096
_LINE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) ...s ([0-9a-f]+) ")


class Mapping(NamedTuple):
    """Addresses `start` to `end` - 1 show the guest from byte `offset` on."""

    start: int
    end: int
    offset: int


def mappings_of(pid: int, name: list[bytes], size: int) -> list[Mapping]:
    """Return the shared mappings of the guest in a process, as far as they show the guest.

    Neighbours are one: the kernel splits a mapping when a part of it gets other access rights.

    name -- how /proc/PID/maps names the file: device and inode
    size -- bytes of the guest

    Raises OSError: the process has ended, or may not be looked at.
    """
    found: list[Mapping] = []
    with open(f"/proc/{pid}/maps", "rb") as maps:
        for line in maps:
            # The name of the file comes last, and may hold anything but a newline.
            if line.split(b" ", 5)[3:5] != name or not (match := _LINE.match(line)):
                continue
            start, end, offset = (int(word, 16) for word in match.groups())
            end = min(end, start + -(-(size - offset) // PAGE) * PAGE)
            if end <= start:
                continue
            if found and (found[-1].end, found[-1].offset + found[-1].end - found[-1].start) == (
                start, offset,
            ):  # fmt: skip
                start, _, offset = found.pop()
            found.append(Mapping(start, end, offset))
    return found
