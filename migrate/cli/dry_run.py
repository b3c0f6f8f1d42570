"""migrate-src --dry-run: measure the path, sample the guest, and predict the migration.

    connect --> greet, measure --> close --> open and sample the guest, leave it --> simulate

The connection is closed before the guest is sampled, so that the destination can serve another
source. A demo guest that was started for the dry run ends with it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from migrate.errors import MigrationError, NotConvergedError, PeerError, code_of, failure_of
from migrate.guests.guest import MemoryGuest
from migrate.policy.parameters import Parameters
from migrate.runtime.threads import in_thread
from migrate.source import forecast
from migrate.source.sample import Sample, Sampler
from migrate.transport import probe
from migrate.transport.link import Link
from migrate.units import format_seconds
from proto.wire import capabilities as caps
from proto.wire.messages import Hello

# A demo guest that has just started has not reached its steady rate of writes yet.
WARM_SECONDS = 0.3


@dataclass(frozen=True)
class DryRunResult:
    """What a dry run has found; `xbzrle` tells whether deltas would be used."""

    prediction: forecast.Prediction
    sample: Sample
    way: probe.Way
    xbzrle: bool

    @property
    def exit_code(self) -> int:
        return 0 if self.prediction.converges else NotConvergedError.exit_code

    def lines(self) -> str:
        return forecast.lines(self.prediction, self.sample, self.way, xbzrle=self.xbzrle)

    def as_json(self) -> dict[str, Any]:
        return forecast.as_json(self.prediction, self.sample, self.way, xbzrle=self.xbzrle)


class DryRun:
    """One dry run over one connection, which it closes.

    open_guest -- opens the guest
    ends_guest -- whether the guest was started for this dry run, and ends with it
    say        -- called with a sentence per step
    """

    def __init__(
        self, link: Link, parameters: Parameters, open_guest: Callable[[], MemoryGuest], *,
        ends_guest: bool, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._link = link
        self._parameters = parameters
        self._open_guest = open_guest
        self._ends_guest = ends_guest
        self._say = say

    async def run(self) -> DryRunResult:
        """Measure, sample and predict. Raises MigrationError."""
        try:
            agreement, hello, way = await self._measure_path()
            return await self._predict(agreement, hello, way)
        except Exception as error:
            failure = failure_of(error, "the guest's memory cannot be read")
            if failure is None or failure is error:
                raise
            raise failure from error

    async def _measure_path(self) -> tuple[caps.Agreement, Hello, probe.Way]:
        """Greet the destination, measure round trip and throughput, and close the connection."""
        link, parameters = self._link, self._parameters
        self._say("measuring the path to the destination")
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

    async def _predict(
        self, agreement: caps.Agreement, hello: Hello, way: probe.Way
    ) -> DryRunResult:
        """Sample the guest, and simulate its migration over that path."""
        parameters, guest = self._parameters, self._open_guest()
        try:
            pages = -(-guest.memory.size // parameters.page_size)
            if pages > hello.max_pages:
                raise MigrationError(
                    f"the guest has {pages} pages, and the destination accepts at most "
                    f"{hello.max_pages}: use a larger --page-size"
                )
            await guest.make_ready()
            self._say(f"sampling {guest.description} for some seconds")
            await asyncio.sleep(WARM_SECONDS)
            sample = await self._with_tracking(guest, await self._sample(guest, agreement))
        finally:
            if self._ends_guest:
                await guest.release()
            await guest.close()
        throttle = parameters.throttle
        slows = parameters.auto_converge and guest.can_throttle
        prediction = await in_thread(
            forecast.simulate, sample, way, parameters.limits, throttle if slows else None
        )
        return DryRunResult(prediction, sample, way, agreement.xbzrle)

    async def _with_tracking(self, guest: MemoryGuest, sample: Sample) -> Sample:
        """Return the sample with the tracking that a migration would use."""
        limit = self._parameters.limits.downtime_limit
        look = await in_thread(guest.foresee_look, sample.scan_seconds, limit)
        if look.refusal:
            self._say(
                f"comparing all of the guest takes {format_seconds(look.seconds)}: the kernel's "
                f"record of writes could not be used: {look.refusal}"
            )
        return replace(sample, scan_seconds=look.seconds, tracking=look.method)

    async def _sample(self, guest: MemoryGuest, agreement: caps.Agreement) -> Sample:
        """Sample the guest in a thread, which has ended when this returns or is cancelled."""
        told = threading.Event()

        def sleep(seconds: float) -> None:
            if told.wait(seconds):
                raise InterruptedError

        sampler = Sampler(
            guest, self._parameters.page_size, self._parameters.cache_size,
            xbzrle=agreement.xbzrle, merge=agreement.merge, zstd=agreement.zstd,
            level=self._parameters.compress_level, sleep=sleep,
        )  # fmt: skip
        looking = asyncio.ensure_future(in_thread(sampler.take))
        try:
            return await asyncio.shield(looking)
        finally:
            told.set()
            await asyncio.wait({looking})
