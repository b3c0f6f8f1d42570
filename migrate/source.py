"""The source: moves a running guest, and keeps it if that fails.

    setup      HELLO, GUEST, ACCEPT, CACHE_SIZE
    active     round 1 all pages, then what was written since, until the policy is content
    device     the guest is paused: last round, digest, COMPLETE, READY
    commit     the guest is given up, COMMITTED is written, then GO: it does not run here again
    completed  RUNNING came

On any failure before the commit the dirty set is put back and the guest goes on here. After it,
only the destination's word that it never will run the guest gives it back: NOT_STARTED, or ABORTED
when it is asked. It is asked where the connection broke before it could say how it went.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from migrate.digest import Digest
from migrate.errors import (
    CancelledByPeer,
    HandOverUnknown,
    MigrationError,
    MismatchError,
    NotConvergedError,
    NotStartedError,
    PeerError,
    PeerLost,
    UsageError,
    code_of,
    failure_of,
    peer_error,
)
from migrate.feeder import Feeder, Turn
from migrate.guests.guest import Guest
from migrate.handover import ask, written
from migrate.journal import Journal, JournalError
from migrate.link import SEND_HIGH, Link, close_all, give_reason_on
from migrate.rounds import DowntimeModel, Limits, Measured, Pending, Policy, Verdict
from migrate.statistics import Statistics
from migrate.tracking import DirtyTracker
from proto import LocalError, ProtoError
from proto import capabilities as caps
from proto.frames import HEADER_BYTES
from proto.kernel import PageCache, PageEncoder, PageHashes
from proto.messages import (
    MAX_CHANNELS,
    MAX_STATE,
    SEED_BYTES,
    TOKEN_BYTES,
    Accept,
    CacheSize,
    Complete,
    Done,
    Error,
    Go,
    GuestInfo,
    Hello,
    Join,
    Joined,
    Message,
    Ready,
    Round,
    RoundAck,
    Running,
    batch_bytes,
)
from proto.ownership import FINAL, Claim, Event, Role
from proto.pageset import PageSet

PAGE_SIZES = (1024, 2048, 4096, 8192, 16384)
DEFAULT_CACHE_SIZE = 64 << 20
# Inside a round, statistics are brought up to date no more often.
UPDATE_SECONDS = 0.05
HANDSHAKE_SECONDS = 15.0
HAND_OVER_SECONDS = 60.0
RESOLVE_SECONDS = 60.0
ASK_AGAIN_SECONDS = (0.1, 3.0)
# A pause that takes so many times what was predicted, and this long, is given up: the guest has
# been stopped long enough, and it is still ours.
PAUSE_FACTOR = 10
PAUSE_SECONDS = 5.0


@dataclass(frozen=True)
class Parameters:
    """What a user can set. Names are QEMU's; sizes in bytes, times in seconds.

    Raises UsageError for what cannot be.
    """

    cache_size: int = DEFAULT_CACHE_SIZE
    page_size: int = 4096
    limits: Limits = field(default_factory=Limits)
    channels: int = 1
    capabilities: Mapping[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.page_size not in PAGE_SIZES:
            raise UsageError(f"a page of {self.page_size} bytes: it is one of {PAGE_SIZES}")
        if self.cache_size < self.page_size or self.cache_size & (self.cache_size - 1):
            raise UsageError(
                f"a cache of {self.cache_size} bytes: it is a power of two of at least one page"
            )
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise UsageError(f"{self.channels} channels: there can be 1 to {MAX_CHANNELS}")
        try:
            caps.switched_on(self.capabilities)
        except LocalError as error:
            raise UsageError(str(error)) from None


T = TypeVar("T")
Observer = Callable[[str, Statistics], None]


class Source:
    """One migration of one guest over one link.

    journal  -- the directory of the journals; "" keeps this one's in memory
    address  -- the destination's, for whoever has to ask it later
    resolve_timeout -- seconds to find out whose the guest is after a break in the hand-over
    observer -- called with ("round" | "progress" | "notice: ...", statistics) as things happen
    dial     -- connects to the destination once more, for channels beside `link`
    """

    def __init__(
        self, guest: Guest, link: Link, parameters: Parameters | None = None,
        observer: Observer | None = None, dial: Callable[[], Awaitable[Link]] | None = None,
        *, journal: str = "", resolve_timeout: float = RESOLVE_SECONDS, address: str = "",
    ) -> None:  # fmt: skip
        self.guest = guest
        self.link = link
        self.parameters = parameters or Parameters()
        self.statistics = Statistics(total=guest.memory.size, page_size=self.parameters.page_size)
        self.committed = False
        self._observer = observer or (lambda _event, _statistics: None)
        self._dial = dial
        self._journals = journal
        self._journal = Journal(Role.SOURCE, bytes(TOKEN_BYTES))
        self._resolve_timeout = resolve_timeout
        self._address = address
        self._links = [link]
        self._worker = ThreadPoolExecutor(1, "encode")
        self._inbox: asyncio.Queue[Message] = asyncio.Queue(64)
        self._model = DowntimeModel()
        self._policy = Policy(self.parameters.limits, self._model)
        self._pages = -(-guest.memory.size // self.parameters.page_size)
        self._began = time.monotonic()
        self._encoder: PageEncoder | None = None
        self._feeder: Feeder | None = None
        self._cache: PageCache | None = None
        self._wanted_cache = 0
        self._cache_size = 0
        self._lane_readers: list[asyncio.Task[None]] = []
        self._unsent: PageSet | None = None
        self._tracker: DirtyTracker | None = None
        self._round = 0
        self._peer_stale = 0
        self._round_began = self._began
        self._round_sent = 0
        self._round_left = 0
        self._next_update = 0.0
        self._paused_at: float | None = None
        self._sent_before_pause = 0
        link.limit.rate = self.parameters.limits.max_bandwidth

    @property
    def sent_bytes(self) -> int:
        """Over all channels."""
        return sum(link.sent_bytes for link in self._links)

    # -- the whole of it

    async def run(self) -> Statistics:
        """Migrates. Returns the final statistics.

        Raises MigrationError (see migrate.errors) or asyncio.CancelledError; unless `committed`,
        the guest runs on here then.
        """
        self._began = time.monotonic()
        try:
            try:
                await self._over_the_link()
            except BaseException as raised:
                error = _the_cause(raised)
                if not self.committed:
                    raise error from None
                await self._find_out(error)
        except BaseException as raised:
            error = _the_cause(raised)
            failure = self._failure(error)
            await self._give_reason(error, failure)
            if failure is None:
                raise
            raise failure from error
        finally:
            self._worker.shutdown(wait=True)
            self._journal.close()
            with contextlib.suppress(BaseException):
                await asyncio.shield(close_all(self._links))
            self._update()
        return self.statistics

    async def _over_the_link(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._readers = group
            reader = group.create_task(self._read())
            try:
                await self._migrate()
            finally:
                for task in (reader, *self._lane_readers):
                    task.cancel()

    def _failure(self, error: BaseException) -> MigrationError | None:
        """The error as a user sees it; None for a cancellation."""
        failure = failure_of(error, "the guest's memory cannot be read")
        cancelled = failure is None
        if self.committed and not isinstance(failure, HandOverUnknown):
            failure = self._unknown(str(failure or "interrupted"))
        self._set_status("cancelled" if cancelled else "failed", str(failure or ""))
        return failure

    def _unknown(self, why: str) -> HandOverUnknown:
        text = (
            "the guest was handed over, but the destination has not confirmed that it runs "
            f"({why}): look there first; here it stays paused"
        )
        if self._journals:
            text += f"; `migrate-src resolve {self._journal.name}` asks again"
        return HandOverUnknown(text)

    async def _give_reason(self, error: BaseException, failure: MigrationError | None) -> None:
        """Tells the peer why, where it can still hear."""
        if isinstance(error, PeerLost | CancelledByPeer):
            return
        reason = str(failure or "cancelled at the source")
        await give_reason_on(self._links, code_of(error, failure), reason)

    async def _read(self) -> None:
        """Sorts what the destination says."""
        while True:
            message = await self.link.receive_message()
            if isinstance(message, CacheSize):
                self.set_cache_size(message.size)
            elif isinstance(message, Error) and not self.committed:
                raise peer_error(message)
            else:
                await self._inbox.put(message)
                if isinstance(message, Running | Error):
                    return

    async def _read_lane(self, lane: Link) -> None:
        """A further channel has nothing to say but why it ends; after the commit, not even that."""
        try:
            message = await lane.receive_message()
        except PeerLost:
            if self.committed:
                return
            raise
        if isinstance(message, Error):
            if self.committed:
                return  # the first channel says so too, and the answer to GO is taken there alone
            raise peer_error(message)
        raise PeerError(f"{type(message).__name__} came on a channel that only carries pages")

    async def _expect(self, kind: type[T]) -> T:
        message = await self._inbox.get()
        if isinstance(message, Error):
            raise peer_error(message)
        if not isinstance(message, kind):
            raise PeerError(f"{type(message).__name__} came where {kind.__name__} was due")
        return message

    async def _migrate(self) -> None:
        try:
            encoder, digest = await self._set_up()
            await self._rounds(encoder, digest)
            await self._hand_over(encoder, digest)
        except BaseException:
            if not self.committed:
                await asyncio.shield(self._keep_guest())
            raise

    async def _keep_guest(self) -> None:
        """Undoes everything: no dirty page forgotten, the guest runs here."""
        if self._tracker is not None and self._unsent is not None:
            self._tracker.put_back(self._unsent)
        if self._paused_at is not None:
            await self.guest.resume()
            self._paused_at = None

    # -- setup

    async def _set_up(self) -> tuple[PageEncoder, Digest]:
        self._set_status("setup")
        parameters = self.parameters
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                hello = caps.offer(caps.switched_on(parameters.capabilities))
                await self.link.send(hello)
                answer = await self._expect(Hello)
                agreement = caps.agree(hello, answer)
                if self._pages > answer.max_pages:
                    raise MigrationError(
                        f"the guest has {self._pages} pages, the destination takes no more than "
                        f"{answer.max_pages}: use a larger --page-size"
                    )
                for name in sorted(agreement.dropped):
                    self._notice(f"the destination has no {name}: it is not used")
                memory = self.guest.memory
                await self.link.send(
                    GuestInfo(
                        self.guest.kind,
                        memory.size,
                        parameters.page_size,
                        seed := os.urandom(SEED_BYTES),
                        parameters.channels,
                        self.guest.description,
                    )
                )
                accept = await self._expect(Accept)
                self._journal = Journal(Role.SOURCE, accept.token, self._journals)
                await asyncio.to_thread(
                    self._journal.begin, guest=self.guest.facts(), address=self._address,
                    description=self.guest.description,
                )  # fmt: skip
                await self._open_channels(accept.token)
                self._model.round_trip = min([await self.link.round_trip() for _ in range(3)])
        except TimeoutError:
            raise PeerLost(
                f"the destination does not answer within {HANDSHAKE_SECONDS:g} s"
            ) from None
        page_size = parameters.page_size
        if agreement.xbzrle:
            self._cache_size = parameters.cache_size
            self._cache = PageCache(self._useful(parameters.cache_size), page_size)
        hashes = PageHashes(self._pages, page_size, seed)
        encoder = PageEncoder(
            hashes,
            self._cache,
            merge=agreement.merge,
            headroom=HEADER_BYTES,
            room=batch_bytes(parameters.channels),
        )
        digest = Digest(memory, hashes)
        self._encoder = encoder
        self._feeder = Feeder(memory, encoder)
        self._tracker = self.guest.track(encoder)
        self._wanted_cache = parameters.cache_size
        await self.link.send(CacheSize(self._cache_size))
        self.statistics = self.statistics.with_(
            capabilities={"xbzrle": agreement.xbzrle},
            channels=parameters.channels,
            setup_time=time.monotonic() - self._began,
            cache_size=self._cache_size,
            remaining=memory.size,
        )
        return encoder, digest

    async def _open_channels(self, token: bytes) -> None:
        """Opens the further channels, all at once: one after the other costs two round trips each,
        and a second for each SYN that is lost."""
        async with asyncio.TaskGroup() as group:
            for channel in range(1, self.parameters.channels):
                group.create_task(self._open_channel(channel, token))
        self._links.sort(key=lambda link: link.session.channel)
        for link in self._links:
            # All of them together queue what a single one would, and a batch each.
            link.bound_sending(SEND_HIGH // len(self._links))
            if link is not self.link:
                self._lane_readers.append(self._readers.create_task(self._read_lane(link)))

    async def _open_channel(self, channel: int, token: bytes) -> None:
        if self._dial is None:
            raise UsageError("several channels need a way to connect again")
        lane = await self._dial()
        lane.limit = self.link.limit
        self._links.append(lane)
        await lane.send(Join(token, channel))
        lane.session.channel = channel
        answer = await lane.receive_message()
        if isinstance(answer, Error):
            raise peer_error(answer)
        if not isinstance(answer, Joined):
            raise PeerError(f"{type(answer).__name__} came where JOINED was due")

    def set_cache_size(self, size: int) -> None:
        """Asks for another cache size; it is in force within a batch, keeping what still fits."""
        if self._cache is not None and size >= self.parameters.page_size and not size & (size - 1):
            self._wanted_cache = size
        else:
            self._notice(f"a cache size of {size} bytes cannot be used: powers of two only")

    def _useful(self, size: int) -> int:
        """What of a cache size this guest can fill: any pages fit together, so no more than it."""
        whole = 1 << (self._pages * self.parameters.page_size - 1).bit_length()
        return min(size, max(whole, self.parameters.page_size))

    # -- rounds

    async def _rounds(self, encoder: PageEncoder, digest: Digest) -> None:
        assert self._tracker is not None
        loop = asyncio.get_running_loop()
        self._set_status("active")
        await loop.run_in_executor(self._worker, self._tracker.start)
        dirty = PageSet.full(self._pages)
        while True:
            began = time.monotonic()
            measured = await self._send_round(encoder, digest, dirty, last=False)
            self._model.learn(measured)
            dirty = await loop.run_in_executor(self._worker, self._tracker.take)
            self._unsent = dirty
            self._model.learn_digest(digest.hashed, digest.seconds, peer=False)
            elapsed = time.monotonic() - began
            self.statistics = self.statistics.with_(
                dirty_pages_rate=len(dirty) / elapsed if elapsed else 0.0,
                remaining=min(len(dirty) * encoder.page_size, self.guest.memory.size),
            )
            # Where nothing stops the guest, looking for what changed keeps nobody waiting.
            scan = self._tracker.take_seconds
            if self.guest.marks or not self.guest.stoppable:
                scan = 0.0
            pending = Pending(len(dirty), max(digest.stale(dirty.bits), self._peer_stale), scan)
            decision = self._policy.decide(self._round, time.monotonic() - self._began, pending)
            self.statistics = self.statistics.with_(expected_downtime=decision.expected_downtime)
            self._update()
            self._observer("round", self.statistics)
            if decision.verdict is Verdict.ABORT:
                raise NotConvergedError(f"the migration was given up: {decision.reason}")
            if decision.verdict is Verdict.STOP_AND_COPY:
                return

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
        pages = self._round_left = len(dirty)
        async with asyncio.TaskGroup() as group:
            for channel in range(len(self._links)):
                group.create_task(self._send_channel(dirty, channel, last))
        self.statistics = self.statistics.with_(dirty_sync_count=self._round)
        transferred = self.sent_bytes - sent_before
        for link in reversed(self._links):
            await link.send(Round(self._round, pages, transferred, last))
        if last:
            await loop.run_in_executor(self._worker, digest.settle)
            return Measured(pages, transferred, 0.0, 0.0, 0.0)
        if self.guest.marks:
            await loop.run_in_executor(self._worker, digest.settle, dirty.bits)
        ack = await self._expect(RoundAck)
        if ack.number != self._round:
            raise PeerError(f"round {ack.number} was confirmed while {self._round} was due")
        self._unsent = None
        self._peer_stale = ack.stale_pages
        self._model.learn_digest(ack.settled_pages, ack.settle_seconds, peer=True)
        wall = max(time.monotonic() - began - ack.settle_seconds, 1e-9)
        self.statistics = self.statistics.with_(
            pages_per_second=pages / wall, mbps=transferred * 8 / wall / 1e6
        )
        return Measured(
            pages, transferred, wall, self._feeder.seconds - cpu_before, ack.apply_seconds
        )

    async def _send_channel(self, dirty: PageSet, channel: int, last: bool) -> None:
        """Sends what a channel can take of a round: the next batch is made while one goes out."""
        loop = asyncio.get_running_loop()
        link = self._links[channel]
        turn = loop.run_in_executor(self._worker, self._turn, dirty, channel)
        try:
            while True:
                batch, done, over = await turn
                if not over:
                    turn = loop.run_in_executor(self._worker, self._turn, dirty, channel)
                if batch is not None:
                    await link.send_batch(*batch)
                    batch = None  # its memory is free again when the transport is done with it
                self._round_left -= done
                await self._confirm_cache()
                self._check_timeout(last)
                if time.monotonic() >= self._next_update:
                    self._next_update = time.monotonic() + UPDATE_SECONDS
                    self._update(left=self._round_left)
                if over:
                    return
        finally:
            turn.cancel()

    def _turn(self, dirty: PageSet, channel: int) -> Turn:
        """In the worker thread: the next batch, after a change of the cache's size."""
        assert self._feeder is not None
        if self._cache is not None and self._wanted_cache != self._cache_size:
            self._cache.resize(self._useful(self._wanted_cache))
            self._cache_size = self._wanted_cache
        return self._feeder.turn(dirty, channel, holes=self._round == 1)

    async def _confirm_cache(self) -> None:
        """Tells the destination the size in force, and counts it."""
        size = self._cache_size
        if size != self.statistics.cache_size:
            self.statistics = self.statistics.with_(cache_size=size)
            await self.link.send(CacheSize(size))

    # -- hand-over

    async def _hand_over(self, encoder: PageEncoder, digest: Digest) -> None:
        self._set_status("device")
        before = self.sent_bytes
        self._paused_at = time.monotonic()
        await self.guest.pause()
        self._observer("paused", self.statistics)
        expected = self.statistics.expected_downtime or 0.0
        patience = max(PAUSE_SECONDS, PAUSE_FACTOR * expected)
        try:
            async with asyncio.timeout(patience):
                await self._last_round(encoder, digest)
        except TimeoutError:
            raise PeerLost(
                f"the last round and its check were not done after {patience:.0f} s, "
                f"{expected * 1e3:.0f} ms were expected"
            ) from None
        self._sent_before_pause = before
        await self.guest.give_up()
        self.committed = True
        try:
            await written(self._journal, Event.READY)
        except JournalError:
            await self.guest.take_back()
            self.committed = False
            raise
        await self._commit()
        await self._done()

    async def _done(self) -> None:
        """It runs over there."""
        assert self._paused_at is not None
        self.statistics = self.statistics.with_(
            downtime=time.monotonic() - self._paused_at,
            downtime_bytes=self.sent_bytes - self._sent_before_pause,
            remaining=0,
            dirty_pages_rate=0.0,
        )
        self._set_status("completed")
        self._update()
        await self.guest.release()

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
        await self.link.send(Complete(whole, state))
        await self._expect(RoundAck)
        await self._expect(Ready)
        if not self.guest.stoppable:
            late = await loop.run_in_executor(self._worker, self._tracker.take)
            if len(late):
                raise MismatchError(
                    f"{len(late)} pages were written during the last round, so the memories "
                    "differ: stop the writer (--pid or --pause-cmd)"
                )

    async def _commit(self) -> None:
        """GO, and the answer. The guest runs there, or nowhere until somebody looks."""
        try:
            async with asyncio.timeout(HAND_OVER_SECONDS):
                await self.link.send(Go())
                await self._expect(Running)
        except NotStartedError:
            await written(self._journal, Event.NOT_STARTED, must=False)
            await self._take_back()
            raise
        except TimeoutError:
            raise PeerLost(f"no answer to GO for {HAND_OVER_SECONDS:g} s") from None
        await written(self._journal, Event.RUNNING, must=False)
        with contextlib.suppress(PeerLost, ProtoError):
            await self.link.send(Done())

    async def _take_back(self) -> None:
        """It will never run over there: it is ours again, and still paused."""
        await self.guest.take_back()
        self.committed = False

    async def _find_out(self, error: BaseException) -> None:
        """The connection broke after the commit: asks until it is known whose the guest is.

        Returns where it runs over there. Raises NotStartedError where it is ours again, and runs;
        HandOverUnknown where that is not to be found out in time.
        """
        why = str(error) or type(error).__name__
        if self._journal.claim is Claim.COMMITTED:
            if isinstance(error, asyncio.CancelledError) or self._dial is None:
                raise self._unknown("interrupted" if not str(error) else why) from error
            self._notice(f"the hand-over was cut off ({why}): asking whose the guest is")
            try:
                async with asyncio.timeout(self._resolve_timeout):
                    await self._ask(self._dial)
            except TimeoutError:
                raise self._unknown(why) from error
        if self._journal.claim is Claim.DONE:
            await self._done()
            return
        await self._take_back()
        await self._keep_guest()
        raise NotStartedError(
            f"the hand-over was cut off ({why}), and the destination has given the guest up"
        )

    async def _ask(self, dial: Callable[[], Awaitable[Link]]) -> None:
        pause, longest = ASK_AGAIN_SECONDS
        while True:
            with contextlib.suppress(MigrationError, ProtoError, TimeoutError, OSError):
                link = await dial()
                try:
                    if await ask(link, self._journal) in FINAL:
                        return
                finally:
                    await link.close()
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest)

    # -- statistics

    def _set_status(self, status: str, error: str = "") -> None:
        self.statistics = self.statistics.with_(status=status, error=error)

    def _notice(self, text: str) -> None:
        self._observer(f"notice: {text}", self.statistics)

    def _check_timeout(self, last: bool) -> None:
        """--timeout holds inside a round too, until the guest is paused."""
        timeout = self.parameters.limits.timeout
        elapsed = time.monotonic() - self._began
        if timeout and elapsed > timeout and not last:
            raise NotConvergedError(
                f"the migration was given up: round {self._round} was not through after "
                f"{elapsed:.0f} s (--timeout)"
            )

    def _update(self, left: int | None = None) -> None:
        """Brings the counters into the statistics; `left` pages of the round are to go."""
        s = self.statistics
        encoder = self._encoder
        if encoder is not None:
            s = s.with_(
                duplicate=encoder.zero,
                normal=encoder.raw,
                skipped=encoder.unchanged,
                xbzrle_bytes=encoder.delta_bytes,
                xbzrle_pages=encoder.delta,
                cache_hits=encoder.hits,
                cache_miss=encoder.misses,
                overflow=encoder.overflows,
                evictions=self._cache.evictions if self._cache else 0,
            )
        transferred = self.sent_bytes
        if left is not None:
            seconds = max(time.monotonic() - self._round_began, 1e-9)
            s = s.with_(
                remaining=min(left * s.page_size, s.total),
                mbps=(transferred - self._round_sent) * 8 / seconds / 1e6,
            )
        s = s.with_(
            transferred=transferred,
            channel_bytes=transferred - self.link.sent_bytes,
            total_time=time.monotonic() - self._began,
            precopy_bytes=transferred - s.downtime_bytes,
        )
        self.statistics = s
        if left is not None:
            self._observer("progress", s)


def _the_cause(error: BaseException) -> BaseException:
    """What stands inside nested exception groups: a fault rather than a cancellation."""
    while isinstance(error, BaseExceptionGroup):
        faults = [e for e in error.exceptions if not isinstance(e, asyncio.CancelledError)]
        error = (faults or list(error.exceptions))[0]
    return error
