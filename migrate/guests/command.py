"""Runs the commands that a user gives: --pause-cmd, --resume-cmd, --on-complete."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import stat
import subprocess
import threading

from migrate.errors import MigrationError, UsageError

COMMAND_PATIENCE = 60.0
# After SIGTERM, before SIGKILL.
END_SECONDS = 5.0
CHECK_SECONDS = 5.0
# A first word that the shell takes as it is.
ABSOLUTE = re.compile(r"\s*(/[\w./+,@%-]+)(?:\s|$)", re.ASCII)


def check_command(command: str, what: str) -> None:
    """Raises UsageError where it is sure that a command cannot run: the shell does not understand
    it, or its first word is the path of a program that is not there."""
    if not command:
        return
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        found = subprocess.run(
            ["/bin/sh", "-n", "-c", command], stdin=subprocess.DEVNULL, capture_output=True,
            check=False, timeout=CHECK_SECONDS,
        )  # fmt: skip
        if found.returncode > 0:
            said = found.stderr.decode(errors="replace").strip().rpartition("\n")[2][:200]
            raise UsageError(f"{what} {command!r}: the shell does not understand it: {said}")
    word = ABSOLUTE.match(command)
    if word is None:
        return
    try:
        mode = os.stat(word[1]).st_mode
    except OSError as error:
        raise UsageError(f"{what} {command!r}: {word[1]}: {error.strerror}") from None
    if not stat.S_ISREG(mode) or not os.access(word[1], os.X_OK):
        raise UsageError(f"{what} {command!r}: {word[1]} is no program that can be run here")


def _check_status(command: str, what: str, status: int) -> None:
    if status != 0:
        raise MigrationError(f"{what} {command!r} failed with status {status}")


async def run_command(
    command: str, what: str, timeout: float = COMMAND_PATIENCE, **environment: str
) -> None:
    """Runs a user's command, and ends it when `timeout` seconds are over, or we are cancelled.

    Raises MigrationError where it fails.
    """
    process = await asyncio.create_subprocess_shell(
        command, env={**os.environ, **environment}, start_new_session=True
    )
    try:
        async with asyncio.timeout(timeout):
            status = await process.wait()
    except BaseException as error:
        # It must not go on behind our back: a late pause would come after the resume.
        await asyncio.shield(_end(process))
        if not isinstance(error, TimeoutError):
            raise
        raise MigrationError(f"{what} {command!r} did not end in {timeout:g} s") from None
    _check_status(command, what, status)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ends a command, and what it has started."""
    with contextlib.suppress(TimeoutError, ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        async with asyncio.timeout(END_SECONDS):
            await process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def start_service(
    command: str, what: str, timeout: float, told: asyncio.Event, **environment: str
) -> None:
    """Runs a user's command that may start something which stays. It is never ended by us.

    timeout -- seconds to wait for it; 0: as long as it takes
    told    -- set: wait no longer

    Raises MigrationError where it fails, or is not waited for any more; then it goes on.
    """
    try:
        process, ended = _in_the_background(command, environment)
    except OSError as error:
        raise MigrationError(f"{what} {command!r} cannot be run: {error.strerror}") from None
    ends, stops = asyncio.ensure_future(ended.wait()), asyncio.ensure_future(told.wait())
    try:
        await asyncio.wait(
            {ends, stops}, timeout=timeout or None, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        for one in (ends, stops):
            one.cancel()
    if not ended.is_set():
        why = "is not waited for any longer" if told.is_set() else f"takes more than {timeout:g} s"
        raise MigrationError(f"{what} {command!r} {why}: it goes on, as process {process.pid}")
    _check_status(command, what, process.returncode)


def _in_the_background(
    command: str, environment: dict[str, str]
) -> tuple[subprocess.Popen[bytes], asyncio.Event]:
    """A command, and an event that is set when it ends.

    It is no process of the loop's: those are killed as the loop is closed.
    """
    process = subprocess.Popen(
        command, shell=True, env={**os.environ, **environment}, start_new_session=True
    )
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def wait() -> None:
        process.wait()
        with contextlib.suppress(RuntimeError):  # nobody waits any more: the loop is closed
            loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=wait, daemon=True).start()
    return process, ended
