"""Stop, throttle and resume the processes that write a file guest.

A watchdog, a helper process, knows every writer before it is stopped. It runs the duty cycle of the
throttle, and resumes the writers if this program dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Iterable

from migrate.errors import MigrationError
from migrate.guests.watchdog import ADDED, Found
from migrate.guests.writer_search import Writer
from migrate.runtime.helper_process import HelperProcess
from migrate.runtime.processes import STOPPED, Process, is_stopped, is_stopping
from migrate.runtime.processes import state as process_state

# Seconds for the watchdog to answer, and for a process to stop.
STOP_PATIENCE = 5.0
STOP_POLL_SECONDS = 0.0005
STOP_LOOKS = 2
# For a process that something else stops.
STOPPING_PATIENCE = 1.0
logger = logging.getLogger(__name__)


class WriterControl:
    """The processes that are stopped in the pause. Owns the handles on them."""

    def __init__(self, writers: Iterable[Process] = ()) -> None:
        self._writers = {writer.pid: writer for writer in writers}
        # The writers that another program has stopped, and alone may resume.
        self._stopped_before: set[int] = set()
        self._watchdog: HelperProcess | None = None
        # One request at a time: the next answer must belong to the next request.
        self._asking = asyncio.Lock()

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(self._writers)

    @property
    def watchdog_pid(self) -> int:
        """The process of the watchdog; 0 if there is none."""
        return self._watchdog.pid if self._watchdog is not None else 0

    @property
    def handles(self) -> dict[int, Process]:
        """The writers by number."""
        return self._writers

    def start_times(self) -> list[tuple[int, str]]:
        """Return number and start time of each writer."""
        return [(pid, handle.start_time) for pid, handle in self._writers.items()]

    def to_resume(self) -> list[tuple[int, str]]:
        """Return the writers that a later program may resume: those that we have stopped."""
        return [one for one in self.start_times() if one[0] not in self._stopped_before]

    def knows(self, writer: Writer) -> bool:
        """Return whether this very process is stopped in the pause."""
        handle = self._writers.get(writer.pid)
        return handle is not None and handle.start_time == writer.start_time

    def add_before_start(self, writers: dict[int, Process]) -> None:
        """Add writers before there is a watchdog that must know them."""
        self._writers |= writers

    async def start(self, resume_command: str) -> None:
        """Start the watchdog. Must come before anything is stopped.

        resume_command -- run by the watchdog if this program dies in the pause; "": none
        """
        self._stopped_before = {pid for pid in self.pids if process_state(pid) in STOPPED}
        command = ["--resume-cmd", resume_command] if resume_command else []
        writers = [f"{pid}:{start_time}" for pid, start_time in self.start_times()]
        self._watchdog = await HelperProcess.start(
            "migrate.guests.watchdog", *command, *writers, patience=STOP_PATIENCE,
            died="the watchdog process of the guest has died: nothing was stopped",
        )  # fmt: skip
        logger.debug("watchdog %d knows the writers %s", self.watchdog_pid, self.pids)

    async def add(self, writer: Process) -> None:
        """Add a writer, and tell the watchdog before it can be stopped. Raises MigrationError."""
        logger.debug("one more writer: process %d", writer.pid)
        await asyncio.shield(self._ask_about(writer))

    async def begin_pause(self) -> None:
        """Have the watchdog end the throttle, and resume the writers if this program dies."""
        await self._tell(b"p")

    async def stop(self, pids: Iterable[int]) -> None:
        """Stop writers that the watchdog knows; return when every thread of them has stopped.

        Raises MigrationError if one cannot be stopped.
        """
        handles = [self._writers[pid] for pid in pids]
        for handle in handles:
            try:
                handle.signal(signal.SIGSTOP)
            except ProcessLookupError:
                continue  # it has ended: it writes no more
            except OSError as error:
                raise MigrationError(
                    f"cannot stop process {handle.pid}: {error.strerror}"
                ) from None
        for handle in handles:
            await _wait_stopped(handle)

    async def resume(self) -> None:
        """Let the writers run, but for those that another program has stopped."""
        async with self._asking:
            pass  # the request of a cancelled pause may not have been answered yet
        self._continue()

    async def end_pause(self) -> None:
        """Tell the watchdog that the writers run again."""
        await self._tell(b"r")

    async def relinquish(self) -> None:
        """Have the watchdog never resume the writers, whatever dies."""
        await self._tell(b"g")

    async def throttle(self, percent: int) -> bool:
        """Take `percent` (0 to 99) of their time from the writers, by SIGSTOP and SIGCONT.

        Returns whether a writer is left to throttle. Raises MigrationError if one may not be
        stopped; then none is throttled.
        """
        try:
            found = await self._tell(b"t" + bytes([percent]))
            forbidden = [pid for pid, what in found.items() if what is Found.FORBIDDEN]
            if percent and forbidden:
                await self._tell(b"t\0")
                raise MigrationError(
                    f"process {forbidden[0]} cannot be slowed: it may not be stopped"
                )
        except MigrationError:
            self._continue()  # the watchdog may have died while the writers were stopped
            raise
        return not set(found.values()) <= {Found.ENDED}

    async def end(self) -> None:
        """End the watchdog, which resumes the writers if they are paused and not relinquished."""
        if self._watchdog is not None:
            await self._watchdog.close()
            self._watchdog = None

    def close(self) -> None:
        """Close the handles on the writers."""
        for handle in self._writers.values():
            handle.close()

    def _continue(self) -> None:
        for pid, handle in self._writers.items():
            if pid not in self._stopped_before:
                with contextlib.suppress(OSError):
                    handle.signal(signal.SIGCONT)

    async def _tell(self, request: bytes) -> dict[int, Found]:
        """Send the watchdog a request. Return what it found of each writer, for p and t.

        A cancellation waits for the answer: it must not be taken for that of the next request.
        """
        return await asyncio.shield(self._ask(request))

    async def _ask(self, request: bytes) -> dict[int, Found]:
        async with self._asking:
            pids = self.pids if request[:1] in (b"p", b"t") else ()
            found = await self._found(request, pids)
            if request == b"p":
                self._stopped_before = _stopped_in(found)
            return found

    async def _ask_about(self, new: Process) -> None:
        async with self._asking:
            if (old := self._writers.get(new.pid)) is not None:
                old.close()
            self._writers[new.pid] = new
            added = b"a" + ADDED.pack(new.pid, int(new.start_time or 0))
            found = await self._found(added, (new.pid,))
            self._stopped_before = self._stopped_before - {new.pid} | _stopped_in(found)

    async def _found(self, request: bytes, pids: tuple[int, ...]) -> dict[int, Found]:
        if self._watchdog is None:
            return dict.fromkeys(pids, Found.RUNS)
        answer = await self._watchdog.ask(request, len(pids))
        return {pid: Found(byte) for pid, byte in zip(pids, answer, strict=True)}


def _stopped_in(found: dict[int, Found]) -> set[int]:
    return {pid for pid, what in found.items() if what is Found.STOPPED_BEFORE}


async def _wait_stopped(process: Process) -> None:
    """Wait until every thread of a process has stopped. Raises MigrationError."""
    loop = asyncio.get_running_loop()
    end = loop.time() + STOP_PATIENCE
    while not process.ended() and not is_stopped(process.pid):
        if loop.time() > end:
            raise MigrationError(f"process {process.pid} does not stop")
        await asyncio.sleep(STOP_POLL_SECONDS)


async def wait_stopping(pid: int) -> None:
    """Wait for a process that is about to stop, for STOPPING_PATIENCE at most.

    Between the end of a pending signal and the stop, neither shows: so two looks must agree.
    """
    loop = asyncio.get_running_loop()
    end, looks = loop.time() + STOPPING_PATIENCE, 0
    with contextlib.suppress(MigrationError):  # it cannot be seen
        while looks < STOP_LOOKS and loop.time() < end and not is_stopped(pid):
            looks = 0 if is_stopping(pid) else looks + 1
            await asyncio.sleep(STOP_POLL_SECONDS)
