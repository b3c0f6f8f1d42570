"""A QEMU that waits for a guest (`-incoming`), as the place where the guest goes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from typing import Any

from migrate.errors import ConnectError, MigrationError
from migrate.qemu.qmp.connecting import OWN_PLACE
from migrate.qemu.qmp.machine import RUNNING, Machine
from migrate.qemu.qmp.settings import ChangedSettings
from migrate.qemu.qmp.stream_pair import our_end
from migrate.qemu.stream.loader import Loader
from migrate.qemu.stream.place import NoQemuError, StreamPlace
from migrate.transport.address import Address
from migrate.transport.connect import check_listener, open_tcp

logger = logging.getLogger(__name__)

# QEMU is on this host or near it; it listens once it has made its devices.
CONNECT_SECONDS = 10.0
SEND_BYTES = 4 << 20
# The guest is ours by then. QEMU opens disks, and starts the guest.
START_SECONDS = 50.0
# The guest runs when we ask for its state, and put settings back: neither is worth a long wait.
ASK_SECONDS = 1.0


class QemuPlace(StreamPlace):
    """A QEMU that was started with `-incoming`.

    address -- where it listens; None: we pass it a socket over qmp (`-incoming defer`)
    qmp     -- its control socket; "": it listens already
    """

    # QEMU may run the guest as soon as it has the last byte, before it can say so.
    irrevocable = True

    def __init__(self, address: Address | None, qmp: str = "") -> None:
        super().__init__()
        self._qmp = qmp
        self._incoming = address
        self.address = address or Address(path=qmp)
        # The settings that we have changed in QEMU, to be put back once the guest runs.
        self._changed = ChangedSettings()

    async def make_ready(self) -> None:
        """Connect. Raises NoQemuError and QemuError."""
        if self._loader is not None:
            return
        connection = await self._open()
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        self._loader = Loader(connection, self._fault)
        logger.debug("the QEMU at %s waits for the stream", self.address)

    async def _open(self) -> socket.socket:
        """Return a socket that QEMU reads its stream from."""
        if not self._qmp:
            return await self._connect(self.address)
        async with await Machine.connect(self._qmp) as machine:
            if self._incoming is not None:
                await machine.incoming(str(self._incoming))
                self._changed = machine.settings.changed
                return await self._connect(self._incoming)
            connection = await our_end(machine.incoming)
            self._changed = machine.settings.changed
            return connection

    async def _connect(self, where: Address) -> socket.socket:
        try:
            if not where.path:
                return await open_tcp(where, CONNECT_SECONDS)
            return await self._connect_unix(where.path)
        except ConnectError as error:
            reason = str(error)
        except (OSError, TimeoutError) as error:
            number = getattr(error, "errno", None) or 0
            reason = os.strerror(number) if number > 0 else "no answer"
        raise NoQemuError(
            f"no QEMU waits for a guest at {where}: {reason}: start it with -incoming {where}"
        )

    async def _connect_unix(self, path: str) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.setblocking(False)
            async with asyncio.timeout(CONNECT_SECONDS):
                await asyncio.get_running_loop().sock_connect(connection, path)
            try:
                check_listener(connection, path, OWN_PLACE)
            except ConnectError as error:
                raise NoQemuError(str(error)) from None
        except BaseException:
            connection.close()
            raise
        return connection

    def _fault(self, reason: str, advice: str = "its own messages say why") -> MigrationError:
        advice = f": {advice}" if advice else ""
        return MigrationError(f"the QEMU at {self.address} {reason}{advice}")

    # -- the guest is ours

    async def start(self, state: bytes) -> str:
        """Give QEMU the end of the stream, and return a sentence on what it says then.

        The stream is complete in QEMU from there on, so silence is no failure: the sentence says
        to look there.
        """
        del state
        await self.loader.finish()
        began = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                await self.loader.ended.wait()
        failure = self.loader.failure
        if failure:
            raise MigrationError(f"the QEMU at {self.address} says that it failed ({failure})")
        if failure is None:
            waited = time.monotonic() - began
            return (
                f"the guest was given to the QEMU at {self.address}, which has not said in "
                f"{waited:.0f} s that it runs: look there"
            )
        if self._changed:
            await self._restore()
        return f"the guest runs in the QEMU at {self.address}"

    async def _restore(self) -> None:
        """Put back what was changed in QEMU. Nothing is raised: the guest runs."""
        with contextlib.suppress(Exception):
            async with await Machine.connect(self._qmp, timeout=ASK_SECONDS) as machine:
                machine.settings.adopt(self._changed)
                await machine.restore()

    async def confirm_running(self, running: str) -> str:
        """Ask QEMU whether the guest runs. If QEMU cannot be asked, the guest is taken to run."""
        if not self._qmp or self.loader.failure is None:
            return running
        with contextlib.suppress(MigrationError):
            async with await Machine.connect(self._qmp, timeout=ASK_SECONDS) as machine:
                runstate = (await machine.status()).runstate
                self.runs = runstate == RUNNING
                if not self.runs:
                    return (
                        f"the guest is in the QEMU at {self.address}, and does not run yet "
                        f"({runstate})"
                    )
        return running

    def facts(self) -> dict[str, Any]:
        return {"kind": "qemu", "address": str(self.address)}
