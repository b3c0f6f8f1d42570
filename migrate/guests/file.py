"""A memory file or block device that other processes map and write."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
from collections.abc import Sequence
from typing import Any

from migrate.directory import existing_file
from migrate.errors import MigrationError, UsageError
from migrate.filesystem import KERNELS_OWN, file_system_of, kind_of
from migrate.guests import companions, isolated, moved
from migrate.guests.command import COMMAND_PATIENCE, run_command
from migrate.guests.device import DeviceHold, mounts_of, number_of, open_direct
from migrate.guests.guard import ADDED, Found
from migrate.guests.guest import MemoryGuest, check_size
from migrate.guests.hold import FileHold, Hold, reopened
from migrate.guests.lookout import Lookout
from migrate.guests.process import STOPPED, Process, exists, stands_still
from migrate.guests.process import state as process_state
from migrate.guests.rights import Rights
from migrate.guests.survey import runs, stoppable, survey, taken, unnamed
from migrate.guests.writers import Writer, named
from migrate.memory import Memory
from migrate.output import printable

STOP_PATIENCE = 5.0
MAX_DESCRIPTION = 200
# Between two looks while the guest runs: at least so long, and so much longer than a look takes.
LOOK_SECONDS = 1.0
LOOK_FACTOR = 10
# Writers that appear while the others are being stopped: so often they are looked for again.
TURNS = 20


class FileGuest(MemoryGuest):
    """`file:PATH`. Its writers are stopped by `pids` (SIGSTOP) or by commands, or all that there
    are (`auto`). Where nothing stops them none may be there, and the digest at the end tells
    whether anything was written during the last round.

    After `survey`, no process that was not stopped may be able to write it in the pause.
    """

    kind = "file"

    def __init__(
        self, path: str, pids: Sequence[int] = (), pause_cmd: str = "", resume_cmd: str = "",
        command_timeout: float = COMMAND_PATIENCE, *, auto: bool = False,
        writers: Sequence[Process] = (),
    ) -> None:  # fmt: skip
        """writers -- those that are known already; they are closed with the guest"""
        if bool(pause_cmd) != bool(resume_cmd):
            raise UsageError(
                "--pause-cmd and --resume-cmd go together: a guest that is paused must be able "
                "to go on where the migration fails"
            )
        self._fd, size = _open(path)
        self.path = path
        self.description = printable(os.path.basename(path), MAX_DESCRIPTION)
        self._is_device, align = stat.S_ISBLK(os.fstat(self._fd).st_mode), 0
        if self._is_device:
            align = self._open_device()
        self.memory = Memory(size, fd=self._fd, align=align)
        self.cautions: list[str] = []
        self._hold: Hold | None = None
        self.pause_cmd = pause_cmd
        self.resume_cmd = resume_cmd
        self._command_timeout = command_timeout
        self.warnings: list[str] = []
        """What a user must know before it is moved."""
        self.notices: list[str] = []
        """What is good to know."""
        self.stoppable = bool(pids or writers or pause_cmd or auto)
        self.can_throttle = bool(pids or writers or auto)
        self._auto = auto
        self._writers = {one.pid: one for one in writers}
        self._lookout: Lookout | None = None
        self._ran: list[int] = []
        """The writers that ran when we first looked."""
        self._guard: asyncio.subprocess.Process | None = None
        self._asking = asyncio.Lock()
        self._asleep: set[int] = set()
        self._paused = False
        self._given_up = False
        self._watching: asyncio.Task[None] | None = None
        self._check: asyncio.Future[list[Writer]] | None = None
        self._told: set[int] = set()
        for pid in pids:
            self._writers[pid] = stoppable(pid, f"--pid {pid}", "")

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that are stopped in the pause, as far as they are known."""
        return tuple(self._writers)

    # -- who writes it

    def survey(self) -> None:
        """Looks who writes the guest, before anything is begun; fills `warnings` and `notices`.

        With `auto` all writers are to be stopped from here on. Raises UsageError where something
        would go on writing.
        """
        try:
            found = survey(
                self._fd, self.path, self._writers, stops=self.can_throttle, auto=self._auto,
                commanded=bool(self.pause_cmd),
            )  # fmt: skip
        except UsageError:
            self._free()
            raise
        self._writers |= found.taken
        self._ran = [pid for pid in self._writers if process_state(pid) not in STOPPED]
        self.warnings, self.notices = found.warnings, found.notices
        self._lookout = Lookout(self._fd, found.seconds, found.new_seconds)

    def _open_device(self) -> int:
        """Read the device past all caches; returns the alignment this needs."""
        try:
            direct, align = open_direct(self._fd)
        except OSError as error:
            if mounts_of(number_of(self._fd)):
                os.close(self._fd)
                raise UsageError(
                    f"guest {self.path}: a file system is mounted on it, and it cannot be read "
                    f"past the page cache, which has old blocks (O_DIRECT: {error.strerror}): "
                    "unmount it"
                ) from None
            return 0
        os.close(self._fd)
        self._fd = direct
        return align

    async def hold(self) -> None:
        if self._hold is not None:
            return
        hold: Hold
        if self._is_device:
            hold = device = DeviceHold(self._fd, f"guest {self.path}", self.pids)
            await device.take()
            points = [mount.point for mount in device.mounts if not mount.read_only]
            if points and not self.pause_cmd:
                hold.cautions.append(
                    f"a file system on {self.path} is mounted at {', '.join(points)} and writes to "
                    f"it: freeze it for the last round (--pause-cmd 'fsfreeze -f {points[0]}' "
                    f"--resume-cmd 'fsfreeze -u {points[0]}')"
                )
        else:
            hold = FileHold(self._fd, f"guest file {self.path}")
            await hold.take()
        self._hold, self.cautions = hold, hold.cautions

    def refuse_if_moved(self) -> None:
        what = f"guest file {self.path}"
        moved.refuse_if_moved(self._fd, what)
        still = [pid for pid in self._ran if process_state(pid) in STOPPED]
        if still:
            raise UsageError(
                f"{what}: its writer, process {still[0]}, ran at the start and was stopped since, "
                "not by us: another program may have moved the guest: wake the writer (kill -CONT) "
                "if that is not so"
            )

    def confirm_hold(self) -> None:
        if self._hold is not None:
            self._hold.confirm()

    def unhold(self) -> None:
        if self._hold is not None:
            self._hold.close()
            self._hold = None

    async def started(self) -> None:
        """Starts the guard: it must be there before anything is stopped."""
        if self.stoppable:
            self._asleep = {pid for pid in self.pids if process_state(pid) in STOPPED}
            command = ["--resume-cmd", self.resume_cmd] if self.resume_cmd else []
            writers = [f"{pid}:{handle.born}" for pid, handle in self._writers.items()]
            self._guard = await asyncio.create_subprocess_exec(
                *isolated.command("migrate.guests.guard", *command, *writers),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
            )  # fmt: skip
            await self._guard_answers(0)
        if self._lookout is not None:
            await self._lookout.open()
        self._watch()

    def _watch(self) -> None:
        """While the guest runs, keeps what is known of processes fresh, so that a look in the pause
        is short; with `auto`, new writers are slowed and stopped like the others."""
        if self._lookout is not None and self._watching is None:
            self._watching = asyncio.create_task(self._looking(self._lookout))

    async def _looking(self, lookout: Lookout) -> None:
        for _ in range(2):  # the first one knows nothing yet, and takes the longest
            await lookout.look()
        while True:
            await asyncio.sleep(max(LOOK_SECONDS, LOOK_FACTOR * lookout.seconds))
            found = await lookout.look()
            for writer in found if self._auto else ():
                if self._is_new(writer):
                    # What cannot be stopped is said where it must be: in the pause.
                    with contextlib.suppress(MigrationError):
                        await self._take_on(writer)

    async def _watch_no_more(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
            self._watching = None

    def _is_new(self, writer: Writer) -> bool:
        handle = self._writers.get(writer.pid)
        return handle is None or handle.born != writer.born

    async def _take_on(self, writer: Writer) -> None:
        """Adds to those that are to be stopped, and tells the guard before that is done."""
        try:
            if self._is_new(writer):
                handle = taken(self._fd, writer)
            else:
                handle = stoppable(writer.pid, f"process {writer}", writer.born)
        except UsageError as error:
            if not exists(writer.pid):
                return
            raise MigrationError(str(error)) from None
        if handle is None:
            return
        await asyncio.shield(self._ask_guard(b"a", handle))
        self.can_throttle = True

    async def _stop_the_rest(self, lookout: Lookout) -> None:
        """Stops the writers that have appeared, until there are no more."""
        for _ in range(TURNS):
            found = await lookout.look_at_new(self._writers)
            if not await self._stop_new(found):
                return
        raise MigrationError(
            "processes that write the guest appear faster than they can be stopped"
        )

    async def _stop_new(self, found: list[Writer]) -> bool:
        """Stops those that run: new ones, and who was woken in the pause; whether there were any.

        Raises MigrationError where they are not ours to stop. A --pause-cmd may have other ways: a
        lock in the program, a frozen file system. A process that merely has the guest open then
        cannot be told from one that writes, so that is no error but a warning.
        """
        running = [writer for writer in found if runs(writer)]
        new = [writer for writer in running if self._is_new(writer)]
        if self._auto or not new:
            for writer in running:
                # One that was woken is told to the guard again: it is not asleep any more.
                await self._take_on(writer)
            await self._stop([writer.pid for writer in running if writer.pid in self._writers])
            return bool(running)
        if self.pause_cmd:
            untold = [writer for writer in new if writer.pid not in self._told]
            self._told |= {writer.pid for writer in untold}
            if untold:
                self.warn(
                    "still running after --pause-cmd, and able to write the guest, so that what is "
                    f"written now is lost: {named(untold)}"
                )
            return False
        words = unnamed(new, others_named=bool(self._writers))
        raise MigrationError(f"guest file {self.path}: {words}")

    async def check_writers(self) -> bool:
        if self._check is None or self._lookout is None:
            return False
        found, stopped = await self._check, False
        for _ in range(TURNS):
            if not await self._stop_new(found):
                return stopped
            stopped, found = True, await self._lookout.look()
        raise MigrationError(
            "processes that write the guest appear faster than they can be stopped"
        )

    @property
    def stop_seconds(self) -> float:  # type: ignore[override]
        return self._lookout.new_seconds if self._lookout else 0.0

    @property
    def check_seconds(self) -> float:  # type: ignore[override]
        return self._lookout.seconds if self._lookout else 0.0

    # -- the guard

    async def _tell_guard(self, words: bytes) -> dict[int, Found]:
        """Tells it, and returns what it has found of each writer, if it was asked (p, t); also
        where it is cancelled, it has been told and has answered: the next answer is not this one.
        """
        return await asyncio.shield(self._ask_guard(words))

    async def _ask_guard(self, words: bytes, new: Process | None = None) -> dict[int, Found]:
        async with self._asking:
            pids = list(self._writers) if words[:1] in (b"p", b"t") else []
            if new is not None:
                if (old := self._writers.get(new.pid)) is not None:
                    old.close()
                self._writers[new.pid] = new
                pids, words = [new.pid], words + ADDED.pack(new.pid, int(new.born or 0))
            if self._guard is None or self._guard.stdin is None:
                return dict.fromkeys(pids, Found.RUNS)
            # Where it has died (uvloop: RuntimeError), the answer that does not come says so.
            with contextlib.suppress(OSError, RuntimeError):
                self._guard.stdin.write(words)
            answer = await self._guard_answers(len(pids))
            found = {pid: Found(byte) for pid, byte in zip(pids, answer, strict=True)}
            asleep = {pid for pid, what in found.items() if what is Found.ASLEEP}
            if words == b"p":
                self._asleep = asleep
            elif new is not None:
                self._asleep = self._asleep - {new.pid} | asleep
            return found

    async def _guard_answers(self, more: int) -> bytes:
        assert self._guard is not None
        assert self._guard.stdout is not None
        answer = b""
        with contextlib.suppress(asyncio.IncompleteReadError, TimeoutError):
            async with asyncio.timeout(STOP_PATIENCE):
                answer = await self._guard.stdout.readexactly(1 + more)
        if answer[:1] != b"k":
            raise MigrationError("the guard process of the guest has died: nothing was stopped")
        return answer[1:]

    async def throttle(self, percent: int) -> None:
        """By SIGSTOP and SIGCONT, which the guard sends: it outlives us."""
        if self._paused:
            return  # which has ended the duty cycle; it stands still, perhaps for good
        try:
            found = await self._tell_guard(b"t" + bytes([percent]))
            forbidden = [pid for pid, what in found.items() if what is Found.FORBIDDEN]
            if percent and forbidden:
                await self._tell_guard(b"t\0")
                raise MigrationError(
                    f"process {forbidden[0]} cannot be slowed: it may not be stopped"
                )
        except MigrationError:
            # It may have died while the writer stood still.
            self._let_go()
            raise
        if percent and set(found.values()) <= {Found.ENDED}:
            self.can_throttle = False

    def _let_go(self) -> None:
        for pid, handle in self._writers.items():
            if pid not in self._asleep:
                with contextlib.suppress(OSError):
                    handle.signal(signal.SIGCONT)

    async def pause(self) -> None:
        self._paused = True  # also where this is cancelled: the guard has been told
        await self._watch_no_more()
        try:
            await self._tell_guard(b"p")
        except MigrationError:
            self._paused = False
            raise
        await self._stop(list(self._writers))
        if self.pause_cmd:
            await run_command(self.pause_cmd, "--pause-cmd", self._command_timeout)
        if self._lookout is not None:
            await self._stop_the_rest(self._lookout)
            self._check = asyncio.ensure_future(self._lookout.look())
            self._check.add_done_callback(lambda check: check.cancelled() or check.exception())
            if self.pause_cmd:
                for text in companions.warnings(self._fd, self.path, ()):
                    self.warn(text)
        self.check()

    async def _stop(self, pids: list[int]) -> None:
        """Stops processes of which the guard knows; returns when every thread stands still."""
        for pid in pids:
            try:
                self._writers[pid].signal(signal.SIGSTOP)
            except ProcessLookupError:
                continue  # it has ended: it writes no more
            except OSError as error:
                raise MigrationError(f"cannot stop process {pid}: {error.strerror}") from None
        for pid in pids:
            await self._stopped(self._writers[pid])

    def check(self) -> None:
        """The file must still be the one we opened, under its name and as long as it was."""
        ours = os.fstat(self._fd)
        try:
            named = os.stat(self.path)
        except OSError:
            named = None
        if named is None or (named.st_dev, named.st_ino) != (ours.st_dev, ours.st_ino):
            raise MigrationError(
                f"guest file {self.path}: it was removed or replaced by another file meanwhile: "
                "move the new one"
            )
        size = os.lseek(self._fd, 0, os.SEEK_END)
        if size != self.memory.size:
            raise MigrationError(
                f"guest file {self.path}: it had {self.memory.size} bytes at the start and has "
                f"{size} now: a guest must keep its size while it moves"
            )

    async def _stopped(self, process: Process) -> None:
        """Waits until every thread of the process has stopped."""
        loop = asyncio.get_running_loop()
        end = loop.time() + STOP_PATIENCE
        while not process.ended() and not stands_still(process.pid):
            if loop.time() > end:
                raise MigrationError(f"process {process.pid} does not stop")
            await asyncio.sleep(0.0005)

    async def resume(self) -> None:
        if not self._paused or self._given_up:
            return
        self._paused = False
        if self._check is not None:
            self._check.cancel()
            self._check = None
        async with self._asking:
            pass  # a pause that was cancelled may not have been answered yet
        self._let_go()
        if self.resume_cmd:
            await run_command(self.resume_cmd, "--resume-cmd", self._command_timeout)
        await self._tell_guard(b"r")
        self._watch()

    def state(self) -> bytes:
        """Mode and owner of the file; of a device they are none of a file's."""
        here = os.fstat(self._fd)
        return Rights.of(here).pack() if stat.S_ISREG(here.st_mode) else b""

    async def give_up(self) -> None:
        await self._tell_guard(b"g")
        writers = [(pid, handle.born) for pid, handle in self._writers.items()]
        moved.mark(self._fd, writers, commanded=bool(self.pause_cmd))
        self._given_up = True

    async def take_back(self) -> None:
        self._given_up = False
        moved.unmark(self._fd)
        await self._tell_guard(b"p")

    async def release(self) -> None:
        """The writer stays stopped: it would write to a copy that is no longer the guest."""

    def facts(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "path": os.path.abspath(self.path),
            # Who was stopped by somebody else is not for a later program to wake.
            "pids": [
                [pid, handle.born]
                for pid, handle in self._writers.items()
                if pid not in self._asleep
            ],
            "resume_cmd": self.resume_cmd,
        }

    @classmethod
    def reopen(cls, facts: dict[str, Any]) -> FileGuest:
        """A guest that an earlier program had given up: its writer is stopped, and has no guard."""
        writers = []
        for pid, born in facts["pids"]:
            with contextlib.suppress(ProcessLookupError):
                writers += [Process(pid, born)] if born else []
        command = facts["resume_cmd"]
        guest = cls(facts["path"], (), "true" if command else "", command, writers=writers)
        guest._paused = guest._given_up = True
        return guest

    async def close(self) -> None:
        await self._watch_no_more()
        if self._check is not None:
            self._check.cancel()
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_PATIENCE):
                    await self._guard.wait()
        if self._lookout is not None:
            await self._lookout.close()
        self._free()

    def _free(self) -> None:
        for handle in self._writers.values():
            handle.close()
        self.unhold()
        os.close(self._fd)


def _open(path: str) -> tuple[int, int]:
    """A descriptor of the guest's file, and its size. Raises UsageError."""
    try:
        with existing_file(path) as found:
            mode = os.fstat(found).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
                raise UsageError(
                    f"guest file {path}: it is neither a file nor a block device, but "
                    f"{kind_of(mode)}"
                )
            fd = reopened(found, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"guest file {path}: {error.strerror}") from None
    try:
        system = file_system_of(fd)
        if system in KERNELS_OWN and stat.S_ISREG(mode):
            raise UsageError(
                f"guest file {path}: it is on {system}: such a file is made as it is read, and "
                "cannot be moved"
            )
        size = os.lseek(fd, 0, os.SEEK_END)
        if size == 0:
            raise UsageError(f"guest file {path}: it is empty, there is nothing to move")
        check_size(size, f"guest file {path}")
    except OSError as error:
        os.close(fd)
        raise UsageError(f"guest file {path}: {error.strerror}") from None
    except UsageError:
        os.close(fd)
        raise
    return fd, size
