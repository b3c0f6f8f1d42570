"""The program migrate-src."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, cast

from migrate import quantities
from migrate.address import Address, parse_address
from migrate.cli.program import (
    QEMU_FORMS,
    Parser,
    Stop,
    add_tls_hostname,
    answering,
    credentials,
    migration_parser,
    number,
    peer_timeout,
    qemu_words,
    run,
    seconds,
    switches,
    tls_of,
)
from migrate.errors import HandOverUnknown, MigrationError, UsageError
from migrate.guests.process import start_time
from migrate.journal import Journal, attempt, check_directory, default_directory
from migrate.monitor.node import IN_PROGRESS, Node, Refused
from migrate.statistics import (
    Statistics,
    info_migrate,
    info_migrate_all,
    query_migrate,
    status_line,
)
from migrate.views.options import Views, add_view_options
from proto.ownership import Role

if TYPE_CHECKING:
    from migrate.guests.guest import Guest, MemoryGuest
    from migrate.link import Link
    from migrate.migration import Migration
    from migrate.monitor.terminal import Terminal
    from migrate.parameters import Parameters
    from migrate.qemu.guest import QemuGuest
    from migrate.throttle import Throttle


def source_parser() -> Parser:
    parser = migration_parser(
        "migrate-src",
        "Moves a guest's memory to migrate-dst while the guest goes on writing to it.",
        "  migrate-src tcp:host:4444\n"
        "  migrate-src --guest demo:256m,hot=64m --max-bandwidth 117m tcp:host:4444\n"
        "  migrate-src --guest file:/dev/shm/db --pid 1234 --cache-size 256m tcp:host:4444",
    )
    parser.add_argument(
        "uri", metavar="tcp:HOST:PORT|unix:PATH", nargs="?", default="",
        help="where migrate-dst listens; with --monitor or --qmp it can be said there, later",
    )  # fmt: skip
    parser.add_argument(
        "--guest", default="demo", metavar="SPEC",
        help="demo[:SIZE][,hot=SIZE][,stride=BYTES][,rate=N][,fill=zero|random], demo:pid=PID, "
        "file:PATH, or of QEMU, which is to migrate to that address: qemu:tcp:HOST:PORT or "
        "qemu:unix:PATH, with ,qmp=PATH it is told to; qemu:qmp=PATH; or snapshot:DIR, one that "
        "has landed (default: demo)",
    )  # fmt: skip
    parser.add_argument(
        "--pid", action="append", default=[], metavar="PID",
        help="a process that writes the file: stopped for the last round (repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--no-return-path", action="store_true",
        help="carry the stream of a QEMU that hears nothing back: it takes its guest for moved as "
        "soon as all is sent",
    )  # fmt: skip
    parser.add_argument("--pause-cmd", default="", metavar="CMD", help="stops the file's writer")
    parser.add_argument("--resume-cmd", default="", metavar="CMD", help="lets it go on")
    parser.add_argument(
        "--cache-size", metavar="SIZE|auto",
        help="xbzrle page cache; auto: as large as the working set needs (default: 64m, and auto "
        "for a QEMU guest, for which it is --cache-max at once)",
    )  # fmt: skip
    parser.add_argument(
        "--cache-max", metavar="SIZE",
        help="how large --cache-size auto may make it (default: 1g, or a quarter of free memory)",
    )  # fmt: skip
    parser.add_argument("--page-size", default="4k", metavar="SIZE", help="1k to 16k (default: 4k)")
    parser.add_argument(
        "--downtime-limit", default="300", metavar="MS",
        help="stop the guest when the rest takes no longer than this (default: 300 ms)",
    )  # fmt: skip
    parser.add_argument(
        "--max-bandwidth", "--bwlimit", default="0", metavar="SIZE",
        help="bytes per second, with suffix k, m, g (default: 0, no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--channels", default="1", metavar="N",
        help="connections to spread the pages over (default: 1): for paths that limit each one",
    )  # fmt: skip
    parser.add_argument(
        "--congestion", default="", metavar="NAME",
        help="how TCP finds its pace: bbr fills a path that loses packets with one connection "
        "(default: as the system does)",
    )  # fmt: skip
    parser.add_argument(
        "--max-rounds", default="0", metavar="N", help="give up after so many (default: 0, never)"
    )
    parser.add_argument(
        "--timeout", default="0", metavar="TIME", help="give up after so long (default: 0, never)"
    )
    parser.add_argument(
        "--stall-timeout", default="30s", metavar="TIME",
        help="give up after so long without progress (default: 30s; 0 never)",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", "-n", action="store_true",
        help="connect, measure the way, look at the guest, and print what a migration would take: "
        "nothing is moved",
    )  # fmt: skip
    add_throttle(parser)
    parser.add_argument(
        "--connect-timeout", default="10s", metavar="TIME",
        help="keep trying to connect for so long (default: 10s)",
    )  # fmt: skip
    add_tls_hostname(parser)
    add_view_options(parser)
    return parser


def add_throttle(parser: Parser) -> None:
    parser.add_argument(
        "--auto-converge", action="store_true",
        help="slow the guest (demo, or --pid), step by step, where nothing else helps",
    )  # fmt: skip
    for name, default, what in (
        ("--cpu-throttle-initial", 20, "take so much of its time first"),
        ("--cpu-throttle-increment", 10, "and so much more with each step"),
        ("--max-cpu-throttle", 99, "but no more than this"),
        ("--throttle-trigger-threshold", 50, "a step is due where more is dirtied, of what goes"),
    ):
        parser.add_argument(
            name, default=str(default), metavar="PERCENT", help=f"{what} (default: {default})"
        )
    parser.add_argument(
        "--cpu-throttle-tailslow", action="store_true",
        help="take smaller steps where those should do",
    )  # fmt: skip


def throttle_of(args: argparse.Namespace) -> Throttle:
    """Raises UsageError."""
    from migrate.throttle import Throttle

    return Throttle(
        number(args.cpu_throttle_initial, "--cpu-throttle-initial"),
        number(args.cpu_throttle_increment, "--cpu-throttle-increment"),
        number(args.max_cpu_throttle, "--max-cpu-throttle"),
        args.cpu_throttle_tailslow,
        number(args.throttle_trigger_threshold, "--throttle-trigger-threshold"),
    )


def parameters_of(args: argparse.Namespace) -> Parameters:
    """Raises UsageError for anything that cannot be."""
    from migrate.parameters import Parameters
    from migrate.rounds import Limits
    from migrate.throttle import CAPABILITY as AUTO_CONVERGE

    capabilities = switches(args.capability, frozenset({AUTO_CONVERGE}))
    if args.auto_converge:
        capabilities[AUTO_CONVERGE] = True
    page_size = quantities.parse_size(args.page_size, "--page-size")
    if page_size not in (1024, 2048, 4096, 8192, 16384):
        raise UsageError(f"--page-size: {args.page_size!r} is none of 1k, 2k, 4k, 8k, 16k")
    limits = Limits(
        downtime_limit=quantities.parse_milliseconds(args.downtime_limit, "--downtime-limit") / 1e3,
        max_bandwidth=quantities.parse_size(args.max_bandwidth, "--max-bandwidth"),
        max_rounds=number(args.max_rounds, "--max-rounds"),
        timeout=seconds(args.timeout, "--timeout"),
        stall_timeout=seconds(args.stall_timeout, "--stall-timeout"),
    )
    wanted = args.cache_size or ("auto" if args.guest.startswith("qemu") else "64m")
    cache_size, cache_max = cache_sizes(wanted, args.cache_max, page_size)
    return Parameters(
        cache_size=cache_size,
        page_size=page_size,
        limits=limits,
        channels=number(args.channels, "--channels"),
        capabilities=capabilities,
        cache_max=cache_max,
        throttle=throttle_of(args),
    )


def cache_sizes(size: str, most: str | None, page_size: int) -> tuple[int, int]:
    """The cache's size at first, and for `auto` the largest, else 0. Raises UsageError."""
    from migrate.available import available_memory
    from migrate.parameters import DEFAULT_CACHE_MAX, DEFAULT_CACHE_SIZE

    if size != "auto":
        if most is not None:
            raise UsageError("--cache-max: it is for --cache-size auto only")
        return quantities.parse_cache_size(size, page_size), 0
    free = available_memory()
    if most is None:
        least = max(page_size, 1 << 20)
        limit = min(DEFAULT_CACHE_MAX, max(1 << (free // 4).bit_length() >> 1, least))
        limit = limit if free else DEFAULT_CACHE_MAX
    else:
        limit = quantities.parse_cache_size(most, page_size, "--cache-max")
    if free and most is not None and limit > free // 2:
        raise UsageError(
            f"--cache-max: {most} is more than half of the {quantities.format_size(free)} of "
            "memory that is free here: write less, or give --cache-size a size"
        )
    return min(DEFAULT_CACHE_SIZE, limit), limit


def open_guest(args: argparse.Namespace, page_size: int) -> Callable[[], MemoryGuest]:
    """Reads --guest and raises UsageError; calling the result opens the guest.

    A new demo guest is not started before there is a destination: it would be left running.
    """
    kind, _, rest = args.guest.partition(":")
    if kind == "file":
        from migrate.guests.file import FileGuest

        if not rest:
            raise UsageError("guest file: name the file: --guest file:PATH")
        pids = [number(pid, "--pid") for pid in args.pid]
        guest = FileGuest(rest, pids, args.pause_cmd, args.resume_cmd)
        return lambda: guest
    if kind == "demo":
        from migrate.guests.demo import DemoGuest, parse_demo

        if args.pid or args.pause_cmd or args.resume_cmd:
            raise UsageError("--pid, --pause-cmd and --resume-cmd are for file guests")
        if rest.startswith("pid="):
            running = DemoGuest.open(rest, page_size)
            return lambda: running
        parse_demo(rest, page_size).check_fits()
        return lambda: DemoGuest.open(rest, page_size)
    raise UsageError(
        f"--guest {args.guest!r}: there are demo[:...], file:PATH, {QEMU_FORMS}, and snapshot:DIR"
    )


def qemu_guest(args: argparse.Namespace, page_size: int) -> QemuGuest:
    """Raises UsageError."""
    from migrate.qemu.guest import QemuGuest

    if args.pid or args.pause_cmd or args.resume_cmd or args.dry_run:
        raise UsageError(
            "--pid, --pause-cmd, --resume-cmd and --dry-run are not for a QEMU guest: QEMU itself "
            "stops it"
        )
    if args.guest.startswith("snapshot"):
        return snapshot_guest(args)
    where, qmp = qemu_words(args.guest.removeprefix("qemu").removeprefix(":"))
    if args.auto_converge and not qmp:
        raise UsageError("--auto-converge: QEMU slows its guest where it is told to: add qmp=PATH")
    settings: dict[str, Any] = {
        "downtime_limit": quantities.parse_milliseconds(args.downtime_limit, "--downtime-limit")
        / 1e3,
    }
    if args.auto_converge:
        settings |= {"auto_converge": True, **asdict(throttle_of(args))}
    return QemuGuest(
        parse_address(where, listen=True) if where else None, qmp, page_size=page_size,
        return_path=not args.no_return_path, settings=settings,
    )  # fmt: skip


def snapshot_guest(args: argparse.Namespace) -> QemuGuest:
    """Raises UsageError."""
    from migrate.qemu.lifting import SnapshotGuest

    path = args.guest.removeprefix("snapshot").removeprefix(":")
    if not path:
        raise UsageError("guest snapshot: name the directory: --guest snapshot:DIR")
    if args.auto_converge or args.no_return_path:
        raise UsageError("--auto-converge and --no-return-path are for a QEMU that sends its guest")
    return SnapshotGuest(path)


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
        self.journal = args.journal or default_directory()
        check_directory(self.journal)
        self.retry = seconds(args.retry, "--retry")
        self.resolve_timeout = seconds(args.resolve_timeout, "--resolve-timeout")
        if args.congestion:
            from migrate.link import check_congestion

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
                os.kill(guest.pid, signal.SIGTERM)
            return False
        finally:
            await guest.close()

    def _know(self, guest: Guest) -> None:
        """From now on the guest is this one; to move it (again) it is opened anew."""
        if guest.pid:
            self._ends_guest |= f"pid={guest.pid}" not in self.args.guest
            self._pid, self._born = guest.pid, start_time(guest.pid)
            self.args.guest = f"demo:pid={guest.pid}"
        self.opened = self._open_again

    def _open_again(self) -> Guest:
        if self.qemu is not None:
            return qemu_guest(self.args, self.parameters.page_size)
        return open_guest(self.args, self.parameters.page_size)()

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
        except BaseException:
            await peer.close()
            raise
        self._know(guest)
        status = await self._move(guest, peer)
        # A guest that was given up, and may be the only one, does not end with us.
        self._moved = status in (0, HandOverUnknown.exit_code)
        return status

    async def _connect_and_carry(self, guest: QemuGuest) -> int:
        """Waits for QEMU, or has it begin once there is a destination; the exit code."""
        self.qemu = qemu_guest(self.args, self.parameters.page_size)  # for the next time
        peer: Link | None = None
        try:
            if guest.driven and (peer := await self._connect()) is None:
                return self.stop.cancelled_code
            self.stop.cancels_me()
            where = guest.listen()
            if not guest.driven and not self.args.quiet:
                self.progress.say(f"waiting for QEMU at {where}")
            await guest.started()
            if peer is None and (peer := await self._connect()) is None:
                return self.stop.cancelled_code
        except asyncio.CancelledError:
            _take_note()
            print("migrate-src: cancelled before QEMU came: nothing was moved", file=sys.stderr)
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
            print(f"migrate-src: {error}", file=sys.stderr)
            return error.exit_code
        finally:
            self._wanted.clear()
            self._over.set()

    def dial(self) -> Awaitable[Link]:
        from migrate import link

        return link.connect(
            self.address, timeout=self.connect_timeout, peer_timeout=self.peer_timeout,
            congestion=self.args.congestion, credentials=self.credentials,
        )  # fmt: skip

    async def _connect(self) -> Link | None:
        """None where it was cancelled."""
        self.stop.cancels_me()
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
            print(
                "migrate-src: cancelled before it was connected: nothing was moved",
                file=sys.stderr,
            )
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

        self.stop.install(cancel)
        status = 0
        try:
            progress.describe(self._facts(guest))
            self._announce(guest)
            await guest.started()
            await source.run()
        except asyncio.CancelledError:
            _take_note()
            status = self.stop.cancelled_code
            progress.clear()
            print(f"migrate-src: cancelled; {self._where(guest)}", file=sys.stderr)
        except MigrationError as error:
            status = error.exit_code
            progress.clear()
            fate = "" if isinstance(error, HandOverUnknown) else f"; {self._where(guest)}"
            if source.resumable:
                fate += "; run it again to resume"
            print(f"migrate-src: {error}{fate}", file=sys.stderr)
        finally:
            self.stop.install(lambda: "migrate-src: it is over already")
            await guest.close()
            progress.end(source.statistics)
        progress.clear()
        self._parameters = self.parameters  # what they have come to holds on
        if progress.owns_stdout or args.monitor == "stdio":
            pass
        elif args.json:
            print(json.dumps(query_migrate(source.statistics)), flush=True)
        elif not args.quiet:
            print(info_migrate(source.statistics), flush=True)
            for sentence in source.statistics.advice:
                if sentence not in source.statistics.error:
                    print(f"migrate-src: advice: {sentence}", file=sys.stderr)
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
            print("migrate-src: cancelled; nothing was moved", file=sys.stderr)
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
        elif event == "resumed":
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
            known = uri.startswith(("tcp:", "unix:"))
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
        return {"running": status == "running", "status": status}


def _take_note() -> None:
    """A cancellation was meant for what is over now, not for what this task does next."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()


async def _run(args: argparse.Namespace) -> int:
    return await SourceProgram(args).run()


def main() -> None:
    if sys.argv[1:2] == ["resolve"]:
        from migrate.cli import resolve

        resolve.main("migrate-src", sys.argv[2:])
    sys.exit(run(source_parser(), _run))
