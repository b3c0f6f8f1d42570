"""The programs migrate-src and migrate-dst: arguments, signals, exit codes.

Results go to standard output, everything else to standard error. Exit codes:

    0 completed and verified    1 failed, the source's guest as it was    2 usage
    3 cannot connect or listen  4 protocol or capability                  6 memories differ
    7 did not converge          8 cancelled at the other side
    9 handed over, but not confirmed   10 the guest is here, but --on-complete failed
    130 SIGINT   143 SIGTERM
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, NoReturn

from migrate import quantities
from migrate.address import parse_address
from migrate.errors import MigrationError, OnCompleteError, UsageError

if TYPE_CHECKING:
    from migrate.destination import Arrival, Destination
    from migrate.guests.guest import Guest, Place
    from migrate.link import Link
    from migrate.progress import Progress
    from migrate.source import Parameters, Source
    from proto.messages import GuestInfo

VERSION = "0.1.0"
CODES = __doc__.partition("Exit codes:")[2].strip("\n") if __doc__ else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help lists what there is")


def _parser(prog: str, description: str, examples: str) -> _Parser:
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=f"exit codes:\n{CODES}\n\nexamples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{prog} {VERSION}")
    parser.add_argument(
        "--capability", action="append", default=[], metavar="NAME=on|off",
        help="switch a capability: xbzrle, xbzrle-merge (shorter deltas); both are on",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.add_argument(
        "--peer-timeout", default="30s", metavar="TIME", help="a peer silent for so long is lost"
    )
    return parser


def source_parser() -> _Parser:
    parser = _parser(
        "migrate-src",
        "Moves a guest's memory to migrate-dst while the guest goes on writing to it.",
        "  migrate-src tcp:host:4444\n"
        "  migrate-src --guest demo:256m,hot=64m --max-bandwidth 117m tcp:host:4444\n"
        "  migrate-src --guest file:/dev/shm/db --pid 1234 --cache-size 256m tcp:host:4444",
    )
    parser.add_argument("uri", metavar="tcp:HOST:PORT|unix:PATH", help="where migrate-dst listens")
    parser.add_argument(
        "--guest", default="demo", metavar="SPEC",
        help="demo[:SIZE][,hot=SIZE][,stride=BYTES][,rate=N][,fill=zero|random], demo:pid=PID, "
        "or file:PATH (default: demo)",
    )  # fmt: skip
    parser.add_argument(
        "--pid", action="append", default=[], metavar="PID",
        help="a process that writes the file: stopped for the last round (repeatable)",
    )  # fmt: skip
    parser.add_argument("--pause-cmd", default="", metavar="CMD", help="stops the file's writer")
    parser.add_argument("--resume-cmd", default="", metavar="CMD", help="lets it go on")
    parser.add_argument(
        "--cache-size", default="64m", metavar="SIZE", help="xbzrle page cache (default: 64m)"
    )
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
        "--connect-timeout", default="10s", metavar="TIME",
        help="keep trying to connect for so long (default: 10s)",
    )  # fmt: skip
    parser.add_argument(
        "--progress", choices=["auto", "plain", "never"], default="auto",
        help="a redrawn line on a terminal, plain lines, or none",
    )  # fmt: skip
    return parser


def destination_parser() -> _Parser:
    parser = _parser(
        "migrate-dst",
        "Receives one guest, verifies it, and runs it.",
        "  migrate-dst --listen 4444\n"
        "  migrate-dst --listen 4444 --output /dev/shm/db --on-complete 'systemctl start db'",
    )
    parser.add_argument(
        "--listen", required=True, metavar="[HOST:]PORT|unix:PATH",
        help="where to listen; port 0 picks a free one and prints it",
    )  # fmt: skip
    parser.add_argument("--output", default="", metavar="PATH", help="where a file guest lands")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--on-complete", default="", metavar="CMD", help="run this when the guest is ours"
    )
    parser.add_argument(
        "--cache-size", default="", metavar="SIZE", help="ask the source for this cache size"
    )
    return parser


def _switches(items: list[str]) -> dict[str, bool]:
    from proto import LocalError
    from proto.capabilities import switched_on

    result: dict[str, bool] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if value not in ("on", "off") or not equals:
            raise UsageError(f"--capability {item!r}: write NAME=on or NAME=off")
        result[name] = value == "on"
    try:
        switched_on(result)
    except LocalError as error:
        raise UsageError(f"--capability: {error}") from None
    return result


def _number(text: str, what: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise UsageError(f"{what}: {text!r} is not a number")
    return int(text)


def _seconds(text: str, what: str) -> float:
    return quantities.parse_milliseconds(text, what, bare="s") / 1e3


def _peer_timeout(args: argparse.Namespace) -> float:
    seconds = _seconds(args.peer_timeout, "--peer-timeout")
    if seconds < 1:
        raise UsageError("--peer-timeout: a second is the least: a living peer pauses too")
    return seconds


def parameters_of(args: argparse.Namespace) -> Parameters:
    """Raises UsageError for anything that cannot be."""
    from migrate.rounds import Limits
    from migrate.source import Parameters

    page_size = quantities.parse_size(args.page_size, "--page-size")
    if page_size not in (1024, 2048, 4096, 8192, 16384):
        raise UsageError(f"--page-size: {args.page_size!r} is none of 1k, 2k, 4k, 8k, 16k")
    limits = Limits(
        downtime_limit=quantities.parse_milliseconds(args.downtime_limit, "--downtime-limit") / 1e3,
        max_bandwidth=quantities.parse_size(args.max_bandwidth, "--max-bandwidth"),
        max_rounds=_number(args.max_rounds, "--max-rounds"),
        timeout=_seconds(args.timeout, "--timeout"),
        stall_timeout=_seconds(args.stall_timeout, "--stall-timeout"),
    )
    return Parameters(
        cache_size=quantities.parse_cache_size(args.cache_size, page_size),
        page_size=page_size,
        limits=limits,
        channels=_number(args.channels, "--channels"),
        capabilities=_switches(args.capability),
    )


def open_guest(args: argparse.Namespace, page_size: int) -> Callable[[], Guest]:
    """Reads --guest and raises UsageError; calling the result opens the guest.

    A new demo guest is not started before there is a destination: it would be left running.
    """
    kind, _, rest = args.guest.partition(":")
    if kind == "file":
        from migrate.guests.file import FileGuest

        if not rest:
            raise UsageError("guest file: name the file: --guest file:PATH")
        pids = [_number(pid, "--pid") for pid in args.pid]
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
    raise UsageError(f"--guest {args.guest!r}: there are demo[:...] and file:PATH")


class _Stop:
    """SIGINT and SIGTERM: the first cancels, once it is too late it says so."""

    def __init__(self) -> None:
        self.signal = 0
        self._cancel: Callable[[], str] = str

    def install(self, cancel: Callable[[], str]) -> None:
        self._cancel = cancel
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._caught, number)

    def _caught(self, number: int) -> None:
        if self.signal:
            print("already cancelling: the guest is being put back to work", file=sys.stderr)
            return
        refusal = self._cancel()
        if refusal:
            print(refusal, file=sys.stderr)
        else:
            self.signal = number


async def _source(args: argparse.Namespace) -> int:
    from migrate import link
    from migrate.progress import Progress
    from migrate.source import Source

    address = parse_address(args.uri)
    parameters = parameters_of(args)
    peer_timeout = _peer_timeout(args)
    connect_timeout = _seconds(args.connect_timeout, "--connect-timeout")
    opened = open_guest(args, parameters.page_size)
    progress = Progress("never" if args.quiet else args.progress)
    stop = _Stop()
    task = asyncio.current_task()
    assert task is not None

    def cancel_connecting() -> str:
        task.cancel()
        return ""

    stop.install(cancel_connecting)
    if not args.quiet:
        progress.say(f"connecting to {address}")
    try:
        peer = await link.connect(address, timeout=connect_timeout, peer_timeout=peer_timeout)
    except asyncio.CancelledError:
        print(
            "migrate-src: cancelled before it was connected: nothing was moved",
            file=sys.stderr,
        )
        return 128 + stop.signal
    try:
        guest = opened()
    except BaseException:
        await peer.close()
        raise

    def dial() -> Awaitable[Link]:
        return link.connect(address, timeout=connect_timeout, peer_timeout=peer_timeout)

    source = Source(guest, peer, parameters, progress.show, dial)
    return await _move(args, guest, source, progress, stop)


async def _move(
    args: argparse.Namespace, guest: Guest, source: Source, progress: Progress, stop: _Stop
) -> int:
    """Moves an open guest over an open link, and prints what came of it."""
    from migrate.guests.file import FileGuest
    from migrate.statistics import info_migrate, query_migrate

    task = asyncio.current_task()
    assert task is not None

    def cancel() -> str:
        if source.committed:
            return "migrate-src: too late to cancel: the guest is handed over"
        task.cancel()
        return ""

    stop.install(cancel)
    status = 0
    try:
        if not args.quiet:
            progress.say(f"moving {guest.description}")
            if isinstance(guest, FileGuest) and not guest.stoppable:
                progress.say(
                    "nothing stops the file's writer in the last round (--pid or --pause-cmd): "
                    "if it writes then, the migration fails"
                )
        await guest.started()
        await source.run()
    except asyncio.CancelledError:
        status = 128 + stop.signal
        progress.clear()
        print(f"migrate-src: cancelled; {_where(guest)}", file=sys.stderr)
    except MigrationError as error:
        status = error.exit_code
        progress.clear()
        fate = "" if status == 9 else f"; {_where(guest)}"
        print(f"migrate-src: {error}{fate}", file=sys.stderr)
    finally:
        await guest.close()
    progress.clear()
    if args.json:
        print(json.dumps(query_migrate(source.statistics)))
    elif not args.quiet:
        print(info_migrate(source.statistics))
    return status


def _where(guest: Guest) -> str:
    pid = getattr(getattr(guest, "process", None), "pid", None)
    if pid is not None:
        return (
            f"the guest runs on here, in process {pid} "
            f"(try again: --guest demo:pid={pid}; end it: kill {pid})"
        )
    return "the guest runs on here"


async def _destination(args: argparse.Namespace) -> int:
    from migrate import link
    from migrate.guests.file import check_output, run_command

    address = parse_address(args.listen, listen=True)
    capabilities = _switches(args.capability)
    wanted = quantities.parse_cache_size(args.cache_size, 4096) if args.cache_size else 0
    if args.output:
        check_output(args.output, args.overwrite)
    peer_timeout = _peer_timeout(args)
    stop = _Stop()
    destination: Destination | None = None
    task = asyncio.current_task()
    assert task is not None

    def cancel() -> str:
        if destination is not None and destination.owner:
            return "migrate-dst: too late to cancel: the guest is ours"
        task.cancel()
        return ""

    stop.install(cancel)
    listener = await link.listen(address, peer_timeout=peer_timeout)
    _say(args, f"listening on {listener.address}")
    try:
        while True:
            peer = await listener.accept()
            destination = _receiver(args, peer, capabilities, wanted, listener.accept)
            try:
                arrival = await destination.run()
                break
            except MigrationError as error:
                if destination.started:
                    raise
                print(f"migrate-dst: refused {peer.peer_name}: {error}", file=sys.stderr)
    except asyncio.CancelledError:
        print("migrate-dst: cancelled; nothing is left of the guest here", file=sys.stderr)
        return 128 + stop.signal
    finally:
        await listener.close()
    if args.json:
        print(json.dumps(_arrival_json(arrival)))
    elif not args.quiet:
        print(f"completed and verified: {arrival.running}", flush=True)
    if args.on_complete:
        kind = arrival.info.kind if arrival.info else ""
        try:
            await run_command(
                args.on_complete, "--on-complete", MIGRATE_OUTPUT=args.output, MIGRATE_KIND=kind
            )
        except MigrationError as error:
            raise OnCompleteError(f"the guest is here and whole, but {error}") from None
    return 0


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(f"migrate-dst: {text}", file=sys.stderr, flush=True)


def _arrival_json(arrival: Arrival) -> dict[str, Any]:
    assert arrival.info is not None
    return {
        "status": arrival.status,
        "guest": {"kind": arrival.info.kind, "size": arrival.info.size},
        "ram": {
            "received": arrival.received,
            "duplicate": arrival.zero,
            "normal": arrival.raw,
            "dirty-sync-count": arrival.rounds,
        },
        "xbzrle-cache": {"pages": arrival.delta, "cache-size": arrival.cache_size},
        "running": arrival.running,
    }


def _receiver(
    args: argparse.Namespace, peer: Any, capabilities: dict[str, bool], wanted: int,
    accept: Callable[[], Awaitable[Link]],
) -> Destination:  # fmt: skip
    from migrate.destination import Destination, NoPlaceError
    from migrate.guests.demo import DemoPlace
    from migrate.guests.file import FilePlace
    from proto.messages import CacheSize

    def placer(info: GuestInfo) -> Place:
        if info.kind == "file":
            if not args.output:
                raise NoPlaceError(
                    "a file guest has nowhere to land: start migrate-dst with --output PATH"
                )
            return FilePlace(info, args.output, args.overwrite)
        if info.kind == "demo":
            if args.output:
                raise NoPlaceError(
                    "a demo guest lands in a process of its own: start migrate-dst without --output"
                )
            return DemoPlace(info)
        raise NoPlaceError(
            f"there is no place for a {info.kind} guest: a Python program receives it with "
            "migrate.receive()"
        )

    asked: set[asyncio.Task[None]] = set()

    def observe(event: str, arrival: Arrival) -> None:
        if event == "accepted" and arrival.info is not None:
            _say(args, f"receiving a {arrival.info.kind} guest of "
                 f"{quantities.format_size(arrival.info.size)} from {peer.peer_name}")  # fmt: skip
            if wanted:
                asked.add(asyncio.get_running_loop().create_task(peer.send(CacheSize(wanted))))

    return Destination(peer, placer, capabilities, observe, accept)


def _main(
    parser: _Parser, program: Callable[[argparse.Namespace], Coroutine[Any, Any, int]]
) -> int:
    try:
        args = parser.parse_args()
        import uvloop

        with contextlib.suppress(BrokenPipeError):
            return uvloop.run(program(args))
        return 1
    except MigrationError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def source_main() -> None:
    sys.exit(_main(source_parser(), _source))


def destination_main() -> None:
    sys.exit(_main(destination_parser(), _destination))
