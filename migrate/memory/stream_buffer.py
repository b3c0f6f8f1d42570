"""A window over a byte stream: filled at one end, consumed at the other, without a ring.

    data   |  taken  |  received, not taken  |  free  |
           0       start                    end     len(data)

When less than `min_read` bytes are free behind `end`, the rest is moved to the front. Parsers need
contiguous bytes, and a rest is at most one record, so the move is short.
"""

from __future__ import annotations


class StreamBuffer:
    """The bytes of a stream that were received and not yet taken: `data[start:end]`.

    data     -- the memory to use; more than twice the longest record
    min_read -- bytes that `room` offers at least
    """

    def __init__(self, data: memoryview, min_read: int) -> None:
        self.data = data
        self.start = self.end = 0
        self.base = 0
        """The offset in the stream at which `data` begins."""
        self._min_read = min_read

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def received(self) -> int:
        """The number of bytes received since the stream began."""
        return self.base + self.end

    def room(self) -> memoryview:
        """Return the memory to read into. Report with `add` how many bytes were read."""
        if self.start == self.end or len(self.data) - self.end < self._min_read:
            rest = bytes(self.data[self.start : self.end])
            self.data[: len(rest)] = rest
            self.base += self.start
            self.start, self.end = 0, len(rest)
        return self.data[self.end :]

    def add(self, count: int) -> None:
        """Count bytes that were read into `room`."""
        self.end += count

    def take(self, to: int) -> memoryview:
        """Return the bytes in front of `to`, and consume them. They are valid until `room`."""
        taken = self.data[self.start : to]
        self.start = to
        return taken
