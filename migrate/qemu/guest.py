"""A guest that runs in a QEMU, whose outgoing migration stream comes to us.

await guest.started()       QEMU has connected, or was told to (qmp), and has said what memory
                            there is
(the stream is read: see intake.py; what the other QEMU says: `say`)
give_up / take_back         from GO on the socket outlives us, since QEMU lets the guest run on
                            where it is closed (see holder.py)
release / resume            QEMU hears that its guest runs over there, or that it does not
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import select
import socket
from typing import Any

from migrate.address import Address
from migrate.errors import ConnectError, MigrationError, QemuError, UsageError, system_reason
from migrate.guests import isolated
from migrate.guests.guest import Guest
from migrate.guests.hold import ProcessHold
from migrate.guests.process import start_time
from migrate.qemu.client import control_path
from migrate.qemu.holder import MOVED
from migrate.qemu.intake import Intake, StreamLost
from migrate.qemu.machine import RUNNING, STREAM_BYTES, Machine, our_end, still_here
from migrate.socket_file import BACKLOG, SocketFile
from migrate.sockets import listening_sockets
from migrate.threads import in_thread

# So long QEMU may take from its connection to the list of its blocks; and to connect, once told.
BEGIN_SECONDS = 30.0
HOLDER_SECONDS = 5.0
POLL_SECONDS = 0.05
NOTICE_SECONDS = 0.5


class QemuGuest(Guest):
    """The guest of one QEMU, for one migration.

    address -- where QEMU is to send its stream; None: a socket of our own, for a QEMU that is told
               to (qmp)
    qmp     -- of that QEMU; "" leaves it to others to begin, and to set what it needs
    settings -- capabilities and parameters to set there meanwhile, by QEMU's names with _ for -
    """

    kind = "qemu"

    def __init__(
        self, address: Address | None, qmp: str = "", *, page_size: int = 4096,
        return_path: bool = True, settings: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.machine: Machine | None = None
        self._wanted = address
        self._qmp = qmp
        self._page_size = page_size
        self._return_path = return_path
        self._settings = settings or {}
        self._listener: socket.socket | None = None
        self._file: SocketFile | None = None
        """The socket's file, where it has one: another one at its path is left alone."""
        self._socket: socket.socket | None = None
        self._intake: Intake | None = None
        self._holder: asyncio.subprocess.Process | None = None
        self._moved = self._given_up = self._told = False
        self._hold: ProcessHold | None = None
        self._began = False
        """Whether the migration that goes on in QEMU is ours: another one is left alone."""
        self._runstate = RUNNING
        """Of the guest as we came, where QEMU tells us."""

    @property
    def driven(self) -> bool:
        """Whether QEMU does what we say."""
        return bool(self._qmp)

    @property
    def remains(self) -> str:  # type: ignore[override]
        if self._intake is not None and self._intake.parser.switched and not self.driven:
            return "its QEMU takes it for moved: `cont` in its monitor lets it run on here"
        if self.machine is not None and self.machine.ended is not None:
            return "its QEMU answers no more: if that has ended, so has the guest"
        if not self.driven:
            return f"{Guest.remains}, if it ran before"
        return Guest.remains if self.runs else still_here(self._runstate)

    @property
    def runs(self) -> bool:  # type: ignore[override]
        return self._runstate == RUNNING

    @property
    def intake(self) -> Intake:
        assert self._intake is not None
        return self._intake

    @property
    def blocks(self) -> tuple[tuple[bytes, int], ...]:
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
        """QEMU can connect now: where. Raises UsageError, ConnectError where that cannot be."""
        where = self._wanted
        assert where is not None
        try:
            if where.path:
                self._file = SocketFile(where.path, "--guest")
                listener = self._file.socket
            else:
                listener = await self._one_listening(where)
                where = Address(where.host, listener.getsockname()[1])
        except OSError as error:
            raise UsageError(
                f"QEMU cannot be waited for at {where}: {system_reason(error)}"
            ) from None
        listener.setblocking(False)
        self._listener, self._wanted = listener, where
        return where

    async def _one_listening(self, where: Address) -> socket.socket:
        """QEMU makes one connection, to any address of a name: IPv4 where there is a choice."""
        try:
            sockets = await listening_sockets(where, BACKLOG)
        except ConnectError as error:
            raise ConnectError(f"QEMU cannot be waited for at {where}: {error}") from None
        sockets.sort(key=lambda one: one.family != socket.AF_INET)
        for one in sockets[1:]:
            one.close()
        return sockets[0]

    def _unlisten(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            if self._file is not None:
                self._file.close()

    async def started(self) -> None:
        """Waits until QEMU has begun to migrate, or has it begin.

        Raises MigrationError: it does not, or what came is no stream that can be carried.
        """
        if self._intake is not None:
            return
        if self._wanted is not None and self._listener is None:
            await self.listen()
        if self._qmp:
            self.machine = await Machine.connect(self._qmp)
            await self._hold_process(self.machine.process)
            self._runstate = (await self.machine.status()).runstate
            await self.machine.prepare(return_path=self._return_path, **self._settings)
        self._socket = await self._connection()
        intake = Intake(self._socket, self._page_size)
        if not await in_thread(intake.begin, BEGIN_SECONDS):
            what = "QEMU" if self._wanted is None else f"what connected to {self._wanted}"
            raise MigrationError(f"{what} has not begun a migration stream in {BEGIN_SECONDS:g} s")
        if self._listener is not None:
            await self._refuse_more(self._socket, self._listener)
        self._unlisten()
        intake.check(return_path=self._return_path)
        await self._have_held(self._socket)
        self._intake = intake

    async def _hold_process(self, pid: int) -> None:
        """Raises UsageError where another program moves the guest, through whatever socket."""
        if pid and self._hold is None:
            hold = ProcessHold(pid, f"the guest of QEMU (process {pid})")
            await hold.take()
            self._hold = hold

    async def _begin(self, machine: Machine, where: str | socket.socket) -> None:
        """Have QEMU begin to migrate."""
        self._began = True
        try:
            await machine.migrate(where)
        except QemuError as error:
            self._began = not error.desc  # it refused: what goes on there, or was, is not ours
            raise

    async def _connection(self) -> socket.socket:
        """What QEMU's stream comes over: it connects to us, or is given one end of a pair."""
        if self._listener is None:
            assert self.machine is not None
            return await our_end(functools.partial(self._begin, self.machine))
        if self.machine is not None:
            await self._begin(self.machine, str(self._wanted))
        connection = await self._accept(self._listener)
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, STREAM_BYTES)
        return connection

    async def _refuse_more(self, stream: socket.socket, listener: socket.socket) -> None:
        """Raises UsageError where pages are to come over connections of their own.

        They are there before QEMU lists its blocks. It must lose its stream first: QEMU 7.2 may
        crash, and its guest with it, where one of those connections breaks before that.
        """
        more = select.poll()
        more.register(listener, select.POLLIN)
        if more.poll(0):
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
            await asyncio.sleep(NOTICE_SECONDS)
            raise UsageError(
                "QEMU opens more connections than one, which cannot be carried: switch the "
                "capability multifd off, or postcopy-preempt"
            )

    async def _accept(self, listener: socket.socket) -> socket.socket:
        coming = asyncio.ensure_future(asyncio.get_running_loop().sock_accept(listener))
        try:
            while self.machine is not None:
                done, _ = await asyncio.wait({coming}, timeout=POLL_SECONDS)
                if done:
                    break
                status = await self.machine.status()
                if not status.going_on:
                    raise QemuError(f"QEMU does not begin to migrate: {status.error}")
            return (await coming)[0]
        finally:
            coming.cancel()

    async def say(self, data: bytes) -> None:
        """On the return path. A QEMU that is gone is noticed where its stream is read."""
        if self._socket is not None and self._return_path:
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().sock_sendall(self._socket, data)

    # -- the holder

    async def _have_held(self, connection: socket.socket) -> None:
        self._holder = await asyncio.create_subprocess_exec(
            *isolated.command("migrate.qemu.holder", str(connection.fileno())),
            env=isolated.environment(), pass_fds=[connection.fileno()],
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        await self._holder_answers()

    async def _tell_holder(self, letter: bytes) -> None:
        assert self._holder is not None
        assert self._holder.stdin is not None
        with contextlib.suppress(OSError, RuntimeError):  # the answer that does not come says so
            self._holder.stdin.write(letter)
        await self._holder_answers()

    async def _holder_answers(self) -> None:
        assert self._holder is not None
        assert self._holder.stdout is not None
        answer = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HOLDER_SECONDS):
                answer = await self._holder.stdout.read(1)
        if answer != b"k":
            raise MigrationError("the process that holds QEMU's stream for us has died")

    # -- whose it is

    async def pause(self) -> None:
        """QEMU does that itself."""

    async def give_up(self) -> None:
        """From here on QEMU must not let the guest run by itself.

        A QEMU that does what we say is told now that its guest has moved: nobody can cancel that
        any more, and it can be told to let it run on. Another one waits for its answer; whoever
        cancels it meanwhile has two guests.
        """
        self.check_alive()
        await asyncio.shield(self._tell_holder(b"g"))
        self._given_up = True
        if self.machine is not None and self._return_path:
            try:
                await asyncio.shield(self._tell_moved(self.machine))
            except BaseException:
                self._given_up = False
                raise

    async def _tell_moved(self, machine: Machine) -> None:
        await self.say(MOVED)
        self._told = True
        try:
            async with asyncio.timeout(BEGIN_SECONDS):
                while (status := await machine.status()).going_on:
                    await asyncio.sleep(POLL_SECONDS / 10)
        except TimeoutError:
            raise QemuError(
                f"QEMU was told that its guest has moved, and has not ended its migration in "
                f"{BEGIN_SECONDS:g} s"
            ) from None
        if status.status != "completed":
            raise StreamLost(f"QEMU has not moved its guest: {status.status} {status.error}")

    def check_alive(self) -> None:
        """Raises StreamLost where QEMU has hung up: it lets its guest run on."""
        if self._socket is None or not self._return_path:
            return  # without one QEMU hangs up as soon as all is sent
        try:
            gone = not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            gone = False
        except OSError:
            gone = True
        if gone:
            raise StreamLost("QEMU has cancelled, or is gone, after all had been sent")

    async def take_back(self) -> None:
        if self._holder is not None:
            await asyncio.shield(self._tell_holder(b"r"))
        self._given_up = False

    async def release(self) -> None:
        """QEMU hears that its guest runs over there."""
        self._moved = True
        if not self._told:
            await self.say(MOVED)

    async def resume(self) -> None:
        """QEMU hears nothing any more, and lets its guest run on; one that takes it for moved is
        told to."""
        await self._hang_up()

    async def close(self) -> None:
        """Where nobody knows whose the guest is, the holder stays, and QEMU waits."""
        self._unlisten()
        unknown = self._given_up and not self._moved
        if not self._moved:
            await self._hang_up(for_good=not unknown)
        if self.machine is not None:
            machine, self.machine = self.machine, None
            if not unknown:
                try:
                    await self._leave(machine, self._moved)
                except QemuError as error:
                    self.trouble = str(error)
                    if not self._moved:
                        self.trouble += (
                            "; `cont` in QEMU's monitor lets the guest run, if it stands"
                        )
            await machine.close()
        await self._hang_up()
        if self._hold is not None:
            self._hold.close()
            self._hold = None

    async def _leave(self, machine: Machine, moved: bool) -> None:
        """QEMU is as it was before; its guest runs, where it is still ours."""
        if not self._began:
            self.trouble = "; ".join(await machine.restore())
            return
        status = await (machine.settled() if moved else machine.status())
        if status.going_on:
            status = await machine.cancel()
        if not moved and status.status == "completed" and self.runs:
            await machine.cont()  # it had no return path, and believed that all was well
        self.trouble = "; ".join(await machine.restore())

    async def _hang_up(self, *, for_good: bool = True) -> None:
        """for_good: QEMU sees that at once, whoever else holds its stream."""
        intake = self._intake
        while intake is not None and intake.parser.switched and not intake.drained:
            await asyncio.sleep(POLL_SECONDS)  # as long as that may take: see Intake
        if self._socket is not None and for_good and not self._moved:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._holder is not None:
            holder, self._holder = self._holder, None
            assert holder.stdin is not None
            holder.stdin.close()
            if for_good and self._moved:
                # it does not end by itself where it was told to hold on
                with contextlib.suppress(ProcessLookupError):
                    holder.kill()
            if for_good:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(HOLDER_SECONDS):
                        await holder.wait()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    # -- what a later program needs

    def facts(self) -> dict[str, Any]:
        pid = self._holder.pid if self._holder is not None else 0
        return {
            "kind": self.kind, "pid": pid, "started": start_time(pid) if pid else "",
            "qmp": os.path.abspath(control_path(self._qmp)) if self._qmp else "",
            "runstate": self._runstate,
        }  # fmt: skip
