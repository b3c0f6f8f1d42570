"""The source: moves a running guest, and keeps it if that fails.

    setup      HELLO, GUEST, ACCEPT, CACHE_SIZE
    active     round 1 all pages, then what was written since, until the policy is content
    device     the guest is paused: last round, digest, COMPLETE, READY
    commit     the guest is given up, then GO: from here on it never runs here again
    completed  RUNNING came

On any failure before the commit the dirty set is put back and the guest goes on here. After it,
only the destination's word that it never started the guest (ERROR, NOT_STARTED) gives it back.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import time
from array import array
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from migrate.digest import ChunkDigests
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
    peer_error,
)
from migrate.guests.guest import Guest
from migrate.link import Link
from migrate.rounds import DowntimeModel, Limits, Measured, Pending, Policy, Verdict
from migrate.statistics import Statistics
from migrate.tracking import DirtyTracker
from proto import ErrorCode, LocalError, ProtoError
from proto import capabilities as caps
from proto.frames import HEADER_BYTES, seal
from proto.kernel import PageCache, PageEncoder
from proto.messages import (
    BATCH_BYTES,
    MAX_STATE,
    Accept,
    CacheSize,
    Complete,
    Error,
    Go,
    GuestInfo,
    Hello,
    Message,
    MessageType,
    Ready,
    Round,
    RoundAck,
    Running,
)
from proto.pageset import PageSet

PAGE_SIZES = (1024, 2048, 4096, 8192, 16384)
DEFAULT_CACHE_SIZE = 64 << 20
# Pages copied and encoded at a time: they stay in the core's own cache.
GATHER_BYTES = 256 << 10
# A worker's turn ends with a full batch, or after this many pages without one.
TURN_PAGES = 1 << 14
HANDSHAKE_SECONDS = 15.0
HAND_OVER_SECONDS = 60.0
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
    capabilities: Mapping[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.page_size not in PAGE_SIZES:
            raise UsageError(f"a page of {self.page_size} bytes: it is one of {PAGE_SIZES}")
        if self.cache_size < self.page_size or self.cache_size & (self.cache_size - 1):
            raise UsageError(
                f"a cache of {self.cache_size} bytes: it is a power of two of at least one page"
            )
        try:
            caps.switched_on(self.capabilities)
        except LocalError as error:
            raise UsageError(str(error)) from None


T = TypeVar("T")
Observer = Callable[[str, Statistics], None]


class Source:
    """One migration of one guest over one link.

    observer -- called with ("round" | "progress" | "notice: ...", statistics) as things happen
    """

    def __init__(
        self, guest: Guest, link: Link, parameters: Parameters | None = None,
        observer: Observer | None = None,
    ) -> None:  # fmt: skip
        self.guest = guest
        self.link = link
        self.parameters = parameters or Parameters()
        self.statistics = Statistics(total=guest.memory.size, page_size=self.parameters.page_size)
        self.committed = False
        self._observer = observer or (lambda _event, _statistics: None)
        self._worker = ThreadPoolExecutor(1, "encode")
        self._inbox: asyncio.Queue[Message] = asyncio.Queue(64)
        self._model = DowntimeModel()
        self._policy = Policy(self.parameters.limits, self._model)
        self._pages = -(-guest.memory.size // self.parameters.page_size)
        per_turn = GATHER_BYTES // self.parameters.page_size
        # Page-aligned: copying to a bytearray, which is not, takes three times as long.
        self._snapshot = memoryview(mmap.mmap(-1, GATHER_BYTES))
        self._numbers = memoryview(array("Q", bytes(8 * per_turn)))
        self._left = (0, 0)
        self._encode_seconds = 0.0
        self._began = time.monotonic()
        self._cache: PageCache | None = None
        self._wanted_cache = 0
        self._cache_size = 0
        self._unsent: PageSet | None = None
        self._tracker: DirtyTracker | None = None
        self._round = 0
        self._peer_stale = 0
        self._round_began = self._began
        self._round_sent = 0
        self._paused_at: float | None = None
        link.limit.rate = self.parameters.limits.max_bandwidth

    # -- the whole of it

    async def run(self) -> Statistics:
        """Migrates. Returns the final statistics.

        Raises MigrationError (see migrate.errors) or asyncio.CancelledError; unless `committed`,
        the guest runs on here then.
        """
        self._began = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(self._read())
                try:
                    await self._migrate()
                finally:
                    reader.cancel()
        except BaseException as raised:
            error = _the_cause(raised)
            failure = self._failure(error)
            await self._give_reason(error, failure)
            if failure is None:
                raise
            raise failure from error
        finally:
            self._worker.shutdown(wait=True)
            with contextlib.suppress(BaseException):
                await asyncio.shield(self.link.close())
            self._update()
        return self.statistics

    def _failure(self, error: BaseException) -> MigrationError | None:
        """The error as a user sees it; None for a cancellation."""
        cancelled = isinstance(error, asyncio.CancelledError)
        failure: MigrationError | None = None
        if isinstance(error, MigrationError):
            failure = error
        elif isinstance(error, ProtoError):
            failure = PeerError(str(error))
        elif isinstance(error, OSError):
            failure = MigrationError(f"the guest's memory cannot be read: {error.strerror}")
        elif not cancelled:
            failure = MigrationError(f"{type(error).__name__}: {error}")
        if self.committed and not isinstance(failure, HandOverUnknown):
            failure = HandOverUnknown(
                "the guest was handed over, but the destination has not confirmed that it runs "
                f"({failure or 'interrupted'}): look there first; here it stays paused"
            )
        self._set_status("cancelled" if cancelled else "failed", str(failure or ""))
        return failure

    async def _give_reason(self, error: BaseException, failure: MigrationError | None) -> None:
        """Tells the peer why, where it can still hear."""
        if isinstance(error, PeerLost | CancelledByPeer):
            return
        code = ErrorCode.CANCELLED
        if isinstance(error, ProtoError):
            code = getattr(error, "code", ErrorCode.PROTOCOL)
        elif failure is not None:
            code = failure.code
        await self.link.give_reason(code, str(failure or "cancelled at the source"))

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

    async def _expect(self, kind: type[T]) -> T:
        message = await self._inbox.get()
        if isinstance(message, Error):
            raise peer_error(message)
        if not isinstance(message, kind):
            raise PeerError(f"{type(message).__name__} came where {kind.__name__} was due")
        return message

    async def _migrate(self) -> None:
        try:
            encoder, digests = await self._set_up()
            await self._rounds(encoder, digests)
            await self._hand_over(encoder, digests)
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

    async def _set_up(self) -> tuple[PageEncoder, ChunkDigests]:
        self._set_status("setup")
        parameters = self.parameters
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            try:
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
                        self.guest.kind, memory.size, parameters.page_size, self.guest.description
                    )
                )
                await self._expect(Accept)
                self._model.round_trip = min([await self.link.round_trip() for _ in range(3)])
            except TimeoutError:
                raise PeerLost(
                    f"the destination does not answer within {HANDSHAKE_SECONDS:g} s"
                ) from None
        page_size = parameters.page_size
        if agreement.xbzrle:
            self._cache_size = parameters.cache_size
            self._cache = PageCache(self._useful(parameters.cache_size), page_size)
        key = None if self.guest.marks else os.urandom(page_size)
        encoder = PageEncoder(self._pages, page_size, self._cache, key, BATCH_BYTES)
        digests = ChunkDigests(memory, page_size, encoder.known_zero)
        self._encoder = encoder
        self._tracker = self.guest.track(encoder, digests)
        self._wanted_cache = parameters.cache_size
        await self.link.send(CacheSize(self._cache_size))
        self.statistics = self.statistics.with_(
            capabilities={"xbzrle": agreement.xbzrle},
            setup_time=time.monotonic() - self._began,
            cache_size=self._cache_size,
            remaining=memory.size,
        )
        return encoder, digests

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

    async def _rounds(self, encoder: PageEncoder, digests: ChunkDigests) -> None:
        assert self._tracker is not None
        loop = asyncio.get_running_loop()
        self._set_status("active")
        await loop.run_in_executor(self._worker, self._tracker.start)
        dirty = PageSet.full(self._pages)
        while True:
            began = time.monotonic()
            measured = await self._send_round(encoder, digests, dirty, last=False)
            self._model.learn(measured)
            dirty = await loop.run_in_executor(self._worker, self._tracker.take)
            self._unsent = dirty
            self._model.learn_digest(digests.hashed, digests.seconds, peer=False)
            elapsed = time.monotonic() - began
            self.statistics = self.statistics.with_(
                dirty_pages_rate=len(dirty) / elapsed if elapsed else 0.0,
                remaining=min(len(dirty) * encoder.page_size, self.guest.memory.size),
            )
            scan = 0.0 if self.guest.marks else self._tracker.take_seconds
            pending = Pending(len(dirty), max(digests.stale_with(dirty), self._peer_stale), scan)
            decision = self._policy.decide(self._round, time.monotonic() - self._began, pending)
            self.statistics = self.statistics.with_(expected_downtime=decision.expected_downtime)
            self._update()
            self._observer("round", self.statistics)
            if decision.verdict is Verdict.ABORT:
                raise NotConvergedError(f"the migration was given up: {decision.reason}")
            if decision.verdict is Verdict.STOP_AND_COPY:
                return
            digests.touch(dirty)

    async def _send_round(
        self, encoder: PageEncoder, digests: ChunkDigests, dirty: PageSet, *, last: bool
    ) -> Measured:
        """Sends what is dirty, and waits until the destination has applied it."""
        loop = asyncio.get_running_loop()
        self._round += 1
        began = time.monotonic()
        sent_before, cpu_before = self.link.sent_bytes, self._encode_seconds
        self._round_began, self._round_sent = began, sent_before
        encoder.begin_round(self._round)
        self._left = (0, 0)
        pages = len(dirty)
        cursor: int | None = 0
        turn = loop.run_in_executor(self._worker, self._turn, encoder, dirty, 0)
        try:
            while cursor is not None:
                frame, cursor = await turn
                if cursor is not None:
                    turn = loop.run_in_executor(self._worker, self._turn, encoder, dirty, cursor)
                if frame is not None:
                    await self.link.send_batch(frame)
                await self._confirm_cache()
                self._update(left=dirty.count_from(self._pages if cursor is None else cursor))
                self._check_timeout(last)
        finally:
            turn.cancel()
        self.statistics = self.statistics.with_(dirty_sync_count=self._round)
        transferred = self.link.sent_bytes - sent_before
        await self.link.send(Round(self._round, pages, transferred, last))
        if last:
            await loop.run_in_executor(self._worker, digests.settle)
            return Measured(pages, transferred, 0.0, 0.0, 0.0)
        if self.guest.marks:
            await loop.run_in_executor(self._worker, digests.settle, dirty)
        ack = await self._expect(RoundAck)
        if ack.number != self._round:
            raise PeerError(f"round {ack.number} was confirmed while {self._round} was due")
        self._unsent = None
        self._peer_stale = ack.stale_chunks
        self._model.learn_digest(ack.settled_chunks, ack.settle_seconds, peer=True)
        wall = max(time.monotonic() - began - ack.settle_seconds, 1e-9)
        self.statistics = self.statistics.with_(
            pages_per_second=pages / wall, mbps=transferred * 8 / wall / 1e6
        )
        return Measured(
            pages, transferred, wall, self._encode_seconds - cpu_before, ack.apply_seconds
        )

    def _turn(
        self, encoder: PageEncoder, dirty: PageSet, cursor: int
    ) -> tuple[bytearray | None, int | None]:
        """In the worker thread: one batch, sealed, and where to go on (None: the round is done)."""
        began = time.thread_time()
        if self._cache is not None and self._wanted_cache != self._cache_size:
            self._cache.resize(self._useful(self._wanted_cache))
            self._cache_size = self._wanted_cache
        next_cursor: int | None = self._fill_batch(encoder, dirty, cursor)
        start, count = self._left
        if next_cursor is not None and next_cursor >= self._pages and start == count:
            next_cursor = None
        frame = None
        if encoder.pending:
            frame = seal(encoder.take(HEADER_BYTES), MessageType.PAGES)
        self._encode_seconds += time.thread_time() - began
        return frame, next_cursor

    def _fill_batch(self, encoder: PageEncoder, dirty: PageSet, cursor: int) -> int:
        """Encodes until the batch is full, the turn is over or nothing is left; the next page."""
        memory, page_size = self.guest.memory, encoder.page_size
        holes = self._round == 1 and memory.view is None
        turn = 0
        start, count = self._left
        while True:
            if start < count:
                start += encoder.feed(self._numbers, count, self._snapshot, dirty.bits, start)
                if start < count:
                    break
            if turn >= TURN_PAGES or cursor >= self._pages:
                break
            end = self._pages
            if holes:
                first, length, data = next(memory.extents_from(cursor, page_size))
                if not data:
                    done = encoder.feed_zeros(first, length)
                    cursor = first + done
                    if done < length:
                        break
                    continue
                end = first + length
            count, cursor = memory.gather(
                dirty.bits, cursor, end, page_size, self._snapshot, self._numbers
            )
            start = 0
            turn += count
        self._left = (start, count)
        return cursor

    async def _confirm_cache(self) -> None:
        """Tells the destination the size in force, and counts it."""
        size = self._cache_size
        if size != self.statistics.cache_size:
            self.statistics = self.statistics.with_(cache_size=size)
            await self.link.send(CacheSize(size))

    # -- hand-over

    async def _hand_over(self, encoder: PageEncoder, digests: ChunkDigests) -> None:
        self._set_status("device")
        before = self.link.sent_bytes
        self._paused_at = time.monotonic()
        await self.guest.pause()
        self._observer("paused", self.statistics)
        expected = self.statistics.expected_downtime or 0.0
        patience = max(PAUSE_SECONDS, PAUSE_FACTOR * expected)
        try:
            async with asyncio.timeout(patience):
                await self._last_round(encoder, digests)
        except TimeoutError:
            raise PeerLost(
                f"the last round and its check were not done after {patience:.0f} s, "
                f"{expected * 1e3:.0f} ms were expected"
            ) from None
        await self.guest.give_up()
        self.committed = True
        await self._commit()
        downtime = time.monotonic() - self._paused_at
        self.statistics = self.statistics.with_(
            downtime=downtime,
            downtime_bytes=self.link.sent_bytes - before,
            remaining=0,
            dirty_pages_rate=0.0,
        )
        self._set_status("completed")
        self._update()
        await self.guest.release()

    async def _last_round(self, encoder: PageEncoder, digests: ChunkDigests) -> None:
        """Sends the rest of the paused guest; returns when the destination has verified all."""
        assert self._tracker is not None
        assert self._unsent is not None
        loop = asyncio.get_running_loop()
        dirty = self._unsent
        dirty |= await loop.run_in_executor(self._worker, self._tracker.take)
        digests.touch(dirty)
        await self._send_round(encoder, digests, dirty, last=True)
        digest = await loop.run_in_executor(self._worker, digests.digest)
        state = self.guest.state()
        if len(state) > MAX_STATE:
            raise MigrationError(
                f"the guest's state has {len(state)} bytes, no more than {MAX_STATE} travel"
            )
        await self.link.send(Complete(digest, state))
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
            await self.guest.take_back()
            self.committed = False
            raise
        except TimeoutError:
            raise HandOverUnknown(
                "the guest was handed over, but the destination has not answered for "
                f"{HAND_OVER_SECONDS:g} s: look there first; here it stays paused"
            ) from None

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
        encoder = getattr(self, "_encoder", None)
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
        transferred = self.link.sent_bytes
        if left is not None:
            seconds = max(time.monotonic() - self._round_began, 1e-9)
            s = s.with_(
                remaining=min(left * s.page_size, s.total),
                mbps=(transferred - self._round_sent) * 8 / seconds / 1e6,
            )
        s = s.with_(
            transferred=transferred,
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
