"""A cursor over the bytes of a stream that have arrived so far.

A part that is not whole yet raises ShortError, and is read again from its beginning once more bytes
are there. The cursor copies what it returns, so nothing refers to the buffer afterwards.
"""

from __future__ import annotations


class ShortError(Exception):
    """More bytes are needed."""


class Cursor:
    """Reads data[at:end] in order; integers are big-endian. All methods raise ShortError."""

    def __init__(self, data: memoryview, at: int, end: int) -> None:
        self.data = data
        self.at = at
        self.end = end

    @property
    def left(self) -> int:
        """The number of bytes not read yet."""
        return self.end - self.at

    def peek(self, count: int) -> bytes:
        """Return the next bytes without consuming them."""
        if count > self.left or self.left == 0:
            raise ShortError
        return bytes(self.data[self.at : self.at + count])

    def take(self, count: int) -> bytes:
        """Return the next bytes, and consume them."""
        if count > self.left:
            raise ShortError
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "big")

    def name(self) -> bytes:
        """Return a name: its length in one byte, then its bytes."""
        return self.take(self.u8())
