"""The source of a guest whose memory can be read while it writes.

    setup      HELLO, GUEST, ACCEPT, CACHE_SIZE
    active     round 1 all pages, then what was written since, until the policy is content
    device     the guest is paused: last round, digest, COMPLETE, READY
    (then      the hand-over: see migrate.migration)

On any failure before the commit the dirty set is put back and the guest goes on here. After a
connection that broke, the destination says what it holds, and only what differs from the guest is
sent again (see `_take_stock`).
"""

from __future__ import annotations

import asyncio
import time

from migrate.advice import advice
from migrate.brake import Brake
from migrate.channels import Dial
from migrate.deltas import CacheSizing, DeltaSwitch, Lookups
from migrate.digest import Digest
from migrate.errors import (
    MigrationError,
    MismatchError,
    NoProgress,
    NotConvergedError,
    PeerError,
    PeerLost,
)
from migrate.feeder import Feeder, Turn
from migrate.guests.guest import MemoryGuest
from migrate.journal import Journal
from migrate.link import Link
from migrate.migration import MAX_PAUSES, RESOLVE_SECONDS, Migration, Observer
from migrate.parameters import Parameters
from migrate.quantities import format_size, option_size
from migrate.rounds import SIDES, DowntimeModel, Measured, Pending, Policy, Verdict
from migrate.throttle import CAPABILITY as AUTO_CONVERGE
from migrate.throttle import Look
from migrate.tracking import DirtyTracker, ScanTracker
from migrate.workingset import WorkingSet
from proto import capabilities as caps
from proto.kernel import PageEncoder, PageHashes
from proto.messages import (
    MAX_STATE,
    CacheSize,
    Complete,
    Held,
    Ready,
    Round,
    RoundAck,
)
from proto.pageset import PageSet

# Inside a round, statistics are brought up to date no more often.
UPDATE_SECONDS = 0.05
# A pause that takes so many times what was predicted, and this long, is given up: the guest has
# been stopped long enough, and it is still ours.
PAUSE_FACTOR = 10
PAUSE_SECONDS = 5.0
# A destination may lose what it had so many times, as where its program dies again and again.
MAX_BEGINNINGS = 5


class Source(Migration):
    """Sends the pages of a guest, round after round. See Migration for the parameters."""

    guest: MemoryGuest
    silent = frozenset({caps.SPARSE})

    def __init__(
        self, guest: MemoryGuest, link: Link, parameters: Parameters | None = None,
        observer: Observer | None = None, dial: Dial | None = None,
        *, retry: float = 0.0, journal: str = "", earlier: Journal | None = None,
        resolve_timeout: float = RESOLVE_SECONDS, address: str = "",
    ) -> None:  # fmt: skip
        super().__init__(
            guest, link, parameters, observer, dial, retry=retry, journal=journal, earlier=earlier,
            resolve_timeout=resolve_timeout, address=address,
        )  # fmt: skip
        self._fewest_left = self._pages
        self._model = DowntimeModel()
        self._policy = Policy(self.parameters.limits, self._model)
        self._working = WorkingSet(self.parameters.page_size)
        self._deltas: DeltaSwitch | None = None
        self._sizing: CacheSizing | None = None
        self._lookups = Lookups()
        self._delta_news = self._obstacle = ""
        self._slower_helps = False
        self._brake = Brake(guest, self._notice)
        self._encoder: PageEncoder | None = None
        self._digest: Digest | None = None
        self._feeder: Feeder | None = None
        self._unsent: PageSet | None = None
        self._tracker: DirtyTracker | None = None
        self._peer_stale = 0
        self._round_began = self._began
        self._round_sent = 0
        self._round_left = 0
        self._next_update = 0.0

    async def _transfer(self) -> None:
        encoder, digest, dirty = await self._set_up()
        await self._rounds(encoder, digest, dirty)
        await self._stop_and_copy(encoder, digest)

    async def _undo(self) -> None:
        """No dirty page is forgotten."""
        if self._tracker is not None and self._unsent is not None:
            self._tracker.put_back(self._unsent)
            self._unsent = None

    async def _let_go(self) -> None:
        await self._brake.release()
        self.statistics = self.statistics.with_(cpu_throttle_percentage=0)

    async def _end_with_all(self) -> None:
        await super()._end_with_all()
        self._brake.close()

    # -- setup

    async def _set_up(self) -> tuple[PageEncoder, Digest, PageSet]:
        """Returns what sends the pages, what hashes them, and the pages to begin with."""
        self._set_status("setup")
        parameters, resumes = self.parameters, self._resumes
        agreement, accept = await self._greet()
        link = self.channels.link
        self._model.round_trip = min([await link.round_trip() for _ in range(3)])
        if self._encoder is None:
            self._make_encoder(agreement)
        assert self._encoder is not None
        assert self._digest is not None
        self._digest.by_sum = agreement.sparse
        if accept.held and not resumes:
            raise PeerError("the destination holds pages of a guest that nobody told it to keep")
        # First the marks are taken, then memory is looked at: what is written meanwhile is marked.
        assert self._tracker is not None
        await asyncio.get_running_loop().run_in_executor(self._worker, self._tracker.start)
        if resumes:
            dirty = await self._take_stock(self._encoder, held=accept.held, sparse=agreement.sparse)
        else:
            dirty = PageSet.full(self._pages)
        await link.send(CacheSize(self._cache.size))
        self._under_way = True
        self.statistics = self.statistics.with_(
            capabilities={"xbzrle": agreement.xbzrle}
            | ({AUTO_CONVERGE: True} if parameters.auto_converge else {}),
            channels=parameters.channels,
            cache_size=self._cache.size,
            remaining=self._remaining(len(dirty)),
        )
        if not self._round:
            self.statistics = self.statistics.with_(setup_time=time.monotonic() - self._began)
        return self._encoder, self._digest, dirty

    def _make_encoder(self, agreement: caps.Agreement) -> None:
        parameters, page_size = self.parameters, self.parameters.page_size
        if agreement.xbzrle:
            if parameters.cache_max:
                most = self._cache.useful(parameters.cache_max)
                self._sizing = CacheSizing(parameters.cache_size, most, page_size)
                self._cache.wanted = self._sizing.size
            self._deltas = DeltaSwitch(page_size)
        hashes = PageHashes(self._pages, page_size, self._seed)
        encoder = self._encoder = self._new_encoder(hashes, agreement)
        self._digest = Digest(self.guest.memory, hashes)
        self._feeder = Feeder(self.guest.memory, encoder)
        self._tracker = self.guest.track(encoder)

    async def _take_stock(self, encoder: PageEncoder, *, held: bool, sparse: bool) -> PageSet:
        """What the destination lacks after an attempt that broke off.

        What it holds it says itself, by the hash of each page; that is compared with the guest, and
        at the end the digest proves it, whatever it said.
        """
        loop = asyncio.get_running_loop()
        self._peer_stale = 0
        if not held:
            self._begun_again += 1
            if self._begun_again > MAX_BEGINNINGS:
                raise NoProgress(f"the destination has lost the guest {self._begun_again} times")
            self._notice("the destination has kept nothing of the guest: beginning again")
            await loop.run_in_executor(self._worker, encoder.forget)
            self._took_stock(self._pages)
            return PageSet.full(self._pages)
        page = 0
        while page < self._pages:
            said = await self.channels.expect(Held)
            if said.first < page or (said.first > page and not sparse):
                raise PeerError(f"HELD began at page {said.first} while {page} was due")
            if said.first + len(said.hashes) // 8 > self._pages:
                raise PeerError(f"HELD goes beyond the {self._pages} pages of the guest")
            if said.first > page:  # what is left out is zeros
                zeros = encoder.adopt_zeros
                await loop.run_in_executor(self._worker, zeros, page, said.first - page)
            await loop.run_in_executor(self._worker, encoder.adopt, said.first, said.hashes)
            page = said.first + len(said.hashes) // 8
        scan = ScanTracker(self.guest.memory, encoder).take
        dirty = await loop.run_in_executor(self._worker, scan)
        self._took_stock(len(dirty))
        share = 100 * (self._pages - len(dirty)) // self._pages
        self._notice(f"resuming at {share} %: {format_size(self._remaining(len(dirty)))} to go")
        return dirty

    def _remaining(self, pages: int) -> int:
        return min(pages * self.parameters.page_size, self.guest.memory.size)

    def set_parameters(self, parameters: Parameters) -> None:
        super().set_parameters(parameters)
        self._policy.limits = self.parameters.limits

    # -- rounds

    async def _rounds(self, encoder: PageEncoder, digest: Digest, dirty: PageSet) -> None:
        assert self._tracker is not None
        loop = asyncio.get_running_loop()
        self._set_status("active")
        while True:
            began = time.monotonic()
            measured = await self._send_round(encoder, digest, dirty, last=False)
            self._model.learn(measured)
            dirty = await loop.run_in_executor(self._worker, self._tracker.take)
            self._unsent = dirty
            await loop.run_in_executor(self._worker, self.guest.check)
            self._working.learn(*await loop.run_in_executor(self._worker, encoder.survey))
            self._model.learn_digest(digest.hashed, digest.seconds, peer=False)
            elapsed, pages = time.monotonic() - began, len(dirty)
            rate = pages / elapsed if elapsed else 0.0
            self.statistics = self.statistics.with_(
                dirty_pages_rate=rate,
                remaining=self._remaining(pages),
            )
            guest, scan = self.guest, self._tracker.take_seconds + self.guest.stop_seconds
            stale = await loop.run_in_executor(self._worker, digest.rehearse, dirty.bits)
            pending = Pending(
                pages, max(stale, self._peer_stale), scan, rate, SIDES * digest.whole_seconds,
                guest.check_seconds, guest.stoppable,
            )  # fmt: skip
            await self._slow_down(pending, measured, elapsed)
            decision = self._policy.decide(self._round, time.monotonic() - self._began, pending)
            self.statistics = self.statistics.with_(expected_downtime=decision.expected_downtime)
            self._update()
            self._observer("round", self.statistics)
            if decision.verdict is Verdict.ABORT:
                raise self._given_up(
                    decision.reason, decision.obstacle, slower=decision.slower_helps
                )
            self._slower_helps = decision.slower_helps
            if decision.verdict is Verdict.STOP_AND_COPY:
                return
            await loop.run_in_executor(self._worker, self._adapt, encoder, measured)
            self._say_changes()

    async def _slow_down(self, pending: Pending, measured: Measured, seconds: float) -> None:
        """auto-converge: takes a step where nothing else helps."""
        parameters, model = self.parameters, self._model
        limits = self._policy.limits
        look = Look(
            expected=model.predict(pending, limits), seconds=seconds,
            sent_bytes=measured.wire_bytes, dirtied_bytes=pending.pages * model.bytes_per_page,
            dirtied_seconds=model.work(pending.pages, limits), still=model.overhead(pending),
        )  # fmt: skip
        slower = await self._brake.apply(
            parameters.auto_converge, parameters.throttle, limits, look
        )
        if slower:
            self._policy.begin_again(self._round, time.monotonic() - self._began)
        percentage = self._brake.percentage
        self.statistics = self.statistics.with_(
            cpu_throttle_percentage=percentage,
            cpu_throttle_highest=max(percentage, self.statistics.cpu_throttle_highest),
        )

    async def _send_round(
        self, encoder: PageEncoder, digest: Digest, dirty: PageSet, *, last: bool
    ) -> Measured:
        """Sends what is dirty, and waits until the destination has applied it."""
        loop = asyncio.get_running_loop()
        self._round += 1
        began = time.monotonic()
        assert self._feeder is not None
        sent_before, cpu_before = self.sent_bytes, self._feeder.seconds
        self._round_began, self._round_sent = began, sent_before
        self._feeder.begin_round(self._round)
        self._observer("pass", self.statistics)
        pages = self._round_left = len(dirty)
        async with asyncio.TaskGroup() as group:
            for channel in range(len(self.channels.links)):
                group.create_task(self._send_channel(dirty, channel, last))
        self.statistics = self.statistics.with_(dirty_sync_count=self._round)
        transferred = self.sent_bytes - sent_before
        for link in reversed(self.channels.links):
            await link.send(Round(self._round, pages, transferred, last))
        if last:
            await loop.run_in_executor(self._worker, digest.settle)
            return Measured(pages, transferred, 0.0, 0.0, 0.0)
        if self.guest.marks:
            await loop.run_in_executor(self._worker, digest.settle, dirty.bits)
        ack = await self.channels.expect(RoundAck)
        if ack.number != self._round:
            raise PeerError(f"round {ack.number} was confirmed while {self._round} was due")
        self._unsent = None
        if pages:
            self._progressed()
        self._peer_stale = ack.stale_pages
        self._model.learn_digest(ack.settled_pages, ack.settle_seconds, peer=True)
        wall = max(time.monotonic() - began - ack.settle_seconds, 1e-9)
        self.statistics = self.statistics.with_(
            pages_per_second=pages / wall, mbps=transferred * 8 / wall / 1e6
        )
        return Measured(
            pages, transferred, wall, self._feeder.seconds - cpu_before, ack.apply_seconds
        )

    def _adapt(self, encoder: PageEncoder, measured: Measured) -> None:
        """In the worker thread: deltas and their cache for the next round, after what this cost."""
        if self._deltas is None:
            return
        bandwidth = self._model.link_bandwidth(self.parameters.limits)
        self._delta_news = self._deltas.decide(measured, bandwidth)
        encoder.active = self._deltas.active
        before, self._lookups = (
            self._lookups,
            Lookups(encoder.hits, encoder.misses, encoder.overflows, encoder.delta_bytes),
        )
        if self._sizing is not None and encoder.active and not self._cache.fixed:
            self._cache.wanted = self._sizing.decide(self._working, self._lookups.since(before))

    def _say_changes(self) -> None:
        if self._delta_news:
            self._notice(self._delta_news)
        if not self._cache.fixed and self._cache.wanted != self._cache.size:
            self._notice(
                f"the working set is about {format_size(self._working.size)}: the cache is "
                f"{option_size(self._cache.wanted)} now"
            )

    async def _send_channel(self, dirty: PageSet, channel: int, last: bool) -> None:
        """Sends what a channel can take of a round: the next batch is made while one goes out."""
        assert self._feeder is not None
        loop = asyncio.get_running_loop()
        link = self.channels.links[channel]
        turn = loop.run_in_executor(self._worker, self._turn, dirty, channel)
        try:
            while True:
                batch, done, over, counts = await turn
                if not over:
                    turn = loop.run_in_executor(self._worker, self._turn, dirty, channel)
                if batch is not None:
                    await link.send_batch(*batch)
                    batch = None  # its memory is free again when the transport is done with it
                self._round_left -= done
                self._feeder.sent = self._feeder.sent.and_(counts)
                await self._confirm_cache()
                if not last:
                    self._check_time()
                if time.monotonic() >= self._next_update:
                    self._next_update = time.monotonic() + UPDATE_SECONDS
                    self._update(left=self._round_left)
                if over:
                    return
        finally:
            turn.cancel()
            self.statistics = self.statistics.with_(remaining=self._remaining(self._round_left))

    def _turn(self, dirty: PageSet, channel: int) -> Turn:
        """In the worker thread: the next batch, after a change of the cache's size."""
        assert self._feeder is not None
        self._cache.resize()
        return self._feeder.turn(dirty, channel, holes=self._round == 1)

    # -- hand-over

    async def _stop_and_copy(self, encoder: PageEncoder, digest: Digest) -> None:
        """Pauses the guest, and sends what is left of it; the destination has it all then."""
        self._set_status("device")
        before = self.sent_bytes
        self._paused_at = time.monotonic()
        self._pauses += 1
        await self.guest.pause()
        self._observer("paused", self.statistics)
        expected = self.statistics.expected_downtime or 0.0
        patience = max(PAUSE_SECONDS, PAUSE_FACTOR * expected)
        try:
            async with asyncio.timeout(patience):
                await self._last_round(encoder, digest)
        except TimeoutError:
            raise self._pause_lost(
                f"the last round and its check were not done after {patience:.0f} s, "
                f"{expected * 1e3:.0f} ms were expected"
            ) from None
        self._sent_before_pause = before

    def _pause_lost(self, why: str) -> MigrationError:
        """The guest was stopped for nothing; some of that is survived, as a break is."""
        kind = PeerLost if self._pauses < MAX_PAUSES else MigrationError
        return kind(why)

    async def _last_round(self, encoder: PageEncoder, digest: Digest) -> None:
        """Sends the rest of the paused guest; returns when the destination has verified all."""
        assert self._tracker is not None
        assert self._unsent is not None
        loop = asyncio.get_running_loop()
        dirty = self._unsent
        if self.guest.stoppable:  # else there is one more look, when all is over
            dirty |= await loop.run_in_executor(self._worker, self._tracker.take)
        await self._send_round(encoder, digest, dirty, last=True)
        whole = await loop.run_in_executor(self._worker, digest.digest)
        state = self.guest.state()
        if len(state) > MAX_STATE:
            raise MigrationError(
                f"the guest's state has {len(state)} bytes, no more than {MAX_STATE} travel"
            )
        await self.channels.link.send(Complete(whole, state))
        await self.channels.expect(RoundAck)
        await self.channels.expect(Ready)
        stopped_late = await self.guest.check_writers()
        if stopped_late or not self.guest.stoppable:
            late = await loop.run_in_executor(self._worker, self._tracker.take)
            if len(late) and stopped_late:
                raise self._pause_lost(
                    f"a process that has appeared in the pause has written {len(late)} pages"
                )
            if len(late):
                raise MismatchError(
                    f"{len(late)} pages were written during the last round, so the memories "
                    "differ: stop the writer (--pid or --pause-cmd)"
                )

    # -- statistics

    def _check_time(self) -> None:
        """--timeout holds inside a round too."""
        timeout = self.parameters.limits.timeout
        elapsed = time.monotonic() - self._began
        if timeout and elapsed > timeout:
            raise self._given_up(
                f"round {self._round} was not through after {elapsed:.0f} s (--timeout)",
                slower=self._slower_helps,
            )

    def _given_up(
        self, reason: str, obstacle: str = "", *, slower: bool = False
    ) -> NotConvergedError:
        """`obstacle` is a part of `reason`; what else could be set otherwise is said behind it.

        slower -- what the guest writes is the obstacle: it would help to slow it
        """
        self._obstacle = obstacle
        self._update()
        if self._brake.percentage:
            reason = f"{reason} (the guest was slowed by {self._brake.percentage} %)"
        elif slower and self.guest.can_throttle and not self.parameters.auto_converge:
            reason = f"{reason}; or slow the guest with --auto-converge"
        return NotConvergedError(
            "; ".join([f"the migration was given up: {reason}", *self._found()])
        )

    def _found(self) -> tuple[str, ...]:
        return advice(
            self.statistics, self._working, self._deltas,
            cache_max=self._sizing.most if self._sizing and not self._cache.fixed else 0,
            bandwidth=self._model.link_bandwidth(self.parameters.limits),
        )  # fmt: skip

    def _advise(self) -> None:
        """What the numbers of a migration that has ended mean."""
        if self._encoder is not None:
            self._working.learn(*self._encoder.survey())
        found = self._found() if self._round > 1 else ()
        if self._obstacle:
            found = (self._obstacle, *found)
        self.statistics = self.statistics.with_(advice=found)

    def _update(self, left: int | None = None) -> None:
        """Brings the counters into the statistics; `left` pages of the round are to go."""
        s = self.statistics
        encoder, feeder = self._encoder, self._feeder
        if encoder is not None and feeder is not None:
            s = s.with_(
                **feeder.sent._asdict(),
                xbzrle_active=encoder.active,
                evictions=self._cache.evictions,
            )
        if left is not None:
            seconds = max(time.monotonic() - self._round_began, 1e-9)
            s = s.with_(
                remaining=self._remaining(left),
                mbps=(self.sent_bytes - self._round_sent) * 8 / seconds / 1e6,
            )
        self.statistics = s
        super()._update()
        if left is not None:
            self._observer("progress", self.statistics)
