"""Compressed batches. Control: how long the batch may be, and how long its head is said to be.

The rest is the body. If the last byte of control is odd, it is the Zstandard frame alone, and the
sizes before it are made of the one that it says itself: so what is inside is reached.
"""

from __future__ import annotations

import struct

from proto.wire.compressed import SIZES, BatchCompressor, BatchOpener
from proto.wire.errors import DecodeError
from proto.wire.frames import HEADER_BYTES
from proto.wire.messages import MAX_BODY
from tests.fuzz.pieces import CONTROL


def compressed(data: bytes) -> None:
    import zstandard

    control, body = data[:CONTROL].ljust(CONTROL, b"\0"), data[CONTROL:]
    most = MAX_BODY if control[0] & 1 else 1 << (control[0] % 22)
    if control[3] & 1:
        try:
            size = zstandard.get_frame_parameters(body).content_size
        except zstandard.ZstdError:
            size = 0
        head = min(size, control[1] << 8 | control[2])
        body = struct.pack(">II", head, (size - head) & 0xFFFFFFFF) + body
    try:
        made = BatchOpener(most).decompress(memoryview(body))
    except DecodeError as error:
        assert str(error).isprintable()
        return
    sizes = SIZES.unpack_from(body)
    assert (len(made[0]), len(made[1])) == sizes
    assert sum(sizes) <= most
    _round_trip(bytes(made[0]), bytes(made[1]))


def _round_trip(head: bytes, data: bytes) -> None:
    again = BatchCompressor(1).compress(memoryview(bytes(HEADER_BYTES) + head), memoryview(data))
    there = BatchOpener().decompress(memoryview(again)[HEADER_BYTES:])
    assert (bytes(there[0]), bytes(there[1])) == (head, data)
