"""What a source's journals say of earlier attempts to move the same guest."""

from __future__ import annotations

from typing import Any

from migrate.errors import UsageError
from migrate.ownership.journal import Journal
from migrate.ownership.stored_journals import journals
from migrate.runtime.processes import state
from proto.wire.ownership import Claim, Role


def find_attempt(guest: dict[str, Any], address: str, directory: str) -> Journal | None:
    """Return the newest interrupted attempt to move a guest to an address, locked; None if none.

    Attempts to move it elsewhere are forgotten.

    guest -- its facts. Other processes may write the file by now

    Raises JournalError if another program has the journal open, UsageError if the guest was handed
    over and may run at the destination.
    """
    if not directory:
        return None
    found: Journal | None = None
    for journal in sorted(journals(Role.SOURCE, directory), key=Journal.written_at, reverse=True):
        facts = journal.facts
        there = facts.get("guest", {})
        if not same_guest(guest, there):
            continue
        if journal.claim is Claim.COMMITTED:
            raise UsageError(
                f"this guest was handed over to {facts.get('address')}, and it is not known "
                f"whether it runs there: `migrate-src resolve {journal.name}` asks"
            )
        if journal.claim is Claim.DONE and _stopped(guest, there):
            raise UsageError(
                f"this guest was moved to {facts.get('address')}, and its writer here has been "
                "stopped since: to move this one all the same, wake it first (kill -CONT)"
            )
        if journal.claim is Claim.NONE:
            journal.open(create=False)
            if found is None and facts.get("address") == address:
                found = journal
            else:
                journal.forget()
    return found


def last_peer(address: str, directory: str) -> str:
    """Return HOST:PORT of the machine that the last interrupted attempt was connected to.

    An address may name several machines, and only this one has the pages. Returns "" if there was
    no such attempt.
    """
    if not directory:
        return ""
    found = [
        one for one in journals(Role.SOURCE, directory)
        if one.claim is Claim.NONE and one.facts.get("address") == address
    ]  # fmt: skip
    newest = max(found, key=Journal.written_at, default=None)
    return str(newest.facts.get("peer", "")) if newest is not None else ""


def same_guest(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two sets of facts are of one guest.

    The processes that write a file, or have a QEMU's stream, may differ.
    """
    names = ("kind", "qmp") if one.get("qmp") else ("kind", "path", "pid", "started")
    return all(one.get(name) == other.get(name) for name in names)


def _stopped(guest: dict[str, Any], there: dict[str, Any]) -> bool:
    """Return whether a process that writes the guest has been stopped since the guest moved."""
    then = there.get("pids", [])
    return any(one in then and state(one[0]) in ("T", "t") for one in guest.get("pids", []))
