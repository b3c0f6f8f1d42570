"""A QEMU's guest whose migrate-src has died in the hand-over, for `migrate-src resolve`.

QEMU has not heard that its guest has moved
    The keeper process has its socket, and QEMU waits (see socket_keeper_process.py). The keeper is
    told what became of the guest.
QEMU has heard that its guest has moved (qmp)
    It has closed its stream, and keeps a paused guest. If the guest is ours after all, QEMU is
    told to let it run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from typing import Any

from migrate.errors import ConnectError, MigrationError
from migrate.guests.guest import Guest
from migrate.qemu.qmp.machine import POLL_SECONDS, RUNNING, Machine, still_here
from migrate.qemu.socket_keeper import KEEPER_SECONDS
from migrate.runtime.processes import Process, start_time_of

logger = logging.getLogger(__name__)


class OrphanGuest(Guest):
    """A guest from the facts of a QemuGuest.

    Raises MigrationError if nothing leads to its QEMU.
    """

    kind = "qemu"
    size = 0

    def __init__(self, facts: dict[str, Any]) -> None:
        self._keeper_pid, self._keeper_start = facts["pid"], facts["started"]
        self._qmp = str(facts.get("qmp", ""))
        # Before the migration. Journals of the first releases do not say it.
        self._runstate = str(facts.get("runstate", RUNNING))
        if self._runstate != RUNNING:
            self.if_here = still_here(self._runstate)
            self.if_there = "the guest is at the destination, and no more here"
        if not (self._keeper_lives or self._qmp):
            raise MigrationError(
                "no process holds the stream of its QEMU any more: that has ended, or lets the "
                "guest run on: ask it (query-status)"
            )

    @property
    def _keeper_lives(self) -> bool:
        return bool(self._keeper_start) and start_time_of(self._keeper_pid) == self._keeper_start

    async def pause(self) -> None:
        """Do nothing: the guest is paused."""

    async def relinquish(self) -> None:
        """Do nothing: the guest is relinquished."""

    async def release(self) -> None:
        """Tell QEMU that its guest runs at the destination.

        Raises MigrationError if a guest runs in it all the same.
        """
        await self._signal_keeper(signal.SIGUSR1)
        if not self._qmp:
            return
        with contextlib.suppress(ConnectError):  # QEMU may have ended
            async with await Machine.connect(self._qmp) as machine:
                await machine.settled()
                if await machine.running():
                    raise MigrationError(
                        "the guest runs at the destination, and the QEMU on "
                        f"{self._qmp} runs one too: if it is the same, stop one of them at once"
                    )

    async def resume(self) -> None:
        """Let the guest run here, if it ran before the migration."""
        await self._signal_keeper(signal.SIGTERM)
        if not self._qmp:
            return
        async with await Machine.connect(self._qmp) as machine:
            status = await machine.settled()
            paused = status.status == "completed" and status.runstate != RUNNING
            if paused and self._runstate == RUNNING:
                await machine.cont()

    async def _signal_keeper(self, number: signal.Signals) -> None:
        """Send a signal to the keeper until it has ended. Raises MigrationError on time-out."""
        for _ in range(int(KEEPER_SECONDS / POLL_SECONDS)):
            if not self._keeper_lives:
                return
            with (
                contextlib.suppress(OSError),
                contextlib.closing(Process(self._keeper_pid, self._keeper_start)) as keeper,
            ):
                logger.debug("%s to the socket keeper %d", number.name, self._keeper_pid)
                keeper.signal(number)
            await asyncio.sleep(POLL_SECONDS)
        raise MigrationError(f"process {self._keeper_pid}, which holds QEMU's stream, does not end")
