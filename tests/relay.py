"""A proxy that passes bytes on, keeps a copy of them, and can break the connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

BUFFER = 1 << 18  # bytes that the system keeps of each direction


class Relay:
    """Between a source and the destination at `address` ("tcp:127.0.0.1:PORT").

    breaks -- after so many bytes from the source, once for each number, all connections break
    flips  -- there a bit is changed, instead
    seen   -- all bytes that passed, both ways, where `keep`
    sent   -- those from the source
    """

    def __init__(
        self, address: str, breaks: tuple[int, ...] = (), *, flips: bool = False, keep: bool = False
    ) -> None:  # fmt: skip
        host, port = address.removeprefix("tcp:").split(":")
        self._there = (host, int(port))
        self._breaks = list(breaks)
        self._flips = flips
        self._keep = keep
        self._lock = threading.Lock()
        self._passed = 0
        self._open: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        # what is read late, on a busy machine, waits at its sender, so that a break loses little
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        self.address = f"tcp:127.0.0.1:{self._server.getsockname()[1]}"
        self.seen = bytearray()
        self.sent = bytearray()
        self._threads = [threading.Thread(target=self._run)]
        self._threads[0].start()

    def __enter__(self) -> Relay:
        return self

    async def __aenter__(self) -> Relay:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.__exit__)

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._cut()
        for thread in self._threads:
            thread.join(10)

    @property
    def broken(self) -> bool:
        """Return whether all breaks have happened."""
        return not self._breaks

    def _run(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            far = socket.create_connection(self._there)
            far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            with self._lock:
                self._open += [near, far]
                pumps = [
                    threading.Thread(target=self._pump, args=(near, far, True)),
                    threading.Thread(target=self._pump, args=(far, near, False)),
                ]
                self._threads += [
                    threading.Thread(target=self._end, args=(pumps, near, far)), *pumps
                ]  # fmt: skip
            for thread in self._threads[-3:][::-1]:
                thread.start()

    def _end(self, pumps: list[threading.Thread], near: socket.socket, far: socket.socket) -> None:
        for pump in pumps:
            pump.join()
        near.close()
        far.close()

    def _pump(self, come: socket.socket, go: socket.socket, forth: bool) -> None:
        with contextlib.suppress(OSError):
            while data := come.recv(1 << 16):
                with self._lock:
                    if self._keep:
                        self.seen += data
                        self.sent += data if forth else b""
                    self._passed += len(data) if forth else 0
                    cut = forth and bool(self._breaks) and self._passed >= self._breaks[0]
                    if cut:
                        del self._breaks[0]
                if cut and self._flips:
                    data = data[:-1] + bytes([data[-1] ^ 1])
                elif cut:
                    self._cut()
                go.sendall(data)
        for end in (come, go):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _cut(self) -> None:
        with self._lock:
            cut, self._open = self._open, []
        for end in cut:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
