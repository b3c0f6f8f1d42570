"""Sample a running guest for a second or two: what it writes, and what moving that would cost.

    round 1   every page of the sample through the real encoder, to nowhere
    then      intervals of growing length; what the guest wrote in each goes the same way

So pages, bytes and CPU seconds are known as functions of time, from the codec and the cache that
would do the work. Of a guest that holds more than SAMPLE_BYTES, holes apart, each 2nd, 4th, 8th ...
stretch of pages is sampled, with a cache that is smaller by the same factor. The guest runs on all
the while, and nothing of it is kept.

A sample cannot know what the guest does later, what it writes less often than every second or two,
and the hits of a cache that is too small for the guest, which take longer to settle.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from migrate.guests.guest import MemoryGuest
from migrate.memory.digest import Digest
from migrate.memory.dirty import DirtyTracker, Method, Scanner
from migrate.policy.compression import CompressionPolicy, Kind
from migrate.policy.downtime import SIDES
from migrate.source.batches import TURN_PAGES
from migrate.source.second_stage import try_level, usable_threads
from proto.codec.kernel import PageCache, PageEncoder, PageHashes
from proto.codec.pageset import PageSet
from proto.wire.compressed import BatchCompressor
from proto.wire.frames import HEADER_BYTES
from proto.wire.messages import SEED_BYTES, batch_bytes

SAMPLE_BYTES = 256 << 20
# The pages of one 64-bit word of a bitmap are sampled together or not at all.
STRETCH = 64
# The first interval warms up the cache, and is not counted.
WARM_SECONDS = 0.3
# A guest has written all that it writes when its dirty pages grow at less than this share of their
# mean growth.
SATURATED = 0.1
# The encoder's number of the round in which all of the sample is fed.
FIRST_ROUND = 2
INTERVALS = (0.002, 0.01, 0.05, 0.1, 0.2, 0.4, 0.8)


@dataclass(frozen=True)
class Cost:
    """The cost of moving some pages: bytes on the wire, CPU seconds of the source."""

    pages: float
    wire_bytes: float
    encode_seconds: float


@dataclass(frozen=True)
class Interval:
    """The pages written in `seconds`, and the cost of moving them; for the whole guest."""

    seconds: float
    cost: Cost


@dataclass(frozen=True)
class Sample:
    """A sampled guest. Counts are in pages, and scaled to the whole guest.

    first         -- cost of the first round
    scan_seconds  -- to find the written pages by `tracking`; 0.0 if the guest marks them
    share         -- of the guest that was sampled
    whole_seconds -- to pass over the whole guest for the digest, on both sides
    check_seconds -- to look for other writers in the pause, beside the last round
    stops_guest   -- whether a writer is stopped for the last round: see PendingWork
    first_stage   -- what compressing the batches of the first round costs; None: they are not
    later_stage   -- the same of later rounds
    """

    pages: int
    page_size: int
    first: Cost
    intervals: tuple[Interval, ...]
    zero: float = 0.0
    scan_seconds: float = 0.0
    deltas: float = 0.0
    delta_bytes: float = 0.0
    hits: float = 0.0
    misses: float = 0.0
    overflows: float = 0.0
    share: float = 1.0
    whole_seconds: float = 0.0
    check_seconds: float = 0.0
    stops_guest: bool = True
    tracking: Method = Method.COMPARE
    first_stage: CompressionPolicy | None = None
    later_stage: CompressionPolicy | None = None

    def dirty(self, seconds: float) -> float:
        """Return how many pages the guest writes in `seconds`.

        The result is interpolated between the intervals, and extrapolated from the last two if the
        count still grew. It never exceeds the guest, and never falls for a longer time.
        """
        points = [(0.0, 0.0)]
        for interval in self.intervals:
            if interval.seconds > points[-1][0]:
                points.append((interval.seconds, max(interval.cost.pages, points[-1][1])))
        if len(points) == 1:
            return 0.0
        (t0, d0), (t1, d1) = points[-2:]
        for left, right in itertools.pairwise(points):
            if seconds <= right[0]:
                (t0, d0), (t1, d1) = left, right
                break
        else:
            if (d1 - d0) / (t1 - t0) < SATURATED * d1 / t1:
                return d1
        return min(d0 + (seconds - t0) * (d1 - d0) / (t1 - t0), float(self.pages))

    def cost(self, pages: float, seconds: float) -> Cost:
        """Return the cost of moving `pages` written in `seconds`, as in the nearest intervals."""
        before = after = None
        for interval in self.intervals:
            if not interval.cost.pages:
                continue
            if interval.seconds <= seconds:
                before = interval
            elif after is None:
                after = interval
        before, after = before or after, after or before
        if before is None or after is None:
            whole = max(self.first.pages, 1.0)
            return Cost(
                pages,
                self.first.wire_bytes * pages / whole,
                self.first.encode_seconds * pages / whole,
            )
        span = after.seconds - before.seconds
        weight = min(1.0, (seconds - before.seconds) / span) if span > 0 else 0.0

        def each(of: Callable[[Cost], float]) -> float:
            low, high = of(before.cost) / before.cost.pages, of(after.cost) / after.cost.pages
            return pages * (low + max(weight, 0.0) * (high - low))

        return Cost(pages, each(lambda c: c.wire_bytes), each(lambda c: c.encode_seconds))


class _Trials:
    """Compresses some of the batches that go by, at each level: the 1st, 2nd, 4th, 8th ..."""

    def __init__(self, level: int | None) -> None:
        self.policy = CompressionPolicy(usable_threads(), level)
        self._compressors = {one: BatchCompressor(one) for one in self.policy.levels}
        self._batches = 0

    def add(self, head: memoryview, data: memoryview) -> float:
        """Take a batch; return the CPU seconds that were spent on it."""
        began = time.thread_time()
        kind = Kind.of(head, data)
        self.policy.count(kind, len(head) + len(data))
        self._batches += 1
        if self._batches & (self._batches - 1) == 0:
            for level, compressor in self._compressors.items():
                _, trial = try_level(compressor, kind, level, head, data)
                self.policy.learn(*trial)
        return time.thread_time() - began


class Sampler:
    """Samples a running guest. Runs in a worker thread: it sleeps and computes.

    xbzrle, merge, zstd -- as agreed with the destination
    level         -- the only level of zstd; None: any
    sleep, clock  -- the machine's, or a test's; an exception of `sleep` ends the sampling
    most          -- bytes to sample
    """

    def __init__(
        self, guest: MemoryGuest, page_size: int, cache_size: int, *, xbzrle: bool, merge: bool,
        zstd: bool = False, level: int | None = None,
        sleep: Callable[[float], object] = time.sleep, clock: Callable[[], float] = time.monotonic,
        most: int = SAMPLE_BYTES,
    ) -> None:  # fmt: skip
        self._memory = guest.memory
        self._guest = guest
        self._sleep, self._clock = sleep, clock
        self.pages = -(-guest.memory.size // page_size)
        self._page_size = page_size
        factor = self._thinning(most)
        self._mask = self._sampled_pages(factor)
        self._scale = self.pages / max(len(self._mask), 1)
        cache = PageCache(max(cache_size // factor, page_size), page_size) if xbzrle else None
        hashes = PageHashes(self.pages, page_size, os.urandom(SEED_BYTES))
        self._encoder = PageEncoder(
            hashes, cache, merge=merge, headroom=HEADER_BYTES, room=batch_bytes(1)
        )
        self._marks: DirtyTracker | None = guest.track(self._encoder) if guest.marks else None
        self._scanner = Scanner(self._memory, self._encoder)
        self._digest = Digest(self._memory, hashes, by_sum=True)
        self._seen = PageSet(self.pages)
        # What compression costs in the first round, and in later ones.
        self._trials = [_Trials(level), _Trials(level)] if zstd else []
        self._round = 0
        self._looked_at = 0.0
        self._scans: list[float] = []

    def _thinning(self, most: int) -> int:
        """Return the power of two by which the guest is thinned out to `most` bytes of data."""
        extents = self._memory.extents(self._page_size)
        filled = sum(count for _, count, data in extents if data)
        factor = 1
        while filled * self._page_size > most * factor:
            factor *= 2
        return factor

    def _sampled_pages(self, factor: int) -> PageSet:
        """Return the pages of each `factor`th stretch."""
        full = PageSet.full(self.pages)
        if factor == 1:
            return full
        sampled = PageSet(self.pages)
        words = memoryview(sampled.bits).cast("Q")
        for index, word in enumerate(memoryview(full.bits).cast("Q")[::factor].tolist()):
            words[index * factor] = word
        return sampled

    def take(self, intervals: Iterable[float] = INTERVALS) -> Sample:
        """Return the sample, after a little more than the sum of the intervals (in seconds).

        Raises OSError if the guest's memory cannot be read.
        """
        if self._marks is not None:
            self._marks.start()
        first, holes = self._first_round()
        encoder = self._encoder
        zero = holes + (encoder.zero - holes) * self._scale
        self._interval(WARM_SECONDS)
        self._seen = PageSet(self.pages)
        before = self._counts()
        began = self._looked_at
        found = [self._interval(seconds) for seconds in intervals]
        found.append(self._all_of_them(began, found[-1]))
        deltas, delta_bytes, hits, misses, overflows = (
            (after - then) * self._scale for then, after in zip(before, self._counts(), strict=True)
        )
        self._digest.rehearse(self._seen.bits)
        scan = 0.0 if self._marks is not None else sum(self._scans) / len(self._scans)
        return Sample(
            self.pages, self._page_size, first, tuple(sorted(found, key=lambda i: i.seconds)),
            zero, scan, deltas, delta_bytes, hits, misses, overflows,
            1 / self._scale, SIDES * self._digest.whole_seconds, self._guest.check_seconds,
            self._guest.stoppable, Method.COMPARE, *(trials.policy for trials in self._trials),
        )  # fmt: skip

    def _all_of_them(self, began: float, last: Interval) -> Interval:
        """Return all intervals together as one more, whose pages cost what those of `last` do."""
        pages = len(self._seen) * self._scale
        more = pages / last.cost.pages if last.cost.pages else 0.0
        cost = Cost(pages, last.cost.wire_bytes * more, last.cost.encode_seconds * more)
        return Interval(self._looked_at - began, cost)

    def _counts(self) -> tuple[int, ...]:
        e = self._encoder
        return e.delta, e.delta_bytes, e.hits, e.misses, e.overflows

    def _first_round(self) -> tuple[Cost, int]:
        """Feed every page of the sample, and all holes; return the cost and the pages of holes."""
        todo, holes = PageSet(self.pages), 0
        todo.bits[:] = self._mask.bits
        self._begin_round()
        began = time.thread_time()
        for page, count, data in self._memory.extents(self._page_size):
            if not data:
                holes += self._feed_hole(page, count, todo)
        spent = time.thread_time() - began
        if self._encoder.pending:
            self._encoder.finish_batch()
        self._begin_round()  # within a round, the encoder takes pages in ascending order
        cost = self._feed(todo)
        seconds = spent + cost.encode_seconds
        return Cost(float(self.pages), cost.wire_bytes, seconds), holes

    def _feed_hole(self, page: int, count: int, todo: PageSet) -> int:
        """Feed the whole stretches of a hole as zeros, without reading; return their pages."""
        first, end = -(-page // STRETCH), (page + count) // STRETCH
        if end <= first:
            return 0
        todo.bits[first * 8 : end * 8] = bytes(8 * (end - first))
        at = first * STRETCH
        while at < end * STRETCH:
            at += self._encoder.feed_zeros(at, end * STRETCH - at)
            if self._encoder.full:
                self._encoder.finish_batch()
        return (end - first) * STRETCH

    def _interval(self, seconds: float) -> Interval:
        """Let the guest write for `seconds` since the last look, and feed what it wrote.

        A guest that marks has written on while the previous interval was fed: those pages are fed
        too, but not counted in this interval.
        """
        earlier = PageSet(self.pages)
        if self._marks is not None:
            earlier = self._dirty()
        began = self._looked_at
        self._sleep(max(0.0, began + seconds - self._clock()))
        dirty = self._dirty()
        elapsed, pages = self._looked_at - began, len(dirty)
        self._begin_round()
        dirty |= earlier
        self._seen |= dirty
        cost, share = self._feed(dirty), pages / max(len(dirty), 1)
        return Interval(
            elapsed,
            Cost(pages * self._scale, cost.wire_bytes * share, cost.encode_seconds * share),
        )

    def _begin_round(self) -> None:
        self._round += 1
        self._encoder.begin_round(self._round)
        if self._round == 1:
            self._looked_at = self._clock()

    def _dirty(self) -> PageSet:
        """Return the pages of the sample that were written since the last look."""
        self._looked_at = self._clock()
        dirty = self._scan() if self._marks is None else self._marks.take()
        dirty &= self._mask
        return dirty

    def _scan(self) -> PageSet:
        """Return the pages that differ, as ScanTracker does, but of the sample alone.

        The walk covers all holes of the guest, so its time is not scaled, unlike that of the scan.
        """
        began = time.perf_counter()
        dirty, mask = PageSet(self.pages), memoryview(self._mask.bits).cast("Q")
        parts = []
        for page, count, data in self._memory.extents(self._page_size):
            if not data:
                self._encoder.scan_zeros(page, count, dirty.bits)
                continue
            end = page + count
            for index in range(page // STRETCH, -(-end // STRETCH)):
                if mask[index]:
                    first = max(page, index * STRETCH)
                    parts.append((first, min(end, (index + 1) * STRETCH) - first))
        walked = time.perf_counter()
        self._scanner.scan(parts, dirty)
        self._scans.append(walked - began + (time.perf_counter() - walked) * self._scale)
        return dirty

    def _feed(self, dirty: PageSet) -> Cost:
        """Encode the pages and discard the result; return the cost, scaled to the whole guest."""
        encoder, cursor, sent, tried = self._encoder, 0, 0, 0.0
        began = time.thread_time()
        while cursor < self.pages:
            if self._memory.view is not None:
                _, cursor = encoder.feed_memory(
                    self._memory.view, dirty.bits, cursor, self.pages, TURN_PAGES
                )
            else:
                snapshot, numbers = encoder.space()
                count, cursor = self._memory.gather(
                    dirty.bits, cursor, self.pages, self._page_size, snapshot, numbers
                )
                encoder.feed(count, dirty.bits)
            if encoder.full or (encoder.pending and cursor >= self.pages):
                head, data = encoder.finish_batch()
                sent += len(head) + len(data)
                if self._trials:
                    trials = self._trials[self._round > FIRST_ROUND]
                    tried += trials.add(head, data)
        seconds = time.thread_time() - began - tried
        scale = self._scale
        return Cost(len(dirty) * scale, sent * scale, seconds * scale)
