"""The HTTP server of `--metrics`, with limits on clients: any of them may be a stranger."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, cast

from migrate.transport.admission import AdmissionQueue
from migrate.transport.name_lookup import host_text

if TYPE_CHECKING:
    from io import BufferedIOBase
    from wsgiref.simple_server import WSGIServer

# Limits on clients: how many at a time, how long each may take in all, and bytes of its request.
MAX_CLIENTS = 32
CLIENT_SECONDS = 5.0
MAX_REQUEST = 16 << 10


class _Request:
    """Reads the lines of a request. Raises OSError after MAX_REQUEST bytes.

    http.server alone would read a hundred lines of 64 KiB each.
    """

    def __init__(self, file: BufferedIOBase) -> None:
        self._file = file
        self._left = MAX_REQUEST
        self.close = file.close

    def readline(self, size: int) -> bytes:
        line = self._file.readline(min(size, self._left))
        self._left -= len(line)
        if not self._left:
            raise OSError(f"the request has more than {MAX_REQUEST} bytes")
        return line


def server_of(sock: socket.socket) -> WSGIServer:
    """Return an HTTP server on a socket that listens already.

    The standard library's server looks up the name of its own address, which cannot be interrupted,
    and keeps a thread for each client without a time limit. Both are replaced here.
    """
    from socketserver import ThreadingMixIn
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

    class Server(ThreadingMixIn, WSGIServer):
        daemon_threads = True

        def __init__(self, *arguments: Any, **words: Any) -> None:
            super().__init__(*arguments, **words)
            self.clients: AdmissionQueue[socket.socket] = AdmissionQueue(_hang_up, MAX_CLIENTS)
            self.ends: dict[socket.socket, float] = {}
            self.turn = threading.Lock()

        def process_request(self, request: Any, client_address: Any) -> None:
            with self.turn:
                self.clients.add(request, client_address)
                self.ends[request] = time.monotonic() + CLIENT_SECONDS
            super().process_request(request, client_address)

        def shutdown_request(self, request: Any) -> None:
            with self.turn:
                self.clients.discard(request)
                self.ends.pop(request, None)
            super().shutdown_request(request)

        def service_actions(self) -> None:
            """Drop clients that have had their time. Called twice a second.

            A timeout of the socket would start again with each byte.
            """
            with self.turn:
                for client, end in self.ends.items():
                    if time.monotonic() > end:
                        _hang_up(client)

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Ignore clients that send nothing or hang up."""

    class Silent(WSGIRequestHandler):
        def setup(self) -> None:
            super().setup()
            self.rfile = cast("BufferedIOBase", _Request(self.rfile))

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = Server(("", 0), Silent, bind_and_activate=False)
    server.socket.close()
    server.socket = sock
    sock.setblocking(True)
    server.server_address = sock.getsockname()
    server.server_name, server.server_port = host_text(sock.getsockname()), sock.getsockname()[1]
    server.setup_environ()
    return server


def _hang_up(client: socket.socket) -> None:
    """Shut the connection down; its thread notices, and ends."""
    with contextlib.suppress(OSError):
        client.shutdown(socket.SHUT_RDWR)
