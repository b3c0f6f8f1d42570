"""The lifecycle of a migration at the source, whatever kind of guest it moves.

    (lock)     no other program can move the guest
    setup      HELLO, GUEST, ACCEPT; further channels               attempt.py
    active     the guest's memory is sent, up to READY              precopy.py, qemu.outgoing
    commit     the guest is relinquished, COMMITTED is written,
               then GO is said: it does not run here again          hand_over.py
    completed  RUNNING came

On any failure before the commit, what was begun is undone and the guest runs on here. After the
commit, only the destination's word that it never will run the guest makes it ours again.

A connection that breaks before the commit is no failure: another one is made (reconnection.py), and
the transfer goes on from what the destination holds.

    Migration --one per migration--> Transfer     the pages, or QEMU's stream
        |-----one per connection---> Attempt      channels and greeting
        +-----one per READY--------> HandOver     who owns the guest
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from migrate.errors import (
    CancelledByPeer,
    ConnectError,
    HandOverUnknown,
    MigrationError,
    NoProgress,
    PeerLost,
    TlsError,
    code_of,
    failure_of,
)
from migrate.guests.guest import Guest
from migrate.ownership.journal import Journal
from migrate.policy.parameters import Parameters
from migrate.runtime.cancellation import cancel_once, finish, ignore_cancellation, release_frames
from migrate.runtime.log_context import name_migration
from migrate.runtime.threads import in_thread
from migrate.source.attempt import Attempt, Introduction
from migrate.source.hand_over import HandOver
from migrate.source.options import SourceOptions
from migrate.source.reconnection import Reconnection
from migrate.source.settings import Settings
from migrate.source.telemetry import Telemetry
from migrate.source.transfer import MAX_PAUSES, Pause, Transfer, TransferContext
from migrate.statistics import OVER, Statistics, Status
from migrate.transport.channels import Channels
from migrate.transport.link import Link
from proto.wire import capabilities as caps
from proto.wire.messages import SEED_BYTES, TOKEN_BYTES, CacheSize, Message
from proto.wire.ownership import Claim, Role

logger = logging.getLogger(__name__)
# Held while a guest is taken: two threads with loops of their own may move guests.
_LOCKING = threading.Lock()


class Migration:
    """One migration of one guest, over one link and those that replace it when it breaks.

    make_transfer -- makes the kind of transfer
    guest         -- what is moved
    settings      -- the parameters in force
    transfer      -- sends the guest
    resumable     -- the migration has failed, and a later program with the journals can resume it
    """

    def __init__(
        self, guest: Guest, link: Link, parameters: Parameters, options: SourceOptions,
        make_transfer: Callable[[TransferContext], Transfer],
    ) -> None:  # fmt: skip
        self.guest = guest
        self.resumable = False
        self._options = options
        statistics = Statistics(total=guest.size, page_size=parameters.page_size)
        self._telemetry = Telemetry(statistics, options.observer, self._cancel)
        self.settings = Settings(guest.size, parameters, link.limit, self._telemetry.notice)
        self._reconnection = Reconnection(options, self._telemetry.notice)
        self._worker = ThreadPoolExecutor(1, "encode")
        self._context = TransferContext(
            self.settings, self._telemetry, self._reconnection, self._worker,
            os.urandom(SEED_BYTES),
        )  # fmt: skip
        self.transfer = make_transfer(self._context)
        self._attempt = self._begin_attempt(link)
        # What the destination agreed to, once it has accepted the guest.
        self._agreement: caps.Agreement | None = None
        # The journal of the last attempt that was accepted: the next one resumes it.
        self._journal = options.earlier or Journal(Role.SOURCE, bytes(TOKEN_BYTES))
        self._resumes = options.earlier is not None
        self._hand_over: HandOver | None = None
        self._task: asyncio.Task[object] | None = None
        self._locked = self._cancelled = False

    @property
    def statistics(self) -> Statistics:
        return self._telemetry.statistics

    @property
    def parameters(self) -> Parameters:
        return self.settings.parameters

    @property
    def channels(self) -> Channels:
        """The channels of the present attempt."""
        return self._attempt.channels

    @property
    def sent_bytes(self) -> int:
        """Bytes sent over all channels, also those of earlier attempts."""
        return self._telemetry.sent_bytes

    @property
    def committed(self) -> bool:
        """Whether GO may have been said: the guest does not run here again unless we hear so."""
        return self._hand_over is not None and self._hand_over.committed

    # -- settings

    def set_parameters(self, parameters: Parameters) -> None:
        """Change the parameters: see Settings.change. Raises UsageError."""
        self.settings.change(parameters)

    def set_cache_size(self, size: int) -> None:
        """Change the size of the page cache, in bytes."""
        self.settings.set_cache_size(size)

    def cancelling(self) -> None:
        """Report that the migration is being cancelled; its task is cancelled by the caller."""
        self._telemetry.set_status(Status.CANCELLING)

    # -- the whole of it

    async def run(self) -> Statistics:
        """Migrate, and return the final statistics.

        Raises MigrationError (see migrate.errors) or asyncio.CancelledError; unless `committed`,
        the guest runs on here then. A cancellation after GO waits until it is known which side owns
        the guest, and is dropped if the guest has arrived.
        """
        try:
            return await cancel_once(self._run(), self._note_cancellation)
        finally:
            self._telemetry.raise_exit()

    def _note_cancellation(self) -> None:
        self._cancelled = True

    def _cancel(self) -> None:
        """Cancel the migration if it can still be cancelled: the observer ends the program."""
        over = self.committed or self.statistics.status in OVER
        if self._task is not None and not over:
            self._note_cancellation()
            self._task.cancel()

    async def _run(self) -> Statistics:
        self._task = asyncio.current_task()
        self._telemetry.restart_clock()
        try:
            await self._lock()
            try:
                await self._attempts()
            except BaseException as broken:
                hand_over = self._hand_over
                if hand_over is None or not hand_over.committed:
                    raise
                await ignore_cancellation(self._find_out(hand_over, broken))
                release_frames(broken)
        except BaseException as raised:
            failure = await ignore_cancellation(self._fail(_cause_of(raised)))
            if failure is raised:
                raise
            raise failure from raised
        finally:
            await ignore_cancellation(self._close())
        return self.statistics

    async def _lock(self) -> None:
        """Lock the guest. Raises UsageError if it is being moved, or has moved."""
        with _LOCKING:
            self.guest.check_available()
            self.guest.moving = self._locked = True
        await self.guest.lock()
        self.guest.refuse_if_moved()
        for caution in self.guest.cautions:
            self._telemetry.notice(f"warning: {caution}")

    async def _close(self) -> None:
        """End everything that goes on, and drop the references to it."""
        self._worker.shutdown(wait=True)
        self._journal.close(keep=self.resumable or self._journal.claim is Claim.ABORTED)
        if self._locked:
            self.guest.moving = False
            self.guest.unlock()
        await self.channels.close()
        self._telemetry.close()
        self.transfer.close()
        self._task = None

    # -- attempts

    def _begin_attempt(self, link: Link) -> Attempt:
        channels = Channels(link, self._options.dial, self._hear)
        self._telemetry.attach(channels)
        return Attempt(channels)

    def _hear(self, message: Message) -> bool:
        """Take a message that the destination may send at any time. Return False for an answer."""
        if self.transfer.hear(message):
            return True
        if isinstance(message, CacheSize):
            self.settings.request_cache(message.size)
            return True
        return False

    async def _attempts(self) -> None:
        """Migrate, over as many connections as it takes."""
        while True:
            try:
                async with self.channels.reading():
                    await self._migrate()
                return
            except BaseException as raised:
                await self._survive(_cause_of(raised))
                release_frames(raised)

    async def _survive(self, error: BaseException) -> None:
        """Connect again, or raise the error that ends the migration."""
        attempt = self._attempt
        if self._cancelled and not self.committed:
            raise asyncio.CancelledError from None  # it came as the connection broke
        if (
            self.committed
            or not isinstance(error, PeerLost)
            or isinstance(error, NoProgress)
            or not self._reconnection.possible(attempt.state)
        ):
            raise error from None
        if self.transfer.pauses >= MAX_PAUSES:
            raise NoProgress(
                f"{error}; the guest was stopped {self.transfer.pauses} times for nothing"
            ) from None
        await self._reconnect(attempt, error)

    async def _reconnect(self, attempt: Attempt, error: PeerLost) -> None:
        """Replace an attempt that broke. The guest runs here meanwhile. Raises PeerLost."""
        telemetry = self._telemetry
        self._reconnection.broke(error, attempt.state)
        telemetry.set_status(Status.SETUP)
        await finish(attempt.channels.close())
        old = attempt.channels.link
        link = await self._reconnection.connect(old, error, self.transfer.check_time)
        if link.endpoint != old.endpoint:
            telemetry.notice(f"connected to another address: {link.peer_name}")
        link.limit = old.limit
        self._attempt = self._begin_attempt(link)
        telemetry.change(reconnects=self.statistics.reconnects + 1)

    async def _migrate(self) -> None:
        """Migrate over the present attempt. Leaves the guest running on failure."""
        attempt = self._attempt
        try:
            self._telemetry.set_status(Status.SETUP)
            admission = await attempt.greet(
                self._introduction(), self._agreement, self._telemetry.notice, self._begin_journal
            )
            self._agreement = admission.agreement
            self._reconnection.accepted = True
            pause = await self.transfer.run(attempt, admission)
            hand_over = self._hand_over = HandOver(
                self.guest, pause, self._journal, attempt.channels, self._options,
                self._reconnection, self._telemetry,
            )  # fmt: skip
            await hand_over.run()
            await ignore_cancellation(self._complete(pause))
        except BaseException:
            if not self.committed:
                await finish(self.transfer.undo())
            raise

    def _introduction(self) -> Introduction:
        transfer = self.transfer
        return Introduction(
            self.guest, self.parameters, transfer.required, transfer.optional,
            self.settings.pages, self._context.seed,
            self._journal.token if self._resumes else b"", transfer.next_round,
        )  # fmt: skip

    async def _begin_journal(self, token: bytes) -> None:
        """Begin the journal of an attempt, and end that of the one before.

        Each attempt has a token of its own, and so a journal of its own.
        """
        journal = Journal(Role.SOURCE, token, self._options.journals)
        beginning = in_thread(
            journal.begin, guest=self.guest.facts(), address=self._options.address,
            description=self.guest.description, peer=self.channels.link.peer_name,
        )  # fmt: skip
        try:
            await finish(beginning)
        except BaseException:
            journal.close()
            raise
        self._journal.close()
        self._journal, self._resumes = journal, True
        name_migration(journal.name)

    # -- the end

    async def _find_out(self, hand_over: HandOver, error: BaseException) -> None:
        """Find out which side owns the guest. Return if it runs at the destination.

        Raises NotStartedError, or the cancellation, if the guest is ours; it runs here then.
        Raises HandOverUnknown if that cannot be found out.
        """
        if await hand_over.find_out(error):
            if self.statistics.status is not Status.COMPLETED:
                await self._complete(hand_over.pause)
            return
        await self.transfer.undo()
        if isinstance(error, asyncio.CancelledError):
            raise error
        raise hand_over.lost(error)

    async def _complete(self, pause: Pause) -> None:
        """Report success, and free what the guest used here. Raises HandOverUnknown."""
        self.transfer.check_running()
        self._telemetry.complete(pause.began, pause.sent_before)
        await self.transfer.release()
        self._end(Status.COMPLETED)
        try:
            await self.guest.release()
        except Exception as error:
            self._telemetry.notice(
                f"warning: the guest runs at the destination; to end it here: {error}"
            )

    async def _fail(self, error: BaseException) -> BaseException:
        """Tell the destination why the migration ends. Return what the user is to see.

        A later program can resume the migration if the destination keeps what it holds. It does so
        if the connection broke, for as long as it retries, and if it has heard nothing of this
        attempt. Before the first ACCEPT, what an earlier program has left is as it was.
        """
        lost = isinstance(error, PeerLost | ConnectError | TlsError)
        lost = lost or self._attempt.state.greeting
        held = bool(lost and self._options.retry) or not self._reconnection.accepted
        self.resumable = self._resumes and held and self.transfer.outlives_program
        self.transfer.failed(committed=self.committed)
        failure = self._failure(error)
        await self._give_reason(error, failure)
        self._end(Status.FAILED if failure else Status.CANCELLED, str(failure or ""))
        return failure or error

    def _failure(self, error: BaseException) -> MigrationError | None:
        """Return the error as a user sees it; None for a cancellation."""
        failure = failure_of(error, "the guest's memory cannot be read")
        hand_over = self._hand_over
        if hand_over is None or not hand_over.committed or isinstance(failure, HandOverUnknown):
            return failure
        return hand_over.unknown(str(failure or "interrupted"))

    async def _give_reason(self, error: BaseException, failure: MigrationError | None) -> None:
        """Tell the destination why we hang up, if it can hear and does not know."""
        if isinstance(error, PeerLost | CancelledByPeer):
            return
        reason = str(failure or "cancelled at the source")
        await self.channels.give_reason(code_of(error, failure), reason)

    def _end(self, status: Status, error: str = "") -> None:
        """Report the final statistics; they do not change after the observer was told of them."""
        self._worker.shutdown(wait=True)
        telemetry = self._telemetry
        telemetry.change(status=status, error=error)
        self.transfer.update()
        telemetry.change(advice=self.transfer.advise())
        logger.info("migration %s after %.3f s %s", status, self.statistics.total_time, error)
        telemetry.announce_status()


def _cause_of(error: BaseException) -> BaseException:
    """Return what is inside nested exception groups: an error rather than a cancellation."""
    while isinstance(error, BaseExceptionGroup):
        errors = [e for e in error.exceptions if not isinstance(e, asyncio.CancelledError)]
        error = (errors or list(error.exceptions))[0]
    return error
