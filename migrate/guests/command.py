"""Run the commands that a user gives: --pause-cmd, --resume-cmd, --on-complete."""

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

# Seconds that a command may take, unless the user says more.
COMMAND_PATIENCE = 60.0
# Seconds between SIGTERM and SIGKILL.
END_SECONDS = 5.0
# Seconds for the shell to check the syntax of a command.
CHECK_SECONDS = 5.0
# A first word without anything that the shell expands.
ABSOLUTE = re.compile(r"\s*(/[\w./+,@%-]+)(?:\s|$)", re.ASCII)


def check_command(command: str, what: str) -> None:
    """Raise UsageError if a command certainly cannot run.

    Either the shell does not understand it, or its first word is the path of a missing program.

    what -- the option that the command comes from
    """
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
        raise UsageError(f"{what} {command!r}: {word[1]} is not a program that can be run here")


def _check_status(command: str, what: str, status: int) -> None:
    if status != 0:
        raise MigrationError(f"{what} {command!r} failed with status {status}")


async def run_command(
    command: str, what: str, timeout: float = COMMAND_PATIENCE, **environment: str
) -> None:
    """Run a user's command, and end it after `timeout` seconds, or when we are cancelled.

    what        -- the option that the command comes from
    environment -- variables to add

    Raises MigrationError if the command fails.
    """
    process = await asyncio.create_subprocess_shell(
        command, env={**os.environ, **environment}, start_new_session=True
    )
    try:
        async with asyncio.timeout(timeout):
            status = await process.wait()
    except BaseException as error:
        # It must not run on unnoticed: a late pause could come after the resume.
        await asyncio.shield(_end(process))
        if not isinstance(error, TimeoutError):
            raise
        raise MigrationError(f"{what} {command!r} did not end in {timeout:g} s") from None
    _check_status(command, what, status)


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a command, and what it has started."""
    with contextlib.suppress(TimeoutError, ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        async with asyncio.timeout(END_SECONDS):
            await process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def start_service(
    command: str, what: str, timeout: float, stop: asyncio.Event, **environment: str
) -> None:
    """Run a user's command that may start a service. We never end it.

    timeout -- seconds to wait for the command; 0: without a limit
    stop    -- once it is set, the command is not waited for any longer

    Raises MigrationError if the command fails, or is not waited for any longer; it then runs on.
    """
    try:
        process, ended = _start_in_background(command, environment)
    except OSError as error:
        raise MigrationError(f"{what} {command!r} cannot be run: {error.strerror}") from None
    waits = [asyncio.ensure_future(ended.wait()), asyncio.ensure_future(stop.wait())]
    try:
        await asyncio.wait(waits, timeout=timeout or None, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    if not ended.is_set():
        why = "is not waited for any longer" if stop.is_set() else f"takes more than {timeout:g} s"
        raise MigrationError(f"{what} {command!r} {why}: it goes on, as process {process.pid}")
    _check_status(command, what, process.returncode)


def _start_in_background(
    command: str, environment: dict[str, str]
) -> tuple[subprocess.Popen[bytes], asyncio.Event]:
    """Start a command. Return its process, and an event that is set when the process has ended.

    The process does not belong to the event loop, which would kill it when it is closed.
    """
    process = subprocess.Popen(
        command, shell=True, env={**os.environ, **environment}, start_new_session=True
    )
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def wait() -> None:
        process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing waits any more
            loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=wait, daemon=True).start()
    return process, ended
