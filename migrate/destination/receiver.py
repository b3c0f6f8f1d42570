"""How the destination takes in a guest's memory, once it has a place for it.

    Receiver        the interface of every kind of transfer to the Destination
    PageReceiver    pages of memory, round after round: see page_receiver.py
    StreamReceiver  a QEMU's stream: see migrate.qemu.incoming

A Receiver outlives the connections of its guest: what came over one that broke still counts. It
decides alone what it can go on from, and says so to the source (HELD, TAKEN); the Destination only
decides whether to wait.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from migrate.destination.channels import ReceivingChannels
from migrate.events import DestinationEvent
from migrate.guests.place import Place
from migrate.statistics import Status
from proto.wire.messages import (
    Complete,
    GuestInfo,
)


@dataclass
class Arrival:
    """How far a guest has come. Sizes in bytes, counts in pages."""

    info: GuestInfo
    status: Status = Status.SETUP
    received: int = 0
    rounds: int = 0
    zero: int = 0
    raw: int = 0
    delta: int = 0
    cache_size: int = 0
    capabilities: dict[str, bool] = field(default_factory=dict)
    running: str = ""
    """The place's sentence on the guest that runs."""
    runs: bool = True
    """Whether the guest runs; a virtual machine may arrive paused."""


@dataclass(frozen=True)
class Reception:
    """What a Receiver works with, over all attempts.

    place         -- where the guest goes
    arrival       -- its counters are kept here
    worker        -- the thread that reads and writes the place
    on_confirmed  -- called when the source has shown that it has our ACCEPT
    on_superseded -- called when this attempt has brought more than an earlier one left: the earlier
                     attempt's record can be dropped
    observe       -- called with DestinationEvent.ROUND_DONE as rounds end
    """

    place: Place
    arrival: Arrival
    worker: ThreadPoolExecutor
    on_confirmed: Callable[[], None]
    on_superseded: Callable[[], None]
    observe: Callable[[DestinationEvent, Arrival], None]


class Receiver(ABC):
    """Takes in one guest, over the channels of one attempt after the other."""

    def __init__(self, reception: Reception) -> None:
        self._reception = reception
        self._arrival = reception.arrival
        self._worker = reception.worker
        self.progress = 0
        """Batches, or items of a stream, that were taken in over all attempts."""

    @abstractmethod
    async def receive(
        self, channels: ReceivingChannels, info: GuestInfo, *, resumes: bool
    ) -> Complete:
        """Take in what comes until COMPLETE, and return that.

        info    -- the guest, as the source of this attempt describes it
        resumes -- ACCEPT has said that pages of an earlier attempt are here

        Raise PeerLost if the connection breaks: another attempt may follow. Raise other
        MigrationErrors, ProtoErrors and OSErrors for good.
        """

    @abstractmethod
    async def verify(self, complete: Complete) -> float:
        """Prove that the guest is here and right; return the seconds this took.

        Raise MismatchError if it is not.
        """
