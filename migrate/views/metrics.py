"""`--metrics` and `--metrics-textfile`: the numbers in Prometheus' text format, in base units.

A collector makes the families from the last snapshot when it is asked. The server of
prometheus_client answers in a thread of its own: a snapshot is immutable, so it is whole.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

from migrate.address import parse_address
from migrate.crowd import Crowd
from migrate.errors import ConnectError, UsageError
from migrate.filesystem import write_whole
from migrate.lookup import host_text, look_up_now, name_of
from migrate.sockets import listen_on
from migrate.statistics import Statistics

if TYPE_CHECKING:
    from io import BufferedIOBase
    from wsgiref.simple_server import WSGIServer

    from prometheus_client import CollectorRegistry, Metric

    from migrate.reception import Arrival

TEXTFILE_SECONDS = 5.0
BACKLOG = 5
# So many may ask at the same time, each for so long in all, and with so many bytes.
MAX_CLIENTS = 32
CLIENT_SECONDS = 5.0
MAX_REQUEST = 16 << 10
STATES = ("none", "setup", "active", "device", "completed", "failed", "cancelled")


def source_families(s: Statistics) -> Iterator[Metric]:
    """What a source knows."""
    yield from _common(s.status, {
        "zero": s.duplicate, "normal": s.normal, "xbzrle": s.xbzrle_pages,
    }, s.dirty_sync_count, s.cache_size)  # fmt: skip
    for name, text, value in (
        ("ram_transferred_bytes", "Given to the socket, framing included.", s.transferred),
        ("ram_downtime_bytes", "Of it, what was sent while the guest was stopped.",
         s.downtime_bytes),
        ("pages_skipped", "Pages that were dirty but equal to what the peer has.", s.skipped),
        ("xbzrle_bytes", "Deltas sent.", s.xbzrle_bytes),
        ("xbzrle_cache_hits", "Pages whose old content was in the cache.", s.cache_hits),
        ("xbzrle_cache_misses", "Pages whose old content was not.", s.cache_miss),
        ("xbzrle_cache_evictions", "Pages that left the cache for others.", s.evictions),
        ("xbzrle_overflows", "Deltas that would have been larger than the page.", s.overflow),
        ("reconnects", "Connections that replaced one that broke.", s.reconnects),
    ):  # fmt: skip
        yield _counter(name, text, value)
    for name, text, number in (
        ("ram_bytes", "The guest's memory.", s.total),
        ("ram_remaining_bytes", "Dirty, and not sent yet.", s.remaining),
        ("ram_dirty_bytes_per_second", "What the guest dirtied in the last round.",
         s.dirty_pages_rate * s.page_size),
        ("ram_throughput_bytes_per_second",
         "Of the current round; when it is completed, of the migration.", s.mbps * 1e6 / 8),
        ("channels", "Connections that carry pages.", s.channels),
        ("time_seconds", "Since the migration began.", s.total_time),
        ("setup_seconds", "Until the first round.", s.setup_time),
        ("downtime_seconds", "Pause to running at the destination.", s.downtime),
        ("expected_downtime_seconds", "The pause as it was last predicted.",
         s.expected_downtime),
    ):  # fmt: skip
        if number is not None:
            yield _gauge(name, text, number)


def destination_families(arrival: Arrival | None) -> Iterator[Metric]:
    """What a destination knows of the guest that comes; nothing before one was accepted."""
    if arrival is None or arrival.info is None:
        yield from _common("none", {"zero": 0, "normal": 0, "xbzrle": 0}, 0, 0)
        return
    kinds = {"zero": arrival.zero, "normal": arrival.raw, "xbzrle": arrival.delta}
    yield from _common(arrival.status, kinds, arrival.rounds, arrival.cache_size)
    yield _counter("ram_received_bytes", "Taken from the sockets.", arrival.received)
    yield _gauge("ram_bytes", "The guest's memory.", arrival.info.size)


def _common(
    status: str, kinds: dict[str, int], rounds: int, cache_size: int
) -> Iterator[Metric]:  # fmt: skip
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    pages = CounterMetricFamily("migrate_pages", "Pages by kind.", labels=["type"])
    for kind, count in kinds.items():
        pages.add_metric([kind], count)
    yield pages
    state = GaugeMetricFamily("migrate_status", "1 for the status it has.", labels=["status"])
    for one in dict.fromkeys([*STATES, status]):
        state.add_metric([one], float(one == status))
    yield state
    yield _gauge("pass", "Rounds that are over.", rounds)
    yield _gauge("xbzrle_cache_size_bytes", "Of the cache of old contents.", cache_size)


def _counter(name: str, text: str, value: float) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    return CounterMetricFamily(f"migrate_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    return GaugeMetricFamily(f"migrate_{name}", text, value=value)


class _Request:
    """A request's lines as they are read. Raises OSError when it has more than MAX_REQUEST bytes.

    http.server would take a hundred of 64 KiB each.
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


class _Collector:
    """What a registry asks."""

    def __init__(self, families: Callable[[], Iterator[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return self._families()

    def describe(self) -> list[Metric]:
        return []  # else a registry would ask for everything once, to know the names


def server_of(sock: socket.socket) -> WSGIServer:
    """An HTTP server on a socket that listens already.

    That of the standard library asks the name server for the name of each address that it listens
    on, and nothing could end that; and it has a thread for everybody who connects, for ever.
    """
    from socketserver import ThreadingMixIn
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

    class Server(ThreadingMixIn, WSGIServer):
        daemon_threads = True

        def __init__(self, *arguments: Any, **words: Any) -> None:
            super().__init__(*arguments, **words)
            self.clients: Crowd[socket.socket] = Crowd(_hang_up, MAX_CLIENTS)
            self.ends: dict[socket.socket, float] = {}
            self.turn = threading.Lock()

        def process_request(self, request: Any, client_address: Any) -> None:
            with self.turn:
                self.clients.come(request, client_address)
                self.ends[request] = time.monotonic() + CLIENT_SECONDS
            super().process_request(request, client_address)

        def shutdown_request(self, request: Any) -> None:
            with self.turn:
                self.clients.go(request)
                self.ends.pop(request, None)
            super().shutdown_request(request)

        def service_actions(self) -> None:
            """Twice a second: a time-out of the socket begins anew with each byte."""
            with self.turn:
                for client, end in self.ends.items():
                    if time.monotonic() > end:
                        _hang_up(client)

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that says nothing, or hangs up, is no news."""

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
    """Its thread sees that, and ends."""
    with contextlib.suppress(OSError):
        client.shutdown(socket.SHUT_RDWR)


class Metrics:
    """Serves and writes the families that `families` gives.

    listen   -- HOST:PORT to serve them on; port 0 picks a free one, see `address`
    textfile -- the file to write them to

    Raises UsageError, ConnectError.
    """

    def __init__(
        self, families: Callable[[], Iterator[Metric]], listen: str = "", textfile: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        from prometheus_client import CollectorRegistry

        self.registry: CollectorRegistry = CollectorRegistry()
        self.registry.register(_Collector(families))
        self._textfile = textfile
        self._clock = clock
        self._written_at = float("-inf")
        self._server: Any = None
        self.address = ""
        if textfile:
            self._check()
        if listen:
            self._serve(listen)

    def _check(self) -> None:
        """Writes what there is; what goes wrong now would go wrong at the end."""
        path = self._textfile
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            raise UsageError(f"--metrics-textfile {path}: it is no plain file, and is not replaced")
        try:
            self.write()
        except OSError as error:
            raise UsageError(
                f"--metrics-textfile {self._textfile}: {error.strerror or error}"
            ) from None

    def _serve(self, listen: str) -> None:
        where = parse_address(listen, listen=True)
        if where.path:
            raise UsageError(f"--metrics {listen!r}: write HOST:PORT")
        from prometheus_client import make_wsgi_app

        try:
            first, *_ = look_up_now(where.host or "127.0.0.1", where.port, listens=True)
            sock, *_ = listen_on([first], BACKLOG)
        except ConnectError as error:
            raise ConnectError(f"--metrics {listen}: {error}") from None
        except OSError as error:
            raise ConnectError(f"--metrics {listen}: {error.strerror or error}") from None
        self._server = server_of(sock)
        self._server.set_app(make_wsgi_app(self.registry))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.address = f"http://{name_of(sock.getsockname())}/metrics"

    def observe(self, paused: bool) -> None:
        """Something has happened: the file is written, where it is time and nobody is waiting."""
        if self._textfile and not paused and self._clock() - self._written_at >= TEXTFILE_SECONDS:
            self.write()

    def write(self) -> None:
        """Replaces the textfile, whole; the collector does not read hidden ones. Raises OSError."""
        if not self._textfile:
            return
        from prometheus_client import generate_latest

        self._written_at = self._clock()
        write_whole(self._textfile, generate_latest(self.registry), "--metrics-textfile")

    def close(self) -> None:
        """Ends the server; a scrape that has begun is answered."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None
