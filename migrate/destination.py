"""The destination: receives one guest, verifies it, and runs it when it is told GO.

    setup   HELLO, GUEST -> a place for it, or a reason why not, before any page -> ACCEPT
    active  PAGES are checked, then applied, by a worker thread; ROUND is confirmed when all of
            the round is in memory, digested where it came to rest, and on its way to disk
    device  COMPLETE: the digest of the whole memory must match -> PREPARED is written -> READY
    done    GO -> OWNER is written -> the guest is started -> RUNNING

Whatever fails before READY, the place is discarded: half a guest never runs. But where only the
connection breaks it is kept for a while, for a source that comes back to resume; a file, also for
a later program. After READY the source may come back, and ask (see migrate.handover). After GO the
guest is ours; if it cannot be started, ERROR NOT_STARTED says so, and it never will be.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from migrate.digest import Digest
from migrate.errors import (
    MigrationError,
    MismatchError,
    NotStartedError,
    PeerError,
    PeerLost,
    code_of,
    failure_of,
    peer_error,
)
from migrate.guests.guest import Place
from migrate.handover import Custody, Records
from migrate.journal import Journal, JournalError
from migrate.link import Link, close_all, give_reason_on
from proto import ErrorCode, ProtoError
from proto import capabilities as caps
from proto.errors import MessageError
from proto.frames import Frame
from proto.kernel import PageDecoder, PageHashes
from proto.messages import (
    HELD_PAGES,
    MAX_PROBE,
    TOKEN_BYTES,
    Accept,
    CacheSize,
    Complete,
    Done,
    Error,
    Go,
    GuestInfo,
    Held,
    Hello,
    Join,
    Joined,
    MessageType,
    Probe,
    Probed,
    Ready,
    Round,
    RoundAck,
    Running,
    unpack,
)
from proto.ownership import Claim

HANDSHAKE_SECONDS = 15.0
RESOLVE_SECONDS = 60.0
# The source says DONE as soon as it has heard RUNNING.
ACKNOWLEDGE_SECONDS = 2.0

T = TypeVar("T")
Placer = Callable[[GuestInfo], Place]


@dataclass
class Arrival:
    """How far a guest has come. Sizes in bytes, counts in pages."""

    info: GuestInfo | None = None
    status: str = "setup"
    received: int = 0
    rounds: int = 0
    zero: int = 0
    raw: int = 0
    delta: int = 0
    cache_size: int = 0
    capabilities: dict[str, bool] = field(default_factory=dict)
    running: str = ""
    """The place's sentence on the guest that runs."""


Observer = Callable[[str, Arrival], None]


class NoPlaceError(MigrationError):
    """There is nowhere to put this guest."""

    exit_code = 2
    code = ErrorCode.NO_PLACE


class Destination:
    """Receives one guest, over one link and those that replace it when it breaks.

    placer -- gives a Place for a described guest, or raises MigrationError: it is refused
    accept -- gives the next connection, for a guest that comes over several; None refuses those
    records -- of this and earlier migrations; whoever asks for them finds this one there
    retry  -- seconds to keep half a guest when its source is gone; 0: a break is a failure
    resolve_timeout -- seconds to keep a whole guest when its source is gone
    """

    def __init__(
        self, link: Link, placer: Placer, capabilities: Mapping[str, bool] | None = None,
        observer: Observer | None = None, accept: Callable[[], Awaitable[Link]] | None = None,
        *, records: Records | None = None, retry: float = 0.0,
        resolve_timeout: float = RESOLVE_SECONDS,
    ) -> None:  # fmt: skip
        self.link = link
        self.arrival = Arrival()
        self.started = False
        self.owner = False
        self.place: Place | None = None
        self.kept = False
        """Half a guest was left for a later program to go on with."""
        self._placer = placer
        self._capabilities = capabilities or {}
        self._observer = observer or (lambda _event, _arrival: None)
        self._accept = accept
        self._records = records or Records()
        self._resolve_timeout = resolve_timeout
        self._retry = retry
        self._custody: Custody | None = None
        self._journal: Journal | None = None
        self._resumed: Journal | None = None
        self._seed = b""
        self._visitor: asyncio.Future[None] | None = None
        self._came: Destination | None = None
        self._heard = False
        """Whether the source has shown that it got ACCEPT: else it will not come back."""
        self._described: GuestInfo | None = None
        self._hashes: PageHashes | None = None
        self._decoder: PageDecoder | None = None
        self._worker = ThreadPoolExecutor(1, "apply")
        self._apply_seconds = 0.0
        self._round = 1
        self._lanes: dict[int, Link] = {}
        self._ended: dict[int, int] = {}
        self._news = asyncio.Event()

    async def run(self) -> Arrival:
        """Receives the guest; returns when it runs here.

        Raises MigrationError or asyncio.CancelledError: then nothing is left of it here.
        `started` tells whether the peer got as far as describing a guest that we accepted.
        """
        try:
            await self._attempts()
        except BaseException as error:
            if await self._let_go():
                return self.arrival
            failure = self._failure(error)
            await self._give_reason(error, failure)
            await self._drain_worker()
            await asyncio.shield(self._discard(keep=isinstance(error, PeerLost)))
            if self.kept:
                failure = PeerLost(f"{error}; what came is kept: run it again to resume")
            if failure is None or failure is error:
                raise
            raise failure from error
        finally:
            await self._drain_worker()
            self._close_journals()
            late = [] if self._came is None else [self._came.link]
            with contextlib.suppress(BaseException):
                await asyncio.shield(close_all([*self._links, *late]))
        return self.arrival

    async def _attempts(self) -> None:
        """Receives, over as many connections as it takes."""
        while True:
            self._visitor = asyncio.get_running_loop().create_future()
            try:
                await self._receive()
                return
            except PeerLost:
                if not self._resumable:
                    raise
                if not self._heard and self._resumed is None and not self._visitor.done():
                    self.started = False  # nobody can know the name of this attempt
                    raise
                await asyncio.shield(close_all(self._links))
                if not self._visitor.done():
                    self._observer("interrupted", self.arrival)
                    await asyncio.wait({self._visitor}, timeout=self._retry)
                if not self._visitor.done():
                    raise
            visitor, self._came = self._came, None
            assert visitor is not None
            self.link, self._described = visitor.link, visitor._described
            self._lanes, self._ended = {}, {}
            self._observer("back", self.arrival)

    @property
    def _resumable(self) -> bool:
        """Whether a source that comes back could go on; not where it is decided whose it is."""
        return bool(self._retry and self.arrival.info and self.place and self._custody is None)

    def take_in(self, visitor: Destination) -> bool:
        """Goes on over the link of a visitor that has been greeted, if it resumes this migration.

        The link there was is given up: its other end knows best that it is broken.
        """
        described, ours = visitor._described, self.arrival.info
        if (
            described is None
            or ours is None
            or self._visitor is None
            or (self._journal and self._journal.claim not in (Claim.NONE, Claim.PREPARED))
            or not any(
                hmac.compare_digest(described.resume, journal.identity)
                for journal in filter(None, (self._journal, self._resumed))
            )
            or (described.kind, described.size, described.page_size)
            != (ours.kind, ours.size, ours.page_size)
        ):
            return False
        earlier, self._came = self._came, visitor
        if earlier is not None:
            earlier.link.abort()  # we were busy, and it has come once more
        if not self._visitor.done():
            self._visitor.set_result(None)
        for link in self._links:
            link.abort()
        return True

    async def _discard(self, *, keep: bool) -> None:
        """Leaves nothing behind, or what a later program can go on with."""
        if self.place is None:
            return
        if keep and self.started and self.place.lasting and self._resumable:
            self.place.close()
            self.kept = True
        else:
            await self.place.discard()

    def _close_journals(self) -> None:
        for journal in filter(None, (self._journal, self._resumed)):
            if journal.claim is Claim.NONE:
                journal.close(keep=self.kept)

    @property
    def _links(self) -> list[Link]:
        return [self.link, *self._lanes.values()]

    async def _drain_worker(self) -> None:
        await asyncio.to_thread(self._worker.shutdown)

    def _failure(self, error: BaseException) -> MigrationError | None:
        failure = failure_of(error, "the guest cannot be written here")
        self.arrival.status = "cancelled" if failure is None else "failed"
        return failure

    async def _let_go(self) -> bool:
        """A guest that is whole is given up for good, before anybody is told so.

        Returns True where it is ours already: whatever happened, it runs here.
        """
        if self._custody is None or self._custody.journal.claim is Claim.NONE:
            return False
        self.place = None  # it is the custody's
        with contextlib.suppress(JournalError):  # PREPARED stays: the next program decides
            await self._custody.give_up()
        if self._custody.journal.claim is not Claim.OWNER or not self._custody.running:
            return False
        self._complete(self._custody)
        return True

    async def _give_reason(self, error: BaseException, failure: MigrationError | None) -> None:
        if isinstance(error, PeerLost):
            return
        reason = str(failure or "cancelled at the destination")
        code = code_of(error, failure)
        if self._custody is not None and self._custody.journal.claim is Claim.ABORTED:
            code = ErrorCode.NOT_STARTED  # GO may be on its way
        await give_reason_on(self._links, code, reason)

    # -- setup

    async def greet(self, *, busy: bool = False) -> bool:
        """The first words, up to the description of a guest: the next thing is to find a place.

        Returns False where the source only wanted to know the way: it has closed the connection,
        and brings nothing. While we are `busy`, nobody may.

        Raises MigrationError or ProtoError; the link is not told yet.
        """
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                hello = await self._expect(Hello)
                answer, agreement = caps.answer(hello, caps.switched_on(self._capabilities))
                if agreement.probe and busy:
                    raise NoPlaceError("another guest is being received here just now")
                await self.link.send(answer)
                if not await self._be_probed(agreement.probe):
                    return False
                self._described = await self._expect(GuestInfo)
        except TimeoutError:
            raise PeerLost(
                f"{self.link.peer_name} did not describe a guest in {HANDSHAKE_SECONDS:g} s"
            ) from None
        self.arrival.capabilities = {"xbzrle": agreement.xbzrle}
        return True

    async def _be_probed(self, agreed: bool) -> bool:
        """Answers each PROBE; whether a guest comes behind them."""
        received = 0
        while True:
            try:
                if await self.link.first_type() is not MessageType.PROBE:
                    return True
                if not agreed:
                    raise PeerError("PROBE came, though probe was not agreed on")
                received += len((await self._expect(Probe)).padding)
                if received > MAX_PROBE:
                    raise PeerError(f"more than {MAX_PROBE} bytes of PROBE came")
                await self.link.send(Probed(received))
            except PeerLost:
                if not agreed:
                    raise
                self._observer("probed", self.arrival)
                return False

    async def _receive(self) -> None:
        if self._described is None and not await self.greet():
            raise PeerLost(f"{self.link.peer_name} only measured the way here: no guest came")
        info = self._described
        assert info is not None
        if info.channels > 1 and self._accept is None:
            raise NoPlaceError("guests are received over one connection here")
        held = self.place is not None
        if self.place is None:
            earlier = await self._records.resume(info.resume)
            self.place = self._placer(info)
            held = self.place.held
            self._resumed = earlier
        place = self.place
        first = self.arrival.info is None
        self.arrival.info = info
        self.started = True
        await place.ready()
        token = await self._begin_journal(place, info.resume)
        self.link.share_receiving(info.channels)
        await self.link.send(Accept(token, held))
        if info.channels > 1:
            await self._gather_channels(token, info.channels - 1)
            self._ended = dict.fromkeys(self._lanes, 0)
        self.arrival.status = "active"
        if first:
            self._observer("accepted", self.arrival)
        loop = asyncio.get_running_loop()
        decoder, digest = await loop.run_in_executor(self._worker, self._take_stock, info, place)
        if held:
            assert self._hashes is not None
            await self._say_what_is_held(self._hashes.table)
        self._round = info.round
        complete = await self._rounds(decoder, digest, place)
        await self._verify(decoder, digest, place, complete)
        await self._take_over()

    async def _begin_journal(self, place: Place, resume: bytes) -> bytes:
        """Each attempt has a name of its own, under which no other can be handed over.

        Where the place outlives this program, what a later one needs is written down. The name by
        which the source has resumed holds until it has surely heard of the new one.
        """
        journal = self._records.journal(os.urandom(TOKEN_BYTES))
        if place.lasting:
            await asyncio.to_thread(journal.begin, place=place.facts())
            place.persist()
        earlier, self._resumed = (self._journal, self._resumed), None
        for one in filter(None, earlier):
            if one.identity == resume:
                self._resumed = one
            else:
                one.close()
        self._journal = journal
        return journal.identity

    def _take_stock(self, info: GuestInfo, place: Place) -> tuple[PageDecoder, Digest]:
        """In the worker thread: hashes what an earlier attempt has left here."""
        hashes, decoder = self._hashes, self._decoder
        if hashes is not None and decoder is not None and self._seed == info.hash_seed:
            # What never came is zeros still, and its hash says so, or anything.
            decoder.hold(0, info.pages, not place.zeroed)
        else:
            anything = place.held or hashes is not None
            hashes = PageHashes(info.pages, info.page_size, info.hash_seed)
            decoder = PageDecoder(hashes, info.size, zeroed=place.zeroed)
            if anything:
                for page, count, data in place.reads.extents(info.page_size):
                    decoder.hold(page, count, data)
        decoder.end_round()
        digest = Digest(place.reads, hashes)
        digest.settle()
        self._hashes, self._decoder, self._seed = hashes, decoder, info.hash_seed
        return decoder, digest

    async def _say_what_is_held(self, table: bytearray) -> None:
        for at in range(0, len(table), 8 * HELD_PAGES):
            await self.link.send(Held(at // 8, bytes(table[at : at + 8 * HELD_PAGES])))

    async def _expect(self, kind: type[T]) -> T:
        message = await self.link.receive_message()
        if isinstance(message, Error):
            raise peer_error(message)
        if not isinstance(message, kind):
            raise PeerError(f"{type(message).__name__} came where {kind.__name__} was due")
        return message

    # -- channels

    async def _gather_channels(self, token: bytes, count: int) -> None:
        """Waits until a connection has joined for each further channel."""
        joining: list[asyncio.Task[None]] = []

        async def admit() -> None:
            assert self._accept is not None
            while True:
                link = await self._accept()
                joining.append(asyncio.create_task(self._join(link, token, count)))

        async def watch() -> None:
            await self.link.ended()
            self._news.set()

        admitting, watching = asyncio.create_task(admit()), asyncio.create_task(watch())
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                while len(self._lanes) < count:
                    self._news.clear()
                    await self._news.wait()
                    if watching.done():
                        await self._expect(Joined)  # it has hung up: for the reason why
        except TimeoutError:
            raise PeerLost(
                f"only {len(self._lanes)} of {count} further channels came within "
                f"{HANDSHAKE_SECONDS:g} s"
            ) from None
        finally:
            for task in (admitting, watching, *joining):
                task.cancel()

    async def _join(self, link: Link, token: bytes, count: int) -> None:
        """Makes a connection a channel, if it is one of ours."""
        try:
            message = await link.receive_message()
            if not isinstance(message, Join) or not hmac.compare_digest(message.token, token):
                raise MessageError("this is no channel of the migration that goes on here")
            if message.channel > count or message.channel in self._lanes:
                raise MessageError(f"channel {message.channel} is not to be had")
            link.session.channel = message.channel
            link.share_receiving(count + 1)
            self._lanes[message.channel] = link
            self._heard = True
            self._news.set()
            await link.send(Joined())
        except (ProtoError, PeerLost) as error:
            await link.give_reason(getattr(error, "code", ErrorCode.PROTOCOL), str(error))
            await link.close()
        except asyncio.CancelledError:
            link.abort()
            raise

    # -- rounds

    async def _rounds(self, decoder: PageDecoder, digest: Digest, place: Place) -> Complete:
        """Applies batches until COMPLETE comes."""
        tasks = [
            asyncio.create_task(self._follow(lane, channel, decoder, place))
            for channel, lane in self._lanes.items()
        ]
        main = asyncio.create_task(self._lead(decoder, digest, place))
        try:
            while not main.done():
                done, _ = await asyncio.wait([main, *tasks], return_when=asyncio.FIRST_COMPLETED)
                for task in done - {main}:
                    task.result()  # a channel only ends by an error
            return main.result()
        finally:
            for task in (main, *tasks):
                task.cancel()
            # A batch that is being applied is let finish: its frame is memory that it reads.
            await asyncio.shield(asyncio.gather(main, *tasks, return_exceptions=True))

    async def _batches(
        self, link: Link, decoder: PageDecoder, place: Place
    ) -> tuple[MessageType, bytes]:
        """Applies the batches of one channel up to its next other message."""
        loop = asyncio.get_running_loop()
        busy: asyncio.Future[None] | None = None
        try:
            while True:
                frame = await link.receive()
                self._heard = True
                if busy is not None:
                    await busy
                    busy = None
                if frame.type is not MessageType.PAGES:
                    body = bytes(frame.head)
                    frame.release()
                    return frame.type, body
                if self._ended.get(link.session.channel) == self._round:
                    raise PeerError(
                        f"a batch came after the end of round {self._round} on its channel"
                    )
                busy = loop.run_in_executor(
                    self._worker, self._apply, decoder, place, frame, self._round
                )
                # Nothing more may come, and a bad batch must be answered all the same.
                busy.add_done_callback(link.fail_with)
        finally:
            if busy is not None:
                with contextlib.suppress(BaseException):
                    await asyncio.shield(busy)

    async def _follow(self, lane: Link, channel: int, decoder: PageDecoder, place: Place) -> None:
        """One further channel: batches and the ends of rounds."""
        while True:
            kind, body = await self._batches(lane, decoder, place)
            message = unpack(kind, body)
            if isinstance(message, Error):
                raise peer_error(message)
            if not isinstance(message, Round):
                raise PeerError(f"channel {channel}: {kind.name} came where a round goes on")
            if message.number != self._round or self._ended[channel] == self._round:
                raise PeerError(
                    f"channel {channel}: round {message.number} ended while {self._round} went on"
                )
            self._ended[channel] = message.number
            self._news.set()

    async def _lead(self, decoder: PageDecoder, digest: Digest, place: Place) -> Complete:
        """The first channel, which carries all the rest; returns at COMPLETE."""
        apply_before = self._apply_seconds
        while True:
            kind, body = await self._batches(self.link, decoder, place)
            message = unpack(kind, body)
            if isinstance(message, Complete):
                return message
            if isinstance(message, CacheSize):
                self.arrival.cache_size = message.size
            elif isinstance(message, Error):
                raise peer_error(message)
            elif isinstance(message, Round):
                if message.number != self._round:
                    raise PeerError(f"round {message.number} ended while {self._round} went on")
                while any(number != self._round for number in self._ended.values()):
                    self._news.clear()
                    await self._news.wait()
                await self._end_round(
                    decoder, digest, place, message, self._apply_seconds - apply_before
                )
                apply_before = self._apply_seconds

    def _apply(self, decoder: PageDecoder, place: Place, frame: Frame, number: int) -> None:
        """In the worker thread."""
        began = time.thread_time()
        try:
            came, fresh = decoder.check(frame.head, len(frame.data))
            if came != number:
                raise PeerError(f"a batch of round {came} came in round {number}")
            for page in fresh:
                place.make_room(page)
            decoder.apply(frame.head, frame.data, place.memory, place.fd, place.fd_offset)
            if decoder.delta and not self.arrival.capabilities["xbzrle"]:
                raise PeerError("a delta came, though xbzrle was not agreed on")
        finally:
            frame.release()
            self._apply_seconds += time.thread_time() - began

    async def _end_round(
        self, decoder: PageDecoder, digest: Digest, place: Place, message: Round,
        apply_seconds: float,
    ) -> None:  # fmt: skip
        """Hashes what came to rest, and confirms the round."""
        loop = asyncio.get_running_loop()
        arrival = self.arrival
        arrival.rounds, arrival.zero = message.number, decoder.zero
        arrival.raw, arrival.delta = decoder.raw, decoder.delta
        arrival.received = sum(link.received_bytes for link in self._links)
        began = time.perf_counter()
        settled = await loop.run_in_executor(
            self._worker, self._settle, decoder, digest, place, message.last
        )
        seconds = time.perf_counter() - began
        self._round += 1
        if self._resumed is not None and self._resumed.claim is Claim.NONE:
            self._resumed.close()
        self._resumed = None
        await self.link.send(
            RoundAck(message.number, apply_seconds, seconds, digest.stale(), settled)
        )
        self._observer("round", arrival)

    def _settle(self, decoder: PageDecoder, digest: Digest, place: Place, last: bool) -> int:
        """All stale pages in the pause; before it, those that this round left alone."""
        if last:
            return digest.settle()
        settled = digest.settle(decoder.recent)
        decoder.end_round()
        place.sync()
        return settled

    # -- hand-over

    async def _verify(
        self, decoder: PageDecoder, digest: Digest, place: Place, complete: Complete
    ) -> None:
        loop = asyncio.get_running_loop()
        self.arrival.status = "device"
        if decoder.received_pages != decoder.pages:
            raise MismatchError(
                f"only {decoder.received_pages} of {decoder.pages} pages came: the guest is not "
                "complete"
            )
        began = time.perf_counter()
        ours = await loop.run_in_executor(self._worker, digest.digest)
        if ours != complete.digest:
            raise MismatchError(
                "the memories differ: the digest here is not the source's. If nothing stopped the "
                "guest's writer, it wrote during the last round"
            )
        await place.prepare(complete.state)
        assert self._journal is not None
        self._custody = Custody(place, self._journal, complete.state)
        self._records.keep(self._custody)
        await self._custody.prepare(peer=self.link.peer_name)
        with contextlib.suppress(PeerLost):  # it may come back, as below
            await self.link.send(Ready(time.perf_counter() - began))

    async def _take_over(self) -> None:
        """GO, on this connection or on one that asked; or the end of the patience."""
        assert self._custody is not None
        custody = self._custody
        if await self._go(custody):
            self.owner = True
            await custody.take_over()
            with contextlib.suppress(PeerLost):
                await self.link.send(Running())
        self._complete(custody)
        with contextlib.suppress(TimeoutError, PeerLost, ProtoError):
            async with asyncio.timeout(ACKNOWLEDGE_SECONDS):
                if isinstance(await self.link.receive_message(), Done):
                    custody.told.set()

    @property
    def acknowledged(self) -> bool:
        """Whether the source has said that it knows."""
        return self._custody is not None and self._custody.told.is_set()

    async def asked(self) -> None:
        """Returns when the source has asked what became of its guest, and knows."""
        if self._custody is not None:
            await self._custody.told.wait()

    def _complete(self, custody: Custody) -> None:
        self.owner = True
        self.place = None
        self.arrival.running = custody.running
        self.arrival.status = "completed"
        custody.place.close()
        self._observer("running", self.arrival)

    async def _go(self, custody: Custody) -> bool:
        """Whether GO came here; it may have come elsewhere. Raises where it will not come at all.

        A lost source may be back soon, and ask, or resume, which it does where it never said GO; a
        source that says why it gives up is not.
        """
        assert self._visitor is not None
        back = self._visitor
        go = asyncio.create_task(self._expect(Go))
        decided = asyncio.create_task(custody.decided.wait())
        first = asyncio.FIRST_COMPLETED
        try:
            await asyncio.wait({go, decided}, return_when=first)
            try:
                if go.done():
                    go.result()
                    return True
            except PeerLost:
                if not back.done():
                    self._observer("lost", self.arrival)
                    waited: set[asyncio.Future[Any]] = {decided, back}
                    await asyncio.wait(waited, timeout=self._resolve_timeout, return_when=first)
                if back.done() and await custody.give_up(keep_place=True):
                    custody.place.unprepare()
                    self._custody = None
                    raise
                if not decided.done() and await custody.give_up():
                    raise
            if custody.journal.claim is Claim.ABORTED:
                raise NotStartedError("the guest was given up before GO came")
            return False
        finally:
            for task in (go, decided):
                task.cancel()
