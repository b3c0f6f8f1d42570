"""A guest that runs in a QEMU, whose outgoing migration stream we receive and carry.

make_ready            QEMU connects, or is told to migrate (qmp), and lists its RAM blocks
intake                reads the stream (see intake.py)
say                   sends QEMU what comes back on the return path
relinquish / reclaim  from GO on the socket outlives this program (see socket_keeper_process.py),
                      because QEMU lets the guest run on when its stream is closed
release / resume      tell QEMU that its guest runs at the destination, or let it run on here
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import logging
import os
import socket
from typing import Any

from migrate.errors import MigrationError, QemuError
from migrate.files.lock import ProcessLock
from migrate.guests.guest import Guest
from migrate.qemu.qmp.connecting import control_path
from migrate.qemu.qmp.machine import POLL_SECONDS, RUNNING, Machine, still_here
from migrate.qemu.qmp.stream_pair import our_end
from migrate.qemu.socket_keeper import SocketKeeper
from migrate.qemu.stream.intake import Intake, StreamLost
from migrate.qemu.stream.return_path import MOVED
from migrate.qemu.stream_listener import StreamListener
from migrate.runtime.processes import start_time_of
from migrate.runtime.threads import in_thread
from migrate.transport.address import Address

logger = logging.getLogger(__name__)

# What QEMU may take from its connection to the list of its RAM blocks; and, once it has heard that
# its guest has moved, to the end of its migration.
BEGIN_SECONDS = 30.0


class Owner(enum.Enum):
    """The side that owns the guest, as far as this program knows."""

    HERE = enum.auto()
    UNDECIDED = enum.auto()  # relinquished: GO may have been sent
    THERE = enum.auto()


class QemuGuest(Guest):
    """The guest of one QEMU, for one migration.

    address     -- where QEMU connects to send its stream; None: we make a pair of sockets and pass
                   one to QEMU (needs qmp)
    qmp         -- the control socket of that QEMU; "": the user sets QEMU up and begins
    page_size   -- of the guest, in bytes
    return_path -- whether QEMU waits for the answer of the destination; without it, QEMU takes the
                   guest for moved as soon as it has sent the stream
    settings    -- capabilities and parameters to set in QEMU for the migration, by QEMU's names
                   with _ for -

    machine     -- the QEMU, once it is connected over qmp
    """

    kind = "qemu"

    def __init__(
        self, address: Address | None, qmp: str = "", *, page_size: int = 4096,
        return_path: bool = True, settings: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.machine: Machine | None = None
        self._address = address
        self._qmp = qmp
        self._page_size = page_size
        self._return_path = return_path
        self._settings = settings or {}
        self._lock: ProcessLock | None = None
        self._listener: StreamListener | None = None
        self._socket: socket.socket | None = None
        self._intake: Intake | None = None
        self._keeper: SocketKeeper | None = None
        self._owner = Owner.HERE
        # QEMU has heard that its guest has moved.
        self._told = False
        # The migration that goes on in QEMU is ours; another one is left alone.
        self._began = False
        # The guest's run state before the migration, if QEMU can be asked.
        self._runstate = RUNNING

    @property
    def driven(self) -> bool:
        """Whether we tell QEMU what to do."""
        return bool(self._qmp)

    @property
    def after_failure(self) -> str:  # type: ignore[override]
        if self._intake is not None and self._intake.parser.switched and not self.driven:
            return "its QEMU takes it for moved: `cont` in its monitor lets it run on here"
        if self.machine is not None and self.machine.ended is not None:
            return "its QEMU answers no more: if that has ended, so has the guest"
        if not self.driven:
            return f"{Guest.after_failure}, if it ran before"
        return Guest.after_failure if self.runs else still_here(self._runstate)

    @property
    def runs(self) -> bool:  # type: ignore[override]
        return self._runstate == RUNNING

    @property
    def intake(self) -> Intake:
        """The stream, after `make_ready`."""
        assert self._intake is not None
        return self._intake

    @property
    def blocks(self) -> tuple[tuple[bytes, int], ...]:
        """The RAM blocks: name and number of pages."""
        parser = self.intake.parser
        return tuple((one.name, one.pages(parser.page_size)) for one in parser.blocks)

    @property
    def size(self) -> int:
        if self._intake is None:
            return 0
        return sum(pages for _, pages in self.blocks) * self._intake.parser.page_size

    @property
    def description(self) -> str:  # type: ignore[override]
        machine = self._intake.machine if self._intake else ""
        return f"QEMU guest ({machine})" if machine else "QEMU guest"

    # -- QEMU's connection

    async def listen(self) -> Address:
        """Listen for QEMU's connection, and return where.

        Raises UsageError or ConnectError if that is not possible.
        """
        return (await self._listen()).address

    async def _listen(self) -> StreamListener:
        if self._listener is None:
            assert self._address is not None
            self._listener = await StreamListener.open(self._address)
        return self._listener

    def _unlisten(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def make_ready(self) -> None:
        """Wait until QEMU has begun to migrate, or tell it to.

        Raises MigrationError if QEMU does not begin, or if its stream cannot be carried.
        """
        if self._intake is not None:
            return
        listener = await self._listen() if self._address is not None else None
        if self._qmp:
            self.machine = await Machine.connect(self._qmp)
            await self._lock_process(self.machine.process)
            self._runstate = (await self.machine.status()).runstate
            await self.machine.prepare(return_path=self._return_path, **self._settings)
        connection = self._socket = await self._connection(listener)
        intake = Intake(connection, self._page_size)
        if not await in_thread(intake.begin, BEGIN_SECONDS):
            what = "QEMU" if listener is None else f"what connected to {listener.address}"
            raise MigrationError(f"{what} has not begun a migration stream in {BEGIN_SECONDS:g} s")
        if listener is not None:
            await listener.refuse_more(connection)
            self._unlisten()
        intake.check(return_path=self._return_path)
        self._keeper = await SocketKeeper.start(connection)
        self._intake = intake
        logger.debug("QEMU (%s) sends its stream: RAM blocks %s", intake.machine, self.blocks)

    async def _lock_process(self, pid: int) -> None:
        """Lock the guest by its process, whichever socket leads to it.

        Raises UsageError if another program moves the guest.
        """
        if pid and self._lock is None:
            lock = ProcessLock(pid, f"the guest of QEMU (process {pid})")
            await lock.acquire()
            self._lock = lock

    async def _connection(self, listener: StreamListener | None) -> socket.socket:
        """Return the socket that QEMU's stream comes over, after telling QEMU to begin."""
        if listener is None:
            assert self.machine is not None
            return await our_end(functools.partial(self._begin, self.machine))
        if self.machine is not None:
            await self._begin(self.machine, str(listener.address))
        return await listener.accept(self.machine)

    async def _begin(self, machine: Machine, where: str | socket.socket) -> None:
        """Tell QEMU to begin to migrate."""
        self._began = True
        try:
            await machine.migrate(where)
        except QemuError as error:
            # If QEMU itself refused, what goes on or went on there is not ours.
            self._began = not error.desc
            raise

    async def say(self, data: bytes) -> None:
        """Send QEMU what came on the return path.

        Errors are not raised: a QEMU that is gone is noticed where its stream is read.
        """
        if self._socket is not None and self._return_path:
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().sock_sendall(self._socket, data)

    # -- who owns the guest

    async def pause(self) -> None:
        """Do nothing: QEMU pauses its guest by itself."""

    async def relinquish(self) -> None:
        """Keep QEMU from letting the guest run by itself from here on.

        A QEMU that we control hears now, before GO, that its guest has moved. After that no user
        can cancel the migration, and `cont` lets the guest run if it is ours after all. A QEMU
        that we do not control waits for its answer; a user who cancels its migration meanwhile
        has two guests.
        """
        self.check_alive()
        if self._keeper is not None:
            await asyncio.shield(self._keeper.relinquish())
        self._owner = Owner.UNDECIDED
        if self.machine is not None and self._return_path:
            try:
                await asyncio.shield(self._tell_moved(self.machine))
            except BaseException:
                self._owner = Owner.HERE
                raise

    async def _tell_moved(self, machine: Machine) -> None:
        """Tell QEMU that its guest has moved, and wait until its migration has completed."""
        await self.say(MOVED)
        self._told = True
        try:
            async with asyncio.timeout(BEGIN_SECONDS):
                while (status := await machine.status()).going_on:
                    await asyncio.sleep(POLL_SECONDS / 10)  # the guest is paused
        except TimeoutError:
            raise QemuError(
                f"QEMU was told that its guest has moved, and has not ended its migration in "
                f"{BEGIN_SECONDS:g} s"
            ) from None
        if status.status != "completed":
            raise StreamLost(f"QEMU has not moved its guest: {status.status} {status.error}")

    def check_alive(self) -> None:
        """Raise StreamLost if QEMU has closed its stream: it lets its guest run on."""
        if self._socket is None or not self._return_path:
            return  # without a return path QEMU closes the stream as soon as all is sent
        try:
            gone = not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            gone = False
        except OSError:
            gone = True
        if gone:
            raise StreamLost("QEMU has cancelled, or is gone, after all had been sent")

    async def reclaim(self) -> None:
        if self._keeper is not None:
            await asyncio.shield(self._keeper.reclaim())
        self._owner = Owner.HERE

    async def release(self) -> None:
        """Tell QEMU that its guest runs at the destination."""
        self._owner = Owner.THERE
        if not self._told:
            await self.say(MOVED)

    async def resume(self) -> None:
        """Close QEMU's stream: it lets its guest run on. `close` tells a QEMU that takes its guest
        for moved to do so."""
        await self._hang_up(Owner.HERE)

    async def close(self) -> None:
        """End this program's part.

        If it is not known who owns the guest, the keeper process stays, and QEMU waits.
        """
        self._unlisten()
        if self._owner is not Owner.THERE:
            await self._hang_up(self._owner)
        if self.machine is not None:
            machine, self.machine = self.machine, None
            if self._owner is not Owner.UNDECIDED:
                await self._leave(machine)
            await machine.close()
        await self._hang_up(self._owner)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    async def _leave(self, machine: Machine) -> None:
        """Leave QEMU as it was before, with its guest running if that is ours.

        What fails is said in `close_warning`.
        """
        moved = self._owner is Owner.THERE
        try:
            if self._began:
                status = await (machine.settled() if moved else machine.status())
                if status.going_on:
                    status = await machine.cancel()
                if not moved and status.status == "completed" and self.runs:
                    # QEMU had no return path, or has heard that its guest has moved
                    await machine.cont()
            self.close_warning = "; ".join(await machine.restore())
        except QemuError as error:
            self.close_warning = str(error)
            if not moved:
                self.close_warning += "; `cont` in QEMU's monitor lets the guest run, if it stands"

    async def _hang_up(self, owner: Owner) -> None:
        """Close QEMU's stream, and end the keeper unless the owner is undecided.

        If the guest is ours, the socket is shut down, so that QEMU notices at once although the
        keeper has the socket too.
        """
        intake = self._intake
        while intake is not None and intake.parser.switched and not intake.drained:
            await asyncio.sleep(POLL_SECONDS)  # its thread is at it: see Intake
        if self._socket is not None and owner is Owner.HERE:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._keeper is not None:
            keeper, self._keeper = self._keeper, None
            if owner is Owner.UNDECIDED:
                keeper.leave()
            else:
                await keeper.end(kill=owner is Owner.THERE)
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    # -- what a later program needs

    def facts(self) -> dict[str, Any]:
        pid = self._keeper.pid if self._keeper is not None else 0
        return {
            "kind": self.kind, "pid": pid, "started": start_time_of(pid) if pid else "",
            "qmp": os.path.abspath(control_path(self._qmp)) if self._qmp else "",
            "runstate": self._runstate,
        }  # fmt: skip
