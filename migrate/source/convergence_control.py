"""Apply the policies after each round: slow the guest, go on, stop it, or give up.

    cost of the round, pending work -> Throttling -> ConvergencePolicy -> Decision
                                                           | ABORT
                                                           +--> NotConvergedError, in words

The policies decide (migrate.policy). This object keeps what they have learnt over all attempts of a
migration, applies their decisions, and has `advice` word them.
"""

from __future__ import annotations

import logging

from migrate.errors import NotConvergedError
from migrate.guests.guest import MemoryGuest
from migrate.policy.advice import abort_reason, advice
from migrate.policy.convergence import ConvergencePolicy, Decision
from migrate.policy.downtime import DowntimeModel, Limits, PendingWork, RoundCost
from migrate.policy.throttle import RoundLoad
from migrate.source.page_sender import PageSender
from migrate.source.settings import Settings
from migrate.source.telemetry import Telemetry
from migrate.source.throttling import Throttling

logger = logging.getLogger(__name__)


class ConvergenceControl:
    """The decisions of one migration."""

    def __init__(
        self, guest: MemoryGuest, sender: PageSender, settings: Settings, telemetry: Telemetry
    ) -> None:
        self.model = DowntimeModel()
        self._policy = ConvergencePolicy(settings.parameters.limits, self.model)
        self._guest = guest
        self._sender = sender
        self._settings = settings
        self._telemetry = telemetry
        self._throttling = Throttling(guest, telemetry.notice)
        # What kept the migration from converging, in words.
        self._obstacle = ""
        # Whether the pause would have been within the limit, after the last round, for a guest that
        # writes nothing.
        self._slower_helps = False

    @property
    def _limits(self) -> Limits:
        return self._settings.parameters.limits

    @property
    def bandwidth(self) -> float:
        """Bytes per second that the link carries; 0.0 when that is unknown."""
        return self.model.link_bandwidth(self._limits)

    # -- after each round

    async def decide(self, cost: RoundCost, pending: PendingWork, seconds: float) -> Decision:
        """Slow the guest if that is due, and decide how to go on.

        seconds -- from the beginning of the round until its dirty pages were taken
        """
        stage = self._sender.stage
        self.model.compressed_share = stage.policy.pause_share(stage.bandwidth)
        await self._slow_down(cost, pending, seconds)
        self._policy.limits = self._limits
        number = self._sender.round
        decision = self._policy.decide(number, self._telemetry.elapsed, pending)
        self._telemetry.change(
            expected_downtime=decision.expected_downtime, downtime_aim=decision.aim
        )
        logger.debug(
            "round %d: %d pages, %d bytes in %.3f s; %d pages pending, %.3f s expected, aim %.3f s:"
            " %s", number, cost.pages, cost.wire_bytes, seconds, pending.pages,
            decision.expected_downtime, decision.aim, decision.verdict.name,
        )  # fmt: skip
        return decision

    def check(self, decision: Decision, pending: PendingWork) -> None:
        """Raise NotConvergedError if the migration is to be given up."""
        if decision.abort is not None:
            reason, obstacle = abort_reason(self._policy, decision.abort, pending)
            raise self._not_converged(reason, obstacle, slower=decision.slower_helps)
        self._slower_helps = decision.slower_helps

    async def _slow_down(self, cost: RoundCost, pending: PendingWork, seconds: float) -> None:
        """Throttle the guest by a step if auto-converge is on and nothing else helps."""
        parameters, model, limits = self._settings.parameters, self.model, self._limits
        load = RoundLoad(
            expected=model.predict(pending, limits), seconds=seconds, sent_bytes=cost.wire_bytes,
            dirtied_bytes=pending.pages * model.bytes_per_page,
            dirtied_seconds=model.transfer_seconds(pending.pages, limits),
            idle_downtime=model.overhead(pending),
        )  # fmt: skip
        slower = await self._throttling.apply(
            parameters.auto_converge, parameters.throttle, limits, load
        )
        if slower:
            self._policy.forget_progress(self._sender.round, self._telemetry.elapsed)
        percentage = self._throttling.percentage
        highest = max(percentage, self._telemetry.statistics.cpu_throttle_highest)
        self._telemetry.change(cpu_throttle_percentage=percentage, cpu_throttle_highest=highest)

    async def release(self) -> None:
        """Let the guest run at full speed."""
        await self._throttling.release()
        self._telemetry.change(cpu_throttle_percentage=0)

    # -- time and words

    def check_time(self) -> None:
        """Raise NotConvergedError if --timeout is over in the middle of a round."""
        timeout, elapsed = self._limits.timeout, self._telemetry.elapsed
        if timeout and elapsed > timeout:
            raise self._not_converged(
                f"round {self._sender.round} was not through after {elapsed:.0f} s (--timeout)",
                slower=self._slower_helps,
            )

    def _not_converged(
        self, reason: str, obstacle: str = "", *, slower: bool = False
    ) -> NotConvergedError:
        """Return the error that ends the migration, with all options that could be changed.

        obstacle -- the part of `reason` that says what takes the time
        slower   -- the obstacle is what the guest writes: slowing it would help
        """
        self._obstacle = obstacle
        self._telemetry.refresh(**self._sender.counters())
        if self._throttling.percentage:
            reason = f"{reason} (the guest was slowed by {self._throttling.percentage} %)"
        elif (
            slower and self._guest.can_throttle and not self._settings.parameters.auto_converge
        ):  # fmt: skip
            reason = f"{reason}; or slow the guest with --auto-converge"
        return NotConvergedError(
            "; ".join([f"the migration was given up: {reason}", *self._advice()])
        )

    def _advice(self) -> tuple[str, ...]:
        tuning = self._sender.tuning
        return advice(
            self._telemetry.statistics, self._sender.working, tuning.switch,
            cache_max=tuning.cache_max, bandwidth=self.bandwidth,
        )  # fmt: skip

    def advise(self) -> tuple[str, ...]:
        """Return what the numbers of a migration that has ended mean.

        A migration of one round has seen no page twice.
        """
        found = self._advice() if self._sender.round > 1 else ()
        return (self._obstacle, *found) if self._obstacle else found

    def close(self) -> None:
        self._throttling.close()
