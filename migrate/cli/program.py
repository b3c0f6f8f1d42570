"""Run migrate-src or migrate-dst: from the command line to the exit code.

Results go to standard output, all other words to standard error. Exit codes stand in
migrate.cli.exit_codes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from migrate.cli.exit_codes import BY_SIGNAL
from migrate.cli.log_options import start_logging
from migrate.cli.options import VERSION, Parser
from migrate.cli.process_limits import check_open_files, check_threads
from migrate.errors import MigrationError
from migrate.files.removal import finish_removals
from migrate.output import say
from migrate.output.run import signals_blocked
from migrate.runtime import core_dumps

if TYPE_CHECKING:
    from migrate.monitor.monitored import MonitoredProgram
    from migrate.monitor.terminal import Terminal


@contextlib.asynccontextmanager
async def monitored(
    args: argparse.Namespace, program: MonitoredProgram
) -> AsyncIterator[Terminal | None]:
    """Answer commands at --qmp and --monitor as long as the context lasts.

    Gives the monitor on standard input, or None without --monitor stdio. Raises UsageError,
    ConnectError.
    """
    if not args.qmp and not args.monitor:
        yield None
        return
    from migrate.monitor.commands import commands
    from migrate.monitor.qmp import Conversation, version_of
    from migrate.monitor.server import Server, parse_path
    from migrate.monitor.terminal import HumanConversation, Terminal

    known = commands(program)
    async with contextlib.AsyncExitStack() as stack:
        if args.qmp:
            machines = Server(
                parse_path(args.qmp), lambda: Conversation(known, version_of(VERSION)), "--qmp"
            )
            await machines.open()
            stack.push_async_callback(machines.close)
            program.listeners.add(machines.tell)
        terminal = None
        if args.monitor == "stdio":
            terminal = await stack.enter_async_context(Terminal(program, VERSION))
        elif args.monitor:
            path = parse_path(args.monitor, "--monitor")
            people = Server(path, lambda: HumanConversation(program, VERSION), "--monitor")
            await people.open()
            stack.push_async_callback(people.close)
        yield terminal


def _run_loop(program: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run a program on uvloop; return its exit code.

    From the moment the program has returned, its exit code is final: a signal while the loop is
    closed does not change it, nor does a failure to start the thread that closes the loop.
    """
    import uvloop

    codes: list[int] = []

    async def whole() -> None:
        codes.append(await program())
        over.enter_context(signals_blocked())

    try:
        with (
            contextlib.ExitStack() as over,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            runner.run(whole())
    except RuntimeError:
        if not codes:
            raise
    return codes[0]


def run(
    parser: Parser,
    program: Callable[[argparse.Namespace], Coroutine[Any, Any, int]],
    words: list[str] | None = None,
) -> int:
    """Parse the command line and run a program on uvloop; return its exit code.

    words -- the command line without the program's name; None: this process's own
    """
    try:
        args = parser.parse_args(words)
        start_logging(args)
        core_dumps.disable()
        check_open_files()
        check_threads()
        return _run_loop(lambda: program(args))
    except MigrationError as error:
        say(f"{parser.prog}: {error}")
        return error.exit_code
    except asyncio.CancelledError:
        return BY_SIGNAL + signal.SIGTERM  # a signal came before the program handled signals
    except OSError as error:
        why = f"{error.strerror or error}"
        say(f"{parser.prog}: {why}{f': {error.filename}' if error.filename else ''}")
        return 1
    except KeyboardInterrupt:
        return BY_SIGNAL + signal.SIGINT
    finally:
        for path in finish_removals():
            say(f"{parser.prog}: the replaced output is not wholly removed: remove {path}")
