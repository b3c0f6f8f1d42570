"""A memory file or block device that other processes map and write."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any

from migrate.errors import MigrationError, UsageError
from migrate.files.file_lock import FileLock
from migrate.files.lock import Lock
from migrate.guests import companions, moved_mark
from migrate.guests.command import COMMAND_PATIENCE, run_command
from migrate.guests.device_lock import DeviceLock
from migrate.guests.guest import MemoryGuest, no_limit
from migrate.guests.opened_file import OpenedFile
from migrate.guests.recorded_file import RecordedFile
from migrate.guests.rights import Rights
from migrate.guests.writer_control import WriterControl, wait_stopping
from migrate.guests.writer_search import Writer, named
from migrate.guests.writer_survey import Survey, runs, skipped, stoppable, survey, taken, unnamed
from migrate.guests.writer_watch import WriterWatch
from migrate.memory.dirty import DirtyTracker, Look, Method
from migrate.memory.memory import Memory
from migrate.output import printable
from migrate.runtime.processes import STOPPED, Process, exists, owners, user_ids
from migrate.runtime.processes import state as process_state
from migrate.tracking.record import Refused
from migrate.tracking.tracker import RecordTracker, Tracking, is_wanted
from proto.codec.kernel import PageEncoder

# Characters of the file's name that the destination is told.
MAX_DESCRIPTION = 200
# Between two looks for writers while the guest runs: at least this many seconds, and this many
# times as long as a look takes.
LOOK_SECONDS = 1.0
FIRST_LOOK_SECONDS = 3.0
LOOK_FACTOR = 10
# How often writers that appear while the others are being stopped are looked for again.
MAX_LOOKS = 20
TOO_MANY_WRITERS = "processes that write the guest appear faster than they can be stopped"

logger = logging.getLogger(__name__)


class State(Enum):
    """What a file guest does."""

    RUNNING = auto()
    PAUSED = auto()
    # Paused, and handed over: nothing here may resume it.
    RELINQUISHED = auto()


class FileGuest(MemoryGuest):
    """`file:PATH`. Its writers are stopped in the pause.

    Either all of them are (`auto`), or the processes `pids` are (SIGSTOP), or a command of the user
    stops them. If nothing stops writers, there must be none; the digest at the end shows whether
    anything was written during the last round.

    After `survey`, no process that was not stopped may be able to write the guest in the pause.

    pids            -- processes that the user names
    command_timeout -- seconds that a command may take
    tracking        -- how written pages are found
    writers         -- further processes, known before; they are closed with the guest
    """

    kind = "file"

    def __init__(
        self, path: str, pids: Sequence[int] = (), pause_cmd: str = "", resume_cmd: str = "",
        command_timeout: float = COMMAND_PATIENCE, *, auto: bool = False,
        tracking: Tracking = Tracking.AUTO, writers: Sequence[Process] = (),
    ) -> None:  # fmt: skip
        """Raises UsageError."""
        if bool(pause_cmd) != bool(resume_cmd):
            raise UsageError(
                "--pause-cmd and --resume-cmd go together: a guest that is paused must be able "
                "to go on if the migration fails"
            )
        self._file = OpenedFile(path)
        self._fd = self._file.fd
        self.path = path
        self.description = printable(os.path.basename(path), MAX_DESCRIPTION)
        self.memory = Memory(self._file.size, fd=self._fd, align=self._file.align)
        self.cautions: list[str] = []
        self._lock: Lock | None = None
        self.pause_cmd = pause_cmd
        self.resume_cmd = resume_cmd
        self._command_timeout = command_timeout
        # For the user before the migration: what must be known, and what is good to know.
        self.warnings: list[str] = []
        self.notices: list[str] = []
        self.stoppable = bool(pids or writers or pause_cmd or auto)
        self.can_throttle = bool(pids or writers or auto)
        self._auto = auto
        self.tracking = tracking
        self._state = State.RUNNING
        named_writers = [stoppable(pid, f"--pid {pid}", "") for pid in pids]
        self._control = WriterControl([*writers, *named_writers])
        # The writers that ran when the survey looked.
        self._ran: list[int] = []
        # What the survey found. If there was one, `make_ready` starts a watch for writers.
        self._surveyed: Survey | None = None
        self.watch: WriterWatch | None = None
        self._watching: asyncio.Task[None] | None = None
        # The look at all writers that `check_writers` waits for; it runs beside the last round.
        self.last_look: asyncio.Future[list[Writer]] | None = None
        # The writers that the user was warned of.
        self._warned_of: set[int] = set()
        # Processes that no look had the time to look at, as far as the user knows.
        self._skipped = 0

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that are stopped in the pause, as far as they are known."""
        return self._control.pids

    @property
    def watchdog_pid(self) -> int:
        """The process of the watchdog; 0 if there is none."""
        return self._control.watchdog_pid

    def track(
        self, encoder: PageEncoder, downtime_limit: Callable[[], float] = no_limit
    ) -> DirtyTracker:
        return RecordTracker(
            self.memory, encoder,
            lambda: self._recorded_file().begin(self.size, encoder.page_size),
            self._record_wanted(downtime_limit), lambda: self._state is State.RUNNING,
        )  # fmt: skip

    def foresee_look(self, scan_seconds: float, downtime_limit: float) -> Look:
        if not self._record_wanted(lambda: downtime_limit)(scan_seconds):
            return Look(Method.COMPARE, scan_seconds)
        try:
            return Look(Method.KERNEL, self._recorded_file().rehearse(self.size))
        except Refused as refused:
            return Look(Method.COMPARE, scan_seconds, str(refused))

    def _record_wanted(self, downtime_limit: Callable[[], float]) -> Callable[[float], bool]:
        """See `is_wanted`. Without a pause it does not matter how long a comparison takes."""
        paused = self.stoppable or self.tracking is not Tracking.AUTO
        return is_wanted(self.tracking if paused else Tracking.COMPARE, downtime_limit)

    def _recorded_file(self) -> RecordedFile:
        """Return the file as the kernel's record sees it. Raises Refused."""
        if self._file.is_device:
            raise Refused("block devices have none")
        if not self.stoppable:
            raise Refused("its writers are not known, since nothing stops them: name them by --pid")
        return RecordedFile(self._fd, self._known_writers, lambda: self._skipped)

    def _known_writers(self) -> list[tuple[int, str]]:
        """Return number and start time of the processes that can write it, as far as is known."""
        found = dict(self._control.start_times())
        if self.watch is not None:
            found |= {writer.pid: writer.start_time for writer in self.watch.found}
        return list(found.items())

    # -- the file

    async def lock(self) -> None:
        if self._lock is not None:
            return
        lock: Lock
        if self._file.is_device:
            lock = device = DeviceLock(self._fd, f"guest {self.path}", self.pids)
            await device.acquire()
            points = [mount.point for mount in device.mounts if not mount.read_only]
            if points and not self.pause_cmd:
                lock.cautions.append(
                    f"a file system on {self.path} is mounted at {', '.join(points)} and writes to "
                    f"it: freeze it for the last round (--pause-cmd 'fsfreeze -f {points[0]}' "
                    f"--resume-cmd 'fsfreeze -u {points[0]}')"
                )
        else:
            lock = FileLock(self._fd, f"guest file {self.path}")
            await lock.acquire()
        self._lock, self.cautions = lock, lock.cautions

    def confirm_lock(self) -> None:
        if self._lock is not None:
            self._lock.confirm()

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def refuse_if_moved(self) -> None:
        what = f"guest file {self.path}"
        moved_mark.refuse_if_moved(self._fd, what)
        stopped = [pid for pid in self._ran if process_state(pid) in STOPPED]
        if stopped:
            raise UsageError(
                f"{what}: its writer, process {stopped[0]}, ran at the start and was stopped "
                "since, not by us: another program may have moved the guest: wake the writer "
                "(kill -CONT) if that is not so"
            )

    def check(self) -> None:
        self._file.check()

    def state(self) -> bytes:
        """Return mode and owner of the file; nothing for a device, whose mode is not a file's."""
        return b"" if self._file.is_device else Rights.of(os.fstat(self._fd)).pack()

    # -- its writers, while it runs

    def survey(self) -> None:
        """Find the writers of the guest before anything is begun; fill `warnings` and `notices`.

        With `auto` all of them are stopped in the pause from here on. Raises UsageError if
        something would go on writing.
        """
        try:
            found = survey(
                self._fd, self.path, self._control.handles, stops=self.can_throttle,
                auto=self._auto, commanded=bool(self.pause_cmd),
            )  # fmt: skip
        except UsageError:
            self._free()
            raise
        self._control.add_before_start(found.taken)
        self._ran = [pid for pid in self.pids if process_state(pid) not in STOPPED]
        self.warnings, self.notices = found.warnings, found.notices
        self._skipped = found.skipped
        self._surveyed = found

    async def make_ready(self) -> None:
        """Start the watchdog, before anything is stopped, and the watch for new writers."""
        if self.stoppable:
            await self._control.start(self.resume_cmd)
        if self._surveyed is not None:
            self.watch = await WriterWatch.start(
                self._fd, self._surveyed.seconds, self._surveyed.new_seconds
            )
            # Before anything is stopped: the first look knows no process yet, and takes longest.
            # The destination waits meanwhile, so a look that takes too long is done later.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_LOOK_SECONDS):
                    await self.watch.search()
        self._start_watching()

    def _start_watching(self) -> None:
        if self.watch is not None and self._watching is None:
            self._watching = asyncio.create_task(self._keep_watching(self.watch))

    async def _keep_watching(self, watch: WriterWatch) -> None:
        """Look for writers again and again while the guest runs.

        Fresh knowledge of the processes makes the look in the pause short. With `auto`, new writers
        are throttled and stopped like the others.
        """
        for _ in range(2):  # the first look knows nothing yet, and takes longest
            await watch.search()
        while True:
            await asyncio.sleep(max(LOOK_SECONDS, LOOK_FACTOR * watch.seconds))
            for writer in await watch.search():
                if self._auto and not self._control.knows(writer):
                    # The pause reports a writer that cannot be stopped.
                    with contextlib.suppress(MigrationError):
                        await self._add(writer)

    async def stop_watching(self) -> None:
        """End the looks for new writers."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
            self._watching = None

    async def _add(self, writer: Writer) -> None:
        """Stop a writer in the pause from here on. Raises MigrationError if that is impossible."""
        handle: Process | None
        try:
            if self._control.knows(writer):
                handle = stoppable(writer.pid, f"process {writer}", writer.start_time)
            else:
                handle = taken(self._fd, writer)
        except UsageError as error:
            if not exists(writer.pid):
                return
            raise MigrationError(str(error)) from None
        if handle is not None:
            await self._control.add(handle)
            self.can_throttle = True

    async def throttle(self, percent: int) -> None:
        # A pause has ended the duty cycle. The writers are stopped, perhaps for good.
        if self._state is State.RUNNING:
            any_left = await self._control.throttle(percent)
            if percent and not any_left:
                self.can_throttle = False

    # -- the pause

    async def pause(self) -> None:
        before, self._state = self._state, State.PAUSED  # also if cancelled: the watchdog is told
        await self.stop_watching()
        try:
            await self._control.begin_pause()
        except MigrationError:
            self._state = before
            raise
        await self._control.stop(self.pids)
        if self.pause_cmd:
            await run_command(self.pause_cmd, "--pause-cmd", self._command_timeout)
        if self.watch is not None:
            await self._stop_new_writers(self.watch)
            self.last_look = asyncio.ensure_future(self.watch.search())
            self.last_look.add_done_callback(lambda look: look.cancelled() or look.exception())
            if self.pause_cmd:
                for text in companions.warnings(self._fd, self.path, ()):
                    self.warn(text)
        self.check()
        logger.debug("%s is paused, its writers %s are stopped", self.path, self.pids)

    async def _stop_new_writers(self, watch: WriterWatch) -> None:
        """Stop the writers that have appeared, until there are no more. Raises MigrationError."""
        for _ in range(MAX_LOOKS):
            if not await self._stop_running(await watch.search_new(self.pids)):
                return
        raise MigrationError(TOO_MANY_WRITERS)

    async def _stop_running(self, found: list[Writer]) -> bool:
        """Stop the writers that run; return whether there were any.

        Some are new, and some were woken in the pause. Raises MigrationError if we may not stop
        them. A --pause-cmd may stop writes in other ways: a lock in the program, a frozen file
        system. A process that merely has the guest open then looks the same as one that writes, so
        it is not an error but a warning.
        """
        running = [writer for writer in found if runs(writer)]
        new = [writer for writer in running if not self._control.knows(writer)]
        if self._auto or not new:
            for writer in running:
                # The watchdog must know of one that was woken: it is not asleep any more.
                await self._add(writer)
            await self._control.stop([one.pid for one in running if one.pid in self.pids])
            return bool(running)
        if self.pause_cmd:
            # Another user's process may be half stopped for as long as that user likes.
            trusted = owners(os.fstat(self._fd))
            waited = [one.pid for one in new if user_ids(one.pid) <= trusted]
            await asyncio.gather(*map(wait_stopping, waited))
            self._warn_of([one for one in new if runs(one) and one.pid not in self._warned_of])
            return False
        sentence = unnamed(new, others_named=bool(self.pids))
        raise MigrationError(f"guest file {self.path}: {sentence}")

    def _warn_of(self, writers: list[Writer]) -> None:
        self._warned_of |= {writer.pid for writer in writers}
        if writers:
            self.warn(
                "still running after --pause-cmd, and able to write the guest, so that what is "
                f"written now is lost: {named(writers)}"
            )

    def _warn_of_skipped(self, count: int) -> None:
        if count > self._skipped:
            self._skipped = count
            self.warn(
                f"{skipped(count)}: what one of them writes to the guest after the pause is lost"
            )

    async def check_writers(self) -> bool:
        if self.last_look is None or self.watch is None:
            return False
        found, stopped = await self.last_look, False
        for _ in range(MAX_LOOKS):
            if not await self._stop_running(found):
                self._warn_of_skipped(self.watch.skipped)
                return stopped
            stopped, found = True, await self.watch.search()
        raise MigrationError(TOO_MANY_WRITERS)

    @property
    def stop_seconds(self) -> float:  # type: ignore[override]
        measured = self.watch or self._surveyed
        return measured.new_seconds if measured else 0.0

    @property
    def check_seconds(self) -> float:  # type: ignore[override]
        measured = self.watch or self._surveyed
        return measured.seconds if measured else 0.0

    async def resume(self) -> None:
        if self._state is not State.PAUSED:
            return
        self._state = State.RUNNING
        if self.last_look is not None:
            self.last_look.cancel()
            self.last_look = None
        await self._control.resume()
        if self.resume_cmd:
            await run_command(self.resume_cmd, "--resume-cmd", self._command_timeout)
        await self._control.end_pause()
        self._start_watching()

    # -- the hand-over

    async def relinquish(self) -> None:
        await self._control.relinquish()
        writers = self._control.start_times()
        moved_mark.mark(self._fd, writers, commanded=bool(self.pause_cmd))
        self._state = State.RELINQUISHED

    async def reclaim(self) -> None:
        self._state = State.PAUSED
        moved_mark.unmark(self._fd)
        await self._control.begin_pause()

    async def release(self) -> None:
        """Leave the writers stopped: they would write to a copy that is no longer the guest."""

    def facts(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "path": os.path.abspath(self.path),
            "pids": [list(writer) for writer in self._control.to_resume()],
            "resume_cmd": self.resume_cmd,
        }

    @classmethod
    def reopen(cls, facts: dict[str, Any]) -> FileGuest:
        """Return a guest that an earlier program relinquished.

        Its writers are stopped, and there is no watchdog. Raises UsageError.
        """
        writers = []
        for pid, start_time in facts["pids"]:
            with contextlib.suppress(ProcessLookupError):
                writers += [Process(pid, start_time)] if start_time else []
        command = facts["resume_cmd"]
        guest = cls(facts["path"], (), "true" if command else "", command, writers=writers)
        guest._state = State.RELINQUISHED
        return guest

    async def close(self) -> None:
        await self.stop_watching()
        if self.last_look is not None:
            self.last_look.cancel()
        await self._control.end()
        if self.watch is not None:
            await self.watch.close()
        self._free()

    def _free(self) -> None:
        self._control.close()
        self.unlock()
        self._file.close()
