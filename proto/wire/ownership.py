"""Who owns the guest: what each side has recorded for good, and what may follow from it.

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

A side records each claim before it says or does what the claim allows: COMMITTED before GO,
PREPARED before READY, OWNER before the guest starts. So a side that was killed finds a claim that
is still true, whatever was lost on the way. After a break the source asks (QUERY), as often as it
likes, and the destination answers with its claim (OWNERSHIP):

    PREPARED   GO never came: the source sends it again
    OWNER      the guest was started there: the source is DONE. The destination does not answer so
               before the start, since the source would give up a guest that may then fail to start
    ABORTED    the destination will never run it: the source is ABORTED too, and runs it
    NONE       the destination has no record of it: an operator must find out

A destination that is PREPARED and hears nothing may give up by itself (ABORTED). That is safe,
because it refuses GO from then on. It may not start the guest by itself. A source that is COMMITTED
may do nothing by itself.

The code follows this table, and so does the model that tests check exhaustively with spin
(tests/model/ownership.pml).
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
    """What one side has recorded of one migration. OWNERSHIP carries the numbers."""

    NONE = 0
    PREPARED = 1
    COMMITTED = 2
    OWNER = 3
    DONE = 4
    ABORTED = 5


class Event(Enum):
    """What makes a side record another claim."""

    VERIFIED = auto()
    """The destination holds all of the guest, and its digest equals the source's."""
    READY = auto()
    GO = auto()
    RUNNING = auto()
    CALLED_OFF = auto()
    """The source takes the guest back. It is the program that recorded COMMITTED, and it has not
    sent GO."""
    NOT_STARTED = auto()
    """The destination could not start the guest: it did not run there, and never will."""
    GIVE_UP = auto()
    """The destination does not wait for GO any longer."""
    SAYS_NONE = auto()
    SAYS_PREPARED = auto()
    SAYS_OWNER = auto()
    SAYS_ABORTED = auto()
    """The four answers to QUERY."""
    KEEP_SOURCE = auto()
    KEEP_DESTINATION = auto()
    """An operator has decided which side keeps the guest."""


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
"""What a destination can answer to QUERY, and the event that it is for the source."""

FINAL = frozenset({Claim.DONE, Claim.ABORTED})
"""Claims after which the source has nothing more to ask."""


def after(role: Role, claim: Claim, event: Event) -> Claim | None:
    """Return the claim to record, or None if the event means nothing with this claim."""
    return TABLE[role].get((claim, event))
