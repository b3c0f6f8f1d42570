"""Start the process that keeps QEMU's socket open, and tell it what to do."""

from __future__ import annotations

import socket

from migrate.runtime import helper_process
from migrate.runtime.helper_process import HelperProcess

# A keeper answers at once; but on a busy machine Python takes seconds to start.
KEEPER_SECONDS = 5.0


class SocketKeeper:
    """A keeper process of one socket; see socket_keeper_process.py.

    `start`, `relinquish` and `reclaim` raise MigrationError if the process does not answer.
    """

    def __init__(self, helper: HelperProcess) -> None:
        self._helper = helper

    @classmethod
    async def start(cls, connection: socket.socket) -> SocketKeeper:
        """Start a keeper; it has its copy of the socket when this returns."""
        helper = await HelperProcess.start(
            "migrate.qemu.socket_keeper_process", str(connection.fileno()),
            died="the process that holds QEMU's stream for us has died",
            patience=KEEPER_SECONDS, keep=[connection.fileno()], quiet=True,
            env=helper_process.environment(),
        )  # fmt: skip
        return cls(helper)

    @property
    def pid(self) -> int:
        return self._helper.pid

    async def relinquish(self) -> None:
        """Have it keep the socket even if this program ends."""
        await self._helper.ask(b"g")

    async def reclaim(self) -> None:
        """Have it close the socket when this program ends."""
        await self._helper.ask(b"r")

    def leave(self) -> None:
        """Leave it alone: it keeps the socket if the guest is relinquished."""
        self._helper.leave()

    async def end(self, *, kill: bool) -> None:
        """End it.

        kill -- do so even if the guest is relinquished, when it does not end by itself
        """
        await self._helper.close(kill=kill)
