"""The words of migrate-src: its parser, and what they come to: parameters, and a guest."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from migrate import quantities
from migrate.address import parse_address
from migrate.cli.program import (
    QEMU_FORMS,
    Parser,
    add_tls_hostname,
    migration_parser,
    number,
    qemu_words,
    seconds,
    switches,
)
from migrate.errors import UsageError
from migrate.output import say
from migrate.views.options import add_view_options

if TYPE_CHECKING:
    from migrate.guests.guest import MemoryGuest
    from migrate.parameters import Parameters
    from migrate.qemu.guest import QemuGuest
    from migrate.throttle import Throttle


def source_parser() -> Parser:
    parser = migration_parser(
        "migrate-src",
        "Moves a guest's memory to migrate-dst while the guest goes on writing to it.",
        "  migrate-src tcp:host:4444\n"
        "  migrate-src --guest demo:256m,hot=64m --max-bandwidth 117m tcp:host:4444\n"
        "  migrate-src --guest file:/dev/shm/db --pid 1234 --cache-size 256m tcp:host:4444\n"
        "  migrate-src --guest qemu:qmp=/run/vm.qmp tcp:host:4444    (a virtual machine)\n"
        "  migrate-src --guest snapshot:/srv/vm tcp:host:4444        (one that has landed)",
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
        "--pid", action="append", default=[], metavar="PID|auto",
        help="a process that writes the file: stopped for the last round (repeatable); auto: all "
        "that write it, those too that appear meanwhile",
    )  # fmt: skip
    parser.add_argument(
        "--no-return-path", action="store_true",
        help="carry the stream of a QEMU that hears nothing back: it takes its guest for moved as "
        "soon as all is sent",
    )  # fmt: skip
    parser.add_argument("--pause-cmd", default="", metavar="CMD", help="stops the file's writer")
    parser.add_argument("--resume-cmd", default="", metavar="CMD", help="lets it go on")
    parser.add_argument(
        "--command-timeout", default="60s", metavar="TIME",
        help="end one of those two when it takes longer: the migration fails (default: 60s)",
    )  # fmt: skip
    parser.add_argument(
        "--cache-size", metavar="SIZE|auto",
        help="xbzrle page cache; auto: as large as the working set needs (default: 64m, and auto "
        "for a QEMU guest, for which it is --cache-max at once)",
    )  # fmt: skip
    parser.add_argument(
        "--cache-max", metavar="SIZE",
        help="how large --cache-size auto may make it (default: 1g, or a quarter of free memory)",
    )  # fmt: skip
    parser.add_argument(
        "--page-size", default="4k", metavar="SIZE",
        help="1k to 16k (default: 4k); of a QEMU guest what its pages have, 4k on most machines",
    )  # fmt: skip
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
        help="slow the guest (demo, --pid, or qemu with qmp=), step by step, where nothing else "
        "helps",
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
    from migrate.cache import default_cache_max
    from migrate.parameters import DEFAULT_CACHE_SIZE

    if size != "auto":
        if most is not None:
            raise UsageError("--cache-max: it is for --cache-size auto only")
        return quantities.parse_cache_size(size, page_size), 0
    if most is None:
        limit = default_cache_max()
        return min(DEFAULT_CACHE_SIZE, limit), limit
    limit, free = quantities.parse_cache_size(most, page_size, "--cache-max"), available_memory()
    if free and limit > free // 2:
        raise UsageError(
            f"--cache-max: {most} is more than half of the {quantities.format_size(free)} of "
            "memory that is free here: write less, or give --cache-size a size"
        )
    return min(DEFAULT_CACHE_SIZE, limit), limit


def open_guest(
    args: argparse.Namespace, page_size: int, born: str = ""
) -> Callable[[], MemoryGuest]:
    """Reads --guest and raises UsageError; calling the result opens the guest.

    born -- start time of the process of demo:pid=N, where it is known

    A new demo guest is not started before there is a destination: it would be left running.
    """
    kind, _, rest = args.guest.partition(":")
    if kind == "file":
        from migrate.guests.file import FileGuest

        if not rest:
            raise UsageError("guest file: name the file: --guest file:PATH")
        pids = [number(pid, "--pid") for pid in args.pid if pid != "auto"]
        guest = FileGuest(
            rest, pids, args.pause_cmd, args.resume_cmd,
            seconds(args.command_timeout, "--command-timeout"), auto="auto" in args.pid,
        )  # fmt: skip
        guest.survey()
        for text in guest.warnings:
            say(f"migrate-src: warning: {text}")
        for text in guest.notices if not args.quiet else ():
            say(f"migrate-src: {text}")
        return lambda: guest
    if kind == "demo":
        from migrate.guests.demo import DemoGuest, parse_demo

        if args.pid or args.pause_cmd or args.resume_cmd:
            raise UsageError("--pid, --pause-cmd and --resume-cmd are for file guests")
        if rest.startswith("pid="):
            running = DemoGuest.open(rest, page_size, born)
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
