"""The program migrate-src."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from migrate import output, quantities
from migrate.address import Address, parse_address
from migrate.cli.program import (
    Stop,
    answering,
    credentials,
    peer_timeout,
    run,
    seconds,
    tls_of,
)
from migrate.cli.source_words import open_guest, parameters_of, qemu_guest, source_parser
from migrate.errors import HandOverUnknown, MigrationError, UsageError
from migrate.guests.process import Process
from migrate.journal import Journal, attempt, check_directory, journal_directory, last_peer
from migrate.monitor.node import IN_PROGRESS, Node, Refused
from migrate.output import say
from migrate.statistics import (
    Statistics,
    info_migrate,
    info_migrate_all,
    query_migrate,
    status_line,
)
from migrate.threads import in_thread
from migrate.views.options import Views
from proto.ownership import Role

if TYPE_CHECKING:
    from migrate.guests.guest import Guest, MemoryGuest
    from migrate.link import Link
    from migrate.migration import Migration
    from migrate.monitor.terminal import Terminal
    from migrate.parameters import Parameters
    from migrate.qemu.guest import QemuGuest


class SourceProgram(Node):
    """One run of migrate-src. What is wrong with its arguments is raised by the constructor.

    Without an address it begins idle, with its guest running, and moves it when it is told to.
    """

    program = "migrate-src"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.args = args
        self.idle = not args.uri
        if self.idle and (args.dry_run or not (args.monitor or args.qmp)):
            raise UsageError(
                "say where to: migrate-src tcp:HOST:PORT; or how it will be said: --monitor stdio"
            )
        self.address = Address() if self.idle else parse_address(args.uri)
        self.source: Migration | None = None
        self.parameters = parameters_of(args)
        self.credentials = credentials(args, Role.SOURCE)
        self.tls = tls_of(args)
        self.peer_timeout = peer_timeout(args)
        self.connect_timeout = seconds(args.connect_timeout, "--connect-timeout")
        self.journal = check_directory(journal_directory(args.journal))
        self.retry = seconds(args.retry, "--retry")
        self.resolve_timeout = seconds(args.resolve_timeout, "--resolve-timeout")
        if args.congestion:
            from migrate.dialing import check_congestion

            check_congestion(args.congestion)
        self.qemu: QemuGuest | None = None
        self.opened: Callable[[], Guest]
        if args.guest.partition(":")[0] in ("qemu", "snapshot"):
            self.qemu = qemu_guest(args, self.parameters.page_size)
            self.opened = self._open_again
        else:
            self.opened = open_guest(args, self.parameters.page_size)
        if args.monitor == "stdio" and args.progress == "auto":
            args.progress = "never"  # the terminal belongs to the monitor
        self.progress = Views(args)
        self.stop = Stop()
        self._early = Statistics(status="none" if self.idle else "setup")
        self._told_status = ""
        self._wanted = asyncio.Event()
        self._over = asyncio.Event()
        self._moved, self._busy = False, not self.idle
        self._pid, self._born = 0, ""
        self._ends_guest = args.stay
        """A demo guest that somebody else has started outlives an idle program."""

    async def run(self) -> int:
        """Moves the guest, stays if it is to; the exit code."""
        with contextlib.closing(self.progress):
            return await self._run()

    async def _run(self) -> int:
        async with answering(self.args, self) as terminal:
            status = 0
            if self.idle:
                if not await self._start_guest():
                    return 128 + self.stop.signal
            else:
                status = await self._migrate()
            if self.idle or self.args.stay:
                status = await self._stay(status, terminal)
            return status

    async def _start_guest(self) -> bool:
        """It runs, and can be moved when that is asked for. False: it was not to be."""
        self.stop.cancels_me()
        guest = self.opened()
        try:
            self._know(guest)
            if guest.pid:
                await guest.started()
            if not self.args.quiet:
                self.progress.say(f"idle: {guest.description} is not moved before it is asked for")
            return True
        except asyncio.CancelledError:
            _take_note()
            if self._ends_guest:
                with contextlib.suppress(ProcessLookupError):
                    Process(self._pid, self._born).signal(signal.SIGTERM)
            return False
        finally:
            await guest.close()

    def _know(self, guest: Guest) -> None:
        """From now on the guest is this one; to move it (again) it is opened anew."""
        if guest.pid:
            self._ends_guest |= f"pid={guest.pid}" not in self.args.guest
            self._pid, self._born = guest.pid, guest.born
            self.args.guest = f"demo:pid={guest.pid}"
        self.opened = self._open_again

    def _open_again(self) -> Guest:
        if self.qemu is not None:
            return qemu_guest(self.args, self.parameters.page_size)
        return open_guest(self.args, self.parameters.page_size, self._born)()

    async def _migrate(self) -> int:
        """Connects and moves the guest; the exit code."""
        self._busy = True
        try:
            return await self._connect_and_move()
        finally:
            self._busy = False

    async def _connect_and_move(self) -> int:
        if self.qemu is not None:
            return await self._connect_and_carry(self.qemu)
        peer = await self._connect()
        if peer is None:
            return self.stop.cancelled_code
        if self.args.dry_run:
            return await self._rehearse(peer)
        try:
            guest = self.opened()
            self._know(guest)
            await self._hold(guest)
        except BaseException:
            await peer.close()
            raise
        status = await self._move(guest, peer)
        # A guest that was given up, and may be the only one, does not end with us.
        self._moved = status in (0, HandOverUnknown.exit_code)
        return status

    async def _hold(self, guest: Guest) -> None:
        """No other program moves the guest from here on. Raises UsageError where one does."""
        try:
            await guest.hold()
        except BaseException:
            await guest.close()
            raise

    async def _connect_and_carry(self, guest: QemuGuest) -> int:
        """Waits for QEMU, or has it begin once there is a destination; the exit code."""
        self.qemu = qemu_guest(self.args, self.parameters.page_size)  # for the next time
        peer: Link | None = None
        try:
            if guest.driven and (peer := await self._connect()) is None:
                return self.stop.cancelled_code
            self.stop.cancels_me()
            if not guest.driven:
                where = await guest.listen()
                if not self.args.quiet:
                    self.progress.say(f"waiting for QEMU at {where}")
            await guest.started()
            if peer is None and (peer := await self._connect()) is None:
                return self.stop.cancelled_code
        except asyncio.CancelledError:
            _take_note()
            say("migrate-src: cancelled before QEMU came: nothing was moved")
            return self.stop.cancelled_code
        else:
            status = await self._move(guest, peer)
            self._moved = status in (0, HandOverUnknown.exit_code)
            peer = None  # it is closed
            return status
        finally:
            await guest.close()
            if peer is not None:
                await peer.close()

    async def _stay(self, status: int, terminal: Terminal | None) -> int:
        """Waits for a signal, `quit` or the end of the guest, and moves it where that is asked
        for; the exit code of the last migration."""
        while True:
            self.stop.install(str)
            pid = self._pid if self._ends_guest and not self._moved else 0
            ends = asyncio.ensure_future(self.stop.stay(pid, self._born))
            asked = asyncio.ensure_future(self._wanted.wait())
            waiting: set[asyncio.Future[Any]] = {ends, asked}
            if terminal is not None:
                waiting.add(asyncio.ensure_future(self._silence(terminal)))
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if not asked.done() and not ends.done():
                    self.stop.request()  # nobody can ask for anything any more
                    await ends
                over = ends.done()
            finally:
                for one in waiting:
                    one.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
            if self._wanted.is_set():
                status = await self._migrate_as_asked()
            elif over:
                return status

    async def _silence(self, terminal: Terminal) -> None:
        await terminal.closed.wait()
        if not self.idle or self.args.qmp:
            await asyncio.Event().wait()  # there is somebody else to ask

    async def _migrate_as_asked(self) -> int:
        """One migration that a command has begun: what goes wrong is said, and ends nothing."""
        try:
            return await self._migrate()
        except MigrationError as error:
            self._early = Statistics(status="failed", error=str(error))
            self._tell_status("failed")
            say(f"migrate-src: {error}")
            return error.exit_code
        finally:
            self._wanted.clear()
            self._over.set()

    def dial(self) -> Awaitable[Link]:
        from migrate import dialing

        again = dialing.dial(
            self.address, timeout=self.connect_timeout, peer_timeout=self.peer_timeout,
            congestion=self.args.congestion, credentials=self.credentials,
            first=last_peer(str(self.address), self.journal),
        )  # fmt: skip
        return again()

    async def _connect(self) -> Link | None:
        """None where it was cancelled."""
        self.stop.cancels_me()
        _load(dry_run=self.args.dry_run)
        self._early = Statistics(status="setup")
        self._tell_status("setup")
        if not self.args.quiet:
            self.progress.say(f"connecting to {self.address}")
        try:
            peer = await self.dial()
            if peer.exposed and not self.args.quiet:
                from migrate.tls import PLAIN

                self.progress.say(f"warning: {PLAIN}")
            return peer
        except asyncio.CancelledError:
            say("migrate-src: cancelled before it was connected: nothing was moved")
            _take_note()
            self._cancelled_early()
            return None

    async def _move(self, guest: Guest, peer: Link) -> int:
        """Moves an open guest over an open link, and prints what came of it."""
        from migrate.qemu.guest import QemuGuest
        from migrate.qemu.source import StreamSource
        from migrate.source import Source

        args, progress = self.args, self.progress
        kind: Callable[..., Migration] = StreamSource if isinstance(guest, QemuGuest) else Source
        source = self.source = kind(
            guest, peer, self.parameters, self._observe, self.dial, retry=self.retry,
            journal=self.journal, earlier=self._earlier(guest),
            resolve_timeout=self.resolve_timeout, address=str(self.address),
        )  # fmt: skip
        task = asyncio.current_task()
        assert task is not None

        def cancel() -> str:
            if source.committed:
                return "migrate-src: too late to cancel: the guest is handed over"
            source.cancelling()
            task.cancel()
            return ""

        self.stop.install(cancel, "already cancelling: the guest is being put back to work")
        guest.warn, status = self._warn, 0
        try:
            progress.describe(self._facts(guest))
            self._announce(guest)
            await guest.started()
            await source.run()
        except asyncio.CancelledError:
            _take_note()
            status = self.stop.cancelled_code
            progress.clear()
            say(f"migrate-src: cancelled; {self._where(guest)}")
        except MigrationError as error:
            status = error.exit_code
            progress.clear()
            fate = "" if isinstance(error, HandOverUnknown) else f"; {self._where(guest)}"
            if source.resumable:
                fate += "; run it again to resume"
            say(f"migrate-src: {error}{fate}")
        finally:
            self.stop.install(lambda: "migrate-src: it is over already")
            await guest.close()
            progress.end(source.statistics)
        progress.clear()
        if guest.trouble:
            say(f"migrate-src: {guest.trouble}")
        self._parameters = self.parameters  # what they have come to holds on
        if progress.owns_stdout or args.monitor == "stdio":
            pass
        elif args.json:
            print(json.dumps(query_migrate(source.statistics)), flush=True)
        elif not args.quiet:
            print(info_migrate(source.statistics), flush=True)
            for sentence in source.statistics.advice:
                if sentence not in source.statistics.error:
                    say(f"migrate-src: advice: {sentence}")
        return status

    def _earlier(self, guest: Guest) -> Journal | None:
        """A stream cannot be gone on with: QEMU begins anew."""
        if guest.kind == "qemu":
            return None
        return attempt(guest.facts(), str(self.address), self.journal)

    def _facts(self, guest: Guest) -> dict[str, str]:
        """What moves where, and with which parameters, for those who look on."""
        size, p = quantities.format_size, self.parameters
        return {
            "guest": guest.description, "destination": str(self.address),
            "page size": size(p.page_size), "cache size": size(p.cache_size),
            "downtime limit": f"{p.limits.downtime_limit * 1e3:g} ms",
            "max bandwidth": f"{size(p.limits.max_bandwidth)}/s" if p.limits.max_bandwidth
            else "none", "channels": str(p.channels), "TLS": "yes" if self.credentials else "no",
        }  # fmt: skip

    async def _rehearse(self, peer: Link) -> int:
        """--dry-run: prints what is predicted; the exit code: whether it would converge."""
        from migrate.cli.rehearsal import Rehearsal

        self.stop.cancels_me()
        progress = self.progress
        new = self.args.guest.startswith("demo") and "pid=" not in self.args.guest
        rehearsal = Rehearsal(
            peer, self.parameters, cast("Callable[[], MemoryGuest]", self.opened), ends_guest=new,
            say=(lambda _text: None) if self.args.quiet else progress.say,
        )  # fmt: skip
        try:
            found = await rehearsal.run()
        except asyncio.CancelledError:
            say("migrate-src: cancelled; nothing was moved")
            return 128 + self.stop.signal
        if self.args.json:
            print(json.dumps(found.as_json()), flush=True)
        elif not self.args.quiet:
            print(found.lines(), flush=True)
        return found.exit_code

    def _announce(self, guest: Guest) -> None:
        if self.args.quiet:
            return
        self.progress.say(f"moving {guest.description}")
        if guest.kind == "file" and not guest.stoppable:
            self.progress.say(
                "nothing stops the file's writer in the last round (--pid or --pause-cmd): "
                "if it writes then, the migration fails"
            )

    def _warn(self, text: str) -> None:
        """A user is told, however quiet the program is to be."""
        self.progress.clear()
        say(f"migrate-src: warning: {text}")

    def _where(self, guest: Guest) -> str:
        """Where the guest is after a failure, and how to go on."""
        if not guest.pid:
            return guest.remains
        if self.args.stay or self.idle:
            return f"the guest runs on here, in process {guest.pid}, until this program is stopped"
        return (
            f"the guest runs on here, in process {guest.pid} "
            f"(try again: --guest demo:pid={guest.pid}; end it: kill {guest.pid})"
        )

    # -- what operators see and do

    def _observe(self, event: str, statistics: Statistics) -> None:
        self.progress.observe(event, statistics)
        if event == "status":
            self._tell_status(statistics.status)
        elif event == "pass":
            self.tell_migration("MIGRATION_PASS", **{"pass": statistics.dirty_sync_count + 1})
        elif event == "paused":
            self.tell("STOP")
        elif event == "resumed" and self.source is not None and self.source.guest.runs:
            self.tell("RESUME")

    def _tell_status(self, status: str) -> None:
        """Once: a source begins with what was told while there was none."""
        if status != self._told_status:
            self._told_status = status
            self.tell_migration("MIGRATION", status=status)

    def _cancelled_early(self) -> None:
        """Before there was a source."""
        self._early = Statistics(status="cancelled")
        for status in ("cancelling", "cancelled"):
            self._tell_status(status)

    @property
    def _statistics(self) -> Statistics:
        return self.source.statistics if self.source else self._early

    @property
    def migrating(self) -> bool:
        return self._busy or self._wanted.is_set()

    def query_migrate(self) -> dict[str, Any]:
        if self.source is not None:
            return query_migrate(self.source.statistics)
        early = {"status": self._early.status, "error-desc": self._early.error}
        return {name: said for name, said in early.items() if said not in ("", "none")}

    def info_migrate(self, *, whole: bool = False) -> str:
        from migrate.monitor.settings import switches

        if self.source is not None and self.source.statistics.capabilities:
            show = info_migrate_all if whole else info_migrate
            return show(self.source.statistics)
        on = "on" if switches(self.parameters)["xbzrle"] else "off"
        return f"capabilities: xbzrle: {on}\n{status_line(self._statistics)}"

    @property
    def parameters(self) -> Parameters:
        """With a cache size that the destination has asked for, or that was found."""
        if self.source is not None and self.migrating:
            return replace(self.source.parameters, capabilities=self._parameters.capabilities)
        return self._parameters

    @parameters.setter
    def parameters(self, parameters: Parameters) -> None:
        self._parameters = parameters

    def take(self, parameters: Parameters) -> None:
        if self.source is not None and self.migrating:
            ours = self.source.parameters.capabilities  # `events` may be switched meanwhile
            self.source.set_parameters(replace(parameters, capabilities=ours))
        super().take(parameters)

    def migrate(self, uri: str) -> None:
        if self.migrating or not (self.idle or self.args.stay):
            raise Refused(IN_PROGRESS)
        if self._moved:
            raise Refused("Can't migrate the vm that was paused due to previous migration")
        try:
            self.address = parse_address(uri)
        except UsageError as error:
            known = uri.lstrip().startswith(("tcp:", "unix:"))
            raise Refused(
                str(error) if known else "Parameter 'uri' expects a valid migration protocol"
            ) from None
        self.source, self._early = None, Statistics(status="setup")
        self._tell_status("setup")
        self._over.clear()
        self._wanted.set()
        self.stop.install(self._call_off)

    def _call_off(self) -> str:
        """A migration that was asked for, and has not begun."""
        self._wanted.clear()
        self._cancelled_early()
        self._over.set()
        self.stop.install(str)
        return ""

    def cancel(self) -> None:
        if self.migrating and (refusal := self.stop.cancel()):
            raise Refused(refusal.removeprefix("migrate-src: "))

    def quit(self) -> None:
        self.stop.request()

    async def ended(self) -> str:
        await self._over.wait()
        s = self._statistics
        return "" if s.status == "completed" else s.error or "the migration was cancelled"

    def query_status(self) -> dict[str, Any]:
        status = "running"
        if self._moved:
            status = "postmigrate"
        elif self.source is None:
            status = "running" if self.idle else "prelaunch"
        elif self.source.committed:
            status = "postmigrate"
        elif self.source.statistics.status == "device":
            status = "finish-migrate"
        elif not self.source.guest.runs:
            status = "paused"
        return {"running": status == "running", "status": status}


def _load(*, dry_run: bool) -> None:
    """Imports what speaks over a connection, before there is one.

    That takes some 300 ms, and a destination with too many connections closes the silent ones
    first. It is not imported at the top so that a wrong argument is told of at once.
    """
    if dry_run:
        import migrate.cli.rehearsal
    else:
        import migrate.qemu.source
        import migrate.source  # noqa: F401


def _take_note() -> None:
    """A cancellation was meant for what is over now, not for what this task does next."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()


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
    output.program("migrate-src", _main)
