"""Decide after each round: another round, stop the guest and copy the rest, or give up.

                 predicted downtime <= the aim, which rises to downtime-limit
    CONTINUE ------------------------------------------> STOP_AND_COPY
        |   max-rounds, timeout, no progress for stall-timeout, or the size of the guest alone
        |   costs more than the limit in each of several rounds
        +----------------------------------------------> ABORT, with the facts behind it

A pause within the limit is put off while another round can make it shorter: see policy.aim. The
prediction is that of policy.downtime.

This module knows no clocks, sockets, guests or sentences: numbers in, a verdict and its facts out.
`advice` puts the facts into sentences.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from migrate.policy.aim import DowntimeAim
from migrate.policy.downtime import DowntimeModel, Limits, PendingWork

# A prediction must fall by this share to count as progress; less is noise.
STALL_MARGIN = 0.04
# A stall is declared after stall-timeout, and not before this many rounds without progress: one
# long round is not a stall.
STALL_ROUNDS = 8
# A guest is too large for the limit when its size alone costs too much in this many rounds in a row
# over this many seconds: in a single round other programs may have had the processors.
LARGE_ROUNDS = 2
LARGE_SECONDS = 3.0
# Size costs below this many seconds are noise, whatever the limit is.
LARGE_COST = 0.05


class Verdict(Enum):
    CONTINUE = auto()
    STOP_AND_COPY = auto()
    ABORT = auto()


class Cause(Enum):
    """Why a migration is given up."""

    ROUNDS = auto()
    TIMEOUT = auto()
    STALL = auto()
    SIZE = auto()


@dataclass(frozen=True)
class AbortFacts:
    """Why a migration is given up; times in seconds.

    rounds, elapsed                 -- since the start
    stalled_rounds, stalled_seconds -- since the prediction last fell
    """

    cause: Cause
    expected_downtime: float
    rounds: int
    elapsed: float
    stalled_rounds: int
    stalled_seconds: float


@dataclass(frozen=True)
class Decision:
    """A verdict; expected_downtime and aim in seconds.

    abort        -- the facts behind an ABORT; None with other verdicts
    slower_helps -- the pause would be within the limit if the guest wrote nothing
    """

    verdict: Verdict
    expected_downtime: float
    aim: float
    abort: AbortFacts | None = None
    slower_helps: bool = False


class ConvergencePolicy:
    """Decides after each round, from the model and the limits; `limits` may change meanwhile."""

    def __init__(self, limits: Limits, model: DowntimeModel) -> None:
        self.limits = limits
        self.model = model
        # The shortest prediction, and when it was made: a stall is measured from there.
        self._best = float("inf")
        self._best_at = 0.0
        self._best_round = 0
        self._aim = DowntimeAim()
        # Rounds in a row, and since when, in which the size alone has cost too much.
        self._large_rounds = 0
        self._large_since = 0.0

    def forget_progress(self, round_number: int, elapsed: float) -> None:
        """Measure progress from now on: the guest has been slowed, and behaves differently."""
        self._best, self._best_at, self._best_round = float("inf"), elapsed, round_number

    def decide(self, round_number: int, elapsed: float, pending: PendingWork) -> Decision:
        """Decide when `round_number` rounds are done, `elapsed` seconds after the start."""
        expected = self.model.predict(pending, self.limits)
        limits = self.limits
        large = self._is_too_large(elapsed, pending)
        slower_helps = self.model.overhead(pending) <= limits.downtime_limit
        aim = self._aim.learn(expected, limits.downtime_limit)
        if not self._can_fall(round_number, elapsed, pending, expected):
            aim = limits.downtime_limit
        if expected <= aim:
            return Decision(Verdict.STOP_AND_COPY, expected, aim)
        if expected <= limits.downtime_limit:
            return Decision(Verdict.CONTINUE, expected, aim)
        if expected < self._best * (1 - STALL_MARGIN):
            self._best, self._best_at, self._best_round = expected, elapsed, round_number
        cause = self._cause(round_number, elapsed, large=large)
        if cause is None:
            return Decision(Verdict.CONTINUE, expected, aim, slower_helps=slower_helps)
        abort = AbortFacts(
            cause, expected, round_number, elapsed,
            round_number - self._best_round, elapsed - self._best_at,
        )  # fmt: skip
        return Decision(Verdict.ABORT, expected, aim, abort, slower_helps)

    def _cause(self, round_number: int, elapsed: float, *, large: bool) -> Cause | None:
        """Return the reason to give up after a round that is over the limit, or None."""
        limits = self.limits
        if limits.max_rounds and round_number >= limits.max_rounds:
            return Cause.ROUNDS
        if limits.timeout and elapsed >= limits.timeout:
            return Cause.TIMEOUT
        if limits.stall_timeout and large:
            return Cause.SIZE
        if (
            limits.stall_timeout
            and elapsed - self._best_at >= limits.stall_timeout
            and round_number - self._best_round >= STALL_ROUNDS
        ):
            return Cause.STALL
        return None

    def _is_too_large(self, elapsed: float, pending: PendingWork) -> bool:
        """Return whether the guest's size alone has cost too much for LARGE_SECONDS."""
        if pending.size_seconds <= max(self.limits.downtime_limit, LARGE_COST):
            self._large_rounds = 0
            return False
        if not self._large_rounds:
            self._large_since = elapsed
        self._large_rounds += 1
        return self._large_rounds >= LARGE_ROUNDS and elapsed - self._large_since >= LARGE_SECONDS

    def _can_fall(
        self, round_number: int, elapsed: float, pending: PendingWork, expected: float
    ) -> bool:
        """Return whether another round may shorten a pause that is within the limit.

        It can shorten only what depends on the written pages, so that part must be the larger one;
        and max-rounds and timeout must leave room for the round and the pause.
        """
        fixed = self.model.overhead(pending) + pending.check_seconds
        limits = self.limits
        return (
            expected - fixed > expected / 2
            and not (limits.max_rounds and round_number >= limits.max_rounds)
            and not (limits.timeout and elapsed + 2 * expected >= limits.timeout)
        )
