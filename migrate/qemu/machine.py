"""A QEMU whose guest migrates: what is wanted of it, in QEMU's commands.

    source       prepare -> migrate -> (status, set_...) -> completed -> restore
                                          |  cancel, or it failed    -> restore
                                          +- completed, but the stream did not arrive: cont
    destination  incoming -> (status) -> running

QEMU's times are milliseconds; here all are seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from migrate.errors import QemuError
from migrate.qemu.client import Client, Events

POLL_SECONDS = 0.05
# What a migration that ends by itself may still take, and one that is told to.
SETTLED_SECONDS = 30.0
CANCEL_SECONDS = 10.0
SETTLE_SECONDS = 10.0
AT_REST = ("none", "completed", "failed", "cancelled")

RETURN_PATH, SWITCHOVER_ACK = "return-path", "switchover-ack"
RUNNING = "running"
FINISHING = "finish-migrate"
# What QEMU calls the socket that it gets from us.
STREAM = "xbmigrate"
# QEMU's own are of 208 KiB: with this, as far as the system allows it, one of the two waits less
# often for the other, and the last 767 MiB of a guest took 0.33 s instead of 0.37.
STREAM_BYTES = 1 << 20
DOWNTIME_LIMIT, MAX_BANDWIDTH = "downtime-limit", "max-bandwidth"
SWITCHOVER_BANDWIDTH = "avail-switchover-bandwidth"

# What changes a stream into one that cannot be carried: also where it arrives it is off, since QEMU
# awaits there what was said to come.
UNFIT = (
    "multifd",
    "mapped-ram",
    "zero-copy-send",
    "background-snapshot",
    "rdma-pin-all",
    "x-colo",
    "x-ignore-shared",
    "compress",
    "postcopy-ram",
    "postcopy-preempt",
)
# And what costs and gives nothing there.
OFF = (
    *UNFIT,
    "release-ram",  # after a failure its guest would have no memory
    "pause-before-switchover",  # it waits for a migrate-continue
    "xbzrle",  # whoever carries the stream makes deltas
)
# The stream is plain: whoever carries it encrypts. And it is a migration, no restart of QEMU.
TLS = "tls-creds"
PLAIN = {TLS: "", "mode": "normal"}

Changed = tuple[dict[str, bool], dict[str, Any]]


def stream_pair() -> tuple[socket.socket, socket.socket]:
    """One end for us, and one for who sends or takes a stream."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with contextlib.suppress(OSError):
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, STREAM_BYTES)
    return ours, theirs


async def our_end(give: Callable[[socket.socket], Awaitable[None]]) -> socket.socket:
    """Of a pair whose other end QEMU gets by `give`: Machine.migrate, or Machine.incoming."""
    ours, theirs = stream_pair()
    with theirs:
        try:
            await give(theirs)
        except BaseException:
            ours.close()
            raise
    return ours


@dataclass(frozen=True)
class MachineStatus:
    """What QEMU says of its migration and its guest. Times in seconds, sizes in bytes.

    runstate         -- of query-status: running, paused, prelaunch, inmigrate, postmigrate, ...
    status           -- of query-migrate: none, setup, active, completed, failed, cancelled, ...
    remaining, total, dirty_* and the like are 0 before QEMU is active, and after it failed; it
    counts a dirty page as a whole one. downtime is known when it completed, expected_downtime
    before.
    """

    runstate: str = ""
    status: str = "none"
    error: str = ""
    blocked: tuple[str, ...] = ()
    total_time: float = 0.0
    setup_time: float = 0.0
    downtime: float | None = None
    expected_downtime: float | None = None
    transferred: int = 0
    remaining: int = 0
    total: int = 0
    page_size: int = 0
    dirty_sync_count: int = 0
    dirty_pages_rate: int = 0
    mbps: float = 0.0

    @property
    def going_on(self) -> bool:
        """Also while QEMU tidies up: it says `completed` before it knows the downtime."""
        return self.status not in AT_REST or self.runstate == FINISHING


class Machine:
    """A QEMU. All methods raise QemuError where it refuses, does not answer, or has ended.

    What `prepare` and the setters change is remembered as it was until `restore` puts it back.
    Only one client at a time may have a monitor of QEMU's: close it when it is not needed.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._capabilities: dict[str, bool] = {}
        self._parameters: dict[str, Any] = {}

    @classmethod
    async def connect(cls, address: str, timeout: float = 5.0) -> Machine:
        """See Client.connect."""
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
        """Nothing is put back by this."""
        await self._client.close()

    @property
    def version(self) -> tuple[int, int, int]:
        return self._client.version

    @property
    def process(self) -> int:
        """See Client.process."""
        return self._client.process

    @property
    def ended(self) -> str | None:
        """Why the connection has ended; None: it has not."""
        return self._client.ended

    def events(self, *names: str) -> Events:
        """STOP, RESUME, SHUTDOWN and others; MIGRATION and MIGRATION_PASS once it is prepared."""
        return self._client.events(*names)

    async def execute(self, command: str, /, **arguments: Any) -> Any:
        """Names are QEMU's: execute("cont"), execute("x", **{"a-b": 1})."""
        return await self._client.execute(command, arguments)

    async def status(self) -> MachineStatus:
        """Of one moment, though QEMU has two commands for it."""
        runstate = await self._runstate()
        for _ in range(3):
            answer = await self.execute("query-migrate")
            before, runstate = runstate, await self._runstate()
            if before == runstate:
                break
        return _status(answer, runstate)

    async def running(self) -> bool:
        return await self._runstate() == RUNNING

    async def _runstate(self) -> str:
        return str(_object("query-status", await self.execute("query-status")).get("status", ""))

    # -- the source

    async def prepare(
        self, *, return_path: bool, downtime_limit: float, max_bandwidth: int = 0,
        **more: bool | int | str,
    ) -> None:  # fmt: skip
        """Makes it send what can be carried; if that fails, all is as it was.

        downtime_limit -- seconds
        max_bandwidth  -- bytes per second; 0: no limit
        more           -- capabilities and parameters by QEMU's names, with _ for -; they go before
                          what is set otherwise (xbzrle=True)
        """
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
        now = await self._query_capabilities()
        capabilities = dict.fromkeys(OFF, False) | {"events": True, RETURN_PATH: return_path}
        if not return_path:
            capabilities[SWITCHOVER_ACK] = False  # it comes on the return path
        parameters: dict[str, Any] = PLAIN | {
            DOWNTIME_LIMIT: _milliseconds(downtime_limit),
            MAX_BANDWIDTH: max_bandwidth,
        }
        known = await self._query_parameters()
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
            await self._set_capabilities(capabilities, now)
            await self._set_parameters(parameters, known)
        except BaseException:
            await self.restore()
            raise

    async def restore(self) -> tuple[str, ...]:
        """Puts back what was changed, as far as it can; what it could not, a sentence each.

        Capabilities stay where a migration is going on: cancel it before.
        """
        faults = []
        try:
            if self._capabilities:
                await self._send_capabilities(self._capabilities)
                self._capabilities = {}
        except QemuError as error:
            faults.append(str(error))
        try:
            if self._parameters:
                await self.execute("migrate-set-parameters", **self._parameters)
                self._parameters = {}
        except QemuError as error:
            faults.append(str(error))
        return tuple(faults)

    async def migrate(self, where: str | socket.socket) -> None:
        """Begins; what becomes of it `status` and events say, a refused connection too.

        where -- unix:PATH or tcp:HOST:PORT, where somebody listens; or what to send it into
        """
        await self._with_stream("migrate", where)

    async def _with_stream(self, command: str, where: str | socket.socket) -> None:
        """A socket QEMU gets itself: it need not reach, nor be allowed, any path of ours."""
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
        await self._set_parameters({DOWNTIME_LIMIT: _milliseconds(seconds)})

    async def set_switchover_bandwidth(self, bytes_per_second: int) -> bool:
        """What QEMU is to reckon with for its last round; 0: what it measures.

        False where it has no such parameter (before 8.2).
        """
        known = await self._query_parameters()
        await self._set_parameters({SWITCHOVER_BANDWIDTH: bytes_per_second}, known)
        return SWITCHOVER_BANDWIDTH in known

    async def settled(self, timeout: float = SETTLED_SECONDS) -> MachineStatus:
        """Waits until its migration is over, and says how it ended. Raises QemuError where that
        takes too long."""
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
        """Cancels, waits until that is over, and says how it ended: `completed` where it was
        too late. Raises QemuError where it is not over in time."""
        await self.execute("migrate_cancel")
        return await self.settled(timeout)

    async def cont(self) -> None:
        """Lets the guest run. After a migration that completed: only where it is sure that it
        does not, and never will, run at the destination."""
        with contextlib.suppress(TimeoutError):  # QEMU refuses it while it tidies up
            async with asyncio.timeout(SETTLE_SECONDS):
                while await self._runstate() == FINISHING:
                    await asyncio.sleep(POLL_SECONDS)
        await self.execute("cont")

    # -- the destination

    async def incoming(self, where: str | socket.socket) -> None:
        """Awaits a stream; QEMU must have been started with -incoming defer.

        What cannot be carried is off then, until `restore`.

        where -- unix:PATH or tcp:HOST:PORT, to listen there; or what to read it from
        """
        try:
            now = await self._query_capabilities()
            await self._set_capabilities(dict.fromkeys(UNFIT, False), now)
            await self._set_parameters({TLS: ""})
            await self._with_stream("migrate-incoming", where)
        except BaseException:
            await self.restore()
            raise

    @property
    def changed(self) -> Changed:
        """What `restore` puts back, for one that is connected later to `adopt`."""
        return self._capabilities, self._parameters

    def adopt(self, changed: Changed) -> None:
        self._capabilities, self._parameters = changed

    # -- capabilities and parameters

    async def _query_capabilities(self) -> dict[str, bool]:
        answer = await self.execute("query-migrate-capabilities")
        try:
            return {str(one["capability"]): bool(one["state"]) for one in answer}
        except (KeyError, TypeError):
            raise _strange("query-migrate-capabilities", answer) from None

    async def _query_parameters(self) -> dict[str, Any]:
        answer = await self.execute("query-migrate-parameters")
        return dict(_object("query-migrate-parameters", answer))

    async def _set_capabilities(self, wanted: Mapping[str, bool], now: dict[str, bool]) -> None:
        """Those that this QEMU knows, and that are not so already."""
        wanted = {name: to for name, to in wanted.items() if now.get(name, to) != to}
        if wanted:
            self._capabilities = {name: now[name] for name in wanted} | self._capabilities
            await self._send_capabilities(wanted)

    async def _send_capabilities(self, states: Mapping[str, bool]) -> None:
        await self.execute(
            "migrate-set-capabilities",
            capabilities=[{"capability": name, "state": to} for name, to in states.items()],
        )

    async def _set_parameters(
        self, wanted: Mapping[str, Any], now: dict[str, Any] | None = None
    ) -> None:
        """Those that this QEMU knows, and that are not so already."""
        now = await self._query_parameters() if now is None else now
        wanted = {name: to for name, to in wanted.items() if now.get(name, to) != to}
        if wanted:
            self._parameters = {name: now[name] for name in wanted} | self._parameters
            await self.execute("migrate-set-parameters", **wanted)


def still_here(runstate: str) -> str:
    """What is true of a guest that did not run before, after a migration that failed."""
    return f"the guest is still here, and does not run, as before ({runstate})"


def _milliseconds(seconds: float) -> int:
    """As QEMU takes them. 0 would be a migration that never ends."""
    return math.ceil(round(seconds * 1000, 3)) if seconds > 0 else 0


def _strange(command: str, answer: object) -> QemuError:
    return QemuError(f"{command}: QEMU's answer is not understood: {repr(answer)[:80]}", command)


def _object(command: str, answer: object) -> Mapping[str, Any]:
    if not isinstance(answer, dict):
        raise _strange(command, answer)
    return answer


def _status(answer: object, runstate: str) -> MachineStatus:
    info = _object("query-migrate", answer)
    try:
        ram = _object("query-migrate", info.get("ram", {}))
        return MachineStatus(
            runstate=runstate,
            status=str(info.get("status", "none")),
            error=str(info.get("error-desc", "")),
            blocked=tuple(str(reason) for reason in info.get("blocked-reasons", ())),
            total_time=info.get("total-time", 0) / 1e3,
            setup_time=info.get("setup-time", 0) / 1e3,
            downtime=_seconds(info.get("downtime")),
            expected_downtime=_seconds(info.get("expected-downtime")),
            transferred=int(ram.get("transferred", 0)),
            remaining=int(ram.get("remaining", 0)),
            total=int(ram.get("total", 0)),
            page_size=int(ram.get("page-size", 0)),
            dirty_sync_count=int(ram.get("dirty-sync-count", 0)),
            dirty_pages_rate=int(ram.get("dirty-pages-rate", 0)),
            mbps=float(ram.get("mbps", 0)),
        )
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise _strange("query-migrate", answer) from None


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
