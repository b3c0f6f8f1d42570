"""One attempt to send the pages of a guest: rounds, then the last one with the guest stopped.

    active     round after round, each with what was written since, until the policy is content
    device     the guest is stopped: last round, digest, COMPLETE, READY

In a round, each channel has a task that sends one batch while the worker makes the next. A round is
over when the destination has applied all of it; only then are its pages no longer in flight.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

from migrate.errors import MigrationError, MismatchError, PeerError
from migrate.events import SourceEvent
from migrate.guests.guest import MemoryGuest
from migrate.memory.dirty import DirtyTracker
from migrate.policy.advice import switch_notice
from migrate.policy.convergence import Verdict
from migrate.policy.downtime import SIDES, PendingWork, RoundCost
from migrate.runtime.cancellation import checked
from migrate.source.batches import PageCounts
from migrate.source.convergence_control import ConvergenceControl
from migrate.source.page_sender import PageSender
from migrate.source.pause import GuestPause
from migrate.source.second_stage import Batch
from migrate.source.transfer import Pause, TransferContext
from migrate.statistics import Status
from migrate.transport.channels import Channels
from migrate.units import format_size, option_size
from proto.codec.pageset import PageSet
from proto.wire.messages import MAX_STATE, Complete, Ready, Round, RoundAck

# A pause that takes this many times the prediction, and at least this many seconds, is given up:
# the guest has been stopped long enough, and it is still ours.
PAUSE_FACTOR = 10
PAUSE_SECONDS = 5.0


class PageRounds:
    """The rounds of one attempt, over its channels."""

    def __init__(
        self, guest: MemoryGuest, channels: Channels, sender: PageSender,
        control: ConvergenceControl, pausing: GuestPause, context: TransferContext,
    ) -> None:  # fmt: skip
        self._guest = guest
        self._channels = channels
        self._sender = sender
        self._control = control
        self._pausing = pausing
        self._context = context
        self._telemetry = context.telemetry
        # Stale pages of the destination after the last round: it hashes them in the pause.
        self._peer_stale = 0
        # Pages of this round that are still to be sent; when it began, and bytes sent by then.
        self._left = 0
        self._began, self._sent_before = time.monotonic(), 0

    async def run(self, dirty: PageSet) -> Pause:
        """Send the dirty pages, and rounds until the destination is READY."""
        await self._converge(dirty)
        return await self._stop_and_copy()

    async def _converge(self, dirty: PageSet) -> None:
        """Send rounds until the policy decides to stop the guest. Raises NotConvergedError."""
        context, sender, control = self._context, self._sender, self._control
        digest = sender.digest
        self._telemetry.set_status(Status.ACTIVE)
        while True:
            began = time.monotonic()
            cost = await self._send_round(dirty, last=False)
            control.model.learn(cost)
            dirty = await context.in_worker(sender.take)
            self._report_tracking(sender.tracker)
            await context.in_worker(self._guest.check)
            await context.in_worker(sender.sample_heat)
            control.model.learn_digest(digest.hashed, digest.seconds, peer=False)
            seconds = time.monotonic() - began
            pending = await self._pending_work(dirty, seconds)
            decision = await control.decide(cost, pending, seconds)
            self._telemetry.refresh(**sender.counters())
            self._telemetry.emit(SourceEvent.ROUND_DONE)
            control.check(decision, pending)
            if decision.verdict is Verdict.STOP_AND_COPY:
                return
            await self._tune(cost)

    async def _pending_work(self, dirty: PageSet, seconds: float) -> PendingWork:
        """Return what is left to do if the guest is stopped now, after a round of `seconds`."""
        guest, sender, pages = self._guest, self._sender, len(dirty)
        rate = pages / seconds if seconds else 0.0
        self._telemetry.change(dirty_pages_rate=rate, remaining=sender.bytes_of(pages))
        stale = await self._context.in_worker(sender.digest.rehearse, dirty.bits)
        return PendingWork(
            pages, max(stale, self._peer_stale), sender.tracker.take_seconds + guest.stop_seconds,
            rate, SIDES * sender.digest.whole_seconds, guest.check_seconds, guest.stoppable,
        )  # fmt: skip

    def _report_tracking(self, tracker: DirtyTracker) -> None:
        """Report how the written pages were found, and how long that took."""
        self._telemetry.change(tracking=tracker.method.value, tracking_time=tracker.take_seconds)
        for text in tracker.collect_notices():
            self._telemetry.notice(text)

    async def _tune(self, cost: RoundCost) -> None:
        """Switch deltas, or change the size of their cache, for the next round."""
        sender, cache = self._sender, self._context.settings.cache
        switched = await self._context.in_worker(sender.tune, cost, self._control.bandwidth)
        if switched and sender.tuning.switch is not None:
            self._telemetry.notice(switch_notice(sender.tuning.switch))
        if not cache.fixed and cache.wanted != cache.size:
            self._telemetry.notice(
                f"the working set is about {format_size(sender.working.size)}: the cache is "
                f"{option_size(cache.wanted)} now"
            )

    # -- a round

    async def _send_round(self, dirty: PageSet, *, last: bool) -> RoundCost:
        """Send the dirty pages and wait until the destination has applied them.

        The last round is confirmed together with COMPLETE; its cost has no times.
        """
        sender, telemetry, context = self._sender, self._telemetry, self._context
        began = self._began = time.monotonic()
        self._sent_before = telemetry.sent_bytes
        encoded_before, saved_before = sender.batches.seconds, sender.stage.saved
        sender.begin_round()
        telemetry.emit(SourceEvent.ROUND_BEGUN)
        pages = self._left = len(dirty)
        async with asyncio.TaskGroup() as group:
            for channel in range(len(self._channels.links)):
                group.create_task(self._send_pages(dirty, channel, last=last))
        telemetry.change(dirty_sync_count=sender.round)
        sent = telemetry.sent_bytes - self._sent_before
        # The first channel comes last: when its ROUND arrives, those of the others are on their
        # way.
        for link in reversed(self._channels.links):
            await link.send(Round(sender.round, pages, sent, last))
        if last:
            await context.in_worker(sender.digest.settle)
            return RoundCost(pages, sent, 0.0, 0.0, 0.0)
        if self._guest.marks:
            await context.in_worker(sender.digest.settle, dirty.bits)
        ack = await self._acknowledged()
        if pages:
            context.reconnection.advance()
        wall = max(time.monotonic() - began - ack.settle_seconds, 1e-9)
        telemetry.change(pages_per_second=pages / wall, mbps=sent * 8 / wall / 1e6)
        encoded = sender.batches.seconds - encoded_before
        saved = sender.stage.saved - saved_before
        return RoundCost(pages, sent, wall, encoded, ack.apply_seconds, saved)

    async def _acknowledged(self) -> RoundAck:
        """Wait until the destination has applied the round, and learn from what it says."""
        ack = await checked(self._channels.expect(RoundAck), self._control.check_time)
        if ack.number != self._sender.round:
            raise PeerError(f"ROUND_ACK for round {ack.number}; expected {self._sender.round}")
        self._sender.acknowledged()
        self._peer_stale = ack.stale_pages
        self._control.model.learn_digest(ack.settled_pages, ack.settle_seconds, peer=True)
        return ack

    async def _send_pages(self, dirty: PageSet, channel: int, *, last: bool) -> None:
        """Send what this channel can take of a round."""
        context, sender = self._context, self._sender
        link = self._channels.links[channel]
        stage, channels = sender.stage, len(self._channels.links)
        # Batches that are being compressed; their memory is free again when the transport is done
        # with it.
        coming: deque[tuple[asyncio.Future[Batch], int, PageCounts]] = deque()
        turn = context.in_worker(sender.turn, dirty, channel)
        try:
            while True:
                left = self._left
                batch, done, over, counts = await turn
                if not over:
                    turn = context.in_worker(sender.turn, dirty, channel)
                if batch is None:
                    self._count(done, counts)
                else:
                    coming.append((stage.start(*batch, channel, paused=last), done, counts))
                    batch = None
                while coming and (over or coming[0][0].done() or len(coming) > stage.depth):
                    made, done, counts = coming.popleft()
                    await stage.send(link, await stage.finish(made), counts.in_batches, channels)
                    self._count(done, counts)
                    del made
                await context.confirm_cache(self._channels.link)
                if not last:
                    self._control.check_time()
                if self._left < left and self._telemetry.update_is_due():
                    self._report_progress()
                    if notice := stage.notice():
                        self._telemetry.notice(notice)
                if over:
                    return
        finally:
            turn.cancel()
            self._telemetry.change(remaining=sender.bytes_of(self._left))

    def _count(self, pages: int, counts: PageCounts) -> None:
        """Count pages of the round that have been sent, or need not be."""
        self._left -= pages
        self._sender.count(counts)

    def _report_progress(self) -> None:
        """Report the numbers in the middle of a round."""
        telemetry = self._telemetry
        seconds = max(time.monotonic() - self._began, 1e-9)
        telemetry.refresh(
            **self._sender.counters(),
            remaining=self._sender.bytes_of(self._left),
            mbps=(telemetry.sent_bytes - self._sent_before) * 8 / seconds / 1e6,
        )
        telemetry.emit(SourceEvent.PROGRESS)

    # -- the last round

    async def _stop_and_copy(self) -> Pause:
        """Stop the guest and send the rest of it. Return when the destination is READY.

        Raises PeerLost for a pause that takes too long: it is another attempt's turn.
        """
        pause = await self._pausing.begin()
        expected = self._telemetry.statistics.expected_downtime or 0.0
        patience = max(PAUSE_SECONDS, PAUSE_FACTOR * expected)
        try:
            async with asyncio.timeout(patience):
                await self._send_last_round()
                await self._check_writers()
        except TimeoutError:
            raise self._pausing.in_vain(
                f"the last round and its check were not done after {patience:.0f} s, "
                f"{expected * 1e3:.0f} ms were expected"
            ) from None
        return pause

    async def _send_last_round(self) -> None:
        """Send the rest of the stopped guest. Return when the destination has verified all."""
        context, sender = self._context, self._sender
        if self._guest.stoppable:  # else its writes are looked for once more, when all is sent
            await context.in_worker(sender.take_more)
            self._report_tracking(sender.tracker)
        await self._send_round(sender.in_flight, last=True)
        digest = await context.in_worker(sender.digest.digest)
        state = self._guest.state()
        if len(state) > MAX_STATE:
            raise MigrationError(
                f"the guest's state has {len(state)} bytes, no more than {MAX_STATE} travel"
            )
        await self._channels.link.send(Complete(digest, state))
        await self._channels.expect(RoundAck)
        await self._channels.expect(Ready)

    async def _check_writers(self) -> None:
        """Check that nothing has written the guest since its last pages were taken.

        Raises PeerLost if a process appeared in the pause and wrote, and was stopped only now: the
        next attempt sends its pages. Raises MismatchError if a guest that cannot be stopped wrote.
        """
        stopped_late = await self._guest.check_writers()
        if not stopped_late and self._guest.stoppable:
            return
        late = await self._context.in_worker(self._sender.take_more)
        if late and stopped_late:
            raise self._pausing.in_vain(
                f"a process that has appeared in the pause has written {late} pages"
            )
        if late:
            raise MismatchError(
                f"{late} pages were written during the last round, so the memories differ: stop "
                "the writer (--pid or --pause-cmd)"
            )
