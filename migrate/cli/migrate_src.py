"""The program migrate-src.

    idle (no address)  --migrate--+
                                  v
    started with an address --> connect --> open the guest --> move it --> print the result
                                  ^                                             |
                                  +-- migrate -- stay (--stay, or idle) <-------+--> exit code

The parts stand in modules of their own: source_options (the command line), source_guest (what
--guest opens), source_monitor (commands and their answers), source_output (what is printed).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from migrate.cli.log_options import levels_of
from migrate.cli.program import monitored, run
from migrate.cli.source_guest import SourceGuest
from migrate.cli.source_monitor import SourceMonitor
from migrate.cli.source_options import source_config, source_parser
from migrate.cli.source_output import SourceOutput
from migrate.cli.stop import StopRequests, absorb_cancellation, this_task
from migrate.errors import MigrationError
from migrate.events import Event
from migrate.output.run import run_program
from migrate.ownership.journal import Journal
from migrate.ownership.source_attempts import find_attempt, last_peer
from migrate.runtime.threads import in_thread
from migrate.statistics import Statistics
from migrate.views.options import Views

if TYPE_CHECKING:
    from migrate.guests.guest import Guest
    from migrate.monitor.terminal import Terminal
    from migrate.policy.parameters import Parameters
    from migrate.source.migration import Migration
    from migrate.transport.link import Link

logger = logging.getLogger(__name__)


class SourceProgram:
    """One run of migrate-src. The constructor raises MigrationError for wrong arguments."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.config = source_config(args)
        self.guest = SourceGuest(args, self.config.parameters.page_size)
        self.stop = StopRequests()
        self.monitor = SourceMonitor(self.config, self.stop)
        if args.progress == "auto" and args.monitor == "stdio":
            args.progress = "never"  # the terminal belongs to the monitor
        elif args.progress == "auto" and levels_of(args):
            args.progress = "plain"  # log records would be printed into the picture
        self.views = Views(args)
        self.output = SourceOutput(args, self.config, self.views)
        self._args = args
        # What is being done, for a user who cancels it.
        self._step = ""

    async def run(self) -> int:
        """Move the guest, and stay if the program is to; return the exit code."""
        with contextlib.closing(self.views):
            async with monitored(self._args, self.monitor) as terminal:
                status = 0
                if self.config.idle:
                    if not await self._start_guest():
                        return self.stop.exit_code
                else:
                    status = await self._migrate()
                if self.config.serves:
                    status = await self._stay(status, terminal)
                return status

    # -- before and between migrations

    async def _start_guest(self) -> bool:
        """Start a demo guest, and leave it running until a command moves it.

        Returns False if the program is told to end meanwhile.
        """
        self.stop.cancel_this_task()
        guest = self.guest.open()
        try:
            self.guest.remember(guest)
            if guest.pid:
                await guest.make_ready()
            self.output.progress(f"idle: {guest.description} is not moved before it is asked for")
            return True
        except asyncio.CancelledError:
            absorb_cancellation()
            self.guest.end()
            return False
        finally:
            await guest.close()

    async def _stay(self, status: int, terminal: Terminal | None) -> int:
        """Move the guest whenever a command asks for it, until the program is to end.

        Returns the exit code of the last migration, at first `status`.
        """
        while True:
            over = await self._wait_for_request(terminal)
            if self.monitor.has_request:
                status = await self._migrate_as_requested()
            elif over:
                return status

    async def _wait_for_request(self, terminal: Terminal | None) -> bool:
        """Wait until a command asks for a migration, or the program is to end; return the latter.

        It is to end on a signal or `quit`, when the guest's process ends, and when no commands can
        come any more.
        """
        self.stop.handle_with(str)
        has_guest = self.guest.ends_with_program and not self.monitor.moved
        pid = self.guest.pid if has_guest else 0
        ends = asyncio.ensure_future(self.stop.stay(pid, self.guest.start_time))
        requested = asyncio.ensure_future(self.monitor.wait_for_request())
        waiting: set[asyncio.Future[Any]] = {ends, requested}
        if terminal is not None and self.config.idle and not self._args.qmp:
            waiting.add(asyncio.ensure_future(terminal.closed.wait()))
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not requested.done() and not ends.done():
                self.stop.request()  # the terminal was the only way to give a command
                await ends
            return ends.done()
        finally:
            for one in waiting:
                one.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _migrate_as_requested(self) -> int:
        """Make the migration that a command asked for; a failure ends the migration only."""
        try:
            return await self._migrate()
        except MigrationError as error:
            self.monitor.fail(str(error))
            self.output.fail(str(error))
            return error.exit_code

    # -- one migration

    async def _migrate(self) -> int:
        """Connect and move the guest; return the exit code."""
        self.monitor.begin()
        try:
            if self.guest.is_stream:
                return await self._move_stream()
            return await self._move_memory()
        except asyncio.CancelledError:
            absorb_cancellation()
            self.monitor.cancelled()
            self.output.fail(f"cancelled while {self._step}: nothing was moved")
            return self.stop.exit_code
        finally:
            self.monitor.end()

    def _begin_step(self, step: str) -> None:
        """Let a request to stop cancel this task while it does `step`."""
        logger.info("%s", step)
        self._step = step
        self.stop.cancel_this_task()

    async def _move_memory(self) -> int:
        """Move a guest whose memory this program reads.

        The program connects first: without a destination, no demo guest is started.
        """
        async with contextlib.AsyncExitStack() as undo:
            peer = await self._connect()
            undo.push_async_callback(peer.close)
            if self.config.dry_run:
                return await self._dry_run(peer)
            self._begin_step("opening the guest")
            guest = self.guest.open()
            undo.push_async_callback(guest.close)
            self.guest.remember(guest)
            await guest.lock()
            undo.pop_all()
        return await self._move(guest, peer)

    async def _move_stream(self) -> int:
        """Move the guest of a QEMU.

        A QEMU that is told to migrate has no time limit before that: the program connects first.
        One that is not is waited for, and nothing is connected that would time out meanwhile.
        """
        async with contextlib.AsyncExitStack() as undo:
            guest = self.guest.open_stream()
            undo.push_async_callback(guest.close)
            self.guest.remember(guest)
            peer = await self._connect() if guest.driven else None
            if peer is not None:
                undo.push_async_callback(peer.close)
            self._begin_step("waiting for QEMU")
            if not guest.driven:
                self.output.progress(f"waiting for QEMU at {await guest.listen()}")
            await guest.make_ready()
            peer = peer or await self._connect()
            undo.pop_all()
        return await self._move(guest, peer)

    def dial(self) -> Awaitable[Link]:
        """Connect to the destination. Raises ConnectError, TlsError."""
        from migrate.transport import connect

        config, address = self.config, self.monitor.address
        again = connect.dial(
            address, timeout=config.connect_timeout, peer_timeout=config.peer_timeout,
            congestion=config.congestion, credentials=config.credentials,
            first=last_peer(str(address), config.journal),
        )  # fmt: skip
        return again()

    async def _connect(self) -> Link:
        """Make the first connection, and warn of one that is not encrypted."""
        self._begin_step("connecting")
        _load(dry_run=self.config.dry_run)
        self.monitor.connecting()
        self.output.progress(f"connecting to {self.monitor.address}")
        peer = await self.dial()
        if peer.exposed:
            from migrate.transport.tls import PLAIN

            self.output.progress(f"warning: {PLAIN}")
        return peer

    async def _move(self, guest: Guest, peer: Link) -> int:
        """Move an open guest over a connection, and print the result; return the exit code.

        Closes both, whatever happens.
        """
        migration = self.monitor.migration = self._migration(guest, peer)
        task = this_task()

        def cancel() -> str:
            if migration.committed:
                return "migrate-src: too late to cancel: the guest is handed over"
            migration.cancelling()
            task.cancel()
            return ""

        self.stop.handle_with(cancel, "already cancelling: the guest is about to run on here")
        guest.warn, status = self.output.warn, 0
        try:
            self.views.describe(self.output.facts(guest, self.monitor.address, self._parameters))
            self.output.announce(guest)
            await guest.make_ready()
            await migration.run()
        except asyncio.CancelledError:
            absorb_cancellation()
            status = self.stop.exit_code
            self.output.cancelled(guest)
        except MigrationError as error:
            status = error.exit_code
            self.output.failure(error, guest, resumable=migration.resumable)
        finally:
            self.stop.handle_with(lambda: "migrate-src: the migration is over already")
            await guest.close()
            self.views.end(migration.statistics)
        self.views.clear()
        if guest.close_warning:
            self.output.fail(guest.close_warning)
        self.output.result(migration.statistics)
        return status

    def _migration(self, guest: Guest, peer: Link) -> Migration:
        """Return a migration of this guest that has not begun."""
        from migrate.qemu.guest import QemuGuest
        from migrate.qemu.outgoing import QemuSource
        from migrate.source.options import SourceOptions
        from migrate.source.precopy import Source

        config, address = self.config, str(self.monitor.address)
        kind: Callable[..., Migration] = QemuSource if isinstance(guest, QemuGuest) else Source
        options = SourceOptions(
            self._observe, self.dial, patience=config.connect_timeout, retry=config.retry,
            journals=config.journal, earlier=_earlier_attempt(guest, address, config.journal),
            address=address, resolve_timeout=config.resolve_timeout,
        )  # fmt: skip
        return kind(guest, peer, self._parameters, options)

    @property
    def _parameters(self) -> Parameters:
        """The parameters in force: the monitor may have set others than the command line."""
        return self.monitor.parameters

    def _observe(self, event: Event, statistics: Statistics) -> None:
        self.views.observe(event, statistics)
        self.monitor.observe(event, statistics)

    async def _dry_run(self, peer: Link) -> int:
        """Print what a migration would take; return the exit code: whether it would converge."""
        from migrate.cli.dry_run import DryRun

        self._begin_step("measuring")
        dry_run = DryRun(
            peer, self._parameters, self.guest.open_memory, ends_guest=self.guest.is_new,
            say=self.output.progress,
        )  # fmt: skip
        result = await dry_run.run()
        self.output.dry_run_result(result)
        return result.exit_code


def _earlier_attempt(guest: Guest, address: str, journals: str) -> Journal | None:
    """Return the journal of a migration that can be resumed; never for a QEMU's stream."""
    if guest.kind == "qemu":
        return None
    return find_attempt(guest.facts(), address, journals)


def _load(*, dry_run: bool) -> None:
    """Import what speaks over a connection before there is one.

    That takes some 300 ms, and a destination with too many connections closes the silent ones
    first. It is not imported at the top, so that a wrong argument is reported at once.
    """
    if dry_run:
        import migrate.cli.dry_run
    else:
        import migrate.qemu.outgoing
        import migrate.source.precopy  # noqa: F401


async def _run(args: argparse.Namespace) -> int:
    from migrate.guests.command import check_command

    for command, what in ((args.pause_cmd, "--pause-cmd"), (args.resume_cmd, "--resume-cmd")):
        await in_thread(check_command, command, what)
    return await SourceProgram(args).run()


def _main() -> int:
    if sys.argv[1:2] == ["resolve"]:
        from migrate.cli import resolve

        return resolve.main("migrate-src", sys.argv[2:])
    return run(source_parser(), _run)


def main() -> None:
    run_program("migrate-src", _main)
