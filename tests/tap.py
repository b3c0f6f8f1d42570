"""A proxy between the two programs that sees each frame, and acts before it passes one on."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future

from proto.wire.frames import FrameReader
from proto.wire.messages import Join, MessageType, Round, unpack

When = Callable[[MessageType, bytes, int], bool]


class Tap:
    """Stands between the two programs, and does something the moment a certain frame passes.

    when -- told the type, head and channel of each frame
    act  -- what to do; it may be set once the programs run, the frame is held until then
    """

    def __init__(self, address: str, when: When) -> None:
        host, port = address.removeprefix("tcp:").split(":")
        self._server: socket.socket | None = socket.create_server(("127.0.0.1", 0))
        self._name = self._server.getsockname()
        self.address = f"tcp:127.0.0.1:{self._name[1]}"
        self._there = (host, int(port))
        self._when = when
        self._open: list[socket.socket] = []
        self._act: Future[Callable[[], object]] = Future()
        self.acted = threading.Event()
        threading.Thread(target=self._run, args=(self._server,), daemon=True).start()

    @property
    def act(self) -> Callable[[], object]:
        return self._act.result(timeout=30)

    @act.setter
    def act(self, act: Callable[[], object]) -> None:
        self._act.set_result(act)

    def _run(self, server: socket.socket) -> None:
        """Open a connection to the other side for each one to the tap."""
        while True:
            try:
                near, _ = server.accept()
            except OSError:
                return  # closed
            if server is not self._server:
                near.close()
                return
            try:
                far = socket.create_connection(self._there)
            except OSError:
                near.close()
                continue
            self._open += [near, far]
            threading.Thread(target=self._serve, args=(near, far), daemon=True).start()

    def close(self) -> None:
        """Pass nothing on, and refuse connections."""
        assert self._server is not None
        server, self._server = self._server, None
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        self.cut()

    def open(self) -> None:
        """Listen again after `close`."""
        self._server = socket.create_server(self._name)
        threading.Thread(target=self._run, args=(self._server,), daemon=True).start()

    def cut(self) -> None:
        """Break all connections; new ones can be made."""
        cut, self._open = self._open, []
        for end in cut:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _serve(self, near: socket.socket, far: socket.socket) -> None:
        readers = FrameReader(), FrameReader()
        for reader in readers:
            reader.compressed = True
        pumps = [
            threading.Thread(target=self._pump, args=(come, go, reader, readers), daemon=True)
            for (come, go), reader in zip(((near, far), (far, near)), readers, strict=True)
        ]
        for pump in pumps:
            pump.start()
        for pump in pumps:
            pump.join()
        near.close()
        far.close()

    def _pump(
        self, come: socket.socket, go: socket.socket, reader: FrameReader,
        both: tuple[FrameReader, FrameReader],
    ) -> None:  # fmt: skip
        try:
            while data := come.recv(1 << 16):
                reader.feed(data)
                while (frame := reader.next_frame()) is not None:
                    kind, head = frame.type, bytes(frame.head)
                    frame.release()
                    if kind is MessageType.JOIN:
                        message = unpack(kind, head)
                        assert isinstance(message, Join)
                        for each in both:
                            each.channel = message.channel
                    if not self.acted.is_set() and self._when(kind, head, reader.channel):
                        self.acted.set()
                        self.act()
                go.sendall(data)
        except OSError:
            pass
        for end in (come, go):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def is_last_round(kind: MessageType, head: bytes, channel: int) -> bool:
    if kind is not MessageType.ROUND or channel:
        return False
    message = unpack(kind, head)
    assert isinstance(message, Round)
    return message.last


def of_kind(kind: MessageType, on: int = 0) -> When:
    return lambda seen, head, channel: seen is kind and channel == on
