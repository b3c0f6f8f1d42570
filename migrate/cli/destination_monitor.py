"""migrate-dst as its operators see it: what the monitor shows of it, and asks it to do.

DEFERRED --migrate_incoming--> OPENING --listening--> LISTENING --arrived--> OVER
    ^                             |
    +------- listen_failed -------+
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from migrate.cli.destination_options import DestinationConfig
from migrate.cli.stop import StopRequests
from migrate.errors import MigrationError, UsageError
from migrate.events import DestinationEvent
from migrate.monitor.monitored import CommandError, MonitoredProgram
from migrate.output import printable
from migrate.statistics import Status
from migrate.transport.address import Address, parse_address
from proto import ProtoError

if TYPE_CHECKING:
    from migrate.destination.destination import Destination
    from migrate.destination.receiver import Arrival
    from migrate.policy.parameters import Parameters

logger = logging.getLogger(__name__)


class State(Enum):
    """What migrate-dst does."""

    DEFERRED = "no address to listen on is known"
    OPENING = "about to listen"
    LISTENING = "a guest can come"
    OVER = "the guest is here"


class DestinationMonitor(MonitoredProgram):
    """Answers the monitor's commands for one run of migrate-dst.

    address     -- where to listen; meaningful from OPENING on
    destination -- receives the guest that comes, or came last; None before
    """

    name = "migrate-dst"
    receives = True

    def __init__(self, config: DestinationConfig, stop: StopRequests) -> None:
        super().__init__()
        self.tls = config.tls
        self.parameters = config.parameters
        self.address = config.address or Address()
        self.destination: Destination | None = None
        self._stop = stop
        self._deferred = config.deferred
        # The cache size to ask the source for; 0: none.
        self._cache_size = config.cache_size
        self._state = State.DEFERRED if config.deferred else State.OPENING
        self._addresses: Sequence[Address] = ()
        # Why the last address could not be listened on.
        self._failure = ""
        self._named = asyncio.Event()
        self._opened = asyncio.Event()
        self._sending: set[asyncio.Task[None]] = set()

    # -- what the program tells

    @property
    def has_address(self) -> bool:
        """Whether an address to listen on is known."""
        return self._state is not State.DEFERRED

    async def wait_for_address(self) -> None:
        """Wait until a command names the address to listen on."""
        await self._named.wait()

    def listening(self, addresses: Sequence[Address]) -> None:
        """Note that the program listens on these addresses."""
        self._addresses = addresses
        self._set_state(State.LISTENING)
        self._opened.set()

    def listen_failed(self, why: str) -> None:
        """Note that the program cannot listen on the address that a command named."""
        self._failure = why
        self._set_state(State.DEFERRED)
        self._named.clear()
        self._opened.set()

    def arrived(self) -> None:
        """Note that the guest is here: nothing more is received."""
        self._set_state(State.OVER)

    def observe(self, event: DestinationEvent, arrival: Arrival, destination: Destination) -> None:
        """Send QMP's events for an event of the migration, and ask for a cache size."""
        if event.admits:
            self.tell_migration("MIGRATION", status=Status.ACTIVE)
            self._ask_for_cache_size(destination)
        elif event is DestinationEvent.ROUND_DONE:
            self.tell_migration("MIGRATION_PASS", **{"pass": arrival.rounds})
        elif event is DestinationEvent.RUNNING:
            if arrival.runs:
                self.tell("RESUME")
            self.tell_migration("MIGRATION", status=Status.COMPLETED)

    def _ask_for_cache_size(self, destination: Destination) -> None:
        """Ask the source for the cache size that is wanted here, if any is."""
        if not self._cache_size:
            return
        task = asyncio.get_running_loop().create_task(_ask(destination, self._cache_size))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    def _set_state(self, state: State) -> None:
        logger.info("%s: %s", state.name.lower(), state.value)
        self._state = state

    # -- what operators see

    @property
    def arrival(self) -> Arrival | None:
        """How far the guest has come; None before one has been described."""
        return self.destination.arrival if self.destination else None

    @property
    def migrating(self) -> bool:
        destination = self.destination
        return destination is not None and destination.started and self._state is not State.OVER

    def info_migrate(self, *, whole: bool = False) -> str:
        """Return the lines of the first QEMU with xbzrle, as far as a destination knows them."""
        del whole  # later QEMUs show no more of a destination
        from migrate.monitor.settings import switches

        arrival = self.arrival
        if arrival is None:
            on = "on" if switches(self.parameters)["xbzrle"] else "off"
            return f"capabilities: xbzrle: {on}\nMigration status: none"
        info = arrival.info
        return "\n".join([
            f"capabilities: xbzrle: {'on' if arrival.capabilities['xbzrle'] else 'off'}",
            f"Migration status: {arrival.status}",
            f"received ram: {arrival.received >> 10} kbytes",
            f"total ram: {info.size >> 10} kbytes",
            f"duplicate: {arrival.zero} pages",
            f"normal: {arrival.raw} pages",
            f"normal bytes: {arrival.raw * info.page_size >> 10} kbytes",
            f"cache size: {arrival.cache_size} bytes",
            f"xbzrle pages: {arrival.delta} pages",
            f"dirty sync count: {arrival.rounds}",
            f"page size: {info.page_size >> 10} kbytes",
        ])  # fmt: skip

    def query_status(self) -> dict[str, Any]:
        arrival = self.arrival
        if arrival is None or arrival.status is not Status.COMPLETED:
            return {"running": False, "status": "inmigrate"}
        return {"running": arrival.runs, "status": "running" if arrival.runs else "paused"}

    def query_migrate(self) -> dict[str, Any]:
        """Return QMP's MigrationInfo of the guest that comes; {} before one can come."""
        if not self._addresses:
            failed = {"status": "failed", "error-desc": self._failure}
            return failed if self._failure else {}
        where = {"socket-address": [_socket_address(one) for one in self._addresses]}
        arrival = self.arrival
        if arrival is None:
            return {"status": "setup", **where}
        info = arrival.info
        return {
            "status": arrival.status,
            **where,
            "guest": {"kind": info.kind, "size": info.size},
            "ram": {
                "received": arrival.received,
                "total": info.size,
                "duplicate": arrival.zero,
                "normal": arrival.raw,
                "normal-bytes": arrival.raw * info.page_size,
                "dirty-sync-count": arrival.rounds,
                "page-size": info.page_size,
            },
            "xbzrle-cache": {"pages": arrival.delta, "cache-size": arrival.cache_size},
            "running": printable(arrival.running),
        }

    # -- what operators set and do

    def apply(self, parameters: Parameters) -> None:
        """Ask the source for the cache size, now or when one comes."""
        super().apply(parameters)
        self._cache_size = parameters.cache_size
        if self.destination is not None and self.migrating:
            self._ask_for_cache_size(self.destination)

    def migrate_incoming(self, uri: str) -> None:
        if self._state is not State.DEFERRED:
            raise CommandError("The incoming migration has already been started")
        try:
            self.address = parse_address(uri, listen=True)
        except UsageError as error:
            raise CommandError(str(error)) from None
        self._failure = ""
        self._opened.clear()
        self._set_state(State.OPENING)
        self._named.set()

    async def ended(self) -> str:
        """Wait until the program listens; return why it cannot, or ""."""
        await self._opened.wait()
        return self._failure

    def cancel(self) -> None:
        if self.migrating and (refusal := self._stop.cancel()):
            raise CommandError(refusal.removeprefix(f"{self.name}: "))

    def quit(self) -> None:
        self._stop.request()


async def _ask(destination: Destination, size: int) -> None:
    from proto.wire.messages import CacheSize

    with contextlib.suppress(MigrationError, ProtoError):  # the migration is over, or resumes
        await destination.link.send(CacheSize(size))


def _socket_address(address: Address) -> dict[str, str]:
    """Return QMP's SocketAddress."""
    if address.path:
        return {"type": "unix", "path": printable(address.path)}
    return {"type": "inet", "host": address.host, "port": str(address.port)}
