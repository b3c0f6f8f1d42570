"""How far a destination has got, and what a broken connection means at that point."""

from __future__ import annotations

from enum import Enum, auto


class RunState(Enum):
    """How far a destination has got.

    GREETED --a place--> ACCEPTED --the source has ACCEPT--> RECEIVING --GO--> OWNER
       |                    |                                    |
       v                    v                                    v
    REFUSED            REFUSED, if only the             FAILED, or KEPT on disk
                       connection broke; else FAILED    for a later program

    The difference between ACCEPTED and RECEIVING is what a broken connection means. A source that
    has not heard ACCEPT does not know the name of this attempt and cannot resume it, so there is
    nothing to wait for. One that has sent a page or joined a channel has heard it, and comes back.
    """

    GREETED = auto()
    ACCEPTED = auto()
    RECEIVING = auto()
    OWNER = auto()
    REFUSED = auto()
    FAILED = auto()
    KEPT = auto()
