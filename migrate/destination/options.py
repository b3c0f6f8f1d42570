"""Options of a program that receives guests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from migrate.destination.receiver import Arrival, Receiver
from migrate.events import DestinationEvent
from migrate.guests.place import Place
from migrate.ownership.records import Records
from migrate.transport.link import Link
from proto.wire.messages import GuestInfo

# How long a whole guest is kept for a source that is gone: an operator may have to restart it, or
# to mend the network.
RESOLVE_SECONDS = 60.0
Placer = Callable[[GuestInfo], Place]
Observer = Callable[[DestinationEvent, Arrival], None]


@dataclass(frozen=True)
class DestinationOptions:
    """Options for placing, recording and waiting.

    placer   -- gives a Place for a described guest, or raises MigrationError to refuse it
    observer -- called with each DestinationEvent; what it raises is logged, and changes nothing
    accept_channel  -- returns the next connection that says JOIN; None refuses guests that come
                       over several channels
    records         -- of this and of earlier migrations; a source that asks finds this one there
    retry           -- seconds to wait for a source whose connection broke, from the first break
                       after it has brought something; 0: a break is a failure
    resolve_timeout -- seconds to keep a whole guest for a source that is gone
    stream_receiver -- receives a guest that comes as a QEMU's stream; None: no place takes one
    """

    placer: Placer
    observer: Observer | None = None
    accept_channel: Callable[[], Awaitable[Link]] | None = None
    records: Records = field(default_factory=Records)
    retry: float = 0.0
    resolve_timeout: float = RESOLVE_SECONDS
    stream_receiver: type[Receiver] | None = None
