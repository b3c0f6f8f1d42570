"""Whether deltas are worth making, and how many old pages are worth keeping for them.

    ON ------ they cost more, as it seems, two rounds long ------> TRIAL: a round without
     ^ <----- no cheaper without: try again after twice as long --- |
     |                                                              v cheaper without
     +------- cheaper with them --- PROBE: two rounds with <-----  OFF
                                      |   no cheaper: try again after twice as long  ^
                                      +----------------------------------------------+

On a fast link it can take longer to find what changed than to send all of it. What counts is what
a page takes from the beginning of a round to its confirmation, whatever it waits for. Only one of
the two can be measured at a time: so what is not done is estimated, tried for a round when that
promises something. What is better by less than MARGIN changes nothing, and after each trial and
each switch the next one waits for twice as many rounds: it cannot flap.

CacheSizing finds the size of the page cache for `--cache-size auto`, from the working set.

Nothing here knows clocks, links or encoders: what a round cost comes in, what to do comes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from migrate.rounds import WEIGHT, Measured
from migrate.workingset import WorkingSet

# Rounds of fewer pages tell what a round costs, not what a page does.
TELLING_PAGES = 4096
MARGIN = 1.25
COSTLY_ROUNDS = 2
# Rounds until something is tried again, which double each time.
FIRST_WAIT, LONGEST_WAIT = 8, 512
# Where deltas save less than half of the bytes and making them takes so much of a round, a round
# without them is worth trying, though nobody knows how fast the link is: it takes twice as long at
# worst.
ENCODER_BOUND = 0.35


class Stage(Enum):
    ON = auto()
    TRIAL = auto()
    OFF = auto()
    FILLING = auto()
    PROBE = auto()


class DeltaSwitch:
    """Says after each round whether the next one makes deltas: `active`."""

    def __init__(self, page_size: int) -> None:
        self.with_deltas = self.without = 0.0
        """Seconds a page took, when it was last measured; 0.0 before that."""
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
        """Whether it is no mere trial."""
        return self._stage in (Stage.ON, Stage.OFF)

    def decide(self, measured: Measured, bandwidth: float) -> str:
        """Takes in a round; `bandwidth` is the link's, as far as it is known, or 0.0.

        Returns a sentence where deltas are switched for more than a trial, else "".
        """
        self._rounds += 1
        if measured.pages < TELLING_PAGES or self._rounds == 1:
            return ""
        taken = measured.wall_seconds / measured.pages
        if self._stage is Stage.ON:
            self._watch(measured, taken, bandwidth)
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
        return ""

    def _watch(self, measured: Measured, taken: float, bandwidth: float) -> None:
        known = self.with_deltas
        self.with_deltas = known + WEIGHT * (taken - known) if known else taken
        costly = bandwidth > 0 and taken > MARGIN * self._page_size / bandwidth
        dense = 2 * measured.wire_bytes > measured.pages * self._page_size
        if dense and measured.encode_seconds > ENCODER_BOUND * measured.wall_seconds:
            costly = True
        self._costly = self._costly + 1 if costly else 0
        if self._costly >= COSTLY_ROUNDS and self._rounds >= self._until:
            self._costly = 0
            self._stage = Stage.TRIAL

    def _conclude_trial(self) -> str:
        if self.with_deltas > MARGIN * self.without:
            self._settle(Stage.OFF)
            return f"deltas cost more than they save here: {self._costs()}: they are switched off"
        self._settle(Stage.ON)
        self.with_deltas = 0.0
        return ""

    def _conclude_probe(self) -> str:
        if self.without > MARGIN * self.with_deltas:
            self._settle(Stage.ON)
            return f"deltas pay again: {self._costs()}: they are switched on"
        self._settle(Stage.OFF)
        return ""

    def _settle(self, stage: Stage) -> None:
        self._stage = stage
        self._until = self._rounds + self._wait
        self._wait = min(2 * self._wait, LONGEST_WAIT)

    def _costs(self) -> str:
        return (
            f"{self.with_deltas * 1e6:.1f} us a page with them, {self.without * 1e6:.1f} us without"
        )


# ---------------------------------------------------------------- the size of the cache

# A cache that misses less than this is large enough.
FEW_MISSES = 0.05
TELLING_LOOKUPS = 256
# A larger cache must be expected to hit so much more than the present one.
GAIN = 0.05
# A hit that saves less of a page's bytes than this is not worth the memory.
SAVING = 0.25
# Far too large for so many rounds, a cache shrinks to twice what is needed.
FAR_TOO_LARGE = 8
IDLE_ROUNDS = 32


@dataclass(frozen=True)
class Lookups:
    """What the page cache did in one round, in pages; delta_bytes of its deltas."""

    hits: int = 0
    misses: int = 0
    overflows: int = 0
    delta_bytes: int = 0

    def since(self, before: Lookups) -> Lookups:
        return Lookups(
            self.hits - before.hits,
            self.misses - before.misses,
            self.overflows - before.overflows,
            self.delta_bytes - before.delta_bytes,
        )

    def saving(self, page_size: int) -> float:
        """The share of the bytes that a hit has saved; 1.0 where none has been seen."""
        if not self.hits:
            return 1.0
        return 1 - self.overflows / self.hits - self.delta_bytes / (self.hits * page_size)


class CacheSizing:
    """`--cache-size auto`: `size` is that for the next round, a power of two up to `most`."""

    def __init__(self, size: int, most: int, page_size: int) -> None:
        self.size = min(size, most)
        self.most = most
        self._page_size = page_size
        self._least = self.size
        self._idle = 0

    def decide(self, working: WorkingSet, round_: Lookups) -> int:
        """Takes in a round; the size in bytes for the next."""
        looked_up = round_.hits + round_.misses
        if looked_up < TELLING_LOOKUPS:
            return self.size
        wanted = working.fitting(self.most)
        if wanted > self.size:
            gain = working.hit_share(wanted) - working.hit_share(self.size)
            if (
                round_.misses > FEW_MISSES * looked_up
                and gain > GAIN
                and round_.saving(self._page_size) > SAVING
            ):
                self.size = wanted
        self._idle = self._idle + 1 if FAR_TOO_LARGE * wanted <= self.size else 0
        if self._idle >= IDLE_ROUNDS:
            self._idle = 0
            self.size = max(2 * wanted, self._least)
        return self.size
