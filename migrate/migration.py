"""What every migration goes through at the source, whatever kind of guest it moves.

    (hold)     no other program can move the guest
    setup      HELLO, GUEST, ACCEPT; further channels
    active     the guest's memory goes over: `_transfer`, up to READY
    commit     it is still held, it is given up, COMMITTED is written, then GO: it does not run here
               again
    completed  RUNNING came

On any failure before the commit what was begun is undone, and the guest goes on here. After it,
only the destination's word that it never will run the guest gives it back: NOT_STARTED, or ABORTED
when it is asked. It is asked where the connection broke before it could say how it went.

A connection that breaks before the commit is no failure: another one is made, and the transfer
goes on from what the destination holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from migrate.budget import Budget
from migrate.cache import SizedCache, default_cache_max
from migrate.cancellation import finished, forget, once, undisturbed
from migrate.channels import Channels, Dial
from migrate.errors import (
    CancelledByPeer,
    ConnectError,
    HandOverUnknown,
    MigrationError,
    NoProgress,
    NotStartedError,
    PeerLost,
    TlsError,
    code_of,
    failure_of,
)
from migrate.guests.guest import Guest
from migrate.handover import ask_until_known, written
from migrate.journal import Journal, JournalError
from migrate.link import Link
from migrate.observer import Watched
from migrate.output import printable
from migrate.parameters import Parameters
from migrate.quantities import option_size
from migrate.statistics import Statistics
from migrate.threads import in_thread
from proto import ProtoError
from proto import capabilities as caps
from proto.frames import HEADER_BYTES
from proto.kernel import PageEncoder, PageHashes
from proto.messages import (
    MAX_TEXT,
    SEED_BYTES,
    TOKEN_BYTES,
    Accept,
    CacheSize,
    Done,
    Go,
    GuestInfo,
    Hello,
    Message,
    Running,
    batch_bytes,
)
from proto.ownership import Claim, Event, Role

HANDSHAKE_SECONDS = 15.0
HAND_OVER_SECONDS = 60.0
RESOLVE_SECONDS = 60.0
RETRY_SECONDS = 60.0
# The first pause before it is tried to connect again, and the longest.
CONNECT_AGAIN_SECONDS = (0.1, 5.0)
# So long, and no longer than half of --retry, only the address that broke off is tried.
HOME_SECONDS = 20.0
# The guest may be paused so many times; each pause but the last has stopped it for nothing.
MAX_PAUSES = 3
# What an operator over there wishes for is done so often.
MAX_WISHES = 100
# Of those that are refused so many are told of.
MOST_TOLD = 3

Observer = Callable[[str, Statistics], None]
_TURN = threading.Lock()


class Migration(ABC):
    """One migration of one guest, over one link and those that replace it when it breaks.

    observer -- called with an event and the statistics as things happen:
                "status"           it has changed
                "pass"             a round begins, the one after dirty_sync_count
                "progress"         some of it is sent
                "round"            it is over, and the destination has it
                "paused"           the guest is stopped;  "resumed" it goes on here after all
                "notice: ..."      a sentence for the user
                what it raises is logged, and changes nothing; SystemExit and KeyboardInterrupt
                cancel the migration where that can be, and are raised at its end
    dial     -- connects to the destination once more: for channels beside `link`, and after a break
    retry    -- seconds to make a connection again for when one breaks, from the first break after
                something new came through; 0: a break is a failure
    journal  -- the directory of the journals; "" keeps this one's in memory
    earlier  -- the journal of an attempt that an earlier program has left: it is resumed
    address  -- the destination's, for whoever has to ask it later
    resolve_timeout -- seconds to find out whose the guest is after a break in the hand-over
    """

    required: frozenset[str] = frozenset()
    """Capabilities that the destination must have for this kind of transfer."""
    silent: frozenset[str] = frozenset()
    """Capabilities that are used where the destination has them; nobody can switch them off."""

    def __init__(
        self, guest: Guest, link: Link, parameters: Parameters | None = None,
        observer: Observer | None = None, dial: Dial | None = None,
        *, retry: float = 0.0, journal: str = "", earlier: Journal | None = None,
        resolve_timeout: float = RESOLVE_SECONDS, address: str = "",
    ) -> None:  # fmt: skip
        self.guest = guest
        self.parameters = parameters or Parameters()
        self.statistics = Statistics(total=guest.size, page_size=self.parameters.page_size)
        self.channels = Channels(link, dial, self._aside)
        self._observer = Watched(observer, self._leave)
        self._task: asyncio.Task[object] | None = None
        self._dial = dial
        self._retry = retry
        self._tries = Budget(CONNECT_AGAIN_SECONDS)
        self._under_way = False
        """This attempt was let in, and is past what both sides have to say at first."""
        self._fewest_left = 0
        """The least that was to go when the destination said what it holds."""
        self._begun_again = self._pauses = self._wishes = self._refused_wishes = 0
        self._sent_before = self._lane_bytes = 0
        self._seed = os.urandom(SEED_BYTES)
        self._agreed: caps.Agreement | None = None
        self._journals = journal
        self._journal = earlier or Journal(Role.SOURCE, bytes(TOKEN_BYTES))
        self._resumes = earlier is not None
        self._greeting = False
        self._holds = self._gave_up = self._cancelled = False
        self.resumable = False
        """It failed, and whoever tries again (with the journals) can go on with it."""
        self._resolve_timeout = resolve_timeout
        self._address = address
        self._worker = ThreadPoolExecutor(1, "encode")
        page_size = self.parameters.page_size
        self._pages = -(-guest.size // page_size)
        self._cache = SizedCache(self._pages * page_size, page_size, self.parameters.cache_size)
        self._began = time.monotonic()
        self._round = 0
        self._paused_at: float | None = None
        self._sent_before_pause = 0
        link.limit.rate = self.parameters.limits.max_bandwidth

    @property
    def committed(self) -> bool:
        """Whether the guest is given up: it does not run here again unless we hear so."""
        return self.channels.handed_over

    @property
    def sent_bytes(self) -> int:
        """Over all channels there were."""
        return self._sent_before + self.channels.sent_bytes

    # -- what a kind of transfer is

    @abstractmethod
    async def _transfer(self) -> None:
        """Greets the destination and sends the guest, over the channels there are now; returns
        when the destination is READY. Called once more after a break."""

    @abstractmethod
    async def _undo(self) -> None:
        """The transfer has failed: what was begun with the guest is undone, so that it runs on."""

    @abstractmethod
    async def _let_go(self) -> None:
        """The guest runs at its own speed, here or there."""

    @abstractmethod
    def _advise(self) -> None:
        """It is over: what the numbers mean."""

    # -- settings

    def set_parameters(self, parameters: Parameters) -> None:
        """Takes other parameters while the migration runs; they hold from the next batch on, or
        from the end of the round.

        Raises UsageError for a change of what was agreed on with the destination.
        """
        ours = self.parameters
        ours.check_change(parameters)
        self.parameters = parameters
        self.channels.link.limit.rate = parameters.limits.max_bandwidth
        if (parameters.cache_size, parameters.cache_max) != (ours.cache_size, ours.cache_max):
            self.set_cache_size(parameters.cache_size)

    def set_cache_size(self, size: int) -> None:
        """Asks for another cache size, which it has as soon as the thread gets to it."""
        if refusal := self._cache.ask(size):
            self._notice(refusal)
        else:
            self.parameters = replace(self.parameters, cache_size=size, cache_max=0)

    async def _confirm_cache(self) -> None:
        """Tells the destination the size in force, and counts it."""
        if refusal := self._cache.refusal():
            self._notice(refusal)
        if (size := self._cache.size) != self.statistics.cache_size:
            self.statistics = self.statistics.with_(cache_size=size)
            await self.channels.link.send(CacheSize(size))

    def _new_encoder(self, hashes: PageHashes, agreement: caps.Agreement) -> PageEncoder:
        return PageEncoder(
            hashes, self._cache.open(deltas=agreement.xbzrle), merge=agreement.merge,
            headroom=HEADER_BYTES, room=batch_bytes(self.parameters.channels),
        )  # fmt: skip

    def _aside(self, message: Message) -> bool:
        """Takes what the destination says when it likes; False for an answer."""
        if not isinstance(message, CacheSize):
            return False
        self._wishes += 1
        most = max(self.parameters.cache_size, self.parameters.cache_max, default_cache_max())
        if self._wishes > MAX_WISHES:
            if self._wishes == MAX_WISHES + 1:
                self._notice(
                    f"the destination has asked for another cache {MAX_WISHES} times: no more of "
                    "that is heard"
                )
        elif message.size <= most:
            self.set_cache_size(message.size)
        elif (refused := self._refused_wishes) < MOST_TOLD:
            self._refused_wishes = refused + 1
            self._notice(
                f"the destination asks for a cache of {option_size(message.size)}: no more "
                f"than {option_size(most)} is given for the asking: --cache-size here sets it"
            )
        return True

    def _check_time(self) -> None:
        """Raises NotConvergedError where the migration has had all the time it gets."""

    # -- the whole of it

    async def run(self) -> Statistics:
        """Migrates. Returns the final statistics.

        Raises MigrationError (see migrate.errors) or asyncio.CancelledError; unless `committed`,
        the guest runs on here then. A cancellation that comes when GO was said waits until it is
        known whose the guest is, and is forgotten where it has arrived.
        """
        try:
            return await once(self._run(), self._hear_cancellation)
        finally:
            self._observer.raise_leaving()

    def _hear_cancellation(self) -> None:
        self._cancelled = True

    def _leave(self) -> None:
        """The observer wants the program to end."""
        over = self.committed or self.statistics.status in ("completed", "failed", "cancelled")
        if self._task is not None and not over:
            self._cancelled = True
            self._task.cancel()

    async def _run(self) -> Statistics:
        self._task = asyncio.current_task()
        self._began = time.monotonic()
        try:
            await self._hold()
            try:
                await self._attempts()
            except BaseException as broken:
                if not self.committed:
                    raise
                await undisturbed(self._find_out(broken))
                forget(broken)
        except BaseException as raised:
            failure = await undisturbed(self._fail(_the_cause(raised)))
            if failure is raised:
                raise
            raise failure from raised
        finally:
            await undisturbed(self._end_with_all())
        return self.statistics

    async def _fail(self, error: BaseException) -> BaseException:
        """Tells the destination why; returns what the user is to see."""
        # Not where the destination has given up, and keeps nothing.
        lost = isinstance(error, PeerLost | ConnectError | TlsError) or self._greeting
        self.resumable = self._resumes and bool((lost and self._retry) or self._agreed is None)
        failure = self._failure(error)
        await self._give_reason(error, failure)
        self._end("failed" if failure else "cancelled", str(failure or ""))
        return failure or error

    async def _end_with_all(self) -> None:
        """Nothing of it goes on, or refers to it, when this returns."""
        self._worker.shutdown(wait=True)
        self._journal.close(keep=self.resumable or self._journal.claim is Claim.ABORTED)
        if self._holds:
            self.guest.moving = False
            self.guest.unhold()
        await self.channels.close()
        self._observer.close()
        self._task = None

    async def _hold(self) -> None:
        """Hold the guest. Raises UsageError where it is being moved, or has moved."""
        with _TURN:  # other threads may have loops of their own
            self.guest.check_home()
            self.guest.moving = self._holds = True
        await self.guest.hold()
        self.guest.refuse_if_moved()
        for caution in self.guest.cautions:
            self._notice(f"warning: {caution}")

    async def _attempts(self) -> None:
        """Migrates, over as many connections as it takes."""
        while True:
            try:
                async with self.channels.reading():
                    await self._migrate()
                return
            except BaseException as raised:
                await self._survive(_the_cause(raised))
                forget(raised)

    async def _survive(self, error: BaseException) -> None:
        """Connects again; raises where this is the end of it."""
        if self._cancelled and not self.committed:
            raise asyncio.CancelledError from None  # it came as the connection broke
        if self.committed or not isinstance(error, PeerLost) or not self._can_retry():
            raise error from None
        if isinstance(error, NoProgress):
            raise error from None
        if self._pauses >= MAX_PAUSES:
            raise NoProgress(
                f"{error}; the guest was stopped {self._pauses} times for nothing"
            ) from None
        await self._connect_again(error)

    def _can_retry(self) -> bool:
        """Not before the first ACCEPT: who has never been there is not to be waited for."""
        return bool(self._retry and self._dial and self._agreed)

    async def _connect_again(self, error: PeerLost) -> None:
        """The guest runs here meanwhile. Raises PeerLost where it takes too long."""
        tries, retry = self._tries, self._retry
        tries.broke(greeted=self._under_way)
        if self._under_way or tries.breaks == 1:
            since = f" ({tries.breaks} breaks, and nothing new came)" if tries.greeted else ""
            left = f"{tries.left(retry):.3g} s at most"
            self._notice(f"{error}: connecting again, for {left}{since}")
        self._under_way = False
        self._set_status("setup")
        await finished(self.channels.close())
        old, link = self.channels.link, await self._dial_again(error)
        if link.endpoint != old.endpoint:
            self._notice(f"connected to another address: {link.peer_name}")
        link.limit = old.limit
        self._lane_bytes += self.channels.lane_bytes
        self._sent_before = self.sent_bytes
        self.channels = Channels(link, self._dial, self._aside)
        self.statistics = self.statistics.with_(reconnects=self.statistics.reconnects + 1)

    async def _dial_again(self, error: PeerLost) -> Link:
        """Connects once more, at first only to the address that broke off.

        Another address of the same name may be another machine's, which knows nothing of the
        guest; or the same machine's, by a way that still works.
        """
        assert self._dial is not None
        beside, tries, retry = self.channels.link.beside, self._tries, self._retry
        at_home = time.monotonic() + min(HOME_SECONDS, retry / 2)
        why = ""
        while True:
            await asyncio.sleep(tries.pause(retry))
            self._check_time()
            left = tries.left(retry)
            if left <= 0:
                raise PeerLost(f"{error}; {self._in_vain()}{why}")
            dial, home = self._dial, at_home - time.monotonic()
            if beside is not None and home > 0:
                dial, left = beside, min(left, home)
            try:
                async with asyncio.timeout(left):
                    return await dial()
            except (ConnectError, PeerLost, TimeoutError) as fault:
                why = f": {fault}" if str(fault) else why

    def _in_vain(self) -> str:
        """What came of connecting again, in words."""
        tries = self._tries
        if not tries.greeted:
            return f"no other connection in {self._retry:g} s"
        return (
            f"nothing new has come through for {tries.used():.3g} s, and the connection broke "
            f"{tries.breaks} times"
        )

    def _progressed(self) -> None:
        """The destination has something that it did not have before."""
        self._tries.renew()

    def _took_stock(self, left: int) -> None:
        """The destination has said what it holds, after a break: `left` pages are to go.

        Raises NoProgress where attempts have brought nothing for too long.
        """
        if left < self._fewest_left:
            self._fewest_left = left
            self._progressed()
        elif self._tries.over(self._retry):
            raise NoProgress(self._in_vain())

    def _failure(self, error: BaseException) -> MigrationError | None:
        """The error as a user sees it; None for a cancellation."""
        failure = failure_of(error, "the guest's memory cannot be read")
        if self.committed and not isinstance(failure, HandOverUnknown):
            failure = self._unknown(str(failure or "interrupted"))
        return failure

    def _unknown(self, why: str) -> HandOverUnknown:
        text = (
            "the guest was handed over, but the destination has not confirmed that it runs "
            f"({why}): look there first; {self.guest.waits}"
        )
        if self._journals:
            text += f"; `migrate-src resolve {self._journal.name}` asks again"
        else:
            self.guest.undecided = self._journal, self._dials
        return HandOverUnknown(text)

    async def _give_reason(self, error: BaseException, failure: MigrationError | None) -> None:
        """Tells the peer why, where it can still hear."""
        if isinstance(error, PeerLost | CancelledByPeer):
            return
        reason = str(failure or "cancelled at the source")
        await self.channels.give_reason(code_of(error, failure), reason)

    async def _migrate(self) -> None:
        try:
            await self._transfer()
            await self._hand_over()
        except BaseException:
            if not self.committed:
                await finished(self._keep_guest())
            raise

    async def _keep_guest(self) -> None:
        """Undoes everything: nothing that was written is forgotten, the guest runs here."""
        await self._undo()
        await self._let_go()
        if self._paused_at is not None:
            await self.guest.resume()
            self._paused_at = None
            self._observer("resumed", self.statistics)

    # -- setup

    async def _greet(self) -> tuple[caps.Agreement, Accept]:
        """Up to ACCEPT, with the further channels. Raises PeerLost where that takes too long."""
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                self._greeting = True
                agreement, accept = await self._describe()
                self._greeting = False
                await self._begin_journal(accept.token)
                await self.channels.open(self.parameters.channels, accept.token)
        except TimeoutError:
            raise PeerLost(
                f"{self.channels.link.peer_name} does not answer within {HANDSHAKE_SECONDS:g} s"
            ) from None
        if self._agreed not in (None, agreement):
            raise MigrationError("the destination has other capabilities now: begin again")
        self._agreed = agreement
        return agreement, accept

    async def _describe(self) -> tuple[caps.Agreement, Accept]:
        parameters, link = self.parameters, self.channels.link
        hello = caps.offer(parameters.wire_capabilities | self.silent, self.required)
        await link.send(hello)
        answer = await self.channels.expect(Hello)
        agreement = caps.agree(hello, answer)
        if self._pages > answer.max_pages:
            raise MigrationError(
                f"the guest has {self._pages} pages, the destination takes no more than "
                f"{answer.max_pages}: use a larger --page-size"
            )
        if self._agreed is None:
            for name in sorted(agreement.dropped - self.silent):
                self._notice(f"the destination has no {name}: it is not used")
        await link.send(
            GuestInfo(
                self.guest.kind,
                self.guest.size,
                parameters.page_size,
                self._seed,
                parameters.channels,
                printable(self.guest.description, MAX_TEXT),
                self._journal.token if self._resumes else b"",
                self._round + 1,
            )
        )
        return agreement, await self.channels.expect(Accept)

    async def _begin_journal(self, token: bytes) -> None:
        """Each attempt has its own name, and so its own journal; that of the last one goes."""
        journal = Journal(Role.SOURCE, token, self._journals)
        beginning = in_thread(
            journal.begin, guest=self.guest.facts(), address=self._address,
            description=self.guest.description, peer=self.channels.link.peer_name,
        )  # fmt: skip
        try:
            await finished(beginning)
        except BaseException:
            journal.close()
            raise
        self._journal.close()
        self._journal, self._resumes = journal, True

    # -- hand-over

    async def _hand_over(self) -> None:
        """READY came: the guest is given up, and GO is said; returns when it runs over there."""
        self.guest.confirm_hold()
        try:
            await finished(self._give_up())
        except BaseException:
            if await undisturbed(self._call_off()):
                raise
        self.channels.handed_over = self.guest.given_up = True
        await self._say_go()
        await undisturbed(self._arrived())

    async def _give_up(self) -> None:
        """From here on nothing but GO is missing. Raises JournalError."""
        await self.guest.give_up()
        self._gave_up = True
        await written(self._journal, Event.READY, **self._late_facts())

    async def _call_off(self) -> bool:
        """GO was not said, and is not going to be: the guest is ours again, still paused.

        False: it stands in the journal that the guest is given up, and that cannot be struck out.
        Whoever reads it could say GO one day; so it is said now.
        """
        if self._journal.claim is Claim.COMMITTED:
            try:
                await written(self._journal, Event.CALLED_OFF)
            except JournalError:
                return False
        if self._gave_up:
            await self._take_back()
        return True

    def _late_facts(self) -> dict[str, Any]:
        """What has become other since the journal was begun: more processes were stopped."""
        facts = self.guest.facts()
        return {} if facts == self._journal.facts.get("guest") else {"guest": facts}

    async def _say_go(self) -> None:
        """Returns when the guest runs there. Raises NotStartedError: it is ours again, for good."""
        try:
            async with asyncio.timeout(HAND_OVER_SECONDS):
                await self.channels.link.send(Go())
                await self.channels.expect(Running)
        except NotStartedError:
            await undisturbed(self._not_started())
            raise
        except TimeoutError:
            raise PeerLost(f"no answer to GO for {HAND_OVER_SECONDS:g} s") from None

    async def _not_started(self) -> None:
        await written(self._journal, Event.NOT_STARTED, must=False)
        await self._take_back()

    async def _arrived(self) -> None:
        """RUNNING came."""
        await written(self._journal, Event.RUNNING, must=False)
        with contextlib.suppress(PeerLost, ProtoError):
            await self.channels.link.send(Done())
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
        await self._let_go()
        self._end("completed")
        try:
            await self.guest.release()
        except Exception as error:
            self._notice(f"warning: the guest runs at the destination; to end it here: {error}")

    async def _take_back(self) -> None:
        """It will never run over there: it is ours again, and still paused."""
        await self.guest.take_back()
        self.channels.handed_over = self.guest.given_up = self._gave_up = False

    @property
    def _dials(self) -> list[Dial]:
        """The ways to the destination."""
        return [dial for dial in (self.channels.link.beside, self._dial) if dial is not None]

    async def _find_out(self, error: BaseException) -> None:
        """The connection broke after the commit: asks until it is known whose the guest is.

        Returns where it runs over there. Raises NotStartedError where it is ours again, and runs;
        HandOverUnknown where that is not to be found out in time.
        """
        cancelled = isinstance(error, asyncio.CancelledError)
        why = str(error) or ("interrupted" if cancelled else type(error).__name__)
        if self._journal.claim is Claim.COMMITTED:
            if self._dial is None:
                raise self._unknown(why) from error
            self._notice(f"the hand-over was cut off ({why}): asking whose the guest is")
            unknown = await ask_until_known(self._dials, self._journal, self._resolve_timeout)
            if unknown and self._journal.claim is Claim.COMMITTED:
                raise self._unknown(f"{why}; {unknown}") from error
        if self._journal.claim is Claim.DONE:
            if self.statistics.status != "completed":
                await self._done()
            return
        await self._take_back()
        await self._keep_guest()
        if cancelled:
            raise error
        raise NotStartedError(
            f"the hand-over was cut off ({why}), and the destination has given the guest up"
        )

    # -- statistics

    def _set_status(self, status: str, error: str = "") -> None:
        changed = status != self.statistics.status
        self.statistics = self.statistics.with_(status=status, error=error)
        if changed:
            self._observer("status", self.statistics)

    def _end(self, status: str, error: str = "") -> None:
        """The last numbers and what they mean: whoever sees this status sees no others later."""
        self._worker.shutdown(wait=True)
        self.statistics = self.statistics.with_(status=status, error=error)
        self._update()
        self._advise()
        self._observer("status", self.statistics)

    def cancelling(self) -> None:
        """Says that it is being cancelled; whoever runs this cancels it."""
        self._set_status("cancelling")

    def _notice(self, text: str) -> None:
        self._observer(f"notice: {text}", self.statistics)

    def _update(self) -> None:
        """Brings what is counted into the statistics."""
        s, transferred = self.statistics, self.sent_bytes
        self.statistics = s.with_(
            transferred=transferred,
            channel_bytes=self._lane_bytes + self.channels.lane_bytes,
            total_time=time.monotonic() - self._began,
            precopy_bytes=transferred - s.downtime_bytes,
        )
        if s.status == "completed":
            seconds = max(self.statistics.total_time - s.setup_time, 1e-9)
            self.statistics = self.statistics.with_(mbps=transferred * 8 / seconds / 1e6)


def _the_cause(error: BaseException) -> BaseException:
    """What stands inside nested exception groups: a fault rather than a cancellation."""
    while isinstance(error, BaseExceptionGroup):
        faults = [e for e in error.exceptions if not isinstance(e, asyncio.CancelledError)]
        error = (faults or list(error.exceptions))[0]
    return error
