"""migrate-src --dry-run: the way is measured, the guest is looked at, and a sentence comes of it.

    connected --> greet, measure --> closed --> guest opened, sampled, left as it was --> simulate

The connection is over before the guest is looked at: who listens there can serve somebody else. A
demo guest that was started for this ends again.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from migrate import dry_run, probe
from migrate.errors import MigrationError, NotConvergedError, PeerError, code_of, failure_of
from migrate.guests.guest import MemoryGuest
from migrate.link import Link
from migrate.parameters import Parameters
from migrate.sample import Sample, Sampler
from migrate.threads import in_thread
from proto import capabilities as caps
from proto.messages import Hello

WARM_SECONDS = 0.3


@dataclass(frozen=True)
class Found:
    """What a dry run has found."""

    prediction: dry_run.Prediction
    sample: Sample
    way: probe.Way
    xbzrle: bool

    @property
    def exit_code(self) -> int:
        return 0 if self.prediction.converges else NotConvergedError.exit_code

    def lines(self) -> str:
        return dry_run.lines(self.prediction, self.sample, self.way, xbzrle=self.xbzrle)

    def as_json(self) -> dict[str, Any]:
        return dry_run.as_json(self.prediction, self.sample, self.way, xbzrle=self.xbzrle)


class Rehearsal:
    """One dry run.

    opened -- opens the guest
    ends_guest -- it is started only for this
    say    -- told what is being done
    """

    def __init__(
        self, link: Link, parameters: Parameters, opened: Callable[[], MemoryGuest], *,
        ends_guest: bool, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._link = link
        self._parameters = parameters
        self._opened = opened
        self._ends_guest = ends_guest
        self._say = say

    async def run(self) -> Found:
        """Raises MigrationError."""
        try:
            agreement, hello, way = await self._know_the_way()
            return await self._know_the_guest(agreement, hello, way)
        except Exception as error:
            failure = failure_of(error, "the guest's memory cannot be read")
            if failure is None or failure is error:
                raise
            raise failure from error

    async def _know_the_way(self) -> tuple[caps.Agreement, Hello, probe.Way]:
        link, parameters = self._link, self._parameters
        self._say("measuring the way there")
        link.limit.rate = parameters.limits.max_bandwidth
        try:
            agreement, hello = await probe.greet(link, parameters.wire_capabilities)
            for name in sorted(agreement.dropped):
                self._say(f"the destination has no {name}: it would not be used")
            return agreement, hello, await probe.measure(link)
        except Exception as error:
            if not isinstance(error, PeerError):
                await link.give_reason(code_of(error, MigrationError()), str(error))
            raise
        finally:
            await asyncio.shield(link.close())

    async def _know_the_guest(
        self, agreement: caps.Agreement, hello: Hello, way: probe.Way
    ) -> Found:
        parameters, guest = self._parameters, self._opened()
        try:
            pages = -(-guest.memory.size // parameters.page_size)
            if pages > hello.max_pages:
                raise MigrationError(
                    f"the guest has {pages} pages, the destination takes no more than "
                    f"{hello.max_pages}: use a larger --page-size"
                )
            await guest.started()
            self._say(f"looking at {guest.description} for some seconds")
            await asyncio.sleep(WARM_SECONDS)
            sample = await self._sample(guest, agreement)
        finally:
            if self._ends_guest:
                await guest.release()
            await guest.close()
        throttle = parameters.throttle
        slows = parameters.auto_converge and guest.can_throttle
        prediction = await in_thread(
            dry_run.simulate, sample, way, parameters.limits, throttle if slows else None
        )
        return Found(prediction, sample, way, agreement.xbzrle)

    async def _sample(self, guest: MemoryGuest, agreement: caps.Agreement) -> Sample:
        """Where this is cancelled, nobody looks at the guest any more when it returns."""
        told = threading.Event()

        def sleep(seconds: float) -> None:
            if told.wait(seconds):
                raise InterruptedError

        sampler = Sampler(
            guest, self._parameters.page_size, self._parameters.cache_size,
            xbzrle=agreement.xbzrle, merge=agreement.merge, sleep=sleep,
        )  # fmt: skip
        looking = asyncio.ensure_future(in_thread(sampler.take))
        try:
            return await asyncio.shield(looking)
        finally:
            told.set()
            await asyncio.wait({looking})
