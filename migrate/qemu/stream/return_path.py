"""The return path: what the QEMU that loads a stream says to the QEMU that sends it.

    be16 type, be16 length, data        on the same connection, in the other direction

SHUT with the value 0 says that the guest was loaded and may run at the destination. A source
whose capability return-path is on waits for it: until then its guest is its own.
"""

from __future__ import annotations

import struct

from proto.qemu.parts import Reply

# What an incoming QEMU may take to load the state of the devices and answer: it may have to open
# disks.
LOAD_SECONDS = 120.0
_HEAD = struct.Struct(">HH")


def reply(kind: Reply, value: int | None = None) -> bytes:
    """Return a message, with a value of 32 bits or without data."""
    if value is None:
        return _HEAD.pack(kind, 0)
    return _HEAD.pack(kind, 4) + value.to_bytes(4, "big")


# The guest has moved.
MOVED = reply(Reply.SHUT, 0)


def split(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Cut what was read into messages, (type, the whole message), and an incomplete rest.

    A message is `_HEAD.size` bytes and its data, which a 16-bit length keeps under 64 KiB.
    """
    found = []
    while len(data) >= _HEAD.size:
        kind, length = _HEAD.unpack_from(data)
        end = _HEAD.size + length
        if len(data) < end:
            break
        found.append((kind, data[:end]))
        data = data[end:]
    return found, data


def data_of(message: bytes) -> bytes:
    """Return the data of a whole message."""
    return message[_HEAD.size :]
