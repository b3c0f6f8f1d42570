"""The part of a stream that is in memory: read at one end, taken at the other."""

from __future__ import annotations


class Sliding:
    """`data[start:end]` is what has come and is not taken; who takes of it moves `start`.

    data  -- where it is kept: more than twice of what must be there at once
    least -- so many bytes of room there always are to read into
    """

    def __init__(self, data: memoryview, least: int) -> None:
        self.data = data
        self.start = self.end = 0
        self.base = 0
        """Where in the stream `data` begins."""
        self._least = least

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def received(self) -> int:
        """Bytes that have come."""
        return self.base + self.end

    def room(self) -> memoryview:
        """Where what comes next is to be; say with `come` how much of it came."""
        if self.start == self.end or len(self.data) - self.end < self._least:
            rest = bytes(self.data[self.start : self.end])
            self.data[: len(rest)] = rest
            self.base += self.start
            self.start, self.end = 0, len(rest)
        return self.data[self.end :]

    def come(self, count: int) -> None:
        self.end += count

    def take(self, to: int) -> memoryview:
        """What is in front of `to`, good until the next `room`."""
        taken = self.data[self.start : to]
        self.start = to
        return taken
