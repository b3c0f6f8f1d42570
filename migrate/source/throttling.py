"""Slow a guest as the throttle policy decides, and release it when the migration is over.

    Source --load of each round--> Throttling --> ThrottlePolicy   by how much
                                       +--------> Guest.throttle   until it is released

This module knows no rounds and no link. Whatever happens, a guest that was slowed is released.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

from migrate.errors import MigrationError
from migrate.guests.guest import Guest
from migrate.policy.downtime import Limits
from migrate.policy.throttle import RoundLoad, ThrottleParameters, ThrottlePolicy

logger = logging.getLogger(__name__)
CANNOT = (
    "auto-converge: this guest cannot be slowed (a demo guest can, and a file with --pid): it runs "
    "at its own speed"
)


class Throttling:
    """The throttling of one guest during one migration.

    notify     -- called with a sentence for each step
    percentage -- by how much the guest is slowed now
    """

    def __init__(self, guest: Guest, notify: Callable[[str], None]) -> None:
        self.percentage = 0
        self._guest = guest
        self._notify = notify
        self._policy = ThrottlePolicy()
        self._told = False

    async def apply(
        self, on: bool, parameters: ThrottleParameters, limits: Limits, load: RoundLoad
    ) -> bool:
        """Take in a round, and slow or release the guest. Return whether it has become slower.

        on -- whether auto-converge is switched on now; the guest is released when it is off

        Raise MigrationError if the guest can be slowed in principle, but this fails.
        """
        if not on:
            await self.release()
            return False
        if not self._guest.can_throttle:
            self._notify_once(CANNOT)
            return False
        before = self.percentage
        percentage = self._policy.decide(parameters, limits, load)
        if percentage != before:
            # Noted first: if this is cancelled, the guest may have been slowed already.
            self.percentage = percentage
            await self._guest.throttle(percentage)
            if not self._guest.can_throttle:
                self.percentage = 0
                self._notify_once(
                    "auto-converge: the guest's processes have ended: nothing is slowed"
                )
                return False
            logger.debug("guest slowed by %d %% (before: %d %%)", percentage, before)
            self._notify(
                f"auto-converge: the guest is slowed by {percentage} % (it would be stopped for "
                f"{load.expected * 1e3:.0f} ms, the limit is {limits.downtime_limit * 1e3:.0f} ms)"
            )
        return percentage > before

    async def release(self) -> None:
        """Let the guest run at full speed.

        The policy keeps its percentage: if the migration resumes after a break, `apply` slows the
        guest to it again.
        """
        if self.percentage:
            self.percentage = 0
            with contextlib.suppress(MigrationError):  # the guest is released all the same
                await self._guest.throttle(0)

    def close(self) -> None:
        """Notify no more; drop the reference to the owner."""
        self._notify = lambda _text: None

    def _notify_once(self, text: str) -> None:
        if not self._told:
            self._told = True
            self._notify(text)
