"""Connect again after a break, for as long as that promises something.

    break -> pause -> dial the same address -> after HOME_SECONDS: dial any -> ... -> PeerLost

The time runs from the first break after the last progress (see transport.retry_budget). Progress is
that the destination holds more than ever before: a connection alone is none.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from migrate.errors import ConnectError, NoProgress, PeerLost
from migrate.source.attempt import AttemptState
from migrate.source.options import SourceOptions
from migrate.transport.channels import Dial
from migrate.transport.link import Link
from migrate.transport.retry_budget import Budget

# The first and the longest pause between two attempts to connect.
CONNECT_AGAIN_SECONDS = (0.1, 5.0)
# For this long, but no longer than half of --retry, only the address that broke off is tried.
HOME_SECONDS = 20.0

logger = logging.getLogger(__name__)


class Reconnection:
    """The attempts of one migration to connect again.

    notify   -- called with a sentence for the user
    accepted -- a destination has accepted the guest once
    """

    def __init__(self, options: SourceOptions, notify: Callable[[str], None]) -> None:
        self.accepted = False
        self._options = options
        self._notify = notify
        self._tries = Budget(CONNECT_AGAIN_SECONDS)
        self._most_held = 0

    @property
    def _seconds(self) -> float:
        """Time for the next connection."""
        return self._options.retry if self.accepted else self._options.patience

    def possible(self, state: AttemptState) -> bool:
        """Whether to connect again after an attempt that broke in `state`.

        Before the first ACCEPT that is so only if the destination hung up without a word: otherwise
        it has refused us, or is not there.
        """
        if not self.accepted and state is not AttemptState.CONNECTED:
            return False
        return bool(self._options.dial and self._seconds)

    def broke(self, error: PeerLost, state: AttemptState) -> None:
        """Note that an attempt broke in `state`."""
        tries, under_way = self._tries, state is AttemptState.UNDER_WAY
        tries.broke(greeted=under_way)
        logger.info("attempt broke in state %s: %s", state.name, error)
        if under_way or tries.breaks == 1:
            since = f" ({tries.breaks} breaks, and nothing new came)" if tries.greeted else ""
            left = f"{tries.left(self._seconds):.3g} s at most"
            self._notify(f"{error}: connecting again, for {left}{since}")

    async def connect(
        self, old: Link, error: PeerLost, check_time: Callable[[], None]
    ) -> Link:  # fmt: skip
        """Connect again, at first only to the address of the `old` link, which broke with `error`.

        Another address of the same name may belong to another machine, which knows nothing of the
        guest; or to the same machine, over a network that still works.

        check_time -- raises NotConvergedError when the migration has used up its time

        Raises PeerLost when the time to connect is over.
        """
        tries, retry = self._tries, self._seconds
        at_home = time.monotonic() + min(HOME_SECONDS, retry / 2)
        why = ""
        while True:
            await asyncio.sleep(tries.pause(retry))
            check_time()
            left = tries.left(retry)
            if left <= 0 or self._options.dial is None:
                raise PeerLost(f"{error}; {self._in_vain()}{why}")
            dial, home = self._options.dial, at_home - time.monotonic()
            if old.redial is not None and home > 0:
                dial, left = old.redial, min(left, home)
            try:
                async with asyncio.timeout(left):
                    return await dial()
            except (ConnectError, PeerLost, TimeoutError) as fault:
                logger.debug("connecting again failed: %s", fault)
                why = f": {fault}" if str(fault) else why

    def dials(self, link: Link) -> list[Dial]:
        """Return the ways to the destination: to the address of `link`, and to any."""
        return [dial for dial in (link.redial, self._options.dial) if dial is not None]

    def _in_vain(self) -> str:
        """Return a sentence on attempts that have brought nothing."""
        tries = self._tries
        if not self.accepted:
            return f"so it went {tries.breaks} times in {tries.used():.3g} s"
        if not tries.greeted:
            return f"no other connection in {self._options.retry:g} s"
        return (
            f"nothing new has come through for {tries.used():.3g} s, and the connection broke "
            f"{tries.breaks} times"
        )

    # -- progress

    def advance(self) -> None:
        """Note that the destination has something that it did not have before."""
        self._tries.renew()

    def note_held(self, held: int) -> None:
        """Note that the destination holds `held` pages or items, as it said itself.

        Raises NoProgress if attempts have brought nothing for too long.
        """
        if held > self._most_held:
            self._most_held = held
            self.advance()
        elif self._tries.over(self._options.retry):
            raise NoProgress(self._in_vain())
