"""The options that migrate-src and migrate-dst share, and how their values are read."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NoReturn

from migrate import units
from migrate.cli.exit_codes import CODES
from migrate.cli.log_options import add_log_options
from migrate.errors import UsageError
from migrate.output import printable, say
from proto.wire.ownership import Role

if TYPE_CHECKING:
    from migrate.transport.tls import Credentials

VERSION = "0.1.0"
QEMU_FORMS = "qemu:tcp:HOST:PORT[,qmp=PATH], qemu:unix:PATH[,qmp=PATH] or qemu:qmp=PATH"
MACHINES = """virtual machines:
  QEMU needs no change. At the source, give it a QMP socket for us:
    -qmp unix:/run/vm.qmp,server=on,wait=off
  At the destination, start a QEMU with the same machine type, memory and
  devices, which waits for the guest:
    -incoming defer -qmp unix:/run/vm-in.qmp,server=on,wait=off
    migrate-dst --listen 4444 --guest qemu:qmp=/run/vm-in.qmp
    migrate-src --guest qemu:qmp=/run/vm.qmp tcp:host:4444

  When the guest has arrived, the QEMU at the source is paused: end it, and
  never say cont to it. If the migration fails, the guest runs on at the
  source, and the QEMU at the destination has to be started again. Only
  --timeout and --max-rounds limit how long a migration may take. Without
  qmp=, set return-path on in QEMU's monitor, and tell QEMU to migrate to the
  address behind qemu: yourself.
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UsageErrors: one sentence on standard error, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help lists the options")


def migration_parser(prog: str, description: str, examples: str) -> Parser:
    """Return a parser with the options that both sides of a migration have."""
    parser = Parser(
        prog=prog,
        description=description,
        epilog=f"exit codes:\n{CODES}\n\n{MACHINES}\nexamples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{prog} {VERSION}")
    parser.add_argument(
        "--capability", action="append", default=[], metavar="NAME=on|off",
        help="switch a capability: xbzrle, xbzrle-merge (shorter deltas), zstd (compression); all "
        "are on by default",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    add_log_options(parser)
    add_peer_timeout(parser)
    parser.add_argument(
        "--retry", default="60s", metavar="TIME",
        help="after the connection breaks, reconnect and resume for at most this long without "
        "progress (default: 60s; 0: fail at once)",
    )  # fmt: skip
    parser.add_argument(
        "--journal", default="", metavar="DIR",
        help="directory of the journals, which record who owns the guest (default: "
        "$MIGRATE_JOURNAL, /var/lib/xbmigrate or ~/.local/state/xbmigrate)",
    )  # fmt: skip
    parser.add_argument(
        "--resolve-timeout", default="60s", metavar="TIME",
        help="after a hand-over that was cut off, how long to find out who owns the guest "
        "(default: 60s)",
    )  # fmt: skip
    add_tls_creds(parser)
    parser.add_argument(
        "--qmp", default="", metavar="unix:PATH",
        help="answer commands of QEMU's machine protocol on this socket, as migrate-ctl sends them",
    )  # fmt: skip
    parser.add_argument(
        "--monitor", default="", metavar="stdio|unix:PATH",
        help="answer commands that people type, on the terminal or on this socket (help lists "
        "them)",
    )  # fmt: skip
    parser.add_argument(
        "--stay", action="store_true",
        help="run on after the migration, for containers and services: until SIGTERM or "
        "`migrate-ctl quit`, which also end a demo guest that runs here, or until that guest ends",
    )  # fmt: skip
    return parser


def add_peer_timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peer-timeout", default="30s", metavar="TIME",
        help="give up a peer that has sent or accepted nothing for this long (default: 30s)",
    )  # fmt: skip


def add_connect_timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--connect-timeout", default="10s", metavar="TIME",
        help="keep trying to connect for this long (default: 10s)",
    )  # fmt: skip


def add_tls_creds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tls-creds", default="", metavar="DIR",
        help="use TLS with the certificates in this directory (QEMU's file names; the README shows "
        "how to make them)",
    )  # fmt: skip


def add_tls_hostname(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tls-hostname", default="", metavar="NAME",
        help="the name that the destination's certificate must have (default: the host of its "
        "address)",
    )  # fmt: skip


# ---------------------------------------------------------------- values


def qemu_words(text: str) -> tuple[str, str]:
    """Split what follows `qemu:` into an address and the path of a QMP socket.

    One of the two may be missing, and is "" then. Raises UsageError.
    """
    where, qmp = text, ""
    if text.startswith("qmp="):
        where, qmp = "", text.removeprefix("qmp=")
    elif ",qmp=" in text:
        where, _, qmp = text.rpartition(",qmp=")
    if not where and not qmp:
        raise UsageError(f"--guest qemu: missing address: write {QEMU_FORMS}")
    if where and not where.lstrip().startswith(("tcp:", "unix:")):
        raise UsageError(f"--guest 'qemu:{text}' is not understood: write {QEMU_FORMS}")
    if qmp:
        from migrate.qemu.qmp.connecting import control_path

        qmp = control_path(qmp)
    return where, qmp


def credentials(args: argparse.Namespace, role: Role) -> Credentials | None:
    """Load the certificates that --tls-creds names; None for plain TCP.

    Prints a warning about keys that other users can read. Raises UsageError, TlsError.
    """
    authz, hostname = getattr(args, "tls_authz", []), getattr(args, "tls_hostname", "")
    if not args.tls_creds:
        if authz or hostname:
            raise UsageError("--tls-authz and --tls-hostname need --tls-creds")
        return None
    from migrate.transport.tls import Credentials

    result = Credentials(args.tls_creds, role, authz=authz, hostname=hostname)
    if not getattr(args, "quiet", False):
        for notice in result.notices:
            say(f"migrate: {notice}")
    return result


def tls_of(args: argparse.Namespace) -> dict[str, str]:
    """Return the TLS options by QEMU's names, as `info migrate_parameters` shows them."""
    said = {
        "tls-creds": args.tls_creds,
        "tls-hostname": getattr(args, "tls_hostname", ""),
        "tls-authz": "; ".join(getattr(args, "tls_authz", [])),
    }
    return {name: printable(value) for name, value in said.items()}


def switches(items: list[str], local: frozenset[str] = frozenset()) -> dict[str, bool]:
    """Return what --capability switches on and off. Raises UsageError.

    local -- capabilities of this program alone, which are not negotiated with the peer
    """
    from proto import LocalError
    from proto.wire.capabilities import switched_on

    result: dict[str, bool] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if value not in ("on", "off") or not equals:
            raise UsageError(f"--capability {item!r}: write NAME=on or NAME=off")
        result[name] = value == "on"
    try:
        switched_on({name: on for name, on in result.items() if name not in local})
    except LocalError as error:
        raise UsageError(f"--capability: {error}") from None
    return result


def number(text: str, what: str) -> int:
    """Return the number that the option `what` is given. Raises UsageError."""
    if not text.isdecimal() or len(text) > 18:
        raise UsageError(f"{what}: {text!r} is not a number")
    return int(text)


def seconds(text: str, what: str) -> float:
    """Return the time that the option `what` is given, in seconds. Raises UsageError."""
    return units.parse_milliseconds(text, what, bare="s") / 1e3


def peer_timeout(args: argparse.Namespace) -> float:
    """Return --peer-timeout in seconds. Raises UsageError."""
    value = seconds(args.peer_timeout, "--peer-timeout")
    if value < 1:
        raise UsageError("--peer-timeout: give at least 1s: a living peer may pause, too")
    return value
