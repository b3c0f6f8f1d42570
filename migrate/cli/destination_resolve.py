"""`migrate-dst resolve`: start or give up a guest that waits here, as an operator decides."""

from __future__ import annotations

import argparse

from migrate.cli.reopen import reopen_place
from migrate.cli.unsettled import RISK, check_proof, find
from migrate.errors import HandOverUnknown, UsageError
from migrate.output import show
from migrate.ownership.journal_directory import journal_directory
from migrate.ownership.records import Records
from proto.wire.ownership import Claim, Event, Role


async def resolve_destination(args: argparse.Namespace) -> int:
    """Settle one hand-over; return the exit code. Raises MigrationError."""
    journal = find(args, Role.DESTINATION)
    if journal is None:
        return 0
    if journal.claim is Claim.NONE:
        show(f"{journal}: nothing to settle")
        return 0
    records = Records(journal_directory(args.journal), reopen_place)
    try:
        custody = await records.reopen(journal)
        if custody.doubt and args.keep:
            if args.keep == "source" and not args.force:
                raise UsageError(f"--keep source needs --force: {RISK['destination']}")
            await custody.end_doubt(runs=args.keep == "destination")
        claim = await custody.answer()
        if claim is Claim.PREPARED and args.keep == "source":
            await custody.give_up(Event.KEEP_SOURCE)
        elif claim is Claim.PREPARED and args.keep == "destination":
            check_proof(args, custody.journal)
            await custody.take_over(Event.KEEP_DESTINATION)
        elif claim is Claim.PREPARED:
            raise HandOverUnknown(
                "no GO has come from the source: let the source ask (migrate-src resolve, with "
                "migrate-dst listening here), or say which side is to keep the guest (--keep)"
            )
        custody.close_place()
        show(f"{custody.journal}{f': {custody.running}' if custody.running else ''}")
        return 0
    finally:
        records.close()
