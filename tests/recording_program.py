"""A program that records its operators' commands, for the tests of the monitor."""

from __future__ import annotations

from typing import Any

from migrate.monitor.monitored import CommandError, MonitoredProgram
from migrate.policy.parameters import Parameters


class RecordingProgram(MonitoredProgram):
    """`done` is what was done; `why` is why the migration failed that one waits for."""

    name = "migrate-src"

    def __init__(self, *, receives: bool = False) -> None:
        super().__init__()
        self.receives = receives
        self.parameters = Parameters()
        self.done: list[str] = []
        self.busy = False
        self.why = ""

    @property
    def migrating(self) -> bool:
        return self.busy

    def query_migrate(self) -> dict[str, Any]:
        return {"status": "active"}

    def info_migrate(self, *, whole: bool = False) -> str:
        return "Status: \t\tactive" if whole else "Migration status: active"

    def query_status(self) -> dict[str, Any]:
        return {"running": not self.receives, "status": "inmigrate" if self.receives else "running"}

    def migrate(self, uri: str) -> None:
        if uri.startswith("rdma"):
            raise CommandError("no such thing")
        self.done.append(f"migrate {uri}")

    def migrate_incoming(self, uri: str) -> None:
        self.done.append(f"incoming {uri}")

    def cancel(self) -> None:
        self.done.append("cancel")

    def quit(self) -> None:
        self.done.append("quit")

    async def ended(self) -> str:
        self.done.append("ended")
        return self.why
