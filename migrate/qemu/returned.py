"""Passes what the QEMU at the destination says to ours.

    destination --BYTES--> queue --> QEMU --> TAKEN --> destination

The destination keeps each piece until our TAKEN, and says it again after a break.
"""

from __future__ import annotations

import asyncio

from migrate.errors import PeerError
from migrate.qemu.guest import QemuGuest
from migrate.transport.link import Link
from proto.wire.messages import MAX_RETURNED, Taken


class ReturnedPieces:
    """The way back of one stream; `passed` pieces have been passed to QEMU."""

    def __init__(self, guest: QemuGuest) -> None:
        self.passed = 0
        self._guest = guest
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(MAX_RETURNED)

    def restart(self) -> None:
        """Drop what has not been passed: the destination says it again."""
        self._queue = asyncio.Queue(MAX_RETURNED)

    def put(self, data: bytes) -> None:
        """Take a piece. Raises PeerError for more pieces than a QEMU says."""
        try:
            self._queue.put_nowait(data)
        except asyncio.QueueFull:
            raise PeerError("the return path carries more than QEMU takes") from None

    async def run(self, link: Link) -> None:
        """Pass each piece to QEMU, and confirm it over `link`."""
        while True:
            await asyncio.shield(self._pass(await self._queue.get()))
            await link.send(Taken(self.passed))

    async def _pass(self, data: bytes) -> None:
        await self._guest.say(data)
        self.passed += 1
