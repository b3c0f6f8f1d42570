"""Frames that were received and wait for the receiver, within bounds.

    FrameReader --put--> ReceiveQueue --take--> Link.receive
                           | is_full
                           +--> the link stops reading: the kernel's buffers fill, the TCP window
                                closes, and the peer's sender stops

So a peer cannot make us keep more than the bounds, however fast it sends and however slowly we
receive. The bounds hold for all channels of a migration together: see Link.share_receiving.
"""

from __future__ import annotations

from collections import deque

from proto.wire.errors import MessageError
from proto.wire.frames import Frame
from proto.wire.messages import MAX_CONTROL, MessageType

# One batch that is being applied, the next one, and one that is just coming; or this many small
# frames.
RECEIVE_AHEAD_BYTES = 3 << 20
RECEIVE_AHEAD = 16
# The same before the peer is admitted, and at the source: there are many strangers, and control
# frames are small.
EARLY_AHEAD_BYTES = 4 * MAX_CONTROL
# Messages that a peer may send at any time without moving the migration on. Each costs as much work
# as a frame of pages. A peer of ours sends a few in a second; one that sends more than MAX_ASIDE
# wants to keep us from all else, since all that came with one read is handled at once.
ASIDE = (MessageType.PING, MessageType.PONG, MessageType.CACHE_SIZE)
MAX_ASIDE = 1000


class ReceiveQueue:
    """The frames of one link, in order.

    limit -- bytes that may wait; the last frame may go beyond it
    bytes -- that do wait
    """

    def __init__(self) -> None:
        self.limit = EARLY_AHEAD_BYTES
        self.bytes = 0
        self._frames: deque[Frame] = deque()

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def is_full(self) -> bool:
        """Whether nothing more may be read until a frame is taken."""
        return self.bytes >= self.limit or len(self._frames) >= RECEIVE_AHEAD

    @property
    def first_type(self) -> MessageType:
        """The type of the next frame; there must be one."""
        return self._frames[0].type

    @property
    def error(self) -> Frame | None:
        """The peer's ERROR, if it waits here. A session ends with it, so it is the last frame."""
        last = self._frames[-1] if self._frames else None
        return last if last is not None and last.type is MessageType.ERROR else None

    def put(self, frame: Frame) -> None:
        """Add a frame that was received."""
        self._frames.append(frame)
        self.bytes += frame.size

    def take(self) -> Frame:
        """Remove and return the next frame; there must be one."""
        frame = self._frames.popleft()
        self.bytes -= frame.size
        return frame

    def clear(self) -> None:
        """Drop all frames."""
        self._frames.clear()
        self.bytes = 0


class AsideLimit:
    """Counts messages of ASIDE, by the second. Times are those of time.monotonic()."""

    def __init__(self, now: float) -> None:
        self._count = 0
        self._since = now

    def count(self, kind: MessageType, now: float) -> None:
        """Count a message. Raise MessageError if the peer sends too many that move nothing."""
        if kind not in ASIDE:
            return
        self._count += 1
        if self._count > MAX_ASIDE:
            if now - self._since < 1:
                raise MessageError(f"{kind.name}, one of more than {MAX_ASIDE} in a second")
            self._count, self._since = 0, now
