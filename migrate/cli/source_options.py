"""The command line of migrate-src: its parser, and the values that it comes to."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from migrate import units
from migrate.cli.options import (
    Parser,
    add_connect_timeout,
    add_tls_hostname,
    credentials,
    migration_parser,
    number,
    peer_timeout,
    seconds,
    switches,
    tls_of,
)
from migrate.errors import UsageError
from migrate.ownership.journal_directory import check_directory, journal_directory
from migrate.transport.address import Address, parse_address
from migrate.views.options import add_view_options
from proto.wire.ownership import Role

if TYPE_CHECKING:
    from migrate.policy.parameters import Parameters
    from migrate.policy.throttle import ThrottleParameters
    from migrate.transport.tls import Credentials


PAGE_SIZES = (1024, 2048, 4096, 8192, 16384)


def source_parser() -> Parser:
    """Return the parser of migrate-src."""
    parser = migration_parser(
        "migrate-src",
        "Moves a guest's memory to migrate-dst while the guest goes on writing to it.",
        "  migrate-src tcp:host:4444\n"
        "  migrate-src --guest demo:256m,hot=64m --max-bandwidth 117m tcp:host:4444\n"
        "  migrate-src --guest file:/dev/shm/db --pid 1234 --cache-size 256m tcp:host:4444\n"
        "  migrate-src --guest qemu:qmp=/run/vm.qmp tcp:host:4444    (a virtual machine)\n"
        "  migrate-src --guest snapshot:/srv/vm tcp:host:4444        (one that was received)",
    )
    parser.add_argument(
        "uri", metavar="tcp:HOST:PORT|unix:PATH", nargs="?", default="",
        help="where migrate-dst listens; with --monitor or --qmp the command migrate may name it "
        "later",
    )  # fmt: skip
    _add_guest(parser)
    _add_policy(parser)
    parser.add_argument(
        "--channels", default="1", metavar="N",
        help="spread the pages over this many connections, for paths that limit each one "
        "(default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--congestion", default="", metavar="NAME",
        help="congestion control of TCP: bbr fills a path that loses packets with one connection "
        "(default: the system's)",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", "-n", action="store_true",
        help="connect, measure the path, sample the guest, and print what a migration would take; "
        "nothing is moved",
    )  # fmt: skip
    add_connect_timeout(parser)
    add_tls_hostname(parser)
    add_view_options(parser)
    return parser


def _add_guest(parser: Parser) -> None:
    """Add the options that say which guest is moved, and how it is paused."""
    parser.add_argument(
        "--guest", default="demo", metavar="SPEC",
        help="demo[:SIZE][,hot=SIZE][,stride=BYTES][,rate=N][,fill=zero|random]; demo:pid=PID; "
        "file:PATH; a QEMU that migrates to the address qemu:tcp:HOST:PORT or qemu:unix:PATH, and "
        "is told to with ,qmp=PATH; qemu:qmp=PATH; or snapshot:DIR, a virtual machine that "
        "migrate-dst has received into DIR (default: demo)",
    )  # fmt: skip
    parser.add_argument(
        "--pid", action="append", default=[], metavar="PID|auto",
        help="a process that writes the file, stopped for the last round (repeatable); auto: all "
        "processes that write it, also those that start during the migration",
    )  # fmt: skip
    parser.add_argument(
        "--no-return-path", action="store_true",
        help="accept the stream of a QEMU without return path, which takes its guest for moved as "
        "soon as it has sent everything",
    )  # fmt: skip
    parser.add_argument(
        "--pause-cmd", default="", metavar="CMD", help="command that stops the file's writer"
    )
    parser.add_argument(
        "--resume-cmd", default="", metavar="CMD", help="command that lets the writer go on"
    )
    parser.add_argument(
        "--command-timeout", default="60s", metavar="TIME",
        help="end either of these commands after this long; the migration fails then (default: "
        "60s)",
    )  # fmt: skip
    parser.add_argument(
        "--tracking", default="auto", choices=("auto", "kernel", "compare"),
        help="how the written pages of a file guest are found: by the kernel's record of writes, "
        "by comparing all of it, or (auto, the default) by the record if comparing would take too "
        "much of the downtime limit",
    )  # fmt: skip
    parser.add_argument(
        "--page-size", default="4k", metavar="SIZE",
        help="1k to 16k (default: 4k); for a QEMU guest its own page size, 4k on most machines",
    )  # fmt: skip


def _add_policy(parser: Parser) -> None:
    """Add the options that say how the migration converges, and when it is given up."""
    parser.add_argument(
        "--cache-size", metavar="SIZE|auto",
        help="size of the XBZRLE page cache; auto: as large as the working set needs (default: "
        "64m; for a QEMU guest auto, which is --cache-max from the start)",
    )  # fmt: skip
    parser.add_argument(
        "--cache-max", metavar="SIZE",
        help="upper limit of --cache-size auto (default: 1g, or a quarter of free memory)",
    )  # fmt: skip
    parser.add_argument(
        "--compress-level", default="auto", metavar="N|auto",
        help="level of zstd, -7 to 19, used if it pays on this link (default: auto, the level that "
        "pays most)",
    )  # fmt: skip
    parser.add_argument(
        "--downtime-limit", default="300", metavar="MS",
        help="pause the guest when the last round will take no longer than this (default: 300 ms)",
    )  # fmt: skip
    parser.add_argument(
        "--max-bandwidth", "--bwlimit", default="0", metavar="SIZE",
        help="bytes per second, with suffix k, m, g (default: 0, no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--max-rounds", default="0", metavar="N",
        help="give up after this many rounds (default: 0, never)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", default="0", metavar="TIME",
        help="give up after this long (default: 0, never)",
    )  # fmt: skip
    parser.add_argument(
        "--stall-timeout", default="30s", metavar="TIME",
        help="give up after this long without progress (default: 30s; 0: never)",
    )  # fmt: skip
    parser.add_argument(
        "--auto-converge", action="store_true",
        help="slow the guest step by step if it does not converge otherwise (demo, --pid, or qemu "
        "with qmp=)",
    )  # fmt: skip
    for name, default, what in (
        ("--cpu-throttle-initial", 20, "share of its CPU time that the first step takes"),
        ("--cpu-throttle-increment", 10, "what each further step adds to that share"),
        ("--max-cpu-throttle", 99, "upper limit of that share"),
        ("--throttle-trigger-threshold", 50, "slow the guest if the cost of what it dirties in a "
         "round is over this share of what the round has sent"),
    ):  # fmt: skip
        parser.add_argument(
            name, default=str(default), metavar="PERCENT", help=f"{what} (default: {default})"
        )
    parser.add_argument(
        "--cpu-throttle-tailslow", action="store_true",
        help="take smaller steps if these should be enough",
    )  # fmt: skip


@dataclass(frozen=True)
class SourceConfig:
    """What the command line of migrate-src comes to. Times are in seconds.

    address -- of the destination; None: a command will name it, and the program begins idle
    tls     -- the TLS options as operators are told of them
    journal -- directory of the journals
    """

    address: Address | None
    parameters: Parameters
    credentials: Credentials | None
    tls: dict[str, str]
    congestion: str
    connect_timeout: float
    peer_timeout: float
    retry: float
    resolve_timeout: float
    journal: str
    dry_run: bool
    stay: bool

    @property
    def idle(self) -> bool:
        """Whether the program waits for a command before it moves the guest."""
        return self.address is None

    @property
    def serves(self) -> bool:
        """Whether the program outlives a migration, and may begin another one."""
        return self.idle or self.stay


def source_config(args: argparse.Namespace) -> SourceConfig:
    """Read the command line. Raises UsageError, TlsError."""
    if not args.uri and (args.dry_run or not (args.monitor or args.qmp)):
        raise UsageError(
            "missing destination: give tcp:HOST:PORT, or --monitor stdio to name it later"
        )
    if args.congestion:
        from migrate.transport.connect import check_congestion

        check_congestion(args.congestion)
    return SourceConfig(
        address=parse_address(args.uri) if args.uri else None,
        parameters=parameters_of(args),
        credentials=credentials(args, Role.SOURCE),
        tls=tls_of(args),
        congestion=args.congestion,
        connect_timeout=seconds(args.connect_timeout, "--connect-timeout"),
        peer_timeout=peer_timeout(args),
        retry=seconds(args.retry, "--retry"),
        resolve_timeout=seconds(args.resolve_timeout, "--resolve-timeout"),
        journal=check_directory(journal_directory(args.journal)),
        dry_run=args.dry_run,
        stay=args.stay,
    )


def throttle_of(args: argparse.Namespace) -> ThrottleParameters:
    """Return the parameters of --auto-converge. Raises UsageError."""
    from migrate.policy.throttle import ThrottleParameters

    return ThrottleParameters(
        number(args.cpu_throttle_initial, "--cpu-throttle-initial"),
        number(args.cpu_throttle_increment, "--cpu-throttle-increment"),
        number(args.max_cpu_throttle, "--max-cpu-throttle"),
        args.cpu_throttle_tailslow,
        number(args.throttle_trigger_threshold, "--throttle-trigger-threshold"),
    )


def parameters_of(args: argparse.Namespace) -> Parameters:
    """Return the parameters of the migration. Raises UsageError."""
    from migrate.policy.downtime import Limits
    from migrate.policy.parameters import Parameters
    from migrate.policy.throttle import CAPABILITY as AUTO_CONVERGE

    capabilities = switches(args.capability, frozenset({AUTO_CONVERGE}))
    if args.auto_converge:
        capabilities[AUTO_CONVERGE] = True
    page_size = units.parse_size(args.page_size, "--page-size")
    if page_size not in PAGE_SIZES:
        raise UsageError(f"--page-size: {args.page_size!r} is none of 1k, 2k, 4k, 8k, 16k")
    limits = Limits(
        downtime_limit=units.parse_milliseconds(args.downtime_limit, "--downtime-limit") / 1e3,
        max_bandwidth=units.parse_size(args.max_bandwidth, "--max-bandwidth"),
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
        compress_level=compress_level_of(args),
        throttle=throttle_of(args),
    )


def compress_level_of(args: argparse.Namespace) -> int | None:
    """Return the level of zstd, or None for `auto`. Raises UsageError."""
    if args.compress_level == "auto":
        return None
    try:
        return int(args.compress_level)
    except ValueError:
        raise UsageError(f"--compress-level: {args.compress_level!r} is no number") from None


def cache_sizes(size: str, most: str | None, page_size: int) -> tuple[int, int]:
    """Return the cache's first size and, for `auto`, its largest, else 0. Raises UsageError.

    size, most -- what --cache-size and --cache-max are given
    """
    from migrate.policy.parameters import DEFAULT_CACHE_SIZE
    from migrate.runtime.machine_memory import available_memory
    from migrate.source.cache_size import default_cache_max

    if size != "auto":
        if most is not None:
            raise UsageError("--cache-max: it limits --cache-size auto, and nothing else")
        return units.parse_cache_size(size, page_size), 0
    if most is None:
        limit = default_cache_max()
        return min(DEFAULT_CACHE_SIZE, limit), limit
    limit, free = units.parse_cache_size(most, page_size, "--cache-max"), available_memory()
    if free and limit > free // 2:
        raise UsageError(
            f"--cache-max: {most} is more than half of the {units.format_size(free)} of "
            "free memory here: write less, or give --cache-size a size"
        )
    return min(DEFAULT_CACHE_SIZE, limit), limit
