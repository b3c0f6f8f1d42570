"""Which hand-over `resolve` is to settle, and what an operator must prove to decide it."""

from __future__ import annotations

import argparse

from migrate.errors import UsageError
from migrate.output import say, show
from migrate.ownership.journal import Journal
from migrate.ownership.journal_directory import check_trusted, journal_directory
from migrate.ownership.stored_journals import claim_in, damaged, journals
from proto.wire.ownership import Claim, Role

# What the other side's journal must claim as proof, by the side that asks and the side to keep.
PROOFS = {
    (Role.SOURCE, "source"): {Claim.ABORTED},
    (Role.SOURCE, "destination"): {Claim.OWNER},
    (Role.DESTINATION, "destination"): {Claim.COMMITTED},
}
RISK = {
    "source": "if the destination runs the guest, or will, it runs twice then",
    "destination": "if the source runs the guest, or will, it runs twice then",
}


def find(args: argparse.Namespace, role: Role) -> Journal | None:
    """Return the journal of the migration to settle.

    Returns None, after printing what is open, if the command names none and there is not exactly
    one. Raises UsageError.
    """
    directory = journal_directory(args.journal)
    check_trusted(directory)
    known = list(journals(role, directory))
    for wrong in damaged(role, directory):
        say(f"ignored: {wrong}")
    if args.id:
        found = [one for one in known if one.name.startswith(args.id.lower())]
        if len(found) != 1:
            raise UsageError(f"{args.id}: {len(found)} migrations with that ID in {directory}")
        return found[0]
    open_ones = [one for one in known if not one.settled]
    if not open_ones:
        show(f"nothing to settle in {directory}")
    for one in open_ones:
        show(f"{one}; {_about(one)}")
    return open_ones[0] if len(open_ones) == 1 else None


def _about(journal: Journal) -> str:
    facts = journal.facts
    return f"{facts.get('description') or facts.get('place', {}).get('path') or 'a guest'}"


def check_proof(args: argparse.Namespace, journal: Journal) -> None:
    """Raise UsageError if an operator's decision is neither proved nor forced."""
    accepted = PROOFS.get((journal.role, args.keep))
    if accepted is None or args.force:
        return
    if not args.proof:
        raise UsageError(
            f"--keep {args.keep} needs proof: the other side's journal, --proof "
            f"{journal.name}.{journal.role.peer.value}; or --force: {RISK[args.keep]}"
        )
    role, name, claim = claim_in(args.proof)
    if (role, name) != (journal.role.peer, journal.name):
        raise UsageError(f"{args.proof} is not the other side's journal of {journal.name}")
    if claim not in accepted:
        raise UsageError(f"{args.proof} says {claim.name}: that does not prove it")
