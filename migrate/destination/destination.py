"""The destination: receives one guest, verifies it, and runs it when the source says GO.

    setup   GUEST -> a place for it, or a reason why not, before any page -> ACCEPT
    active  pages are taken in, round after round (migrate.destination.page_receiver)
    device  COMPLETE: the digest of the whole memory must match -> PREPARED is written -> READY
    done    GO (migrate.destination.go_wait) -> OWNER is written -> the guest is started -> RUNNING

If anything fails before READY, the place is discarded: half a guest never runs. If only the
connection breaks, the place is kept for a while for a source that comes back to resume; a place
that outlives this program, for a later program as well. After READY the source may come back and
ask (migrate.ownership.records). After GO the guest is ours: if it cannot be started, ERROR
NOT_STARTED says so, and it never will be.

    Destination --one per guest-------> Receiver          takes pages, or QEMU's stream, in
         |------one per connection----> ReceivingChannels its TCP connections
         |------one per connection----> AttemptJournals   its name, by which it can be resumed
         |------over all connections--> ReturningSource   how long a break may last
         +------one per READY---------> Custody, GoWait   who owns the guest

The order of steps in `_attempt` and `_prepare` is the protocol's promise. A place is found before
ACCEPT, so a guest without one costs no transfer. The journal of an attempt exists before the source
hears its name. PREPARED is on the disk before READY, since the source gives its guest up on READY:
a program that is started after a crash finds it and can answer. OWNER is on the disk before the
guest runs, so no later program starts it twice.

A cancellation is honoured between steps, never within one: what follows GO is finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor

from migrate.destination.attempts import AttemptJournals
from migrate.destination.channels import ReceivingChannels
from migrate.destination.go_wait import GoWait
from migrate.destination.greeting import Introduction, NoPlaceError
from migrate.destination.options import DestinationOptions
from migrate.destination.page_receiver import PageReceiver
from migrate.destination.receiver import Arrival, Receiver, Reception
from migrate.destination.returning import ReturningSource
from migrate.destination.run_state import RunState
from migrate.errors import (
    JournalError,
    MigrationError,
    PeerError,
    PeerLost,
    code_of,
    failure_of,
)
from migrate.events import DestinationEvent
from migrate.guests.place import Place
from migrate.ownership.custody import Custody
from migrate.ownership.journal import Journal
from migrate.runtime.cancellation import cancel_once, finish, ignore_cancellation, release_frames
from migrate.runtime.log_context import name_migration
from migrate.runtime.observer import SafeObserver
from migrate.runtime.threads import in_thread
from migrate.statistics import OVER, Status
from migrate.transport.link import Link, close_all, give_reason_on
from proto import ErrorCode, ProtoError
from proto.wire.messages import Accept, Complete, Done, GuestInfo, Ready, Running
from proto.wire.ownership import Claim

# The source says DONE as soon as it has heard RUNNING.
ACKNOWLEDGE_SECONDS = 2.0

logger = logging.getLogger(__name__)


class Destination:
    """Receives one guest, over one connection and those that replace it when it breaks."""

    def __init__(self, introduction: Introduction, options: DestinationOptions) -> None:
        agreement = introduction.agreement
        self.arrival = Arrival(introduction.info, capabilities={"xbzrle": agreement.xbzrle})
        self.state = RunState.GREETED
        self.arrived: Place | None = None
        """Where the guest is, once it runs here."""
        self.patience = options.retry
        """Seconds that a source whose connection broke has to come back."""
        self._options = options
        self._introduction = introduction
        """How the source of the current attempt has introduced itself."""
        self._channels = ReceivingChannels(introduction.link, agreement)
        self._returning = ReturningSource(options.retry)
        self._journals = AttemptJournals(options.records)
        self._place: Place | None = None
        """The place to discard on failure; None before there is one, and once a Custody has it."""
        self._receiver: Receiver | None = None
        self._custody: Custody | None = None
        self._worker = ThreadPoolExecutor(1, "apply")
        self._observer = SafeObserver(options.observer, self._leave)
        self._task: asyncio.Task[object] | None = None
        self._cancelled = False

    @property
    def link(self) -> Link:
        """The first channel of the current attempt."""
        return self._channels.link

    @property
    def started(self) -> bool:
        """Whether a guest was accepted here, so that its failure is a failed migration."""
        return self.state not in (RunState.GREETED, RunState.REFUSED)

    @property
    def is_ours(self) -> bool:
        """Whether GO has come: the guest is ours, whatever happens."""
        return self.state is RunState.OWNER

    @property
    def acknowledged(self) -> bool:
        """Whether the source has said that it knows that the guest runs here."""
        return self._custody is not None and self._custody.told.is_set()

    async def until_acknowledged(self) -> None:
        """Wait until the source has asked what became of its guest, and knows."""
        if self._custody is not None:
            await self._custody.told.wait()

    async def run(self) -> Arrival:
        """Receive the guest; return when it runs here.

        Raise MigrationError or asyncio.CancelledError: then nothing is left of the guest here, but
        for what KEPT means. From GO on the guest is ours, and a cancellation changes nothing.
        """
        try:
            return await cancel_once(self._run(), self._note_cancellation)
        except MigrationError as error:
            if self._cancelled and self.was_refused(error):
                raise asyncio.CancelledError from error  # else our caller would await another guest
            raise
        finally:
            self._observer.raise_exit()

    def _note_cancellation(self) -> None:
        self._cancelled = True

    def was_refused(self, error: MigrationError) -> bool:
        """Return whether the peer was refused with `error`: the true source may come yet.

        The failure of a source ends the program; a peer that breaks the protocol is no source.
        """
        return not self.started or type(error) is PeerError

    def resume_with(self, introduction: Introduction) -> bool:
        """Go on over a new connection if its source resumes this migration; return whether it does.

        The channels there were are given up: the source knows best that they are broken.
        """
        info, ours = introduction.info, self.arrival.info
        if not self._journals.is_resumed_by(info.resume) or (
            (info.kind, info.size, info.page_size) != (ours.kind, ours.size, ours.page_size)
        ):
            return False
        self._returning.come(introduction)
        for link in self._channels.links:
            link.abort()
        return True

    # -- one attempt after the other

    async def _run(self) -> Arrival:
        self._task = asyncio.current_task()
        try:
            await self._receive_until_done()
        except BaseException as error:
            failure = await ignore_cancellation(self._fail(error))
            if failure is error:
                raise
            if failure is not None:
                raise failure from error
            release_frames(error)
        finally:
            await ignore_cancellation(self._clean_up())
        return self.arrival

    async def _receive_until_done(self) -> None:
        """Receive over as many connections as it takes."""
        while True:
            try:
                await self._attempt()
                return
            except PeerLost as error:
                self._introduction = back = await self._wait_for_return(error)
                release_frames(error)
            self._channels = ReceivingChannels(back.link, back.agreement)
            logger.info("the source is back, from %s", back.link.peer_name)
            self._observer(DestinationEvent.RETURNED, self.arrival)

    async def _wait_for_return(self, error: PeerLost) -> Introduction:
        """Wait until a source whose connection broke is back. Return how it introduces itself.

        Raise `error` if it cannot resume or does not come in time, NoProgress if it comes again and
        again and brings nothing.
        """
        if not (self._options.retry and self._place is not None and self._custody is None):
            raise error
        returning = self._returning
        left = returning.time_left(self._receiver.progress if self._receiver is not None else 0)
        unheard = self.state is RunState.ACCEPTED and self._journals.resumed is None
        if unheard and not returning.is_here:
            self.state = RunState.GREETED  # the source cannot name this attempt
            raise error
        await finish(close_all(self._channels.links))
        if not returning.is_here and left > 0:
            logger.info("%s; the source has %.3g s to come back", error, left)
            self.patience = left
            self._observer(DestinationEvent.INTERRUPTED, self.arrival)
            await returning.wait(left)
        if left <= 0:
            raise await returning.no_progress(error) from None
        back = returning.take()
        if back is None:
            raise error
        return back

    async def _attempt(self) -> None:
        """Receive over the connection there is, up to the guest that runs."""
        info, agreement = self._introduction.info, self._introduction.agreement
        accept = self._options.accept_channel
        if info.channels > 1 and accept is None:
            raise NoPlaceError("guests are received over one connection here")
        first = self._place is None
        place = self._place or await self._find_place(info)
        resumes = not first or place.partial
        await place.make_ready()
        journal = await self._journals.begin(place, info.resume)
        name_migration(journal.name)
        logger.info("a %s guest comes from %s", info.kind, self.link.peer_name)
        self.link.share_receiving(info.channels, compressed=agreement.zstd)
        await self.link.send(Accept(journal.token, resumes))
        if info.channels > 1 and accept is not None:
            await self._channels.gather(journal.token, info.channels, accept, self._confirmed)
        self.arrival.status = Status.ACTIVE
        if first:
            self._observer(DestinationEvent.ACCEPTED, self.arrival)
        receiver = self._receiver = self._receiver or self._receiver_for(place, agreement.stream)
        complete = await receiver.receive(self._channels, info, resumes=resumes)
        self.arrival.status = Status.DEVICE
        seconds = await receiver.verify(complete)
        await self._prepare(place, journal, complete, seconds)

    async def _find_place(self, info: GuestInfo) -> Place:
        """Find a place for the guest. Raise MigrationError if there is none."""
        resumed = await self._options.records.resume(info.resume)
        self._place = place = self._options.placer(info)
        self._journals.resumed = resumed
        self.state = RunState.ACCEPTED
        return place

    def _receiver_for(self, place: Place, stream: bool) -> Receiver:
        """Make the receiver for this kind of guest. Raise PeerError if the place takes another."""
        if place.takes_stream != stream:
            raise PeerError(
                f"a guest of kind {self.arrival.info.kind} comes "
                f"{'as a stream' if place.takes_stream else 'as pages'} alone"
            )
        kind = (self._options.stream_receiver if stream else None) or PageReceiver
        reception = Reception(
            place, self.arrival, self._worker, self._confirmed, self._journals.supersede,
            self._observer,
        )  # fmt: skip
        return kind(reception)

    def _confirmed(self) -> None:
        """Note that the source has our ACCEPT: it has sent a page, or joined a channel."""
        if self.state is RunState.ACCEPTED:
            self.state = RunState.RECEIVING

    # -- hand-over

    async def _prepare(
        self, place: Place, journal: Journal, complete: Complete, seconds: float
    ) -> None:
        """Persist PREPARED, say READY, and see the guest through to where it runs."""
        await place.prepare(complete.state)
        custody = self._custody = Custody(place, journal, complete.state)
        self._options.records.keep(custody)
        await custody.prepare(peer=self.link.peer_name)
        with contextlib.suppress(PeerLost):  # the source may come back, see GoWait
            await self.link.send(Ready(seconds))
        wait = GoWait(
            custody, self.link, self._returning, self._options.resolve_timeout, self._lost,
            stream=self._introduction.agreement.stream,
        )  # fmt: skip
        try:
            came = await wait.run()
        except PeerLost:
            if wait.resumed:  # the place is ours again
                self._custody = None
            raise
        if came:
            self.state = RunState.OWNER
            await ignore_cancellation(custody.take_over())
        await ignore_cancellation(self._arrived(custody))

    def _lost(self) -> None:
        """Report that the source is gone, and has not said GO."""
        self._observer(DestinationEvent.LOST, self.arrival)

    async def _arrived(self, custody: Custody) -> None:
        """Tell the source that the guest runs here, and wait a moment for its DONE."""
        # The guest runs already. If the source is gone, it asks later, and hears OWNER.
        with contextlib.suppress(MigrationError, ProtoError):
            await self.link.send(Running())
        custody.running = await custody.place.confirm_running(custody.running)
        self.state = RunState.OWNER
        self._place, self.arrived = None, custody.place
        self.arrival.running, self.arrival.runs = custody.running, custody.place.runs
        self.arrival.status = Status.COMPLETED
        custody.close_place()
        self._observer(DestinationEvent.RUNNING, self.arrival)
        with contextlib.suppress(TimeoutError, MigrationError, ProtoError):
            async with asyncio.timeout(ACKNOWLEDGE_SECONDS):
                if isinstance(await self.link.receive_message(), Done):
                    custody.told.set()

    # -- failure

    def _leave(self) -> None:
        """Cancel for an observer that ends the program, unless it is too late for that."""
        over = self.is_ours or self.arrival.status in OVER
        if self._task is not None and not over:
            self._task.cancel()

    async def _fail(self, error: BaseException) -> BaseException | None:
        """Leave nothing of the guest here, tell the source why; return what the user is to see.

        Return None if the guest is ours already: whatever happened, it runs here.
        """
        # Ownership first: once the source hears of a failure its guest runs there, so ABORTED must
        # be on our disk by then.
        if await self._give_up():
            return None
        failure = failure_of(error, "the guest cannot be written here")
        logger.info("failed in state %s: %s", self.state.name, failure or "cancelled")
        self.arrival.status = Status.CANCELLED if failure is None else Status.FAILED
        await self._give_reason(error, failure)
        await self._drain_worker()
        await self._discard(keep=isinstance(error, PeerLost))
        if self.state is RunState.KEPT:
            return PeerLost(f"{error}; what came is kept: run it again to resume")
        return failure or error

    async def _give_up(self) -> bool:
        """Persist ABORTED before the source is told. Return whether the guest runs here instead."""
        custody = self._custody
        if custody is None or custody.journal.claim is Claim.NONE:
            return False
        if not custody.place_kept:
            self._place = None  # it is the custody's
            with contextlib.suppress(JournalError):  # PREPARED stays: the next program decides
                await custody.give_up()
        if custody.journal.claim is not Claim.OWNER or not custody.running:
            return False
        if self.arrival.status is not Status.COMPLETED:
            await self._arrived(custody)
        return True

    async def _give_reason(self, error: BaseException, failure: MigrationError | None) -> None:
        """Tell the source why we hang up, if it can hear."""
        if isinstance(error, PeerLost):
            return
        reason = str(failure or "cancelled at the destination")
        code = code_of(error, failure)
        if self._custody is not None and self._custody.journal.claim is Claim.ABORTED:
            code = ErrorCode.NOT_STARTED  # GO may be on its way
        await give_reason_on(self._channels.links, code, reason)

    async def _discard(self, *, keep: bool) -> None:
        """Leave nothing behind, or what a later program can go on with."""
        place, started = self._place, self.started
        self.state = RunState.FAILED if started else RunState.REFUSED
        if place is None:
            return
        resumable = self._options.retry and self._custody is None
        if keep and started and place.persistent and resumable:
            place.close()
            self.state = RunState.KEPT
        else:
            await place.discard()

    async def _drain_worker(self) -> None:
        """Wait until the worker thread has ended: it writes to the place until then."""
        try:
            await in_thread(self._worker.shutdown)
        except RuntimeError:  # no thread can be started any more
            self._worker.shutdown()

    async def _clean_up(self) -> None:
        """End everything that goes on, and drop the references to it."""
        await self._drain_worker()
        self._journals.close(keep=self.state is RunState.KEPT)
        late = self._returning.link
        await close_all([*self._channels.links, *([late] if late is not None else [])])
        self._observer.close()
        self._task = self._receiver = None
