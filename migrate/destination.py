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
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from migrate.budget import Budget
from migrate.cancellation import finished, forget, once, undisturbed
from migrate.errors import (
    MigrationError,
    NoProgress,
    NotStartedError,
    PeerError,
    PeerLost,
    code_of,
    failure_of,
)
from migrate.guests.guest import Place
from migrate.handover import Custody, Records
from migrate.journal import Journal, JournalError
from migrate.link import Link, close_all, give_reason_on
from migrate.observer import Watched
from migrate.reception import Arrival, Lanes, Pages, Reception
from migrate.threads import in_thread
from proto import ErrorCode, ProtoError
from proto import capabilities as caps
from proto.errors import MessageError
from proto.messages import (
    MAX_PROBE,
    TOKEN_BYTES,
    Accept,
    Complete,
    Done,
    Go,
    GuestInfo,
    Hello,
    Join,
    Joined,
    MessageType,
    Probe,
    Probed,
    Ready,
    Running,
)
from proto.ownership import Claim

HANDSHAKE_SECONDS = 15.0
RESOLVE_SECONDS = 60.0
# The source says DONE as soon as it has heard RUNNING.
ACKNOWLEDGE_SECONDS = 2.0

T = TypeVar("T")
Placer = Callable[[GuestInfo], Place]


Observer = Callable[[str, Arrival], None]


class NoPlaceError(MigrationError):
    """There is nowhere to put this guest."""

    exit_code = 2
    code = ErrorCode.NO_PLACE


class Destination:
    """Receives one guest, over one link and those that replace it when it breaks.

    placer -- gives a Place for a described guest, or raises MigrationError: it is refused
    observer -- called with an event as things happen; what it raises is logged, and changes nothing
    accept -- gives the next connection, for a guest that comes over several; None refuses those
    records -- of this and earlier migrations; whoever asks for them finds this one there
    retry  -- seconds to keep half a guest when its source is gone, from the first break after it
              has brought something; 0: a break is a failure
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
        self.arrived: Place | None = None
        """Where the guest is, once it is ours."""
        self.kept = False
        """Half a guest was left for a later program to go on with."""
        self._placer = placer
        self._capabilities = capabilities or {}
        self._observer = Watched(observer, self._leave)
        self._task: asyncio.Task[object] | None = None
        self._accept = accept
        self._records = records or Records()
        self._resolve_timeout = resolve_timeout
        self._retry = retry
        self._tries = Budget()
        self.patience = retry
        """Seconds that a source whose connection broke has to come back."""
        self._brought = 0
        self._custody: Custody | None = None
        self._journal: Journal | None = None
        self._resumed: Journal | None = None
        self._seed = b""
        self._visitor: asyncio.Future[None] | None = None
        self._came: Destination | None = None
        self._heard = False
        """Whether the source has shown that it got ACCEPT: else it will not come back."""
        self._described: GuestInfo | None = None
        self._stream = self._sparse = False
        self._reception: Reception | None = None
        self._worker = ThreadPoolExecutor(1, "apply")
        self._lanes: dict[int, Link] = {}
        self._news = asyncio.Event()

    async def run(self) -> Arrival:
        """Receives the guest; returns when it runs here.

        Raises MigrationError or asyncio.CancelledError: then nothing is left of it here. From GO on
        the guest is ours, and a cancellation changes nothing.
        `started` tells whether the peer got as far as describing a guest that we accepted.
        """
        try:
            return await once(self._run())
        finally:
            self._observer.raise_leaving()

    def _leave(self) -> None:
        """The observer wants the program to end."""
        over = self.owner or self.arrival.status in ("completed", "failed", "cancelled")
        if self._task is not None and not over:
            self._task.cancel()

    async def _run(self) -> Arrival:
        self._task = asyncio.current_task()
        try:
            await self._attempts()
        except BaseException as error:
            failure = await undisturbed(self._fail(error))
            if failure is error:
                raise
            if failure is not None:
                raise failure from error
            forget(error)
        finally:
            await undisturbed(self._end_with_all())
        return self.arrival

    async def _fail(self, error: BaseException) -> BaseException | None:
        """Leaves nothing of the guest here, and says why; returns what the user is to see.

        None where it is ours already: whatever happened, it runs here.
        """
        if await self._let_go():
            return None
        failure = self._failure(error)
        await self._give_reason(error, failure)
        await self._drain_worker()
        await self._discard(keep=isinstance(error, PeerLost))
        if self.kept:
            return PeerLost(f"{error}; what came is kept: run it again to resume")
        return failure or error

    async def _end_with_all(self) -> None:
        """Nothing of it goes on, or refers to it, when this returns."""
        await self._drain_worker()
        self._close_journals()
        late = [] if self._came is None else [self._came.link]
        await close_all([*self._links, *late])
        self._observer.close()
        self._task = self._reception = None

    async def _attempts(self) -> None:
        """Receives, over as many connections as it takes."""
        while True:
            self._visitor = asyncio.get_running_loop().create_future()
            try:
                await self._receive()
                return
            except PeerLost as error:
                if not self._resumable:
                    raise
                left = self._time_left()
                if not self._heard and self._resumed is None and not self._visitor.done():
                    self.started = False  # nobody can know the name of this attempt
                    raise
                await finished(close_all(self._links))
                if not self._visitor.done() and left > 0:
                    self.patience = left
                    self._observer("interrupted", self.arrival)
                    await asyncio.wait({self._visitor}, timeout=left)
                if left <= 0:
                    raise await self._no_progress(error) from None
                if not self._visitor.done():
                    raise
                forget(error)
            visitor, self._came = self._came, None
            assert visitor is not None
            self.link, self._described = visitor.link, visitor._described
            self._sparse = visitor._sparse
            self._lanes = {}
            self._observer("back", self.arrival)

    def _time_left(self) -> float:
        """How long the source is waited for, after a break: --retry, from the first break after it
        has brought anything."""
        brought = self._reception.brought if self._reception is not None else 0
        if brought > self._brought:
            self._brought = brought
            self._tries.renew()
        self._tries.broke()
        return self._tries.left(self._retry)

    async def _no_progress(self, error: PeerLost) -> NoProgress:
        """It comes again and again, and brings nothing: so it is told, where it is here."""
        tries = self._tries
        why = (
            f"nothing new has come for {tries.used():.3g} s, and the connection broke "
            f"{tries.breaks} times"
        )
        if self._came is not None:
            await self._came.link.give_reason(ErrorCode.INTERNAL, why)
        return NoProgress(f"{error}; {why}")

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
                journal.is_of(described.resume)
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
        return Lanes(self.link, self._lanes).links

    async def _drain_worker(self) -> None:
        try:
            await in_thread(self._worker.shutdown)
        except RuntimeError:  # no thread can be started any more
            self._worker.shutdown()

    def _failure(self, error: BaseException) -> MigrationError | None:
        failure = failure_of(error, "the guest cannot be written here")
        self.arrival.status = "cancelled" if failure is None else "failed"
        return failure

    async def _let_go(self) -> bool:
        """A guest that is whole is given up for good, before anybody is told so.

        Returns True where it is ours already: whatever happened, it runs here.
        """
        custody = self._custody
        if custody is None or custody.journal.claim is Claim.NONE:
            return False
        if not custody.place_kept:
            self.place = None  # it is the custody's
            with contextlib.suppress(JournalError):  # PREPARED stays: the next program decides
                await custody.give_up()
        if custody.journal.claim is not Claim.OWNER or not custody.running:
            return False
        if self.arrival.status != "completed":
            await self._arrived(custody)
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
                switches = caps.switched_on(self._capabilities)
                answer, agreement = caps.answer(hello, switches | {caps.SPARSE})
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
        self._stream, self._sparse = agreement.stream, agreement.sparse
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
        self.arrival.status = "active"
        if first:
            self._observer("accepted", self.arrival)
        reception = self._reception
        if reception is None:
            reception = self._reception = self._reception_of(place)
        lanes = Lanes(self.link, self._lanes, self._sparse)
        complete = await reception.receive(lanes, info, held=held)
        self.arrival.status = "device"
        seconds = await reception.verify(complete)
        await self._prepare(place, complete, seconds)
        await self._take_over()

    def _reception_of(self, place: Place) -> Reception:
        if (place.reception is not None) != self._stream:
            assert self.arrival.info is not None
            raise PeerError(
                f"a guest of kind {self.arrival.info.kind} comes "
                f"{'as pages' if place.reception is None else 'as a stream'} alone"
            )
        kind = place.reception or Pages
        return kind(
            place, self.arrival, self._worker, self._hear, self._forget_earlier, self._observer
        )

    def _hear(self) -> None:
        self._heard = True

    def _forget_earlier(self) -> None:
        """What this attempt has brought outdoes the one before."""
        if self._resumed is not None and self._resumed.claim is Claim.NONE:
            self._resumed.close()
        self._resumed = None

    async def _begin_journal(self, place: Place, resume: bytes) -> bytes:
        """Each attempt has a name of its own, under which no other can be handed over.

        Where the place outlives this program, what a later one needs is written down. The name by
        which the source has resumed holds until it has surely heard of the new one.
        """
        journal = self._records.journal(os.urandom(TOKEN_BYTES))
        if place.lasting:
            try:
                await finished(in_thread(journal.begin, place=place.facts()))
                place.persist()
            except BaseException:
                journal.close()
                raise
        earlier, self._resumed = (self._journal, self._resumed), None
        for one in filter(None, earlier):
            if one.is_of(resume):
                self._resumed = one
            else:
                one.close()
        self._journal = journal
        return journal.token

    async def _expect(self, kind: type[T]) -> T:
        while self._stream and await self.link.first_type() is MessageType.TAKEN:
            await self.link.receive_message()  # it has crossed with READY
        return await self.link.expect(kind)

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

    # -- hand-over

    async def _prepare(self, place: Place, complete: Complete, seconds: float) -> None:
        """All of it is here, and right: that is written, then said."""
        await place.prepare(complete.state)
        assert self._journal is not None
        self._custody = Custody(place, self._journal, complete.state)
        self._records.keep(self._custody)
        await self._custody.prepare(peer=self.link.peer_name)
        with contextlib.suppress(PeerLost):  # it may come back, as below
            await self.link.send(Ready(seconds))

    async def _take_over(self) -> None:
        """GO, on this connection or on one that asked; or the end of the patience."""
        custody = self._custody
        assert custody is not None
        if await self._go(custody):
            self.owner = True
            await undisturbed(custody.take_over())
        await undisturbed(self._arrived(custody))

    async def _arrived(self, custody: Custody) -> None:
        """The guest runs here, and the source is told."""
        with contextlib.suppress(PeerLost, ProtoError):
            await self.link.send(Running())
        custody.running = await custody.place.look(custody.running)
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
        self.place, self.arrived = None, custody.place
        self.arrival.running, self.arrival.runs = custody.running, custody.place.runs
        self.arrival.status = "completed"
        custody.let_go()
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
