"""`--metrics` and `--metrics-textfile`: statistics in Prometheus' text format, in base units.

A collector makes the metric families from the last snapshot when it is scraped. The HTTP server
(metrics_server) runs in a thread of its own; snapshots are immutable, so it never sees half of one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from migrate.errors import ConnectError, UsageError
from migrate.files.filesystem import write_whole
from migrate.statistics import Statistics, Status
from migrate.transport.address import parse_address
from migrate.transport.listening_sockets import listen_on
from migrate.transport.name_lookup import look_up_now, name_of
from migrate.views.metrics_server import server_of

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

    from migrate.destination.receiver import Arrival

TEXTFILE_SECONDS = 5.0
BACKLOG = 5
# There is always a sample for each of these; CANCELLING has one only while it lasts.
STATES = tuple(status for status in Status if status is not Status.CANCELLING)


def source_families(s: Statistics) -> Iterator[Metric]:
    """Yield the metrics of a source."""
    yield from _common(s.status, {
        "zero": s.duplicate, "normal": s.normal, "xbzrle": s.xbzrle_pages,
    }, s.dirty_sync_count, s.cache_size)  # fmt: skip
    for name, text, value in (
        ("ram_transferred_bytes", "Bytes given to sockets, framing included.", s.transferred),
        ("ram_downtime_bytes", "Those of them that were sent while the guest was paused.",
         s.downtime_bytes),
        ("pages_skipped", "Dirty pages that were equal to those at the destination.", s.skipped),
        ("xbzrle_bytes", "Bytes of deltas sent.", s.xbzrle_bytes),
        ("compression_pages", "Pages in batches that were compressed.", s.compression_pages),
        ("compression_bytes", "Bytes that batches were compressed to.", s.compressed_size),
        ("compression_saved_bytes", "Bytes that compression has saved.", s.compression_saved),
        ("xbzrle_cache_hits", "Pages whose old content was in the cache.", s.cache_hits),
        ("xbzrle_cache_misses", "Pages whose old content was not in the cache.", s.cache_miss),
        ("xbzrle_cache_evictions", "Pages evicted from the cache.", s.evictions),
        ("xbzrle_overflows", "Deltas that would have been larger than the page.", s.overflow),
        ("reconnects", "Connections that replaced a broken one.", s.reconnects),
    ):  # fmt: skip
        yield _counter(name, text, value)
    for name, text, number in (
        ("ram_bytes", "Size of the guest's memory.", s.total),
        ("ram_remaining_bytes", "Bytes that are dirty and not sent yet.", s.remaining),
        ("ram_dirty_bytes_per_second", "Rate at which the guest dirtied memory in the last round.",
         s.dirty_pages_rate * s.page_size),
        ("ram_throughput_bytes_per_second",
         "Throughput of the current round; at the end, of the migration.", s.mbps * 1e6 / 8),
        ("channels", "Connections that carry pages.", s.channels),
        ("time_seconds", "Time since the migration began.", s.total_time),
        ("setup_seconds", "Time before the first round.", s.setup_time),
        ("downtime_seconds", "Time from the pause until the guest ran there.", s.downtime),
        ("expected_downtime_seconds", "Downtime as last predicted.",
         s.expected_downtime),
    ):  # fmt: skip
        if number is not None:
            yield _gauge(name, text, number)


def destination_families(arrival: Arrival | None) -> Iterator[Metric]:
    """Yield the metrics of a destination; all are zero before it has accepted a guest."""
    if arrival is None:
        yield from _common(Status.NONE, {"zero": 0, "normal": 0, "xbzrle": 0}, 0, 0)
        return
    kinds = {"zero": arrival.zero, "normal": arrival.raw, "xbzrle": arrival.delta}
    yield from _common(arrival.status, kinds, arrival.rounds, arrival.cache_size)
    yield _counter("ram_received_bytes", "Bytes received from sockets.", arrival.received)
    yield _gauge("ram_bytes", "Size of the guest's memory.", arrival.info.size)


def _common(
    status: str, kinds: dict[str, int], rounds: int, cache_size: int
) -> Iterator[Metric]:  # fmt: skip
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    pages = CounterMetricFamily("migrate_pages", "Pages by kind.", labels=["type"])
    for kind, count in kinds.items():
        pages.add_metric([kind], count)
    yield pages
    state = GaugeMetricFamily("migrate_status", "1 for the current status.", labels=["status"])
    for one in dict.fromkeys([*STATES, status]):
        state.add_metric([one], float(one == status))
    yield state
    yield _gauge("pass", "Number of rounds that are over.", rounds)
    yield _gauge("xbzrle_cache_size_bytes", "Size of the cache of old page contents.", cache_size)


def _counter(name: str, text: str, value: float) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    return CounterMetricFamily(f"migrate_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    return GaugeMetricFamily(f"migrate_{name}", text, value=value)


class _Collector:
    """Answers a scrape with the families of `families`."""

    def __init__(self, families: Callable[[], Iterator[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return self._families()

    def describe(self) -> list[Metric]:
        return []  # otherwise the registry would collect all metrics once for their names


class Metrics:
    """Serves and writes the metrics that `families` gives.

    listen   -- HOST:PORT to serve them on; port 0 picks a free port
    textfile -- file to write them to
    address  -- the URL that is served, or ""

    The constructor raises UsageError, ConnectError.
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
        """Write the file once, to find errors before the migration. Raises UsageError."""
        path = self._textfile
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            raise UsageError(
                f"--metrics-textfile {path}: it is not a regular file, and is not replaced"
            )
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
        """Write the textfile if it is due, but never in the pause. Raises OSError."""
        if self._textfile and not paused and self._clock() - self._written_at >= TEXTFILE_SECONDS:
            self.write()

    def write(self) -> None:
        """Replace the textfile atomically. Raises OSError.

        The new content is first written to a hidden file, which node_exporter does not read.
        """
        if not self._textfile:
            return
        from prometheus_client import generate_latest

        self._written_at = self._clock()
        write_whole(self._textfile, generate_latest(self.registry), "--metrics-textfile")

    def close(self) -> None:
        """Stop the server, after answering the scrapes that have begun."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None
