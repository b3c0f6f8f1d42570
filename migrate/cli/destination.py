"""The program migrate-dst."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from migrate import output, quantities
from migrate.address import Address, parse_address
from migrate.cli.program import (
    QEMU_FORMS,
    Parser,
    Stop,
    answering,
    credentials,
    migration_parser,
    peer_timeout,
    qemu_words,
    run,
    seconds,
    switches,
    tls_of,
)
from migrate.directory import Left
from migrate.errors import (
    ConnectError,
    MigrationError,
    OnCompleteError,
    PeerError,
    UsageError,
)
from migrate.journal import check_directory, damaged, journal_directory
from migrate.monitor.node import Node, Refused
from migrate.output import printable, say, show
from migrate.rationed import Rationed
from migrate.threads import in_thread
from migrate.views.options import DestinationViews, add_metrics_options
from proto import ProtoError
from proto.ownership import Claim, Role

if TYPE_CHECKING:
    from migrate.destination import Destination
    from migrate.door import Door
    from migrate.guests.guest import Place
    from migrate.guests.rights import Rights
    from migrate.handover import Custody
    from migrate.journal import Journal
    from migrate.link import Link
    from migrate.monitor.terminal import Terminal
    from migrate.parameters import Parameters
    from migrate.reception import Arrival
    from proto.messages import GuestInfo, Message


def destination_parser() -> Parser:
    parser = migration_parser(
        "migrate-dst",
        "Receives one guest, verifies it, and runs it.",
        "  migrate-dst --listen 4444\n"
        "  migrate-dst --listen 4444 --output /dev/shm/db --on-complete 'systemctl start db'\n"
        "  migrate-dst --listen 4444 --guest qemu:qmp=/run/vm-in.qmp    (QEMU: -incoming defer)\n"
        "  migrate-dst --listen 4444 --guest qemu --output /srv/vm",
    )
    parser.add_argument(
        "--listen", default="", metavar="[HOST:]PORT|unix:PATH",
        help="where to listen; port 0 picks a free one and prints it; with --monitor or --qmp it "
        "can be said there, later (migrate_incoming)",
    )  # fmt: skip
    parser.add_argument(
        "--allow", action="append", default=[], metavar="ADDRESS[/BITS]",
        help="only these may connect (repeatable; default: everybody)",
    )  # fmt: skip
    parser.add_argument(
        "--tls-authz", action="append", default=[], metavar="NAME",
        help="only clients of this name may bring a guest: a certificate's common name (host), DNS "
        "name (DNS:host) or distinguished name (CN=host,O=...); repeatable; default: all that the "
        "authority vouches for",
    )  # fmt: skip
    parser.add_argument(
        "--guest", default="", metavar="qemu:tcp:HOST:PORT|qemu:unix:PATH|qemu:qmp=PATH|qemu",
        help="the QEMU that waits for a guest there (-incoming), or is told to (-incoming defer); "
        "qemu alone: a QEMU's guest lands in the directory --output",
    )  # fmt: skip
    parser.add_argument(
        "--output",
        default="",
        metavar="PATH",
        help="where a file guest lands; with --guest qemu the directory a QEMU's guest lands in",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--mode", default="", metavar="MODE",
        help="of the output, in octal digits (default: as the file it replaces, or as the guest's)",
    )  # fmt: skip
    parser.add_argument(
        "--owner", default="", metavar="USER[:GROUP]",
        help="of the output, names or numbers (default: as the file it replaces, or as the "
        "guest's by number, as far as we may set it)",
    )  # fmt: skip
    parser.add_argument(
        "--on-complete", default="", metavar="CMD", help="run this when the guest is ours"
    )
    parser.add_argument(
        "--on-complete-timeout", default="0", metavar="TIME",
        help="wait no longer for that command: it goes on, and the exit code is 10 (default: 0, "
        "as long as it takes)",
    )  # fmt: skip
    parser.add_argument(
        "--cache-size", default="", metavar="SIZE", help="ask the source for this cache size"
    )
    add_metrics_options(parser)
    return parser


def qemu_of(args: argparse.Namespace) -> tuple[Address | None, str] | None:
    """Where the QEMU listens, and its QMP socket, that tells it to. Raises UsageError."""
    if not args.guest:
        return None
    kind, _, rest = args.guest.partition(":")
    if args.guest == "qemu" and args.output:
        return None
    if kind == "snapshot":
        raise UsageError("--guest snapshot: to land a machine in DIR: --guest qemu --output DIR")
    if kind != "qemu" or not rest:
        raise UsageError(
            f"--guest {args.guest!r}: say where the QEMU is: {QEMU_FORMS}; or qemu, and with "
            "--output where its guest is to land"
        )
    if args.output:
        raise UsageError("--guest and --output: a guest lands in one of both")
    where, qmp = qemu_words(rest)
    return parse_address(where) if where else None, qmp


def rights_of(args: argparse.Namespace) -> Rights:
    """Mode and owner that are asked for. Raises UsageError."""
    from migrate.guests.rights import Rights, parse_mode, parse_owner

    if (args.mode or args.owner) and (not args.output or args.guest):
        raise UsageError("--mode and --owner are for the file of a guest: give --output PATH")
    return Rights(parse_mode(args.mode), *parse_owner(args.owner))


class DestinationProgram(Node):
    """One run of migrate-dst. What is wrong with its arguments is raised by the constructor."""

    program = "migrate-dst"
    receives = True

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        from migrate.guests.output_file import try_output
        from migrate.guests.reopen import reopen_place
        from migrate.handover import Records
        from migrate.parameters import DEFAULT_CACHE_SIZE, Parameters
        from migrate.tls import networks

        self.args = args
        self._refusals = Rationed(
            say, lambda number: f"migrate-dst: refused {number} more connections"
        )
        self._visits = Rationed(
            self._say, lambda number: f"{number} more lines on guests that came, or meant to"
        )
        self.deferred = not args.listen
        if self.deferred and not (args.monitor or args.qmp):
            raise UsageError(
                "say where to listen: --listen 4444; or how it will be said: --monitor stdio"
            )
        self.address = None if self.deferred else parse_address(args.listen, listen=True)
        self.wanted_cache = (
            quantities.parse_cache_size(args.cache_size, 4096) if args.cache_size else 0
        )
        self.parameters = Parameters(
            self.wanted_cache or DEFAULT_CACHE_SIZE, capabilities=switches(args.capability)
        )
        self._incoming = asyncio.Event()
        self._heard = asyncio.Event()
        self._failed, self._silent = "", False
        self._over = asyncio.Event()
        self._done = asyncio.Event()
        """--on-complete has run too."""
        self.qemu = qemu_of(args)
        self.landing = args.guest == "qemu"
        if self.landing:
            from migrate.qemu.landing import try_landing

            try_landing(args.output, args.overwrite)
        self.rights = rights_of(args)
        if args.output and not self.landing:
            try_output(args.output, args.overwrite, self.rights)
        self.on_complete_timeout = seconds(args.on_complete_timeout, "--on-complete-timeout")
        self.peer_timeout = peer_timeout(args)
        self.allow = networks(args.allow)
        self.credentials = credentials(args, Role.DESTINATION)
        self.tls = tls_of(args)
        self.warned = False
        self.retry = seconds(args.retry, "--retry")
        self.resolve_timeout = seconds(args.resolve_timeout, "--resolve-timeout")
        journal = check_directory(journal_directory(args.journal))
        self.records = Records(journal, reopen_place)
        self.stop = Stop()
        self.destination: Destination | None = None
        self.place: Place | None = None
        self._door: Door | None = None
        self._taken: asyncio.Future[Custody]
        self._asked: set[asyncio.Task[None]] = set()
        self.views = DestinationViews(
            args, lambda: self.destination.arrival if self.destination else None, self._say
        )

    async def run(self) -> int:
        """Receives a guest, stays if it is to; the exit code."""
        task = asyncio.current_task()
        assert task is not None
        self._taken = asyncio.get_running_loop().create_future()
        self.records.on_taken = self._take

        def cancel() -> str:
            if self._taken.done() or (self.destination is not None and self.destination.owner):
                return "migrate-dst: too late to cancel: the guest is ours"
            task.cancel()
            return ""

        self.stop.install(cancel)
        silence = None
        try:
            async with answering(self.args, self) as terminal:
                if terminal is not None and self.deferred and not self.args.qmp:
                    silence = asyncio.create_task(self._silence(terminal))
                return await self._serve()
        finally:
            if silence is not None:
                silence.cancel()
            self._refusals.close()
            self._visits.close()
            self.records.close()
            self.views.close()

    async def _serve(self) -> int:
        try:
            opening = await (self._open_as_asked() if self.deferred else self._open())
        except asyncio.CancelledError:
            return self._cancelled()
        async with opening as self._door:
            try:
                arrival = await self._receive(self._door)
            except asyncio.CancelledError:
                return self._cancelled()
            self._over.set()
            if arrival is None:
                return await self._gone_on(self._taken.result())
            return await self._arrived(arrival)

    def _cancelled(self) -> int:
        say("migrate-dst: cancelled; nothing is left of the guest here")
        return self.stop.cancelled_code

    async def _silence(self, terminal: Terminal) -> None:
        """Nobody can ask for anything any more: what was asked for is done, and that is all."""
        await terminal.closed.wait()
        self._silent = True
        if self._incoming.is_set():
            await self._done.wait()
        if not self.stop.signal:  # `quit` was the last thing that was asked
            self.stop.request()

    async def _open_as_asked(self) -> Door:
        """Listens where a command says; what goes wrong is said, and another address is waited
        for, as long as anybody can say one."""
        while True:
            await self._incoming.wait()
            try:
                return await self._open()
            except ConnectError as error:
                if self._silent:
                    raise
                self._failed = str(error)
                say(f"migrate-dst: {self._failed}")
                self._incoming.clear()
                self._heard.set()

    async def _open(self) -> Door:
        """Listens, after what an earlier program has left is done."""
        from migrate import listening
        from migrate.door import Door

        for said in await self.records.finish(self.resolve_timeout):
            self._say(said)
        for wrong in damaged(Role.DESTINATION, self.records.directory):
            self._say(f"not looked at: {wrong}")
        for file in {one.facts["place"]["temporary"] for one in self._attempts()}:
            self._say(f"a guest came half-way here ({file}): its source can go on with it")
        assert self.address is not None
        listener = await listening.listen(
            self.address, peer_timeout=self.peer_timeout, credentials=self.credentials,
            allow=self.allow, refused=self._refused,
        )  # fmt: skip
        self._say(f"listening on {listener}")
        if self.qemu and self.qemu[1] and not os.path.exists(self.qemu[1]):
            self._say(
                f"no QEMU has a socket at {self.qemu[1]} yet: it must be there when a guest comes "
                "(-incoming defer -qmp unix:PATH,server=on,wait=off)"
            )
        self._heard.set()
        return Door(listener, self.records, self._destination, refused=self._refused)

    def _refused(self, who: str, why: object) -> None:
        self._refusals.say(f"migrate-dst: refused {who}: {why}")

    async def _arrived(self, arrival: Arrival) -> int:
        """The guest is ours: says so, does what is to be done then; the exit code."""
        if self.args.json:
            print(json.dumps(self.query_migrate()), flush=True)
        elif not self.args.quiet:
            show(f"completed and verified: {arrival.running}")
        status = await self._on_complete(arrival.info.kind if arrival.info else "")
        assert self.destination is not None
        if self.args.stay or self.deferred:
            place = self.place
            await self.stop.stay(*(place.pid, place.born) if place else (0, ""))
        elif not self.destination.acknowledged:
            self._say(
                "the source may not know that its guest runs here: it is waited for, "
                f"{self.resolve_timeout:g} s at most"
            )
            await self.stop.until(self.destination.asked(), self.resolve_timeout)
        return status

    def _take(self, custody: Custody) -> None:
        """A guest that an earlier program had prepared runs; it is ours if it is our output."""
        path = getattr(custody.place, "path", "")
        ours = self.args.output and os.path.abspath(path) == os.path.abspath(self.args.output)
        if ours and not self._taken.done():
            self._taken.set_result(custody)

    async def _gone_on(self, custody: Custody) -> int:
        """What an earlier program would have done when its guest ran; the exit code."""
        if not self.args.quiet and not self.args.json:
            show(f"completed and verified: {custody.running}")
        status = await self._on_complete("qemu" if self.landing else "file")
        if self.args.stay or self.deferred:
            await self.stop.stay(0, "")
        else:
            await self.stop.until(custody.told.wait(), self.resolve_timeout)
        return status

    async def _receive(self, door: Door) -> Arrival | None:
        """Serves connections until a guest has come, or was accepted and failed.

        None: a guest runs that an earlier program had prepared.
        """
        while True:
            coming = asyncio.ensure_future(door.guest())
            waited: set[asyncio.Future[Any]] = {coming, self._taken}
            try:
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if self._taken.done():
                    return None
                self.destination = destination = coming.result()
            finally:
                coming.cancel()
            try:
                return await destination.run()
            except MigrationError as error:
                # A source may fail. Who breaks the protocol is none: the true one may come yet.
                if destination.started and type(error) is not PeerError:
                    raise
                self._refused(destination.link.peer_name, error)
                self.destination = None

    def _destination(self, peer: Link) -> Destination:
        from migrate.destination import Destination

        def link() -> Link:
            return self.destination.link if self.destination else peer

        said = self._visits.say

        def observe(event: str, arrival: Arrival) -> None:
            self.views.observe()
            self._tell_of(event, arrival)
            if event == "accepted" and arrival.info is not None:
                size = quantities.format_size(arrival.info.size)
                said(f"receiving a {arrival.info.kind} guest of {size} from {peer.peer_name}")
                self._warn(peer)
            if event == "probed":
                said(f"{peer.peer_name} measured the way here: nothing was moved (--dry-run)")
            if event == "interrupted":
                left = self.destination.patience if self.destination else self.retry
                said(f"the connection broke: the source may come back, within {left:.3g} s")
            if event == "back":
                said(f"the source is back, from {link().peer_name}")
            if event == "lost":
                self._say(
                    "the source is gone, and its guest is whole here: it may come back and ask, "
                    f"within {self.resolve_timeout:g} s"
                )
            if event in ("accepted", "back") and self.wanted_cache:
                self._ask_for_cache()

        assert self._door is not None
        return Destination(
            peer, self._place, self.parameters.wire_switches, observe, self._door.lane,
            records=self.records, retry=self.retry, resolve_timeout=self.resolve_timeout,
        )  # fmt: skip

    def _ask_for_cache(self) -> None:
        """The source owns the cache, and confirms."""
        from proto.messages import CacheSize

        assert self.destination is not None
        asking = self._asked_for(self.destination.link, CacheSize(self.wanted_cache))
        task = asyncio.get_running_loop().create_task(asking)
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)

    async def _asked_for(self, link: Link, message: Message) -> None:
        with contextlib.suppress(MigrationError, ProtoError):  # it may be over, or just resuming
            await link.send(message)

    def _tell_of(self, event: str, arrival: Arrival) -> None:
        if event in ("accepted", "back"):
            self.tell_migration("MIGRATION", status="active")
        elif event == "round":
            self.tell_migration("MIGRATION_PASS", **{"pass": arrival.rounds})
        elif event == "running":
            if arrival.runs:
                self.tell("RESUME")
            self.tell_migration("MIGRATION", status="completed")

    def _warn(self, peer: Link) -> None:
        if peer.exposed and not self.warned:
            from migrate.tls import PLAIN

            self.warned = True
            self._say(f"warning: {PLAIN}")

    def _place(self, info: GuestInfo) -> Place:
        """Where a guest lands. Raises NoPlaceError."""
        from migrate.destination import NoPlaceError
        from migrate.guests.demo import DemoPlace
        from migrate.guests.output_file import FilePlace

        args = self.args
        if info.kind == "qemu" or self.qemu is not None or self.landing:
            self.place = self._qemu_place(info)
        elif info.kind == "file":
            if not args.output:
                raise NoPlaceError(
                    "a file guest has nowhere to land: start migrate-dst with --output PATH"
                )
            self.place = place = FilePlace(
                info, args.output, args.overwrite, self._left_of(info), self.rights
            )
            for said in place.notices():
                self._visits.say(f"warning: {said}")
        elif info.kind == "demo":
            if args.output:
                raise NoPlaceError(
                    "a demo guest lands in a process of its own: start migrate-dst without --output"
                )
            self.place = DemoPlace(info)
        else:
            raise NoPlaceError(
                f"there is no place for a {info.kind} guest: a Python program receives it with "
                "migrate.receive()"
            )
        return self.place

    def _qemu_place(self, info: GuestInfo) -> Place:
        from migrate.destination import NoPlaceError
        from migrate.qemu.place import QemuPlace

        if info.kind != "qemu":
            raise NoPlaceError(f"a QEMU's guest is awaited here, and no {info.kind} guest")
        if self.landing:
            from migrate.qemu.landing import LandingPlace

            return LandingPlace(self.args.output, overwrite=self.args.overwrite)
        if self.qemu is None:
            raise NoPlaceError(
                "a QEMU guest lands in a QEMU that waits for it: start migrate-dst with "
                "--guest qemu:qmp=PATH; or in a directory: --guest qemu --output DIR"
            )
        return QemuPlace(*self.qemu)

    def _attempts(self) -> list[Journal]:
        """Journals of guests that came half-way to our output."""
        output = os.path.abspath(self.args.output)
        every = self.records.attempts() if self.args.output else []
        return [one for one in every if one.facts["place"].get("path") == output]

    def _left_of(self, info: GuestInfo) -> Left | None:
        """The file in which this guest came half-way; those of others are removed."""
        attempt, left = self.records.attempt(info.resume), None
        if attempt is not None:
            found, output = attempt.left, os.path.abspath(self.args.output)
            same_size = attempt.facts["place"].get("size") == info.size
            if found is not None and found.path == output and same_size and found.there:
                left = found
            elif attempt.claim is not Claim.NONE:
                attempt.drop_temporary()
        for journal in self._attempts():
            same = left is not None and journal.left == left
            if not same or not journal.is_of(info.resume):
                journal.forget(alone=same)
        return left

    async def _on_complete(self, kind: str) -> int:
        """Runs the user's command; the exit code: the guest is here whatever comes of it."""
        try:
            return await self._run_on_complete(kind)
        finally:
            self._done.set()

    async def _run_on_complete(self, kind: str) -> int:
        """A signal or `quit` ends the waiting for it, and nothing else."""
        if not self.args.on_complete:
            return 0
        from migrate.guests.command import start_service

        told = asyncio.Event()

        def tell() -> str:
            told.set()
            return ""

        self.stop.install(tell)
        try:
            await start_service(
                self.args.on_complete, "--on-complete", self.on_complete_timeout, told,
                MIGRATE_OUTPUT=self.args.output, MIGRATE_KIND=kind,
            )  # fmt: skip
        except MigrationError as error:
            say(f"migrate-dst: the guest is here and whole, but {error}")
            return OnCompleteError.exit_code
        return 0

    def _say(self, text: str) -> None:
        if not self.args.quiet:
            say(f"migrate-dst: {text}")

    # -- what operators see and do

    @property
    def migrating(self) -> bool:
        return self.destination is not None and self.destination.started and not self._over.is_set()

    def take(self, parameters: Parameters) -> None:
        """A cache size is asked for at the source, now or when one comes."""
        super().take(parameters)
        self.wanted_cache = parameters.cache_size
        if self.migrating:
            self._ask_for_cache()

    def migrate_incoming(self, uri: str) -> None:
        if not self.deferred or self._incoming.is_set():
            raise Refused("The incoming migration has already been started")
        try:
            self.address = parse_address(uri, listen=True)
        except UsageError as error:
            raise Refused(str(error)) from None
        self._failed = ""
        self._heard.clear()
        self._incoming.set()

    async def ended(self) -> str:
        """Waits until somebody can come, or nobody can."""
        await self._heard.wait()
        return self._failed

    def cancel(self) -> None:
        if self.migrating and (refusal := self.stop.cancel()):
            raise Refused(refusal.removeprefix("migrate-dst: "))

    def quit(self) -> None:
        self.stop.request()

    def info_migrate(self, *, whole: bool = False) -> str:
        """The seed's lines, those of them that are known here: there are no others."""
        del whole
        from migrate.monitor.settings import switches

        arrival = self.destination.arrival if self.destination else None
        xbzrle = switches(self.parameters)["xbzrle"]
        if arrival is not None and arrival.info is not None:
            xbzrle = arrival.capabilities["xbzrle"]
        lines = [f"capabilities: xbzrle: {'on' if xbzrle else 'off'}"]
        if arrival is None or arrival.info is None:
            return "\n".join([*lines, "Migration status: none"])
        size, page_size = arrival.info.size, arrival.info.page_size
        return "\n".join([
            *lines,
            f"Migration status: {arrival.status}",
            f"received ram: {arrival.received >> 10} kbytes",
            f"total ram: {size >> 10} kbytes",
            f"duplicate: {arrival.zero} pages",
            f"normal: {arrival.raw} pages",
            f"normal bytes: {arrival.raw * page_size >> 10} kbytes",
            f"cache size: {arrival.cache_size} bytes",
            f"xbzrle pages: {arrival.delta} pages",
            f"dirty sync count: {arrival.rounds}",
            f"page size: {page_size >> 10} kbytes",
        ])  # fmt: skip

    def query_status(self) -> dict[str, Any]:
        """QEMU's RunState of the guest here."""
        arrival = self.destination.arrival if self.destination else None
        if arrival is None or arrival.status != "completed":
            return {"running": False, "status": "inmigrate"}
        return {"running": arrival.runs, "status": "running" if arrival.runs else "paused"}

    def query_migrate(self) -> dict[str, Any]:
        """How far the guest that comes has come; {} before anybody can come."""
        if self._door is None:
            return {"status": "failed", "error-desc": self._failed} if self._failed else {}
        where = {
            "socket-address": [
                {"type": "unix", "path": printable(one.path)} if one.path
                else {"type": "inet", "host": one.host, "port": str(one.port)}
                for one in self._door.addresses
            ]
        }  # fmt: skip
        if self.destination is None or self.destination.arrival.info is None:
            return {"status": "setup", **where}
        arrival = self.destination.arrival
        assert arrival.info is not None
        return {
            "status": arrival.status,
            **where,
            "guest": {"kind": arrival.info.kind, "size": arrival.info.size},
            "ram": {
                "received": arrival.received,
                "total": arrival.info.size,
                "duplicate": arrival.zero,
                "normal": arrival.raw,
                "normal-bytes": arrival.raw * arrival.info.page_size,
                "dirty-sync-count": arrival.rounds,
                "page-size": arrival.info.page_size,
            },
            "xbzrle-cache": {"pages": arrival.delta, "cache-size": arrival.cache_size},
            "running": printable(arrival.running),
        }


async def _run(args: argparse.Namespace) -> int:
    from migrate.guests.command import check_command

    await in_thread(check_command, args.on_complete, "--on-complete")
    return await DestinationProgram(args).run()


def _main() -> int:
    if sys.argv[1:2] == ["resolve"]:
        from migrate.cli import resolve

        return resolve.main("migrate-dst", sys.argv[2:])
    return run(destination_parser(), _run)


def main() -> None:
    output.program("migrate-dst", _main)
