"""The brake: slows a guest as the throttle policy says, and lets it go when all is over.

    Source --a look at each round--> Brake --> ThrottlePolicy   how much
                                       +-----> Guest.throttle   so much, until it is released

It knows no rounds and no link. What it has put on a guest it takes off again, whatever comes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from migrate.errors import MigrationError
from migrate.guests.guest import Guest
from migrate.rounds import Limits
from migrate.throttle import Look, Throttle, ThrottlePolicy

CANNOT = (
    "auto-converge: this guest cannot be slowed (a demo guest can, and a file with --pid): it runs "
    "at its own speed"
)


class Brake:
    """Of one guest during one migration; `percentage` is what it is slowed by now.

    say -- told in a sentence of each step
    """

    def __init__(self, guest: Guest, say: Callable[[str], None]) -> None:
        self.percentage = 0
        self._guest = guest
        self._say = say
        self._policy = ThrottlePolicy()
        self._told = False

    async def apply(self, on: bool, throttle: Throttle, limits: Limits, look: Look) -> bool:
        """Takes in a round. Returns whether the guest is slower from here on.

        on -- whether auto-converge is; it may change

        Raises MigrationError where the guest cannot be slowed though it should.
        """
        if not on:
            await self.release()
            return False
        if not self._guest.can_throttle:
            self._say_once(CANNOT)
            return False
        before = self.percentage
        percentage = self._policy.decide(throttle, limits, look)
        if percentage != before:
            self.percentage = percentage  # before: where this is cancelled, it may have come true
            await self._guest.throttle(percentage)
            if not self._guest.can_throttle:
                self.percentage = 0
                self._say_once("auto-converge: the guest's processes have ended: nothing is slowed")
                return False
            self._say(
                f"auto-converge: the guest is slowed by {percentage} % (it would be stopped for "
                f"{look.expected * 1e3:.0f} ms, the limit is {limits.downtime_limit * 1e3:.0f} ms)"
            )
        return percentage > before

    async def release(self) -> None:
        """The guest runs at its own speed. Where a break was survived, `apply` goes on from what
        it was slowed by."""
        if self.percentage:
            self.percentage = 0
            with contextlib.suppress(MigrationError):  # it is free all the same, see throttle
                await self._guest.throttle(0)

    def close(self) -> None:
        """It is over: nobody is told anything any more."""
        self._say = lambda _text: None

    def _say_once(self, text: str) -> None:
        if not self._told:
            self._told = True
            self._say(text)
