"""A program as its operators see it: what it shows, takes and does, whichever way it is asked.

The programs' parsers come with this, and are read where nothing else is installed (migrate.manual).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from migrate.errors import UsageError

if TYPE_CHECKING:
    from migrate.parameters import Parameters


class Refused(Exception):  # noqa: N818 - what was answered, not a kind of exception
    """A command that is refused, with a sentence; `kind` is QEMU's error class."""

    def __init__(self, desc: str, kind: str = "GenericError") -> None:
        super().__init__(desc)
        self.kind = kind


IN_PROGRESS = "There's a migration process in progress"
# So ends what is said to words that do not fit their command.
TRY_HELP = " for more information\n"
Listener = Callable[[dict[str, Any]], None]


class Node(ABC):
    """migrate-src or migrate-dst. All methods but `ended` answer at once, or raise Refused."""

    program = ""
    receives = False
    """Whether guests come to it."""
    parameters: Parameters
    tls: Mapping[str, str] = {}
    """What it was started with, by QEMU's names; what is not there is unset."""

    def __init__(self) -> None:
        self.listeners: set[Listener] = set()

    # -- what it shows

    @abstractmethod
    def query_migrate(self) -> dict[str, Any]:
        """QMP's MigrationInfo; {} before there was a migration."""

    @abstractmethod
    def info_migrate(self, *, whole: bool = False) -> str:
        """The same, for people; `whole` in the layout of later QEMUs."""

    @abstractmethod
    def query_status(self) -> dict[str, Any]:
        """QEMU's RunState of the guest here."""

    # -- what it takes

    @property
    @abstractmethod
    def migrating(self) -> bool:
        """Whether a migration is under way."""

    def take(self, parameters: Parameters) -> None:
        """Takes other parameters, for a migration that runs too. Raises UsageError."""
        self.parameters = parameters

    def set_parameters(self, values: dict[str, Any]) -> None:
        """Takes all of these, or none."""
        from migrate.monitor import settings

        for name in set(values) & set(settings.TLS):
            # Who drives QEMU sets them to "" or null for a migration without TLS.
            given = "" if values[name] is None else values[name]
            if given != self.tls.get(name, ""):
                raise Refused(
                    f"Parameter '{name}' cannot change while the program runs: certificates are "
                    f"read when it starts (--{name})"
                )
        values = {name: value for name, value in values.items() if name not in settings.TLS}
        if self.receives:
            for name in values:
                one = settings.SETTINGS.get(name)
                if one is not None and not one.destination:
                    raise Refused(f"Parameter '{name}' is the source's: set it there")
        try:
            if values:
                self.take(settings.changed(self.parameters, values))
        except UsageError as error:
            raise Refused(str(error)) from None

    def set_capabilities(self, switches: list[tuple[object, object]]) -> None:
        """Takes all of these, or none; not while a migration is under way."""
        from migrate.monitor import settings
        from migrate.parameters import EVENTS

        parameters = self.parameters
        try:
            for name, state in switches:
                if self.migrating and name != EVENTS:
                    raise Refused(IN_PROGRESS)
                parameters = settings.switched(parameters, name, state)
        except UsageError as error:
            raise Refused(str(error)) from None
        self.parameters = parameters

    # -- what it does

    def migrate(self, uri: str) -> None:
        """Begins to move the guest there."""
        raise Refused("a guest that comes here cannot be moved on before it has arrived")

    def migrate_incoming(self, uri: str) -> None:
        """Begins to listen there."""
        raise Refused("'-incoming' is not supported by a source: start migrate-dst")

    @abstractmethod
    def cancel(self) -> None:
        """Cancels the migration that is under way; succeeds where there is none."""

    @abstractmethod
    def quit(self) -> None:
        """Ends the program, in an orderly way."""

    async def ended(self) -> str:
        """Waits for the end of the migration, or until a guest can come; why not, or ""."""
        return ""

    # -- what it tells

    def tell(self, event: str, **data: Any) -> None:
        """An event of QMP, to all who listen."""
        now = time.time_ns() // 1000
        message: dict[str, Any] = {"event": event}
        if data:
            message["data"] = data
        message["timestamp"] = {"seconds": now // 1_000_000, "microseconds": now % 1_000_000}
        for listener in list(self.listeners):
            listener(message)

    def tell_migration(self, event: str, **data: Any) -> None:
        """One of those that must be switched on."""
        from migrate.parameters import EVENTS

        if self.parameters.capabilities.get(EVENTS, False):
            self.tell(event, **data)
