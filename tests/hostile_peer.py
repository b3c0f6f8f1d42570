"""A source that sends what a test tells it to."""

from __future__ import annotations

import contextlib
import socket

from proto.wire.frames import HEADER_BYTES, FrameReader, seal
from proto.wire.messages import (
    TYPE_OF,
    Accept,
    Error,
    GuestInfo,
    Hello,
    Message,
    pack,
    unpack,
)  # fmt: skip

MIB = 1 << 20
SEED = bytes(range(16))
HELLO = Hello(1, ("page-hash-nh",), ("xbzrle",))
GUEST = GuestInfo("demo", MIB, 4096, SEED)


def framed(message: Message, channel: int = 0) -> bytes:
    frame = pack(message, HEADER_BYTES)
    seal(frame, TYPE_OF[type(message)], channel)
    return bytes(frame)


class Peer:
    """A hostile source, by hand."""

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("tcp:").rsplit(":", 1)
        self.sock = socket.create_connection((host, int(port)), timeout=20)
        self.reader = FrameReader()

    def send(self, *pieces: Message | bytes) -> None:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                self.sock.sendall(piece if isinstance(piece, bytes) else framed(piece))

    def receive(self) -> Message | None:
        """The next message; None at the end of the connection."""
        while True:
            frame = self.reader.next_frame()
            if frame is not None:
                return unpack(frame.type, frame.head)
            try:
                data = self.sock.recv(1 << 16)
            except ConnectionError:
                return None
            if not data:
                return None
            self.reader.feed(data)

    def reason(self) -> str:
        """Return the reason in the ERROR that precedes the hang-up; "" if there is none."""
        while (message := self.receive()) is not None:
            if isinstance(message, Error):
                return message.reason
        return ""

    def describe(self) -> None:
        """Goes as far as a source whose guest was accepted."""
        self.send(HELLO)
        assert isinstance(self.receive(), Hello)
        self.send(GUEST)
        assert isinstance(self.receive(), Accept)

    def hang_up(self) -> None:
        """Says nothing more, in order; the other side may have had enough before."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.sock.close()
