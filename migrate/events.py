"""What the observers of a migration are called with.

    source        SourceEvent or Notice, and the Statistics
    destination   DestinationEvent, and the Arrival

Each event is a str as well, so that a program may compare it with the text that stands beside it
here: `event == "round"`, `event.startswith("notice: ")`. The JSON of `--events` and the events of
QMP have names of their own: see migrate.views.events and migrate.monitor.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import TypeAlias

from migrate.statistics import Statistics

NOTICE_PREFIX = "notice: "


class SourceEvent(StrEnum):
    """What happens at the source, in the order in which it happens."""

    STATUS = "status"
    """The status has changed."""
    ROUND_BEGUN = "pass"
    """A round begins: number dirty_sync_count + 1."""
    PROGRESS = "progress"
    """A part of the round has been sent; 20 times a second at most."""
    ROUND_DONE = "round"
    """A round is over: the destination has confirmed all of it."""
    PAUSED = "paused"
    """The guest is stopped for the last round."""
    RESUMED = "resumed"
    """The guest runs on here after a pause: the hand-over has failed."""


class DestinationEvent(StrEnum):
    """What happens at the destination, in the order in which it happens."""

    ACCEPTED = "accepted"
    """The guest that the source has described is accepted."""
    ROUND_DONE = "round"
    """A round is in memory and confirmed."""
    INTERRUPTED = "interrupted"
    """The connection has broken, and the source may come back to resume."""
    RETURNED = "back"
    """The source is back, and resumes."""
    LOST = "lost"
    """The source is gone after READY: the whole guest waits here until it asks."""
    RUNNING = "running"
    """The guest is ours and has been started."""

    @property
    def admits(self) -> bool:
        """Whether a source has just been let in, for the first time or to resume."""
        return self in (DestinationEvent.ACCEPTED, DestinationEvent.RETURNED)


class Notice(str):
    """A sentence for the user, in `text`. As a str, it begins with "notice: "."""

    __slots__ = ()

    def __new__(cls, text: str) -> Notice:
        return super().__new__(cls, NOTICE_PREFIX + text)

    def __getnewargs__(self) -> tuple[str]:
        return (self.text,)

    @property
    def text(self) -> str:
        return self.removeprefix(NOTICE_PREFIX)


Event: TypeAlias = SourceEvent | Notice
Observer: TypeAlias = Callable[[Event, Statistics], None]
