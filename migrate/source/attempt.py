"""One attempt of a migration: the channels of one connection, and how far they got.

    CONNECTED --HELLO--> ANSWERED --ACCEPT--> ACCEPTED --CACHE_SIZE--> UNDER_WAY
        |                    |
        +----- timeout ------+--> TIMED_OUT

The state decides what a break means. Before ACCEPT the destination has nothing to resume. A
destination that hangs up in CONNECTED has too many clients, and is tried again. An attempt that
breaks UNDER_WAY may have brought something.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum, auto

from migrate.errors import MigrationError, PeerLost
from migrate.guests.guest import Guest
from migrate.output import printable
from migrate.policy.parameters import Parameters
from migrate.transport.channels import Channels
from proto.wire import capabilities as caps
from proto.wire.messages import MAX_TEXT, Accept, GuestInfo, Hello

HANDSHAKE_SECONDS = 15.0

logger = logging.getLogger(__name__)


class AttemptState(Enum):
    CONNECTED = auto()
    ANSWERED = auto()
    TIMED_OUT = auto()
    ACCEPTED = auto()
    UNDER_WAY = auto()

    @property
    def greeting(self) -> bool:
        """Whether the destination has not accepted the guest, as far as we know."""
        return self not in (AttemptState.ACCEPTED, AttemptState.UNDER_WAY)


@dataclass(frozen=True)
class Introduction:
    """The description of a source and its guest, for HELLO and GUEST.

    required -- capabilities that the destination must have
    optional -- capabilities that are used if the destination has them, and cannot be switched off
    seed     -- key of the page hashes
    resume   -- token of the attempt to resume, or b""
    round    -- number of the next round
    """

    guest: Guest
    parameters: Parameters
    required: frozenset[str]
    optional: frozenset[str]
    pages: int
    seed: bytes
    resume: bytes
    round: int


@dataclass(frozen=True)
class Admission:
    """The answer of a destination that accepts the guest.

    held    -- it holds what an earlier attempt has sent
    resumes -- we have asked it to resume an earlier attempt
    token   -- names this attempt
    """

    agreement: caps.Agreement
    held: bool
    resumes: bool
    token: bytes


class Attempt:
    """The channels of one attempt, and its state."""

    def __init__(self, channels: Channels) -> None:
        self.channels = channels
        self.state = AttemptState.CONNECTED

    def begin(self) -> None:
        """Note that setup is over: from now on the attempt may bring something."""
        self.state = AttemptState.UNDER_WAY
        logger.debug("setup is over, over %d channels", len(self.channels.links))

    async def greet(
        self, introduction: Introduction, before: caps.Agreement | None,
        notify: Callable[[str], None], on_accept: Callable[[bytes], Awaitable[None]],
    ) -> Admission:  # fmt: skip
        """Introduce ourselves and the guest, and open the further channels.

        before    -- the agreement of an earlier attempt, which must still hold
        notify    -- called with a sentence for the user
        on_accept -- called with the token of the attempt when the destination has accepted

        Raises PeerLost if that takes longer than HANDSHAKE_SECONDS.
        """
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                agreement, accept = await self._introduce(introduction, before, notify)
                self.state = AttemptState.ACCEPTED
                await on_accept(accept.token)
                await self.channels.open(introduction.parameters.channels, accept.token)
        except TimeoutError:
            if self.state.greeting:
                self.state = AttemptState.TIMED_OUT
            raise PeerLost(
                f"{self.channels.link.peer_name} does not answer within {HANDSHAKE_SECONDS:g} s"
            ) from None
        if before not in (None, agreement):
            raise MigrationError("the destination has other capabilities now: begin again")
        return Admission(agreement, accept.held, bool(introduction.resume), accept.token)

    async def _introduce(
        self, introduction: Introduction, before: caps.Agreement | None,
        notify: Callable[[str], None],
    ) -> tuple[caps.Agreement, Accept]:  # fmt: skip
        parameters, pages, link = introduction.parameters, introduction.pages, self.channels.link
        hello = caps.offer(
            parameters.wire_capabilities | introduction.optional, introduction.required
        )
        await link.send(hello)
        answer = await self.channels.expect(Hello)
        self.state = AttemptState.ANSWERED
        agreement = caps.agree(hello, answer)
        if pages > answer.max_pages:
            raise MigrationError(
                f"the guest has {pages} pages, the destination takes no more than "
                f"{answer.max_pages}: use a larger --page-size"
            )
        if before is None:
            for name in sorted(agreement.dropped - introduction.optional):
                notify(f"the destination has no {name}: it is not used")
        guest = introduction.guest
        described = GuestInfo(
            guest.kind, guest.size, parameters.page_size, introduction.seed, parameters.channels,
            printable(guest.description, MAX_TEXT), introduction.resume, introduction.round,
        )  # fmt: skip
        await link.send(described)
        return agreement, await self.channels.expect(Accept)
