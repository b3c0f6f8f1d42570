"""The command that migrate-dst runs when the guest is here (--on-complete)."""

from __future__ import annotations

import asyncio

from migrate.cli.destination_options import DestinationConfig
from migrate.cli.stop import StopRequests
from migrate.errors import MigrationError, OnCompleteError
from migrate.output import say


async def run_on_complete(config: DestinationConfig, stop: StopRequests, kind: str) -> int:
    """Run the command, if there is one; return the exit code of the program.

    The guest is here whatever the command does. A request to stop ends the wait for the command,
    not the command itself.

    kind -- of the guest: "demo", "file" or "qemu"
    """
    if not config.on_complete:
        return 0
    from migrate.guests.command import start_service

    requested = asyncio.Event()

    def end_wait() -> str:
        requested.set()
        return ""

    stop.handle_with(end_wait)
    try:
        await start_service(
            config.on_complete, "--on-complete", config.on_complete_timeout, requested,
            MIGRATE_OUTPUT=config.output, MIGRATE_KIND=kind,
        )  # fmt: skip
    except MigrationError as error:
        say(f"migrate-dst: the guest is here and whole, but {error}")
        return OnCompleteError.exit_code
    return 0
