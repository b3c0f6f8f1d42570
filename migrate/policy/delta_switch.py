"""Switch deltas off when they cost more than they save, and on again when they pay.

    ON ------ they seem to cost more in two rounds in a row -----> TRIAL: a round without deltas
     ^ <----- no cheaper without: wait twice as long to retry ----- |
     |                                                              v cheaper without
     +------- cheaper with deltas --- PROBE <--- FILLING <-------  OFF
                                        |   no cheaper: wait twice as long to retry  ^
                                        +--------------------------------------------+

On a fast link it can take longer to find what changed in a page than to send all of it. The measure
is the wall time per page from the beginning of a round to its acknowledgement, whichever resource
the round waits for. Only one of the two alternatives can be measured at a time, so the other one is
estimated, and tried for a round when the estimate is promising. FILLING is the round that fills the
cache of old pages again; PROBE is the first one whose deltas are measured. A difference of less
than MARGIN changes nothing, and after each trial and each switch the wait doubles: the state cannot
flap.

This module knows no clocks, links, encoders or sentences: the cost of a round comes in, the
decision comes out.
"""

from __future__ import annotations

from enum import Enum, auto

from migrate.policy.downtime import WEIGHT, RoundCost

# A shorter round measures the fixed costs of a round (round trips, acknowledgement) rather than the
# cost of a page: 4096 pages of 4 KiB are 16 MiB, 13 ms of a 10 Gbit/s link when sent whole.
MIN_PAGES_FOR_COMPARISON = 4096
# One alternative must be this many times as dear as the other to matter: less is noise.
MARGIN = 1.25
# Costly rounds in a row before a trial; one slow round is no reason.
COSTLY_ROUNDS = 2
# Rounds until the next trial or probe: the first wait, which doubles up to the longest one.
FIRST_WAIT, LONGEST_WAIT = 8, 512
# A trial is worth a round, even over a link of unknown speed, when deltas save less than half of
# the bytes and encoding takes this share of the round: at worst the trial takes twice as long.
ENCODER_BOUND = 0.35


class Stage(Enum):
    ON = auto()
    TRIAL = auto()
    OFF = auto()
    FILLING = auto()
    PROBE = auto()


class DeltaSwitch:
    """Says after each round whether the next one makes deltas: `active`.

    with_deltas, without -- seconds that a page took when last measured; 0.0 before that
    """

    def __init__(self, page_size: int) -> None:
        self.with_deltas = self.without = 0.0
        self._page_size = page_size
        self._stage = Stage.ON
        self._costly = 0
        self._rounds = 0
        self._wait = FIRST_WAIT
        self._until = 0

    @property
    def active(self) -> bool:
        return self._stage not in (Stage.TRIAL, Stage.OFF)

    @property
    def settled(self) -> bool:
        """Whether the present state is more than a trial."""
        return self._stage in (Stage.ON, Stage.OFF)

    def decide(self, cost: RoundCost, bandwidth: float) -> bool:
        """Take in a round; return True when deltas are switched on or off for more than a trial.

        bandwidth -- bytes per second that the link carries; 0.0 when that is unknown
        """
        self._rounds += 1
        if cost.pages < MIN_PAGES_FOR_COMPARISON or self._rounds == 1:
            return False
        taken = cost.wall_seconds / cost.pages
        if self._stage is Stage.ON:
            self._watch(cost, taken, bandwidth)
        elif self._stage is Stage.TRIAL:
            self.without = taken
            return self._conclude_trial()
        elif self._stage is Stage.OFF:
            self.without += WEIGHT * (taken - self.without)
            if self._rounds >= self._until:
                self._stage = Stage.FILLING
        elif self._stage is Stage.FILLING:
            self._stage = Stage.PROBE
        else:
            self.with_deltas = taken
            return self._conclude_probe()
        return False

    def _watch(self, cost: RoundCost, taken: float, bandwidth: float) -> None:
        """Begin a trial when rounds with deltas have been costly for long enough."""
        known = self.with_deltas
        self.with_deltas = known + WEIGHT * (taken - known) if known else taken
        costly = bandwidth > 0 and taken > MARGIN * self._page_size / bandwidth
        dense = 2 * cost.batch_bytes > cost.pages * self._page_size
        if dense and cost.encode_seconds > ENCODER_BOUND * cost.wall_seconds:
            costly = True
        self._costly = self._costly + 1 if costly else 0
        if self._costly >= COSTLY_ROUNDS and self._rounds >= self._until:
            self._costly = 0
            self._stage = Stage.TRIAL

    def _conclude_trial(self) -> bool:
        if self.with_deltas > MARGIN * self.without:
            self._settle(Stage.OFF)
            return True
        self._settle(Stage.ON)
        self.with_deltas = 0.0
        return False

    def _conclude_probe(self) -> bool:
        if self.without > MARGIN * self.with_deltas:
            self._settle(Stage.ON)
            return True
        self._settle(Stage.OFF)
        return False

    def _settle(self, stage: Stage) -> None:
        self._stage = stage
        self._until = self._rounds + self._wait
        self._wait = min(2 * self._wait, LONGEST_WAIT)
