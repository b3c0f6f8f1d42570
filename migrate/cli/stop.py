"""What asks a program to stop, and what stopping means at each moment.

    SIGHUP, SIGINT, SIGTERM --+
    `quit`                  --+--> StopRequests.request --> cancel(), of the current phase
    `migrate_cancel`        -----> StopRequests.cancel  -->

Each phase of a program says what a request does (`handle_with`): it cancels the migration, ends a
wait, or comes too late, when the guest is handed over. Only the first request in a phase acts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from migrate.cli.exit_codes import BY_SIGNAL
from migrate.errors import CancelledByPeer
from migrate.output import say
from migrate.runtime.processes import Process

logger = logging.getLogger(__name__)


def ending_signals() -> set[signal.Signals]:
    """Return the signals that end a program: SIGHUP too, unless nohup(1) has started it."""
    hangup = set() if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else {signal.SIGHUP}
    return {signal.SIGINT, signal.SIGTERM} | hangup


def this_task() -> asyncio.Task[Any]:
    """Return the task that calls this."""
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("no task runs")
    return task


def absorb_cancellation() -> None:
    """Take note that the cancellation which has just been caught is dealt with.

    Without this, asyncio.timeout and TaskGroup would take it for one of their own later.
    """
    this_task().uncancel()


class StopRequests:
    """Requests to stop one program."""

    def __init__(self) -> None:
        # The first signal that was obeyed; SIGTERM for `quit`.
        self.signal = 0
        # A request came too late to cancel anything: the program ends as soon as it can.
        self.late = False
        self._cancelled = False
        self._cancel: Callable[[], str] = str
        self._again = ""

    def handle_with(self, cancel: Callable[[], str], again: str = "already ending") -> None:
        """Call `cancel` for the first request from now on.

        cancel -- returns "", or a sentence that says why it is too late to cancel
        again  -- the sentence for further signals, while what `cancel` began goes on
        """
        self._cancel, self._again = cancel, again
        self._cancelled = False
        loop = asyncio.get_running_loop()
        for number in ending_signals():
            loop.add_signal_handler(number, self.request, number)

    def cancel_this_task(self) -> None:
        """Have the first request from now on cancel the task that calls this."""
        task = this_task()

        def cancel() -> str:
            task.cancel()
            return ""

        self.handle_with(cancel)

    @property
    def exit_code(self) -> int:
        """The exit code of a program that was cancelled: by a signal or by `migrate_cancel`."""
        return BY_SIGNAL + self.signal if self.signal else CancelledByPeer.exit_code

    def cancel(self) -> str:
        """Cancel what runs, and let the program run on; return why it is too late, or ""."""
        if self._cancelled:
            return ""
        refusal = self._cancel()
        logger.info("asked to cancel: %s", refusal or "cancelling")
        self._cancelled = not refusal
        return refusal

    def request(self, number: int = signal.SIGTERM) -> None:
        """Cancel what runs, and end the program; print a sentence if it is too late."""
        if self.signal:
            say(self._again)
            return
        refusal = self.cancel()
        if refusal:
            self.late = True
            say(refusal)
        else:
            self.signal = number

    def _event(self) -> asyncio.Event:
        """Return an event that the next request sets; set already if there was one."""
        requested = asyncio.Event()

        def cancel() -> str:
            requested.set()
            return ""

        if self.signal or self.late:
            requested.set()
        self.handle_with(cancel)
        return requested

    async def wait_for(self, done: Awaitable[object], timeout: float) -> None:
        """Wait until `done` is done, a request comes, or `timeout` seconds are over."""
        requested = self._event()
        waiting = [asyncio.ensure_future(done), asyncio.ensure_future(requested.wait())]
        if not requested.is_set():
            await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for one in waiting:
            one.cancel()

    async def stay(self, pid: int, start_time: str) -> None:
        """Wait for a request and end process `pid` then; or wait until that process ends.

        pid        -- of the demo guest that runs here; 0 if there is none
        start_time -- of that process, so that a later one with the same number is left alone
        """
        requested = self._event()
        if not pid:
            await requested.wait()
            return
        try:
            guest = Process(pid, start_time)
        except ProcessLookupError:
            return  # it has ended already
        ends = asyncio.ensure_future(guest.wait())
        ends.add_done_callback(lambda _ends: requested.set())
        try:
            await requested.wait()
            with contextlib.suppress(ProcessLookupError):
                guest.signal(signal.SIGTERM)
        finally:  # cancelled, too: by a command that moves the guest
            ends.cancel()
            await asyncio.wait({ends})
            guest.close()
