"""migrate-src as its operators see it: what the monitor shows of it, and asks it to do.

    IDLE --migrate--> REQUESTED --begin--> MIGRATING --end--> MOVED   the destination has the guest
     ^                    |                    |
     +---- call off ------+---- end -----------+             the guest runs here

The program does the work: it waits for a request, tells of each step, and obeys StopRequests.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from migrate.cli.source_options import SourceConfig
from migrate.cli.stop import StopRequests
from migrate.errors import UsageError
from migrate.events import Event, SourceEvent
from migrate.monitor.monitored import IN_PROGRESS, CommandError, MonitoredProgram
from migrate.statistics import (
    Statistics,
    Status,
    info_migrate,
    info_migrate_all,
    query_migrate,
    status_line,
)
from migrate.transport.address import Address, parse_address

if TYPE_CHECKING:
    from migrate.policy.parameters import Parameters
    from migrate.source.migration import Migration

logger = logging.getLogger(__name__)


class State(Enum):
    """What migrate-src does with its guest."""

    IDLE = "the guest runs here"
    REQUESTED = "a command asks for a migration that has not begun"
    MIGRATING = "a migration is under way"
    MOVED = "the destination has the guest, or may have it"


class SourceMonitor(MonitoredProgram):
    """Answers the monitor's commands for one run of migrate-src.

    address   -- of the destination; set by the command line, then by each `migrate`
    migration -- the one that runs, or the last one; None before it has a connection
    """

    name = "migrate-src"

    def __init__(self, config: SourceConfig, stop: StopRequests) -> None:
        super().__init__()
        self.tls = config.tls
        self.address = config.address or Address()
        self.migration: Migration | None = None
        self._config = config
        self._stop = stop
        self._parameters = config.parameters
        self._state = State.IDLE if config.idle else State.MIGRATING
        # The statistics while there is no `migration`.
        self._unconnected = Statistics(status=Status.NONE if config.idle else Status.SETUP)
        # The status that was sent as an event last.
        self._last_status: Status | None = None
        self._requested = asyncio.Event()
        self._over = asyncio.Event()

    # -- what the program tells

    @property
    def moved(self) -> bool:
        """Whether the destination has the guest, or may have it."""
        return self._state is State.MOVED

    @property
    def has_request(self) -> bool:
        """Whether a command asks for a migration that has not begun."""
        return self._state is State.REQUESTED

    async def wait_for_request(self) -> None:
        """Wait until a command asks for a migration."""
        await self._requested.wait()

    def begin(self) -> None:
        """Note that a migration begins; there is no connection yet."""
        self._set_state(State.MIGRATING)

    def connecting(self) -> None:
        """Note that the program connects to the destination."""
        self._unconnected = Statistics(status=Status.SETUP)
        self._tell_status(Status.SETUP)

    def fail(self, error: str) -> None:
        """Note that a migration which a command asked for failed before it had a connection."""
        self._unconnected = Statistics(status=Status.FAILED, error=error)
        self._tell_status(Status.FAILED)

    def cancelled(self) -> None:
        """Note that the migration was cancelled before it had a connection."""
        self._unconnected = Statistics(status=Status.CANCELLED)
        for status in (Status.CANCELLING, Status.CANCELLED):
            self._tell_status(status)

    def end(self) -> None:
        """Note that the migration is over."""
        self._parameters = self.parameters  # what was found or set meanwhile holds for the next one
        moved = self.migration is not None and self.migration.committed
        self._set_state(State.MOVED if moved else State.IDLE)
        self._requested.clear()
        self._over.set()

    def observe(self, event: Event, statistics: Statistics) -> None:
        """Send QMP's events for an event of the migration."""
        if event is SourceEvent.STATUS:
            self._tell_status(statistics.status)
        elif event is SourceEvent.ROUND_BEGUN:
            self.tell_migration("MIGRATION_PASS", **{"pass": statistics.dirty_sync_count + 1})
        elif event is SourceEvent.PAUSED:
            self.tell("STOP")
        elif event is SourceEvent.RESUMED and self.migration and self.migration.guest.runs:
            self.tell("RESUME")

    def _tell_status(self, status: Status) -> None:
        """Send a status once: a migration begins with the one that was sent before it existed."""
        if status != self._last_status:
            self._last_status = status
            self.tell_migration("MIGRATION", status=status)

    def _set_state(self, state: State) -> None:
        if state is not self._state:
            logger.info("%s: %s", state.name.lower(), state.value)
        self._state = state

    # -- what operators see

    @property
    def migrating(self) -> bool:
        return self._state in (State.REQUESTED, State.MIGRATING)

    @property
    def _statistics(self) -> Statistics:
        return self.migration.statistics if self.migration else self._unconnected

    def query_migrate(self) -> dict[str, Any]:
        if self.migration is not None:
            return query_migrate(self.migration.statistics)
        s = self._unconnected
        told = {"status": s.status, "error-desc": s.error}
        return {name: text for name, text in told.items() if text not in ("", Status.NONE)}

    def info_migrate(self, *, whole: bool = False) -> str:
        from migrate.monitor.settings import switches

        s = self._statistics
        if s.capabilities:
            return info_migrate_all(s) if whole else info_migrate(s)
        on = "on" if switches(self.parameters)["xbzrle"] else "off"
        return f"capabilities: xbzrle: {on}\n{status_line(s)}"

    def query_status(self) -> dict[str, Any]:
        status = self._run_state()
        return {"running": status == "running", "status": status}

    def _run_state(self) -> str:
        """Return QEMU's RunState of the guest."""
        migration = self.migration
        if self.moved or (migration is not None and migration.committed):
            return "postmigrate"
        if migration is None:
            return "running" if self._config.idle else "prelaunch"
        if migration.statistics.status is Status.DEVICE:
            return "finish-migrate"
        return "running" if migration.guest.runs else "paused"

    # -- what operators set

    @property
    def parameters(self) -> Parameters:
        """The parameters in force: a migration may find a cache size, or be asked for another."""
        if self.migration is not None and self.migrating:
            return replace(self.migration.parameters, capabilities=self._parameters.capabilities)
        return self._parameters

    @parameters.setter
    def parameters(self, parameters: Parameters) -> None:
        self._parameters = parameters

    def apply(self, parameters: Parameters) -> None:
        if self.migration is not None and self.migrating:
            # The operator may switch `events` at any time, but not what was agreed on.
            agreed = self.migration.parameters.capabilities
            self.migration.set_parameters(replace(parameters, capabilities=agreed))
        super().apply(parameters)

    # -- what operators do

    def migrate(self, uri: str) -> None:
        if self.migrating or not self._config.serves:
            raise CommandError(IN_PROGRESS)
        if self.moved:
            raise CommandError("Can't migrate the vm that was paused due to previous migration")
        try:
            self.address = parse_address(uri)
        except UsageError as error:
            known = uri.lstrip().startswith(("tcp:", "unix:"))
            raise CommandError(
                str(error) if known else "Parameter 'uri' expects a valid migration protocol"
            ) from None
        self.migration = None
        self.connecting()
        self._over.clear()
        self._set_state(State.REQUESTED)
        self._requested.set()
        self._stop.handle_with(self._call_off)

    def _call_off(self) -> str:
        """Cancel a migration that has not begun."""
        self.cancelled()
        self.end()
        self._stop.handle_with(str)
        return ""

    def cancel(self) -> None:
        if self.migrating and (refusal := self._stop.cancel()):
            raise CommandError(refusal.removeprefix(f"{self.name}: "))

    def quit(self) -> None:
        self._stop.request()

    async def ended(self) -> str:
        await self._over.wait()
        s = self._statistics
        return "" if s.status is Status.COMPLETED else s.error or "the migration was cancelled"
