"""Frames: a 24-byte header and a body, cut out of a byte stream.

    offset  bytes  field     (all integers big-endian)
    0       4      magic     "XBM1"
    4       1      type      proto.wire.messages.MessageType
    5       1      flags     0; or COMPRESSED, in PAGES alone (proto.wire.compressed)
    6       2      channel   of the connection: 0, or what JOIN named
    8       4      length    of the body, at most the limit of its type
    12      4      head      bytes of the body that the check covers: all, but for PAGES
    16      8      check     XXH3-64 of the head, seeded with bytes 4..11

A body is a head and, in PAGES alone, data behind the head: raw pages. The check of the frame does
not cover them. They have a check of their own in the head, which is made of the page hashes and so
costs nothing. A compressed body is all head.

`seal` writes a header and `FrameReader` reads headers: the two mirror each other. The reader
receives straight into arenas and gives out bodies as views of them. So bulk data is copied once, by
the operating system.
"""

from __future__ import annotations

import mmap
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from proto.wire.errors import FrameError, LocalError
from proto.wire.messages import BODY_LIMITS, MAX_BODY, MessageType, body_limits

MAGIC = b"XBM1"
HEADER = struct.Struct(">4sBBHIIQ")
HEADER_BYTES = HEADER.size
# The flag of a PAGES frame whose body is compressed.
COMPRESSED = 1

PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
ARENAS_KEPT = 2
# A read has room for at least this many bytes, so that small frames do not cost a call each.
LEAST_READ = 256 << 10


def _check(seed: bytes | bytearray | memoryview, head: memoryview) -> int:
    return xxhash.xxh3_64_intdigest(head, seed=int.from_bytes(seed, "big"))


def seal(
    frame: bytearray | memoryview, message_type: MessageType, channel: int = 0, data_bytes: int = 0,
    *, compressed: bool = False,
) -> None:  # fmt: skip
    """Write the header into the first HEADER_BYTES of `frame`. The head is behind them already.

    data_bytes -- bytes of data that will be sent after `frame`

    Raises LocalError if the body is longer than the peer may accept.
    """
    head = len(frame) - HEADER_BYTES
    length = head + data_bytes
    if length > BODY_LIMITS[message_type]:
        raise LocalError(
            f"{message_type.name}: a body of {length} bytes is over {BODY_LIMITS[message_type]}"
        )
    flags = COMPRESSED if compressed else 0
    HEADER.pack_into(frame, 0, MAGIC, message_type, flags, channel, length, head, 0)
    with memoryview(frame) as view:
        view[16:24] = _check(view[4:12], view[HEADER_BYTES:]).to_bytes(8, "big")


class _Arena:
    """Memory for two frames of the largest size and one good read more; none for size 0.

    Two, because a frame is read while the one before it is in use.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.least_read = min(largest, LEAST_READ)
        size = 2 * largest + self.least_read
        # Page-aligned: copies from and to it are fastest then.
        self.buffer = memoryview(mmap.mmap(-1, size, PRIVATE) if size else b"")
        # One entry per frame that is not released. It is a list because other threads release
        # frames too: append and pop are atomic, and += and -= need not be.
        self.in_use: list[None] = []


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame. Its parts are valid until `release`, which gives their memory back to the reader.

    Any thread may release it, once.
    """

    type: MessageType
    head: memoryview
    data: memoryview
    compressed: bool
    _arena: _Arena

    @property
    def size(self) -> int:
        """Bytes of the body. Not to be asked after `release`."""
        return len(self.head) + len(self.data)

    def release(self) -> None:
        self.head.release()
        self.data.release()
        self._arena.in_use.pop()


class FrameReader:
    """Reads bytes in pieces of any size, and gives whole, checked frames.

    `get_buffer` and `received` are the two halves of a read into memory. `next_frame` returns None
    until a frame is whole, and raises FrameError at the first byte that cannot belong to one. After
    an error the reader must not be used any more.

    largest -- make arenas for bodies of this size; they grow when a longer body is admitted, and
               in `limit_bodies`
    """

    def __init__(self, largest: int = MAX_BODY) -> None:
        self.channel = 0
        """The channel that all frames must name. It may change between two frames."""
        self.compressed = False
        """Whether batches may be compressed. It may change between two frames."""
        self._limits = BODY_LIMITS
        self._largest = largest
        self._arena = _Arena(largest)
        self._kept: deque[_Arena] = deque(maxlen=ARENAS_KEPT)
        self._start = 0
        self._end = 0
        self._checked = False  # the head of the frame that is coming in
        self._wanted = 1  # bytes of that frame before `next_frame` can say anything new

    def limit_bodies(self, channels: int) -> None:
        """Limit bodies to what one of several channels may send.

        Channels share the memory that one takes, so their bodies are shorter. To be called after
        `channel` is set, and before a frame on which the limits of these channels apply.
        """
        self._limits = body_limits(channels, self.channel)
        self._resize()

    def _resize(self) -> None:
        """Make arenas for the longest body from now on."""
        self._largest = max(self._limits.values())
        self._kept.clear()

    def discard(self) -> None:
        """Discard all bytes that are in no frame, and free their memory.

        The memory of a frame is freed when the frame is released.
        """
        self._arena = _Arena(0)
        self._kept.clear()
        self._start = self._end = 0

    @property
    def partial(self) -> int:
        """Bytes received that belong to no frame given out yet."""
        return self._end - self._start

    @property
    def has_news(self) -> bool:
        """Whether enough bytes came that `next_frame` can give a frame, or find another fault."""
        return self._end - self._start >= self._wanted

    def get_buffer(self) -> memoryview:
        """Return memory for the next bytes, never empty.

        Raises LocalError if an arena is full of whole frames: `next_frame` was not called.
        """
        if self._start == self._end and not self._arena.in_use:
            self._start = self._end = 0
            if self._arena.largest != self._largest:
                self._arena = _Arena(self._largest)
        arena, size = self._arena, len(self._arena.buffer)
        if size - self._end < arena.least_read or size - self._start < self._largest + 64:
            if self.partial == size and arena.largest >= self._largest:
                raise LocalError("more came than an arena holds: take the frames that are whole")
            self._move()
        return self._arena.buffer[self._end :]

    def _move(self) -> None:
        """Go on in an arena of which no frame is in use. Copy the partial frame there."""
        old = self._arena
        rest = old.buffer[self._start : self._end]
        fresh = next((arena for arena in self._kept if not arena.in_use), None)
        if fresh is None:
            fresh = _Arena(self._largest)
        else:
            self._kept.remove(fresh)
        fresh.buffer[: len(rest)] = rest
        if old.largest == self._largest:
            self._kept.append(old)
        self._arena, self._start, self._end = fresh, 0, len(rest)

    def received(self, count: int) -> None:
        """Note that `count` bytes were read into `get_buffer`."""
        self._end += count

    def feed(self, data: bytes) -> None:
        """Copy `data` in. For tests and small peers."""
        while data:
            buffer = self.get_buffer()
            piece = data[: len(buffer)]
            buffer[: len(piece)] = piece
            self.received(len(piece))
            data = data[len(piece) :]

    def next_frame(
        self, admit: Callable[[MessageType], object] = lambda _kind: None
    ) -> Frame | None:
        """Return the next frame, or None if it is not whole.

        admit -- called with the type of the frame as soon as its header is there. It may raise
                 RemoteError: then no memory is spent on a body that is not wanted

        Raises FrameError.
        """
        view = self._arena.buffer[self._start : self._end]
        known = bytes(view[:4])
        if known != MAGIC[: len(known)]:
            raise FrameError(f"not an xbmigrate stream: it goes on with {known.hex(' ')}")
        if len(view) < HEADER_BYTES:
            return None
        _, number, flags, channel, length, head, check = HEADER.unpack_from(view)
        try:
            kind = MessageType(number)
        except ValueError:
            raise FrameError(f"unknown frame type {number}") from None
        admit(kind)
        compressed = flags == COMPRESSED and kind is MessageType.PAGES and self.compressed
        if flags and not compressed:
            raise FrameError(f"{kind.name}: flags {flags:#x} are not in use")
        if channel != self.channel and kind is not MessageType.ERROR:
            raise FrameError(f"{kind.name}: channel {channel} on the connection of {self.channel}")
        if length > self._limits[kind]:
            raise FrameError(f"{kind.name}: {length} bytes are over {self._limits[kind]}")
        if head > length or (head < length and (kind is not MessageType.PAGES or compressed)):
            raise FrameError(f"{kind.name}: a head of {head} bytes in a body of {length}")
        if length > self._largest:
            self._resize()
        data_at = HEADER_BYTES + head
        if len(view) < data_at:
            self._wanted = data_at
            return None
        if not self._checked:
            if _check(view[4:12], view[HEADER_BYTES:data_at]) != check:
                raise FrameError(f"{kind.name}: the check of its {head} bytes does not match")
            self._checked = True
        end = HEADER_BYTES + length
        if len(view) < end:
            self._wanted = end
            return None
        self._checked, self._wanted = False, 1
        self._start += end
        self._arena.in_use.append(None)
        head_view, data_view = view[HEADER_BYTES:data_at], view[data_at:end]
        return Frame(kind, head_view, data_view, compressed, self._arena)
