"""Runs the commands that a user gives: --pause-cmd, --resume-cmd, --on-complete."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

from migrate.errors import MigrationError

COMMAND_PATIENCE = 60.0


async def run_command(command: str, what: str, **environment: str) -> None:
    """Runs a user's command. Raises MigrationError where it fails."""
    process = await asyncio.create_subprocess_shell(
        command, env={**os.environ, **environment}, start_new_session=True
    )
    try:
        async with asyncio.timeout(COMMAND_PATIENCE):
            status = await process.wait()
    except BaseException as error:
        # It must not go on behind our back: a late pause would come after the resume.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await asyncio.shield(process.wait())
        if not isinstance(error, TimeoutError):
            raise
        raise MigrationError(f"{what} {command!r} did not end in {COMMAND_PATIENCE:g} s") from None
    if status != 0:
        raise MigrationError(f"{what} {command!r} failed with status {status}")
