"""Whose the guest is: what each side has written down for good, and what may follow on it.

    source                                      destination
    NONE       the guest runs here              NONE
      |                                           | VERIFIED
      |  <---------------- READY -------------- PREPARED    can run it, must not
      v
    COMMITTED  must not run it any more
      |  ------------------ GO ------------------>|
      |                                         OWNER       runs it
      |  <--------------- RUNNING ----------------|
    DONE

Each claim is written before what it allows is said or done: COMMITTED before GO, PREPARED before
READY, OWNER before the guest starts. So whoever dies, or whatever is lost, comes back to a claim
that is still true. After a break the source asks (QUERY), as often as it likes, and the destination
answers with its claim (OWNERSHIP):

    PREPARED   GO never came: the source says it again
    OWNER      the source is DONE. This is said of a guest that was started, not before: else the
               source would let go of one that then cannot be started
    ABORTED    the destination has sworn never to run it: the source is ABORTED too, and runs it
    NONE       there is no record of it: nobody can know, a person must look

A destination that is PREPARED and hears nothing may give up by itself (ABORTED): that is safe,
since it refuses GO then. It may not start by itself. A source that is COMMITTED may do nothing by
itself.

This table is the code's and the model's: tests check it exhaustively with spin.
"""

from __future__ import annotations

from enum import Enum, IntEnum, auto


class Role(Enum):
    SOURCE = "source"
    DESTINATION = "destination"

    @property
    def peer(self) -> Role:
        return Role.DESTINATION if self is Role.SOURCE else Role.SOURCE


class Claim(IntEnum):
    """What one side has written of one migration. The numbers are the wire's (OWNERSHIP)."""

    NONE = 0
    PREPARED = 1
    COMMITTED = 2
    OWNER = 3
    DONE = 4
    ABORTED = 5


class Event(Enum):
    """What makes a side write another claim."""

    VERIFIED = auto()
    """The destination holds all of the guest, and its digest is the source's."""
    READY = auto()
    GO = auto()
    RUNNING = auto()
    CALLED_OFF = auto()
    """The source takes it back: it has never said GO, and is the program that would know."""
    NOT_STARTED = auto()
    """The destination could not start it: it did not run, and never will."""
    GIVE_UP = auto()
    """The destination will not wait for GO any longer."""
    SAYS_NONE = auto()
    SAYS_PREPARED = auto()
    SAYS_OWNER = auto()
    SAYS_ABORTED = auto()
    """The four answers to QUERY."""
    KEEP_SOURCE = auto()
    KEEP_DESTINATION = auto()
    """A person has decided, and answers for it."""


S, D = Role.SOURCE, Role.DESTINATION

TABLE: dict[Role, dict[tuple[Claim, Event], Claim]] = {
    S: {
        (Claim.NONE, Event.READY): Claim.COMMITTED,
        (Claim.COMMITTED, Event.RUNNING): Claim.DONE,
        (Claim.COMMITTED, Event.CALLED_OFF): Claim.ABORTED,
        (Claim.COMMITTED, Event.NOT_STARTED): Claim.ABORTED,
        (Claim.COMMITTED, Event.SAYS_NONE): Claim.COMMITTED,
        (Claim.COMMITTED, Event.SAYS_PREPARED): Claim.COMMITTED,
        (Claim.COMMITTED, Event.SAYS_OWNER): Claim.DONE,
        (Claim.COMMITTED, Event.SAYS_ABORTED): Claim.ABORTED,
        (Claim.COMMITTED, Event.KEEP_SOURCE): Claim.ABORTED,
        (Claim.COMMITTED, Event.KEEP_DESTINATION): Claim.DONE,
    },
    D: {
        (Claim.NONE, Event.VERIFIED): Claim.PREPARED,
        (Claim.PREPARED, Event.GO): Claim.OWNER,
        (Claim.PREPARED, Event.GIVE_UP): Claim.ABORTED,
        (Claim.PREPARED, Event.KEEP_SOURCE): Claim.ABORTED,
        (Claim.PREPARED, Event.KEEP_DESTINATION): Claim.OWNER,
        (Claim.OWNER, Event.GO): Claim.OWNER,
        (Claim.OWNER, Event.NOT_STARTED): Claim.ABORTED,
    },
}

MAY_RUN: dict[Role, frozenset[Claim]] = {
    S: frozenset({Claim.NONE, Claim.ABORTED}),
    D: frozenset({Claim.OWNER}),
}
"""Claims with which a side may run the guest."""

ANSWERS: dict[Claim, Event] = {
    Claim.NONE: Event.SAYS_NONE,
    Claim.PREPARED: Event.SAYS_PREPARED,
    Claim.OWNER: Event.SAYS_OWNER,
    Claim.ABORTED: Event.SAYS_ABORTED,
}
"""What a destination can answer to QUERY, and what that is to the source."""

FINAL = frozenset({Claim.DONE, Claim.ABORTED})
"""Claims after which nothing more is to be found out at the source."""


def after(role: Role, claim: Claim, event: Event) -> Claim | None:
    """The claim to write; None where the event means nothing with this claim."""
    return TABLE[role].get((claim, event))
