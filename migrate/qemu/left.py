"""A QEMU's guest whose migrate-src has died in the hand-over, for `migrate-src resolve`.

told by nobody      the holder keeps QEMU waiting (see holder.py): it is told what to say
told that it moved  (qmp) QEMU has closed its stream, and keeps a guest that stands still: where
                    it is ours after all, QEMU is told to let it run on
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import Any

from migrate.errors import ConnectError, MigrationError
from migrate.guests.guest import Guest
from migrate.guests.process import Process, start_time
from migrate.qemu.machine import RUNNING, Machine, still_here

HOLDER_SECONDS = 5.0
POLL_SECONDS = 0.05


class LeftGuest(Guest):
    """From the facts of a QemuGuest. Raises MigrationError where nothing leads to its QEMU."""

    kind = "qemu"
    size = 0

    def __init__(self, facts: dict[str, Any]) -> None:
        self._pid, self._started = facts["pid"], facts["started"]
        self._qmp = str(facts.get("qmp", ""))
        self._runstate = str(facts.get("runstate", RUNNING))
        if self._runstate != RUNNING:
            self.ours = still_here(self._runstate)
            self.theirs = "the guest is at the destination, and no more here"
        if not (self._held or self._qmp):
            raise MigrationError(
                "nobody holds the stream of its QEMU any more: that has ended, or lets the guest "
                "run on: ask it (query-status)"
            )

    @property
    def _held(self) -> bool:
        return bool(self._started) and start_time(self._pid) == self._started

    async def pause(self) -> None:
        """It stands still."""

    async def give_up(self) -> None:
        """It was."""

    async def release(self) -> None:
        """Raises MigrationError where its QEMU runs a guest all the same."""
        await self._tell_holder(signal.SIGUSR1)
        if not self._qmp:
            return
        with contextlib.suppress(ConnectError):  # QEMU has ended, as it may
            async with await Machine.connect(self._qmp) as machine:
                await machine.settled()
                if await machine.running():
                    raise MigrationError(
                        "the guest runs at the destination, and the QEMU on "
                        f"{self._qmp} runs one too: if it is the same, stop one of them at once"
                    )

    async def resume(self) -> None:
        await self._tell_holder(signal.SIGTERM)
        if not self._qmp:
            return
        async with await Machine.connect(self._qmp) as machine:
            status = await machine.settled()
            left = status.status == "completed" and status.runstate != RUNNING
            if left and self._runstate == RUNNING:
                await machine.cont()

    async def _tell_holder(self, number: signal.Signals) -> None:
        for _ in range(int(HOLDER_SECONDS / POLL_SECONDS)):
            if not self._held:
                return
            with (
                contextlib.suppress(OSError),
                contextlib.closing(Process(self._pid, self._started)) as holder,
            ):
                holder.signal(number)
            await asyncio.sleep(POLL_SECONDS)
        raise MigrationError(f"process {self._pid}, which holds QEMU's stream, does not end")
