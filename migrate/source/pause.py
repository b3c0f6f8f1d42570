"""Stop the guest for the last round, and let it run again if that fails."""

from __future__ import annotations

import logging
import time

from migrate.errors import MigrationError, PeerLost
from migrate.events import SourceEvent
from migrate.guests.guest import Guest
from migrate.source.telemetry import Telemetry
from migrate.source.transfer import MAX_PAUSES, Pause
from migrate.statistics import Status

logger = logging.getLogger(__name__)


class GuestPause:
    """The pauses of one guest during one migration; `count` of them."""

    def __init__(self, guest: Guest, telemetry: Telemetry) -> None:
        self.count = 0
        self._guest = guest
        self._telemetry = telemetry
        self._paused = False

    async def begin(self) -> Pause:
        """Stop the guest."""
        self._telemetry.set_status(Status.DEVICE)
        pause = Pause(time.monotonic(), self._telemetry.sent_bytes)
        # Noted first: if this is cancelled, the guest may have been stopped already.
        self._paused = True
        self.count += 1
        await self._guest.pause()
        logger.debug("guest paused in %.3f s", time.monotonic() - pause.began)
        self._telemetry.emit(SourceEvent.PAUSED)
        return pause

    async def end(self) -> None:
        """Let the guest run here again, if it was stopped."""
        if self._paused:
            await self._guest.resume()
            self._paused = False
            self._telemetry.emit(SourceEvent.RESUMED)

    def in_vain(self, why: str) -> MigrationError:
        """Return the error for a pause that was of no use.

        Another attempt is made as after a break (PeerLost), unless there were too many pauses.
        """
        kind = PeerLost if self.count < MAX_PAUSES else MigrationError
        return kind(why)
