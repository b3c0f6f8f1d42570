"""A program as its operators see it, whether they ask through QMP or the human monitor.

The module is imported with the programs' parsers, which are read where nothing else is installed
(migrate.manual). So it imports no compiled module at the top.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from migrate.errors import UsageError

if TYPE_CHECKING:
    from migrate.policy.parameters import Parameters


class CommandError(Exception):
    """A command is refused: the sentence says why, `kind` is QEMU's error class."""

    def __init__(self, desc: str, kind: str = "GenericError") -> None:
        super().__init__(desc)
        self.kind = kind


# In QEMU's words, which its clients may look for.
IN_PROGRESS = "There's a migration process in progress"
# How the human monitor ends the answer to words that do not fit their command.
TRY_HELP = " for more information\n"
Listener = Callable[[dict[str, Any]], None]


class MonitoredProgram(ABC):
    """migrate-src or migrate-dst. No method but `ended` waits; each may raise CommandError.

    name       -- of the program
    receives   -- whether it is a destination
    parameters -- in force now
    tls        -- the TLS options by QEMU's names; a name that is missing is unset
    listeners  -- called with each event
    """

    name = ""
    receives = False
    parameters: Parameters
    tls: Mapping[str, str] = {}

    def __init__(self) -> None:
        self.listeners: set[Listener] = set()

    # -- what it shows

    @abstractmethod
    def query_migrate(self) -> dict[str, Any]:
        """Return QMP's MigrationInfo; {} before there was a migration."""

    @abstractmethod
    def info_migrate(self, *, whole: bool = False) -> str:
        """Return the same for people; `whole` in the layout of later QEMUs."""

    def table(self) -> dict[str, tuple[int | bool | str, str]]:
        """Return the parameters in QEMU's order: each value, and the text that people read."""
        from migrate.monitor import settings

        return settings.table(self.parameters, self.tls, receives=self.receives)

    @abstractmethod
    def query_status(self) -> dict[str, Any]:
        """Return QEMU's RunState of the guest here."""

    # -- what it takes

    @property
    @abstractmethod
    def migrating(self) -> bool:
        """Whether a migration is under way."""

    def apply(self, parameters: Parameters) -> None:
        """Put other parameters in force, for a running migration too. Raises UsageError."""
        self.parameters = parameters

    def set_parameters(self, values: dict[str, Any]) -> None:
        """Set parameters by QEMU's names. If one is refused, none is set."""
        from migrate.monitor import settings

        for name in set(values) & set(settings.TLS):
            # Clients of QEMU set these to "" or null for a migration without TLS.
            given = "" if values[name] is None else values[name]
            if given != self.tls.get(name, ""):
                raise CommandError(
                    f"Parameter '{name}' cannot change while the program runs: certificates are "
                    f"read when it starts (--{name})"
                )
        values = {name: value for name, value in values.items() if name not in settings.TLS}
        if self.receives:
            for name in values:
                one = settings.SETTINGS.get(name)
                if one is not None and not one.destination:
                    raise CommandError(f"Parameter '{name}' is the source's: set it there")
        try:
            if values:
                self.apply(settings.changed(self.parameters, values))
        except UsageError as error:
            raise CommandError(str(error)) from None

    def set_capabilities(self, switches: list[tuple[object, object]]) -> None:
        """Switch capabilities on or off. If one is refused, none is switched.

        While a migration is under way, only `events` may be switched: the others were agreed on
        with the peer.
        """
        from migrate.monitor import settings
        from migrate.policy.parameters import EVENTS

        parameters = self.parameters
        try:
            for name, state in switches:
                if self.migrating and name != EVENTS:
                    raise CommandError(IN_PROGRESS)
                parameters = settings.switched(parameters, name, state)
        except UsageError as error:
            raise CommandError(str(error)) from None
        self.parameters = parameters

    # -- what it does

    def migrate(self, uri: str) -> None:
        """Begin to move the guest to `uri`."""
        raise CommandError("this program receives a guest: it cannot move one elsewhere")

    def migrate_incoming(self, uri: str) -> None:
        """Begin to listen at `uri`."""
        raise CommandError("'-incoming' is not supported by a source: start migrate-dst")

    @abstractmethod
    def cancel(self) -> None:
        """Cancel the migration that is under way; do nothing if there is none."""

    @abstractmethod
    def quit(self) -> None:
        """End the program, in an orderly way."""

    async def ended(self) -> str:
        """Wait for the end of the migration, or until the destination listens.

        Returns why it failed, or "".
        """
        return ""

    # -- what it tells

    def tell(self, event: str, **data: Any) -> None:
        """Send a QMP event to all listeners."""
        now = time.time_ns() // 1000
        message: dict[str, Any] = {"event": event}
        if data:
            message["data"] = data
        message["timestamp"] = {"seconds": now // 1_000_000, "microseconds": now % 1_000_000}
        for listener in list(self.listeners):
            listener(message)

    def tell_migration(self, event: str, **data: Any) -> None:
        """Send an event that the capability `events` must switch on, as QEMU's MIGRATION."""
        from migrate.policy.parameters import EVENTS

        if self.parameters.capabilities.get(EVENTS, False):
            self.tell(event, **data)
