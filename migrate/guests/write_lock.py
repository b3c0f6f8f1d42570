"""The lock that writers of a buffer share, and a pause excludes them with.

A writer is a thread, or a task in a thread with an event loop: a task must not block that loop.
The pause is a coroutine, and waits for writers of both kinds.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import warnings
from enum import Enum, auto

BLOCKS_LOOP = (
    "`with guest.writing()` waits while the guest is paused, and would stop the event loop of this "
    "thread: write `async with guest.writing()` here, or write in another thread"
)


class GuestMoved(Exception):  # noqa: N818 - news, not a fault
    """The buffer has moved away: further writes must be made at the destination."""


class _State(Enum):
    OPEN = auto()
    # A pause waits for the writers inside, or has begun.
    CLOSED = auto()
    # The guest has moved. Writers that wait, or come, get GuestMoved.
    MOVED = auto()


class WriteLock:
    """A lock that any number of writers share. A writer that holds it may take it once more."""

    def __init__(self) -> None:
        # Guards the rest, and is notified at each change.
        self._changed = threading.Condition()
        self._state = _State.OPEN
        # How often each writer holds the lock.
        self._holders: dict[object, int] = {}
        self._warned = False
        # Tasks that wait for a change, each in its own loop.
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def open(self) -> bool:
        """Whether writers are admitted."""
        return self._state is _State.OPEN

    @property
    def moved(self) -> bool:
        """Whether the guest has moved."""
        return self._state is _State.MOVED

    def acquire(self) -> None:
        """Wait in this thread until writers are admitted.

        Raises GuestMoved, and RuntimeError if the wait would stop the thread's event loop.
        """
        me = _current_writer()
        in_loop = not isinstance(me, int)
        with self._changed:
            if in_loop and not self._need_not_wait(me):
                raise RuntimeError(BLOCKS_LOOP)
            self._changed.wait_for(lambda: self._need_not_wait(me))
            self._admit(me)
            warn = in_loop and not self._warned
            self._warned |= warn
        if warn:
            try:
                warnings.warn(BLOCKS_LOOP, RuntimeWarning, stacklevel=3)
            except BaseException:  # warnings are errors in this program
                self.release()
                raise

    async def acquire_async(self) -> None:
        """Wait in this task until writers are admitted. Raises GuestMoved."""
        me = _current_writer()
        while True:
            with self._changed:
                if self._need_not_wait(me):
                    self._admit(me)
                    return
                waiter = self._add_waiter()
            await self._wait(waiter)

    def release(self) -> None:
        """Undo one `acquire` of this writer."""
        me = _current_writer()
        with self._changed:
            self._holders[me] -= 1
            if not self._holders[me]:
                del self._holders[me]
                if not self.open:
                    self._notify()

    async def exclude(self, timeout: float) -> bool:
        """Admit no more writers, and wait until those inside have left.

        timeout -- seconds to wait. Returns False if a writer is still inside then
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while True:
                    with self._changed:
                        if self.open:
                            self._state = _State.CLOSED
                        if not self._holders:
                            return True
                        waiter = self._add_waiter()
                    await self._wait(waiter)
        return False

    def admit(self) -> None:
        """Admit writers again."""
        with self._changed:
            if not self.moved:
                self._state = _State.OPEN
            self._notify()

    def end(self) -> None:
        """Raise GuestMoved in every writer that waits or comes: the guest has moved."""
        with self._changed:
            self._state = _State.MOVED
            self._notify()

    # -- with `_changed` held

    def _need_not_wait(self, writer: object) -> bool:
        return writer in self._holders or self._state is not _State.CLOSED

    def _admit(self, writer: object) -> None:
        if self.moved and writer not in self._holders:
            raise GuestMoved("the guest runs at the destination now")
        self._holders[writer] = self._holders.get(writer, 0) + 1

    def _notify(self) -> None:
        self._changed.notify_all()
        for waiter in self._waiters:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                waiter.get_loop().call_soon_threadsafe(_wake, waiter)

    def _add_waiter(self) -> asyncio.Future[None]:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        return waiter

    # -- without it

    async def _wait(self, waiter: asyncio.Future[None]) -> None:
        try:
            await waiter
        finally:
            with self._changed:
                self._waiters.remove(waiter)


def _current_writer() -> object:
    """Return the current task; else the running loop, or the thread's number if there is none."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return threading.get_ident()
    return asyncio.current_task(loop) or loop


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Writing:
    """The context of a writer: the guest is not paused while one is inside."""

    def __init__(self, lock: WriteLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    async def __aenter__(self) -> None:
        await self._lock.acquire_async()

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()
