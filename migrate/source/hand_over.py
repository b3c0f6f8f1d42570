"""Hand the guest over, so that there are never two owners.

    OURS --relinquish, READY written--> RELINQUISHED --GO--> COMMITTED --RUNNING--> (there, for
    good)
      ^                                     |                    |
      +---- CALLED_OFF written, reclaim ----+                    |
      +---- NOT_STARTED heard, reclaim --------------------------+

Every step is in the journal before it is taken. Before GO is said the guest can be called off by us
alone. After GO only the destination's word that it never will run the guest makes it ours again:
NOT_STARTED, or ABORTED when it is asked. It is asked when the connection broke before its answer
came. The rules are in proto.wire.ownership; tests/model checks them exhaustively.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from enum import Enum, auto
from functools import partial
from typing import Any

from migrate.errors import HandOverUnknown, JournalError, MigrationError, NotStartedError, PeerLost
from migrate.guests.guest import Guest
from migrate.ownership.ask import ask_until_known, decide
from migrate.ownership.journal import Journal, record
from migrate.runtime.cancellation import finish, ignore_cancellation
from migrate.source.options import SourceOptions
from migrate.source.reconnection import Reconnection
from migrate.source.telemetry import Telemetry
from migrate.source.transfer import Pause
from migrate.transport.channels import Channels
from proto import ProtoError
from proto.wire.messages import Done, Go, Running
from proto.wire.ownership import Claim, Event

# The destination has this long to answer GO. The link notices a peer that is gone much earlier
# (--peer-timeout).
HAND_OVER_SECONDS = 60.0

logger = logging.getLogger(__name__)


class HandOverState(Enum):
    OURS = auto()
    RELINQUISHED = auto()
    COMMITTED = auto()


class HandOver:
    """The hand-over of one attempt, whose destination is READY.

    pause -- the guest is stopped since then
    """

    def __init__(
        self, guest: Guest, pause: Pause, journal: Journal, channels: Channels,
        options: SourceOptions, reconnection: Reconnection, telemetry: Telemetry,
    ) -> None:  # fmt: skip
        self.state = HandOverState.OURS
        self.pause = pause
        self._guest = guest
        self._journal = journal
        self._channels = channels
        self._options = options
        self._dials = reconnection.dials(channels.link)
        self._notify = telemetry.notice

    @property
    def committed(self) -> bool:
        """Whether GO may have been said: the guest does not run here again unless we hear so."""
        return self.state is HandOverState.COMMITTED

    async def run(self) -> None:
        """Relinquish the guest, say GO, and wait until it runs at the destination.

        If this raises and `committed` is False, the guest is ours, and still paused.
        """
        self._guest.confirm_lock()
        try:
            await finish(self._relinquish())
        except BaseException:
            if await ignore_cancellation(self._call_off()):
                raise
        self._change(HandOverState.COMMITTED)
        await self._say_go()
        await ignore_cancellation(self._acknowledge())

    def _change(self, state: HandOverState) -> None:
        logger.debug("hand-over: %s -> %s", self.state.name, state.name)
        self.state = state
        committed = state is HandOverState.COMMITTED
        self._channels.handed_over = self._guest.relinquished = committed

    async def _relinquish(self) -> None:
        """Do all that comes before GO. Raises JournalError."""
        await self._guest.relinquish()
        self._change(HandOverState.RELINQUISHED)
        await record(self._journal, Event.READY, **self._late_facts())

    async def _call_off(self) -> bool:
        """Own the guest again: GO was not said, and will not be. The guest is still paused.

        Return False if the journal says that the guest is relinquished, and this cannot be
        corrected. A later program that reads it could say GO, so GO must be said now.
        """
        if self._journal.claim is Claim.COMMITTED:
            try:
                await record(self._journal, Event.CALLED_OFF)
            except JournalError:
                return False
        if self.state is HandOverState.RELINQUISHED:
            await self._reclaim()
        return True

    def _late_facts(self) -> dict[str, Any]:
        """Return the guest's facts if they have changed since the journal was begun.

        They change when more processes were stopped.
        """
        facts = self._guest.facts()
        return {} if facts == self._journal.facts.get("guest") else {"guest": facts}

    async def _say_go(self) -> None:
        """Say GO and wait for RUNNING. Raises NotStartedError: the guest is ours, for good."""
        try:
            async with asyncio.timeout(HAND_OVER_SECONDS):
                await self._channels.link.send(Go())
                await self._channels.expect(Running)
        except NotStartedError:
            await ignore_cancellation(self._not_started())
            raise
        except TimeoutError:
            raise PeerLost(f"no answer to GO for {HAND_OVER_SECONDS:g} s") from None

    async def _not_started(self) -> None:
        await record(self._journal, Event.NOT_STARTED, must=False)
        await self._reclaim()

    async def _acknowledge(self) -> None:
        """Record RUNNING, and tell the destination that we know."""
        await record(self._journal, Event.RUNNING, must=False)
        with contextlib.suppress(MigrationError, ProtoError):
            await self._channels.link.send(Done())

    async def _reclaim(self) -> None:
        """Own the guest again, still paused: it never will run at the destination."""
        await self._guest.reclaim()
        self._change(HandOverState.OURS)

    # -- after a break

    async def find_out(self, error: BaseException) -> bool:
        """Ask which side owns the guest, after a break or a cancellation since the commit.

        Return True if the guest runs at the destination, and False if it is ours, still paused.
        Raises HandOverUnknown if that cannot be found out in time.
        """
        why = _reason(error)
        if self._journal.claim is Claim.COMMITTED:
            if self._options.dial is None:
                raise self.unknown(why) from error
            self._notify(f"the hand-over was cut off ({why}): asking whose the guest is")
            seconds = self._options.resolve_timeout
            problem = await ask_until_known(self._dials, self._journal, seconds)
            if problem and self._journal.claim is Claim.COMMITTED:
                raise self.unknown(f"{why}; {problem}") from error
        if self._journal.claim is Claim.DONE:
            return True
        await self._reclaim()
        return False

    def lost(self, error: BaseException) -> NotStartedError:
        """Return what the user is told if the guest is ours after `find_out`."""
        return NotStartedError(
            f"the hand-over was cut off ({_reason(error)}), and the destination has given the "
            "guest up"
        )

    def unknown(self, why: str) -> HandOverUnknown:
        """Return what the user is told while the owner is unknown, and how to ask again."""
        text = (
            "the guest was handed over, but the destination has not confirmed that it runs "
            f"({why}): look there first; {self._guest.while_undecided}"
        )
        if self._options.journals:
            text += f"; `migrate-src resolve {self._journal.name}` asks again"
        else:
            self._guest.decide_owner = partial(decide, self._journal, self._dials)
        return HandOverUnknown(text)


def _reason(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return str(error) or "interrupted"
    return str(error) or type(error).__name__
