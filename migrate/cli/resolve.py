"""`migrate-src resolve` and `migrate-dst resolve`: settle a hand-over that was cut off.

    migrate-src resolve              list what is not settled here
    migrate-src resolve ID           ask the destination, and act on its answer
    migrate-src resolve ID --keep source|destination    an operator decides, and proves it

Proof is the other side's journal, copied here by hand (`--proof FILE`). The source may keep the
guest if the destination's journal says ABORTED, and must release it if that says OWNER. The
destination may run the guest if the source's journal says COMMITTED. `--force` decides without
proof: the guest may run twice then, or not at all.
"""

from __future__ import annotations

import argparse

from migrate.cli.log_options import add_log_options
from migrate.cli.options import (
    Parser,
    add_connect_timeout,
    add_peer_timeout,
    add_tls_creds,
    add_tls_hostname,
)
from migrate.cli.program import run


def resolve_parser(prog: str) -> Parser:
    """Return the parser of `prog resolve`."""
    parser = Parser(
        prog=f"{prog} resolve",
        description="Settles a hand-over that was cut off: finds out which side owns the guest.",
        epilog="exit codes:\n    0 settled, or nothing to settle    1 failed    2 usage\n"
        "    3 no answer from the other side    5 TLS    9 still unknown",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "id", nargs="?", default="", metavar="ID", help="the migration, or the start of its ID"
    )
    if prog == "migrate-src":
        parser.add_argument(
            "uri", nargs="?", default="", metavar="tcp:HOST:PORT|unix:PATH",
            help="where migrate-dst listens (default: the address that the guest was sent to)",
        )  # fmt: skip
        add_connect_timeout(parser)
        add_peer_timeout(parser)
        add_tls_creds(parser)
        add_tls_hostname(parser)
    parser.add_argument(
        "--keep",
        choices=["source", "destination"],
        help="the side that is to keep the guest: an operator decides",
    )
    parser.add_argument(
        "--proof", default="", metavar="FILE", help="the other side's journal, as proof"
    )
    parser.add_argument("--force", action="store_true", help="decide without proof")
    parser.add_argument("--journal", default="", metavar="DIR", help="directory of the journals")
    add_log_options(parser)
    return parser


def main(prog: str, words: list[str]) -> int:
    """Run `prog resolve`; return its exit code."""
    if prog == "migrate-src":
        from migrate.cli.source_resolve import resolve_source as resolve
    else:
        from migrate.cli.destination_resolve import resolve_destination as resolve
    return run(resolve_parser(prog), resolve, words)
