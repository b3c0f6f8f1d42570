"""Frames: a 16-byte header and a body, cut out of a byte stream.

    offset  bytes  field     (all integers big-endian)
    0       4      magic     "XBM1"
    4       1      type      proto.messages.MessageType
    5       1      flags     0
    6       2      channel   0 (others are for parallel channels)
    8       4      length    of the body, at most the limit of its type
    12      4      check     low 32 bits of XXH3-64 of the body, seeded with bytes 4..11

`seal` writes a header, `FrameReader` reads them: the two mirror each other. The reader receives
straight into arenas and hands out bodies as views of them, so bulk data is copied once, by the
kernel of the operating system.
"""

from __future__ import annotations

import mmap
import struct
from collections import deque
from dataclasses import dataclass

import xxhash

from proto.errors import FrameError, LocalError
from proto.messages import BODY_LIMITS, MAX_BODY, MessageType

MAGIC = b"XBM1"
HEADER = struct.Struct(">4sBBHII")
HEADER_BYTES = HEADER.size

# An arena holds a frame of the largest size that begins at its end, and a good read beside it.
ARENA_BYTES = 4 << 20
ARENAS_KEPT = 3
LEAST_READ = 256 << 10


def _check(seed: bytes | bytearray | memoryview, body: memoryview) -> int:
    return xxhash.xxh3_64_intdigest(body, seed=int.from_bytes(seed, "big")) & 0xFFFFFFFF


def seal(frame: bytearray, message_type: MessageType, channel: int = 0) -> bytearray:
    """Writes the header into the first HEADER_BYTES of `frame`, whose body stands behind them.

    Raises LocalError where the body is longer than the peer may accept.
    """
    length = len(frame) - HEADER_BYTES
    if length > BODY_LIMITS[message_type]:
        raise LocalError(
            f"{message_type.name}: a body of {length} bytes is over {BODY_LIMITS[message_type]}"
        )
    HEADER.pack_into(frame, 0, MAGIC, message_type, 0, channel, length, 0)
    with memoryview(frame) as view:
        check = _check(view[4:12], view[HEADER_BYTES:])
    frame[12:16] = check.to_bytes(4, "big")
    return frame


class _Arena:
    def __init__(self) -> None:
        # Page-aligned, which copies to and from it like best.
        self.buffer = memoryview(mmap.mmap(-1, ARENA_BYTES))
        # One entry per frame that is not released: a list, since other threads release frames too,
        # and append and pop are atomic where += and -= need not be.
        self.lent: list[None] = []


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame. `body` is valid until `release`, which gives its memory back to the reader.

    Any thread may release it, once.
    """

    type: MessageType
    channel: int
    body: memoryview
    _arena: _Arena

    @property
    def wire_bytes(self) -> int:
        return HEADER_BYTES + len(self.body)

    def release(self) -> None:
        self.body.release()
        self._arena.lent.pop()


class FrameReader:
    """Takes bytes in pieces of any size; gives whole, checked frames.

    `get_buffer` and `received` are the two halves of a read into memory; `next_frame` returns None
    until a frame is whole, and raises FrameError at the first byte that cannot be one. After an
    error the reader is of no more use.
    """

    def __init__(self) -> None:
        self._arena = _Arena()
        self._kept: deque[_Arena] = deque(maxlen=ARENAS_KEPT)
        self._start = 0
        self._end = 0

    @property
    def partial(self) -> int:
        """Bytes that came and are in no frame that was given yet."""
        return self._end - self._start

    def get_buffer(self) -> memoryview:
        """Where the next bytes go; never empty.

        Raises LocalError where an arena is full of frames that `next_frame` was not asked for.
        """
        if self._start == self._end and not self._arena.lent:
            self._start = self._end = 0
        if ARENA_BYTES - self._end < LEAST_READ or ARENA_BYTES - self._start < MAX_BODY + 64:
            if self.partial == ARENA_BYTES:
                raise LocalError("more came than an arena holds: take the frames that are whole")
            self._move()
        return self._arena.buffer[self._end :]

    def _move(self) -> None:
        """Goes on in an arena nobody reads from; takes the partial frame along."""
        old = self._arena
        rest = old.buffer[self._start : self._end]
        fresh = next((arena for arena in self._kept if not arena.lent), None)
        if fresh is None:
            fresh = _Arena()
        else:
            self._kept.remove(fresh)
        fresh.buffer[: len(rest)] = rest
        self._kept.append(old)
        self._arena, self._start, self._end = fresh, 0, len(rest)

    def received(self, count: int) -> None:
        self._end += count

    def feed(self, data: bytes) -> None:
        """Copies `data` in: for tests and small peers."""
        while data:
            buffer = self.get_buffer()
            piece = data[: len(buffer)]
            buffer[: len(piece)] = piece
            self.received(len(piece))
            data = data[len(piece) :]

    def next_frame(self) -> Frame | None:
        view = self._arena.buffer[self._start : self._end]
        known = bytes(view[:4])
        if known != MAGIC[: len(known)]:
            raise FrameError(f"not an xbmigrate stream: it goes on with {known.hex(' ')}")
        if len(view) < HEADER_BYTES:
            return None
        _, number, flags, channel, length, check = HEADER.unpack_from(view)
        try:
            kind = MessageType(number)
        except ValueError:
            raise FrameError(f"unknown frame type {number}") from None
        if flags or channel:
            raise FrameError(f"{kind.name}: flags {flags:#x}, channel {channel} are not in use")
        if length > BODY_LIMITS[kind]:
            raise FrameError(f"{kind.name}: {length} bytes are over {BODY_LIMITS[kind]}")
        if len(view) < HEADER_BYTES + length:
            return None
        body = view[HEADER_BYTES : HEADER_BYTES + length]
        if _check(view[4:12], body) != check:
            raise FrameError(f"{kind.name}: the check of its {length} bytes does not match")
        self._start += HEADER_BYTES + length
        self._arena.lent.append(None)
        return Frame(kind, channel, body, self._arena)
