"""`migrate-src resolve` and `migrate-dst resolve`: settle a hand-over that was cut off.

    migrate-src resolve              what is not settled here
    migrate-src resolve ID           asks the destination, and does what follows from its answer
    migrate-src resolve ID --keep source|destination    a person decides, who can prove it

Proof is the other side's journal (`--proof FILE`, brought by hand): the source may keep the guest
if the destination's says ABORTED, and must let it go if that says OWNER; the destination may run it
if the source's says COMMITTED. Without proof `--force` does it: two may run then, or none.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from migrate.address import Address, parse_address
from migrate.cli.program import (
    Parser,
    add_tls_creds,
    add_tls_hostname,
    credentials,
    peer_timeout,
    run,
    seconds,
)
from migrate.errors import (
    ConnectError,
    HandOverUnknown,
    MigrationError,
    PeerLost,
    UsageError,
)
from migrate.journal import (
    Journal,
    check_trusted,
    claim_in,
    damaged,
    journal_directory,
    journals,
    same_guest,
    settled,
)
from migrate.output import say, show
from proto.ownership import Claim, Event, Role

if TYPE_CHECKING:
    from migrate.lookup import Endpoint

# What the other side's journal must claim for one side to be kept, by the side that asks.
PROOFS = {
    (Role.SOURCE, "source"): {Claim.ABORTED},
    (Role.SOURCE, "destination"): {Claim.OWNER},
    (Role.DESTINATION, "destination"): {Claim.COMMITTED},
}
RISK = {
    "source": "if the destination runs the guest, or will, there are two of it then",
    "destination": "if the source runs the guest, or will, there are two of it then",
}


def resolve_parser(prog: str) -> Parser:
    parser = Parser(
        prog=f"{prog} resolve",
        description="Settles a hand-over that was cut off: finds out whose the guest is.",
        epilog="exit codes:\n    0 settled, or nothing to settle    1 failed    2 usage\n"
        "    3 nobody answers there    5 TLS    9 still unknown",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("id", nargs="?", default="", metavar="ID", help="of the migration")
    if prog == "migrate-src":
        parser.add_argument(
            "uri", nargs="?", default="", metavar="tcp:HOST:PORT|unix:PATH",
            help="where migrate-dst listens (default: where it did)",
        )  # fmt: skip
        parser.add_argument(
            "--connect-timeout", default="10s", metavar="TIME",
            help="keep trying to connect for so long (default: 10s)",
        )  # fmt: skip
        parser.add_argument(
            "--peer-timeout", default="30s", metavar="TIME",
            help="a peer that says or takes nothing for so long is lost (default: 30s)",
        )  # fmt: skip
        add_tls_creds(parser)
        add_tls_hostname(parser)
    parser.add_argument("--keep", choices=["source", "destination"], help="a person's decision")
    parser.add_argument("--proof", default="", metavar="FILE", help="the other side's journal")
    parser.add_argument("--force", action="store_true", help="decide without proof")
    parser.add_argument("--journal", default="", metavar="DIR", help="where the journals are")
    return parser


def find(args: argparse.Namespace, role: Role) -> Journal | None:
    """The journal that is meant; None where there is nothing to settle, which is said."""
    directory = journal_directory(args.journal)
    check_trusted(directory)
    known = list(journals(role, directory))
    for wrong in damaged(role, directory):
        say(f"not looked at: {wrong}")
    if args.id:
        found = [one for one in known if one.name.startswith(args.id.lower())]
        if len(found) != 1:
            raise UsageError(f"{args.id}: {len(found)} migrations of that name in {directory}")
        return found[0]
    open_ones = [one for one in known if not settled(one)]
    if not open_ones:
        show(f"nothing to settle in {directory}")
    for one in open_ones:
        show(f"{one.text()}; {_about(one)}")
    return open_ones[0] if len(open_ones) == 1 else None


def _about(journal: Journal) -> str:
    facts = journal.facts
    return f"{facts.get('description') or facts.get('place', {}).get('path') or 'a guest'}"


def check_proof(args: argparse.Namespace, journal: Journal) -> None:
    """Raises UsageError where a person's decision is neither proved nor forced."""
    accepted = PROOFS.get((journal.role, args.keep))
    if accepted is None or args.force:
        return
    if not args.proof:
        raise UsageError(
            f"--keep {args.keep} wants proof: the other side's journal, --proof "
            f"{journal.name}.{journal.role.peer.value}; or --force: {RISK[args.keep]}"
        )
    role, name, claim = claim_in(args.proof)
    if (role, name) != (journal.role.peer, journal.name):
        raise UsageError(f"{args.proof} is no journal of the other side of {journal.name}")
    if claim not in accepted:
        raise UsageError(f"{args.proof} says {claim.name}: that does not prove it")


# ---------------------------------------------------------------- the source


async def resolve_source(args: argparse.Namespace) -> int:
    journal = find(args, Role.SOURCE)
    if journal is None:
        return 0
    journal.open(create=False)
    ended = False
    try:
        if journal.claim is Claim.COMMITTED:
            if args.keep:
                check_proof(args, journal)
                journal.move(Event.KEEP_SOURCE if args.keep == "source" else Event.KEEP_DESTINATION)
            else:
                await _ask(args, journal)
        status = await _act_on(journal)
        ended = journal.claim is Claim.ABORTED
        return status
    finally:
        journal.close(keep=ended)


async def _ask(args: argparse.Namespace, journal: Journal) -> None:
    """At the very address that the guest was sent to; where that does not know, at its name."""
    address = parse_address(args.uri or journal.facts["address"])
    there = None if args.uri else _peer_of(journal)
    hint = "start migrate-dst there again, with the journal it had, and try again"
    for at in [there, None] if there is not None else [None]:
        try:
            if await _ask_at(args, journal, address, at) is not Claim.COMMITTED:
                return
        except TimeoutError:
            if at is None:
                raise ConnectError(f"{address} does not answer: {hint}") from None
        except (ConnectError, PeerLost) as error:
            if at is None:
                raise ConnectError(f"{error}: {hint}") from None


def _peer_of(journal: Journal) -> Endpoint | None:
    """What the source was connected to; its address may be a name of several machines."""
    from migrate.lookup import endpoint_of

    try:
        peer = parse_address(f"tcp:{journal.facts.get('peer', '')}")
        return None if str(peer) == journal.facts["address"] else endpoint_of(peer)
    except (UsageError, OSError):
        return None


async def _ask_at(
    args: argparse.Namespace, journal: Journal, address: Address, at: Endpoint | None
) -> Claim:
    from migrate import dialing
    from migrate.handover import ask

    peer = await dialing.connect(
        address,
        timeout=seconds(args.connect_timeout, "--connect-timeout"),
        peer_timeout=peer_timeout(args),
        credentials=credentials(args, Role.SOURCE),
        at=at,
    )
    try:
        return await ask(peer, journal)
    finally:
        await peer.close()


async def _act_on(journal: Journal) -> int:
    """Does with the guest here what the claim says; doing it again changes nothing.

    A guest that is ours again is let go on once: it may have been moved since, by others too.
    """
    from migrate.guests.reopen import reopen_guest

    if journal.claim is Claim.COMMITTED:
        # it was asked, and nobody knows
        raise HandOverUnknown(
            "the destination has no record of this migration: look at its guest, and say what is "
            "to be kept (--keep)"
        )
    if journal.claim is not Claim.DONE:
        later = _given_up_later(journal)
        if later is not None:
            show(f"{journal.text()}; it was given up since: {later.text()}")
            return 0
    if journal.claim is Claim.ABORTED and "ended" in journal.facts:
        show(f"{journal.text()}: that was settled before; nothing more is done")
        return 0
    try:
        guest = reopen_guest(journal.facts["guest"])
    except MigrationError as error:
        show(f"{journal.text()}; here {error}")
        return 0
    try:
        if journal.claim is Claim.DONE:
            await guest.release()
            show(f"{journal.text()}: {guest.theirs}")
        else:
            await guest.hold()
            await guest.take_back()
            await guest.resume()
            show(f"{journal.text()}: {guest.ours}")
    finally:
        await guest.close()
    return 0


def _given_up_later(journal: Journal) -> Journal | None:
    """A later migration of the same guest, by which it is not here any more."""
    if journal.facts.get("guest", {}).get("kind") == "snapshot":
        return None  # it is here as ever
    for other in journals(Role.SOURCE, journal.directory):
        if (
            other.name != journal.name
            and other.claim in (Claim.COMMITTED, Claim.DONE)
            and other.written_at() >= journal.written_at()
            and same_guest(other.facts.get("guest", {}), journal.facts.get("guest", {}))
        ):
            return other
    return None


# ---------------------------------------------------------------- the destination


async def resolve_destination(args: argparse.Namespace) -> int:
    from migrate.guests.reopen import reopen_place
    from migrate.handover import Records

    journal = find(args, Role.DESTINATION)
    if journal is None:
        return 0
    records = Records(journal_directory(args.journal), reopen_place)
    try:
        custody = await records.find(journal.name)
        assert custody is not None
        if custody.doubt and args.keep:
            if args.keep == "source" and not args.force:
                raise UsageError(f"--keep source wants --force: {RISK['destination']}")
            await custody.decide(runs=args.keep == "destination")
        claim = await custody.standing()
        if claim is Claim.PREPARED and args.keep == "source":
            await custody.give_up(Event.KEEP_SOURCE)
        elif claim is Claim.PREPARED and args.keep == "destination":
            check_proof(args, custody.journal)
            await custody.take_over(Event.KEEP_DESTINATION)
        elif claim is Claim.PREPARED:
            raise HandOverUnknown(
                "the source has not said GO, or it was lost: let it ask (migrate-src resolve, with "
                "migrate-dst listening here), or say what is to be kept (--keep)"
            )
        custody.let_go()
        show(f"{custody.journal.text()}{f': {custody.running}' if custody.running else ''}")
        return 0
    finally:
        records.close()


def main(prog: str, words: list[str]) -> int:
    """Run `prog resolve`; the exit code."""
    resolve = resolve_source if prog == "migrate-src" else resolve_destination
    return run(resolve_parser(prog), resolve, words)
