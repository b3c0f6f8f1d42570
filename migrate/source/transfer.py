"""The interface of a transfer: of pages (precopy.py), or of QEMU's stream (qemu.outgoing).

Migration --Attempt, Admission--> Transfer.run --READY--> Pause
          --on failure----------> Transfer.undo
          --at the end----------> Transfer.release, advise, close
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple

from migrate.policy.parameters import Parameters
from migrate.source.attempt import Admission, Attempt
from migrate.source.reconnection import Reconnection
from migrate.source.settings import Settings
from migrate.source.telemetry import Telemetry
from migrate.transport.link import Link
from proto.wire.messages import CacheSize, Message

# The guest may be paused this many times; each pause but the last has stopped it for nothing.
MAX_PAUSES = 3

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


@dataclass(frozen=True)
class Pause:
    """A guest that is stopped.

    began       -- since when, by the monotonic clock
    sent_before -- bytes that had been sent by then
    """

    began: float
    sent_before: int


@dataclass(frozen=True)
class TransferContext:
    """The parts of a Migration that its transfer uses.

    worker -- one thread: it encodes, scans and hashes
    seed   -- key of the page hashes
    """

    settings: Settings
    telemetry: Telemetry
    reconnection: Reconnection
    worker: Executor
    seed: bytes

    @property
    def parameters(self) -> Parameters:
        return self.settings.parameters

    def in_worker(
        self, work: Callable[[*Arguments], T], *arguments: *Arguments
    ) -> asyncio.Future[T]:
        """Have the worker thread do something."""
        return asyncio.get_running_loop().run_in_executor(self.worker, work, *arguments)

    async def confirm_cache(self, link: Link) -> None:
        """Tell the destination, and the user, if the size of the cache has changed or cannot."""
        cache, telemetry = self.settings.cache, self.telemetry
        if refusal := cache.refusal():
            telemetry.notice(refusal)
        if cache.size != telemetry.statistics.cache_size:
            telemetry.change(cache_size=cache.size)
            await link.send(CacheSize(cache.size))


class Transfer(ABC):
    """One kind of transfer. A single object serves all attempts of a migration."""

    # Capabilities that the destination must have for this kind.
    required: frozenset[str] = frozenset()
    # Capabilities that are used if the destination has them; no user can switch them off.
    optional: frozenset[str] = frozenset()
    # Whether a later program can resume this kind of transfer.
    outlives_program = True

    @property
    def pauses(self) -> int:
        """How many times the guest was paused."""
        return 0

    @property
    def next_round(self) -> int:
        """The number of the next round."""
        return 1

    @abstractmethod
    async def run(self, attempt: Attempt, admission: Admission) -> Pause:
        """Send the guest over the channels of an attempt. Return when the destination is READY."""

    def hear(self, message: Message) -> bool:
        """Take a message that the destination may send at any time. Return False for an answer."""
        return False

    @abstractmethod
    async def undo(self) -> None:
        """Undo what the attempt has done to the guest, so that it runs here."""

    def failed(self, *, committed: bool) -> None:
        """Note that the migration has failed, before the destination and the user are told."""

    def check_running(self) -> None:
        """Raise HandOverUnknown if the guest may run here although it runs at the destination."""

    async def release(self) -> None:
        """Let the guest run at full speed, here or at the destination."""

    @abstractmethod
    def check_time(self) -> None:
        """Raise NotConvergedError if the migration has used up its time."""

    @abstractmethod
    def update(self) -> None:
        """Bring the counters into the statistics."""

    @abstractmethod
    def advise(self) -> tuple[str, ...]:
        """Return what the numbers of a migration that has ended mean."""

    def close(self) -> None:
        """Drop references: the migration is over."""
