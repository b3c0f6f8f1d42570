"""`migrate-src resolve`: ask the destination which side owns a guest, and act on the answer."""

from __future__ import annotations

import argparse
import contextlib

from migrate.cli.options import credentials, peer_timeout, seconds
from migrate.cli.reopen import reopen_guest
from migrate.cli.unsettled import check_proof, find
from migrate.errors import ConnectError, HandOverUnknown, MigrationError, PeerLost, UsageError
from migrate.output import show
from migrate.ownership.ask import ask
from migrate.ownership.journal import Journal
from migrate.ownership.source_attempts import same_guest
from migrate.ownership.stored_journals import journals
from migrate.transport.address import Address, parse_address
from migrate.transport.connect import connect
from migrate.transport.name_lookup import Endpoint, endpoint_of
from proto.wire.ownership import Claim, Event, Role


async def resolve_source(args: argparse.Namespace) -> int:
    """Settle one hand-over; return the exit code. Raises MigrationError."""
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
    """Ask the destination: first at the very address that received the guest, then by its name.

    Raises MigrationError.
    """
    address = parse_address(args.uri or journal.facts["address"])
    there = None if args.uri else _peer_of(journal)
    hint = "start migrate-dst there again, with the same journal, and try again"
    if there is not None:
        with contextlib.suppress(TimeoutError, ConnectError, PeerLost):
            if await _ask_at(args, journal, address, there) is not Claim.COMMITTED:
                return
    try:
        await _ask_at(args, journal, address, None)
    except TimeoutError:
        raise ConnectError(f"{address} does not answer: {hint}") from None
    except (ConnectError, PeerLost) as error:
        raise ConnectError(f"{error}: {hint}") from None


def _peer_of(journal: Journal) -> Endpoint | None:
    """Return the address that the source was connected to, or None if it is not known.

    The name in the command line may belong to several machines.
    """
    try:
        peer = parse_address(f"tcp:{journal.facts.get('peer', '')}")
        return None if str(peer) == journal.facts["address"] else endpoint_of(peer)
    except (UsageError, OSError):
        return None


async def _ask_at(
    args: argparse.Namespace, journal: Journal, address: Address, at: Endpoint | None
) -> Claim:
    peer = await connect(
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
    """Do with the guest here what the claim says; return the exit code.

    Doing it again changes nothing. A guest that is ours again is resumed only once: afterwards
    another program may have moved it.
    """
    if journal.claim is Claim.COMMITTED:
        # The destination was asked, and has no record.
        raise HandOverUnknown(
            "the destination has no record of this migration: look whether the guest runs there, "
            "and say which side is to keep it (--keep)"
        )
    if journal.claim is not Claim.DONE:
        later = _given_up_later(journal)
        if later is not None:
            show(f"{journal}; it has been handed over since: {later}")
            return 0
    if journal.claim is Claim.ABORTED and "ended" in journal.facts:
        show(f"{journal}: settled before; nothing to do")
        return 0
    try:
        guest = reopen_guest(journal.facts["guest"])
    except MigrationError as error:
        show(f"{journal}; here {error}")
        return 0
    try:
        if journal.claim is Claim.DONE:
            await guest.release()
            show(f"{journal}: {guest.if_there}")
        else:
            await guest.lock()
            await guest.reclaim()
            await guest.resume()
            show(f"{journal}: {guest.if_here}")
    finally:
        await guest.close()
    return 0


def _given_up_later(journal: Journal) -> Journal | None:
    """Return a later migration that has moved the same guest away, or None."""
    if journal.facts.get("guest", {}).get("kind") == "snapshot":
        return None  # a snapshot stays where it is
    for other in journals(Role.SOURCE, journal.directory):
        if (
            other.name != journal.name
            and other.claim in (Claim.COMMITTED, Claim.DONE)
            and other.written_at() >= journal.written_at()
            and same_guest(other.facts.get("guest", {}), journal.facts.get("guest", {}))
        ):
            return other
    return None
