"""The encoder of a migration and what belongs to it; it serves all rounds and all attempts.

    tracker --dirty pages--> BatchMaker --memory--> encoder --batch--> channel
                                            |  |
                                     Digest +  + PageCache <-- DeltaTuning

One worker thread calls `turn`, `tune` and `take`; the event loop calls the rest between them.

Dirty pages are never lost. `take` clears the marks of the guest, and keeps the pages in `in_flight`
until the destination has acknowledged the round; `put_back` marks them again.
"""

from __future__ import annotations

from migrate.guests.guest import MemoryGuest
from migrate.memory.digest import Digest
from migrate.policy.cache_sizing import CacheSizing, CacheUse
from migrate.policy.delta_switch import DeltaSwitch
from migrate.policy.downtime import RoundCost
from migrate.policy.working_set import WorkingSet
from migrate.source.batches import BatchMaker, PageCounts, Turn
from migrate.source.second_stage import SecondStage
from migrate.source.settings import Settings
from proto.codec.kernel import PageEncoder, PageHashes
from proto.codec.pageset import PageSet
from proto.wire import capabilities as caps
from proto.wire.frames import HEADER_BYTES
from proto.wire.messages import batch_bytes


def new_encoder(
    settings: Settings, hashes: PageHashes, agreement: caps.Agreement
) -> PageEncoder:  # fmt: skip
    """Open the page cache, and return an encoder that makes what was agreed on."""
    return PageEncoder(
        hashes, settings.cache.open(deltas=agreement.xbzrle), merge=agreement.merge,
        headroom=HEADER_BYTES, room=batch_bytes(settings.parameters.channels),
    )  # fmt: skip


class DeltaTuning:
    """Switches deltas off and on, and finds the size of their cache.

    switch -- None without deltas
    sizing -- None without deltas, or with a cache of a fixed size
    """

    def __init__(self, settings: Settings, *, deltas: bool) -> None:
        parameters, cache = settings.parameters, settings.cache
        self.switch: DeltaSwitch | None = None
        self.sizing: CacheSizing | None = None
        self._cache = cache
        self._use = CacheUse()
        if not deltas:
            return
        self.switch = DeltaSwitch(parameters.page_size)
        if parameters.cache_max:
            most = cache.useful(parameters.cache_max)
            self.sizing = CacheSizing(parameters.cache_size, most, parameters.page_size)
            cache.wanted = self.sizing.size

    @property
    def cache_max(self) -> int:
        """The bound of a cache that finds its own size, in bytes; else 0."""
        return self.sizing.most if self.sizing is not None and not self._cache.fixed else 0

    def tune(
        self, encoder: PageEncoder, cost: RoundCost, bandwidth: float, working: WorkingSet
    ) -> bool:
        """Decide on the next round. Return whether deltas were switched for more than a trial.

        bandwidth -- bytes per second that the link carries; 0.0 when that is unknown
        """
        if self.switch is None:
            return False
        switched = self.switch.decide(cost, bandwidth)
        encoder.active = self.switch.active
        before, self._use = (
            self._use,
            CacheUse(encoder.hits, encoder.misses, encoder.overflows, encoder.delta_bytes),
        )
        if self.sizing is not None and encoder.active and not self._cache.fixed:
            self._cache.wanted = self.sizing.decide(working, self._use.since(before))
        return switched


class PageSender:
    """Made when a destination has accepted the guest for the first time.

    encoder   -- knows what the destination holds
    digest    -- brings the hashes of the pages up to date
    tracker   -- finds the pages that were written
    batches   -- walks the pages of a round
    working   -- the working set
    tuning    -- decides on deltas and their cache
    stage     -- compresses batches
    round     -- number of the last round that was begun
    in_flight -- pages taken from the tracker and not acknowledged
    """

    def __init__(
        self, guest: MemoryGuest, settings: Settings, seed: bytes, agreement: caps.Agreement
    ) -> None:
        page_size = settings.parameters.page_size
        hashes = PageHashes(settings.pages, page_size, seed)
        self.tuning = DeltaTuning(settings, deltas=agreement.xbzrle)
        self.encoder = new_encoder(settings, hashes, agreement)
        self.digest = Digest(guest.memory, hashes)
        self.batches = BatchMaker(guest.memory, self.encoder)
        self.tracker = guest.track(self.encoder, lambda: settings.parameters.limits.downtime_limit)
        self.working = WorkingSet(page_size)
        self.stage = SecondStage(settings, agreement)
        self.round = 0
        self.in_flight = PageSet(settings.pages)
        self._settings = settings
        self._size = guest.memory.size

    @property
    def pages(self) -> int:
        return self._settings.pages

    def bytes_of(self, pages: int) -> int:
        """Return the bytes of `pages` pages: the last page of a guest may be shorter."""
        return min(pages * self._settings.parameters.page_size, self._size)

    def begin_round(self) -> None:
        self.round += 1
        self.stage.begin_round()
        self.batches.begin_round(self.round)

    # -- in the worker thread

    def turn(self, dirty: PageSet, channel: int) -> Turn:
        """Change the size of the cache if that is due, and return the next batch."""
        self._settings.cache.resize()
        return self.batches.turn(dirty, channel, holes=self.round == 1)

    def take(self) -> PageSet:
        """Take the dirty pages: they are in flight from now on."""
        self.in_flight = self.tracker.take()
        return self.in_flight

    def take_more(self) -> int:
        """Take the pages that have become dirty since, too. Return how many."""
        late = self.tracker.take()
        self.in_flight |= late
        return len(late)

    def tune(self, cost: RoundCost, bandwidth: float) -> bool:
        """Decide on deltas and their cache: see DeltaTuning.tune."""
        return self.tuning.tune(self.encoder, cost, bandwidth, self.working)

    def sample_heat(self) -> None:
        """Learn the working set from what the last round has sent again."""
        self.working.learn(*self.encoder.sample_heat())

    # -- in the event loop

    def acknowledged(self) -> None:
        """Note that the destination holds the pages in flight."""
        self.in_flight = PageSet(self.pages)

    def close(self) -> None:
        self.tracker.close()
        self.stage.close()

    def put_back(self) -> None:
        """Mark the pages in flight as dirty again: the round has failed."""
        self.tracker.put_back(self.in_flight)
        self.in_flight = PageSet(self.pages)

    def counters(self) -> dict[str, int | bool]:
        """Return the counters for the statistics: they count pages that have been sent."""
        return {
            **self.batches.sent._asdict(),
            **self.stage.counters(),
            "xbzrle_active": self.encoder.active,
            "evictions": self._settings.cache.evictions,
        }

    def count(self, counts: PageCounts) -> None:
        """Count pages that have been sent."""
        self.batches.sent = self.batches.sent.plus(counts)
