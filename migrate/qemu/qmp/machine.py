"""A QEMU whose guest migrates, driven with QEMU's own commands.

    source       prepare -> migrate -> (status, set_...) -> completed -> restore
                                          |  cancel, or it failed    -> restore
                                          +- completed, but the stream did not arrive: cont
    destination  incoming -> (status) -> running

QEMU counts times in milliseconds; here all are in seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from types import TracebackType
from typing import Any

from migrate.errors import QemuError
from migrate.qemu.qmp.client import Client
from migrate.qemu.qmp.events import Events
from migrate.qemu.qmp.settings import (
    DOWNTIME_LIMIT,
    MAX_BANDWIDTH,
    OFF,
    PLAIN,
    RETURN_PATH,
    SWITCHOVER_ACK,
    SWITCHOVER_BANDWIDTH,
    TLS,
    UNFIT,
    MigrationSettings,
    milliseconds,
)
from migrate.qemu.qmp.status import (
    FINISHING,
    MachineStatus,
    object_in,
    parse_status,
)

# The status is asked for this often while we wait for a change: no event tells that QEMU has left
# `finish-migrate`.
POLL_SECONDS = 0.05
# How long a migration may still take that ends by itself; and one that we have cancelled.
SETTLED_SECONDS = 30.0
CANCEL_SECONDS = 10.0
# QEMU refuses `cont` while it tidies up after a migration (finish-migrate).
SETTLE_SECONDS = 10.0

RUNNING = "running"
# The name that QEMU knows our socket by, from `getfd` on.
STREAM = "xbmigrate"


class Machine:
    """A QEMU. All methods raise QemuError if it refuses, gives no answer, or has ended.

    `prepare` and the setters remember what they change, until `restore` puts it back.

    A monitor of QEMU serves one client at a time, so close a Machine that is not needed.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self.settings = MigrationSettings(client)

    @classmethod
    async def connect(cls, address: str, timeout: float = 5.0) -> Machine:
        """Connect; see Client.connect."""
        return cls(await Client.connect(address, timeout))

    async def __aenter__(self) -> Machine:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection. Settings stay as they are: see `restore`."""
        await self._client.close()

    @property
    def version(self) -> tuple[int, int, int]:
        return self._client.version

    @property
    def process(self) -> int:
        """The PID of QEMU; see Client.process."""
        return self._client.process

    @property
    def ended(self) -> str | None:
        """Why the connection has ended; None while it is open."""
        return self._client.ended

    def events(self, *names: str) -> Events:
        """Iterate over events: STOP, RESUME, SHUTDOWN, ... QEMU sends MIGRATION and MIGRATION_PASS
        only after `prepare`, which switches the capability `events` on."""
        return self._client.events(*names)

    async def execute(self, command: str, /, **arguments: Any) -> Any:
        """Run a command. Names are QEMU's: execute("cont"), execute("x", **{"a-b": 1})."""
        return await self._client.execute(command, arguments)

    async def status(self) -> MachineStatus:
        """Return the status of the migration and of the guest at one moment.

        QEMU has a command for each of them. The run state is asked for before and after; if it has
        changed in between, the three commands are repeated, twice at most.
        """
        runstate = await self._runstate()
        for _ in range(3):
            answer = await self.execute("query-migrate")
            before, runstate = runstate, await self._runstate()
            if before == runstate:
                break
        return parse_status(answer, runstate)

    async def running(self) -> bool:
        """Return whether the guest runs."""
        return await self._runstate() == RUNNING

    async def _runstate(self) -> str:
        return str(object_in("query-status", await self.execute("query-status")).get("status", ""))

    # -- the source

    async def prepare(
        self, *, return_path: bool, downtime_limit: float, max_bandwidth: int = 0,
        **more: bool | int | str,
    ) -> None:  # fmt: skip
        """Set QEMU up to send a stream that can be carried. On failure all is as it was.

        downtime_limit -- seconds
        max_bandwidth  -- bytes per second; 0: no limit
        more           -- capabilities and parameters by QEMU's names, with _ for -; they override
                          what is set otherwise (xbzrle=True)
        """
        await self._check_can_migrate()
        now = await self.settings.query_capabilities()
        capabilities = dict.fromkeys(OFF, False) | {"events": True, RETURN_PATH: return_path}
        if not return_path:
            capabilities[SWITCHOVER_ACK] = False  # it comes on the return path
        parameters: dict[str, Any] = PLAIN | {
            DOWNTIME_LIMIT: milliseconds(downtime_limit),
            MAX_BANDWIDTH: max_bandwidth,
        }
        known = await self.settings.query_parameters()
        for name, value in more.items():
            named = name.replace("_", "-")
            if named in now:
                capabilities[named] = bool(value)
            elif named in known:
                parameters[named] = value
            else:
                raise QemuError(
                    f"QEMU {'.'.join(map(str, self.version))} has no migration capability or "
                    f"parameter {named}"
                )
        try:
            await self.settings.set_capabilities(capabilities, now)
            await self.settings.set_parameters(parameters, known)
        except BaseException:
            await self.restore()
            raise

    async def _check_can_migrate(self) -> None:
        """Raise QemuError if the guest is migrating, has moved, is not here yet, or is blocked."""
        status = await self.status()
        if status.going_on:
            raise QemuError(
                f"a migration of this guest is going on ({status.status}): wait until it has "
                "ended, or cancel it"
            )
        if status.runstate == "inmigrate":
            raise QemuError("this QEMU waits for a guest: it is a destination, no source")
        if status.runstate == "postmigrate":
            raise QemuError(
                "the guest of this QEMU has moved: a guest moves once. `cont` would let it run "
                "here again: only if it does not, and never will, run at the destination"
            )
        if status.blocked:
            raise QemuError(f"QEMU cannot migrate this guest: {'; '.join(status.blocked)}")

    async def restore(self) -> tuple[str, ...]:
        """Put back the settings that were changed: see MigrationSettings.restore."""
        return await self.settings.restore()

    async def migrate(self, where: str | socket.socket) -> None:
        """Begin to migrate.

        QEMU answers before it has connected: `status` and events tell what becomes of the
        migration, a refused connection included.

        where -- unix:PATH or tcp:HOST:PORT to connect to; or the socket to send the stream into
        """
        await self._with_stream("migrate", where)

    async def _with_stream(self, command: str, where: str | socket.socket) -> None:
        """Run a command that takes the address of a stream.

        A socket is passed to QEMU. So QEMU need not reach any path of ours, nor be allowed to (its
        security profile, its mount namespace).
        """
        if isinstance(where, str):
            await self.execute(command, uri=where)
            return
        await self._client.execute("getfd", {"fdname": STREAM}, where.fileno())
        try:
            await self.execute(command, uri=f"fd:{STREAM}")
        except QemuError:
            with contextlib.suppress(QemuError):
                await self.execute("closefd", fdname=STREAM)
            raise

    async def set_downtime_limit(self, seconds: float) -> None:
        """Set the downtime below which QEMU switches over."""
        await self.settings.set_parameters({DOWNTIME_LIMIT: milliseconds(seconds)})

    async def set_switchover_bandwidth(self, bytes_per_second: int) -> bool:
        """Set the bandwidth that QEMU predicts its last round with; 0: the one that it measures.

        Returns False if QEMU has no such parameter (before 8.2).
        """
        known = await self.settings.query_parameters()
        await self.settings.set_parameters({SWITCHOVER_BANDWIDTH: bytes_per_second}, known)
        return SWITCHOVER_BANDWIDTH in known

    async def settled(self, timeout: float = SETTLED_SECONDS) -> MachineStatus:
        """Wait until no migration goes on; return how it ended. Raises QemuError on time-out."""
        try:
            async with asyncio.timeout(timeout):
                while (status := await self.status()).going_on:
                    await asyncio.sleep(POLL_SECONDS)
                return status
        except TimeoutError:
            raise QemuError(
                f"QEMU still migrates after {timeout:g} s: look at it with query-migrate before "
                "anything else, its guest may run"
            ) from None

    async def cancel(self, timeout: float = CANCEL_SECONDS) -> MachineStatus:
        """Cancel the migration; return how it ended: `completed` if it was too late to cancel.

        Raises QemuError if it has not ended in `timeout` seconds.
        """
        await self.execute("migrate_cancel")
        return await self.settled(timeout)

    async def cont(self) -> None:
        """Let the guest run.

        After a migration that completed, call this only if the guest surely does not run at the
        destination, and never will.
        """
        with contextlib.suppress(TimeoutError):  # then QEMU refuses `cont`, and says why
            async with asyncio.timeout(SETTLE_SECONDS):
                while await self._runstate() == FINISHING:
                    await asyncio.sleep(POLL_SECONDS)
        await self.execute("cont")

    # -- the destination

    async def incoming(self, where: str | socket.socket) -> None:
        """Have a QEMU that was started with `-incoming defer` wait for a stream.

        Capabilities that make a stream unfit are off from then on, until `restore`.

        where -- unix:PATH or tcp:HOST:PORT to listen on; or the socket to read the stream from
        """
        try:
            now = await self.settings.query_capabilities()
            await self.settings.set_capabilities(dict.fromkeys(UNFIT, False), now)
            await self.settings.set_parameters({TLS: ""})
            await self._with_stream("migrate-incoming", where)
        except BaseException:
            await self.restore()
            raise


def still_here(runstate: str) -> str:
    """Return what is true, after a failed migration, of a guest that did not run before it."""
    return f"the guest is still here, and does not run, as before ({runstate})"
