"""The command line of migrate-dst: its parser, and the values that it comes to."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from migrate import units
from migrate.cli.options import (
    QEMU_FORMS,
    Parser,
    credentials,
    migration_parser,
    peer_timeout,
    qemu_words,
    seconds,
    switches,
    tls_of,
)
from migrate.errors import UsageError
from migrate.ownership.journal_directory import check_directory, journal_directory
from migrate.transport.address import Address, parse_address
from migrate.views.options import add_metrics_options
from proto.wire.ownership import Role

if TYPE_CHECKING:
    from migrate.guests.rights import Rights
    from migrate.policy.parameters import Parameters
    from migrate.transport.networks import Network
    from migrate.transport.tls import Credentials


def destination_parser() -> Parser:
    """Return the parser of migrate-dst."""
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
        help="where to listen; port 0 picks a free port and prints it; with --monitor or --qmp the "
        "command migrate_incoming may name it later",
    )  # fmt: skip
    parser.add_argument(
        "--allow", action="append", default=[], metavar="ADDRESS[/BITS]",
        help="accept connections from these addresses only (repeatable; default: from all)",
    )  # fmt: skip
    parser.add_argument(
        "--tls-authz", action="append", default=[], metavar="NAME",
        help="accept a guest only from clients whose certificate has this common name (host), DNS "
        "name (DNS:host) or distinguished name (CN=host,O=...); repeatable; default: from all that "
        "the authority has signed",
    )  # fmt: skip
    parser.add_argument(
        "--guest", default="", metavar="qemu:tcp:HOST:PORT|qemu:unix:PATH|qemu:qmp=PATH|qemu",
        help="the QEMU that receives the guest: it listens there (-incoming), or is told to "
        "(-incoming defer); qemu alone: receive the guest of a QEMU into the directory --output",
    )  # fmt: skip
    parser.add_argument(
        "--output", default="", metavar="PATH",
        help="file that receives a file guest; with --guest qemu the directory that receives the "
        "guest of a QEMU",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--mode", default="", metavar="MODE",
        help="permissions of the output, in octal digits (default: those of the file it replaces, "
        "or the guest's)",
    )  # fmt: skip
    parser.add_argument(
        "--owner", default="", metavar="USER[:GROUP]",
        help="owner of the output, by name or number (default: the owner of the file it replaces, "
        "or the guest's by number, if this program may set it)",
    )  # fmt: skip
    parser.add_argument(
        "--on-complete", default="", metavar="CMD", help="run this command when the guest is here"
    )
    parser.add_argument(
        "--on-complete-timeout", default="0", metavar="TIME",
        help="wait at most this long for that command, then leave it running and exit with 10 "
        "(default: 0, wait until it ends)",
    )  # fmt: skip
    parser.add_argument(
        "--cache-size", default="", metavar="SIZE", help="ask the source for this cache size"
    )
    add_metrics_options(parser)
    return parser


@dataclass(frozen=True)
class QemuTarget:
    """A QEMU that receives the guest.

    address -- where it listens; None: over `qmp` it is told to
    qmp     -- path of its QMP socket, or ""
    """

    address: Address | None
    qmp: str


@dataclass(frozen=True)
class DestinationConfig:
    """What the command line of migrate-dst comes to. Times are in seconds.

    address     -- where to listen; None: a command will name it
    tls         -- the TLS options as operators are told of them
    cache_size  -- in bytes, asked of the source; 0: none is asked for
    qemu        -- the QEMU that receives the guest, or None
    to_directory -- the guest of a QEMU is received into the directory `output`
    journal     -- directory of the journals
    """

    address: Address | None
    parameters: Parameters
    credentials: Credentials | None
    tls: dict[str, str]
    allow: tuple[Network, ...]
    cache_size: int
    qemu: QemuTarget | None
    to_directory: bool
    output: str
    overwrite: bool
    rights: Rights
    on_complete: str
    on_complete_timeout: float
    peer_timeout: float
    retry: float
    resolve_timeout: float
    journal: str
    stay: bool

    @property
    def deferred(self) -> bool:
        """Whether the program waits for a command before it listens."""
        return self.address is None

    def is_output(self, path: str) -> bool:
        """Return whether `path` names the output."""
        return bool(self.output) and os.path.abspath(path) == os.path.abspath(self.output)


def destination_config(args: argparse.Namespace) -> DestinationConfig:
    """Read the command line, and check that the output can be made. Raises UsageError, TlsError."""
    from migrate.guests.output_file import try_output
    from migrate.policy.parameters import DEFAULT_CACHE_SIZE, Parameters
    from migrate.transport.networks import parse_networks

    if not args.listen and not (args.monitor or args.qmp):
        raise UsageError("missing address: give --listen 4444, or --monitor stdio to name it later")
    cache_size = units.parse_cache_size(args.cache_size, 4096) if args.cache_size else 0
    qemu, to_directory = qemu_of(args), args.guest == "qemu"
    if to_directory:
        from migrate.qemu.snapshot.prepared import try_snapshot_output

        try_snapshot_output(args.output, args.overwrite)
    rights = rights_of(args)
    if args.output and not to_directory:
        try_output(args.output, args.overwrite, rights)
    return DestinationConfig(
        address=parse_address(args.listen, listen=True) if args.listen else None,
        parameters=Parameters(
            cache_size or DEFAULT_CACHE_SIZE, capabilities=switches(args.capability)
        ),
        credentials=credentials(args, Role.DESTINATION),
        tls=tls_of(args),
        allow=parse_networks(args.allow),
        cache_size=cache_size,
        qemu=qemu,
        to_directory=to_directory,
        output=args.output,
        overwrite=args.overwrite,
        rights=rights,
        on_complete=args.on_complete,
        on_complete_timeout=seconds(args.on_complete_timeout, "--on-complete-timeout"),
        peer_timeout=peer_timeout(args),
        retry=seconds(args.retry, "--retry"),
        resolve_timeout=seconds(args.resolve_timeout, "--resolve-timeout"),
        journal=check_directory(journal_directory(args.journal)),
        stay=args.stay,
    )


def qemu_of(args: argparse.Namespace) -> QemuTarget | None:
    """Return the QEMU that --guest names, or None. Raises UsageError."""
    if not args.guest:
        return None
    kind, _, rest = args.guest.partition(":")
    if args.guest == "qemu" and args.output:
        return None
    if kind == "snapshot":
        raise UsageError(
            "--guest snapshot: to receive a virtual machine into DIR: --guest qemu --output DIR"
        )
    if kind != "qemu" or not rest:
        raise UsageError(
            f"--guest {args.guest!r} is not understood: write {QEMU_FORMS}; or qemu with --output "
            "DIR, to receive the guest into a directory"
        )
    if args.output:
        raise UsageError("--guest and --output: a guest is received into one of the two")
    where, qmp = qemu_words(rest)
    return QemuTarget(parse_address(where) if where else None, qmp)


def rights_of(args: argparse.Namespace) -> Rights:
    """Return the mode and owner that are asked for. Raises UsageError."""
    from migrate.guests.rights import Rights, parse_mode, parse_owner

    if (args.mode or args.owner) and (not args.output or args.guest):
        raise UsageError("--mode and --owner are for the file of a guest: give --output PATH")
    return Rights(parse_mode(args.mode), *parse_owner(args.owner))
