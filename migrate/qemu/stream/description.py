"""Checks that sections were cut where QEMU's description of the devices says.

    {"devices": [{"name", "instance_id", "fields": [{"size"[, "array_len"]}],
                  "subsections": [{"vmsd_name", "fields", "subsections"}]}]}

Only QEMU knows how long the state of a device is, so the parser ends a section at the first footer
that a next section, or the end, follows. A device's state could look like that. The description
comes last and gives the size of each section: its fields, and for each subsection a head of
1 + 1 + name + 4 bytes and its fields.

QEMU itself does not read the description, so a size in it that leads to no footer is taken for a
mistake in the description.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

from migrate.errors import MigrationError
from migrate.qemu.snapshot.layout import StoredSection
from migrate.runtime import bounded_json
from proto.qemu.parts import FOOTER, FULL

# Of subsections in subsections; QEMU's own go a few levels deep.
MAX_DEPTH = 64


def check_sections(
    text: bytes, sections: Sequence[StoredSection], early: int, read: Callable[[int, int], bytes]
) -> None:
    """Raise MigrationError if the description contradicts how the sections were cut.

    text  -- the description
    early -- how many of the sections come before the memory: not all versions describe those
    read  -- returns bytes of devices.bin: (at, size)
    """
    try:
        devices = bounded_json.loads(text)["devices"]
        told = [(str(one["name"]), int(one["instance_id"])) for one in devices]
        sizes = [_size(one) for one in devices]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise MigrationError("QEMU's description of its devices is not to be understood") from None
    for skip in (0, early):
        full = [one for one in sections[skip:] if one.kind == FULL]
        if [(one.name, one.instance) for one in full] == told:
            break
    else:
        raise MigrationError(
            f"the stream has the sections of {len(full)} devices, which are not the {len(told)} of "
            "QEMU's description"
        )
    for section, size in zip(full, sizes, strict=True):
        head = 14 + len(section.name.encode())
        mark = bytes([FOOTER]) + struct.pack(">I", section.id)
        ends = head + size + len(mark)
        if ends < section.size and read(section.at + head + size, len(mark)) == mark:
            raise MigrationError(
                f"the section of {section.name} may end after {ends} bytes as well as after "
                f"{section.size}: it cannot be kept for sure"
            )


def _size(entry: dict[str, Any], depth: int = 0) -> int:
    """Return the bytes of a device or subsection. Raises ValueError, KeyError or TypeError."""
    if depth > MAX_DEPTH:
        raise ValueError
    size = sum(int(one["size"]) * int(one.get("array_len", 1)) for one in entry.get("fields", ()))
    for one in entry.get("subsections", ()):
        size += 2 + len(one["vmsd_name"]) + 4 + _size(one, depth + 1)
    return max(size, 0)
