"""Memory of a Python program: any writable buffer, a NumPy array among them."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

from migrate._memory import set_marks
from migrate.errors import MigrationError, UsageError
from migrate.guests.guest import MemoryGuest, Place
from migrate.guests.memory_hold import MemoryHold
from migrate.memory import Memory, private_buffer
from migrate.parameters import PAGE_SIZES, Parameters
from migrate.tracking import DirtyTracker, MarkTracker
from proto.kernel import PageEncoder
from proto.messages import GuestInfo

PAUSE_PATIENCE = 10.0
WAITS = (
    "`with guest.writing()` waits where the guest is paused, and would stop the event loop of this "
    "thread: write `async with guest.writing()` here, or write in another thread"
)


class GuestMoved(Exception):  # noqa: N818 - news, not a fault
    """The buffer has moved away: whoever still wants to write must do so at the destination."""


class Gate:
    """Lets writers in and out, one pause at a time; closed for good once the guest has moved.

    A writer is a thread, or a task in a thread with an event loop. One that is inside already comes
    in once more without waiting.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: dict[object, int] = {}
        self._closed = False
        self._moved = False
        self._warned = False
        self._waiters: list[asyncio.Future[None]] = []

    def enter(self) -> None:
        """Waits in this thread. Raises GuestMoved; RuntimeError where that would stop its loop."""
        me = _me()
        with self._changed:
            if not isinstance(me, int) and not self._open_to(me):
                raise RuntimeError(WAITS)
            self._changed.wait_for(lambda: self._open_to(me))
            self._let_in(me)
            first = not isinstance(me, int) and not self._warned
            self._warned |= first
        if first:
            try:
                warnings.warn(WAITS, RuntimeWarning, stacklevel=3)
            except BaseException:
                self.leave()
                raise

    async def enter_soon(self) -> None:
        """In a task, whose loop goes on meanwhile. Raises GuestMoved."""
        me = _me()
        while True:
            with self._changed:
                if self._open_to(me):
                    self._let_in(me)
                    return
                waiter = self._waiter()
            await self._news(waiter)

    def leave(self) -> None:
        me = _me()
        with self._changed:
            self._inside[me] -= 1
            if not self._inside[me]:
                del self._inside[me]
                if self._closed:
                    self._tell()

    async def close(self, timeout: float) -> bool:
        """Keeps writers out and waits for those inside; False where they stay."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while True:
                    with self._changed:
                        self._closed = True
                        if not self._inside:
                            return True
                        waiter = self._waiter()
                    await self._news(waiter)
        return False

    def open(self) -> None:
        with self._changed:
            self._closed = False
            self._tell()

    def move(self) -> None:
        with self._changed:
            self._moved = True
            self._tell()

    # -- with the lock held

    def _open_to(self, me: object) -> bool:
        """Whether this writer need not wait; not whether it may write."""
        return me in self._inside or self._moved or not self._closed

    def _let_in(self, me: object) -> None:
        if self._moved and me not in self._inside:
            raise GuestMoved("the guest runs at the destination now")
        self._inside[me] = self._inside.get(me, 0) + 1

    def _tell(self) -> None:
        self._changed.notify_all()
        for waiter in self._waiters:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                waiter.get_loop().call_soon_threadsafe(_wake, waiter)

    def _waiter(self) -> asyncio.Future[None]:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        return waiter

    # -- without it

    async def _news(self, waiter: asyncio.Future[None]) -> None:
        try:
            await waiter
        finally:
            with self._changed:
                self._waiters.remove(waiter)


def _me() -> object:
    """The task that calls; else its loop, or the number of the thread, where none runs there."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return threading.get_ident()
    return asyncio.current_task(loop) or loop


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Writing:
    """What `BufferGuest.writing` returns: as long as one is inside, the guest is not stopped."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __enter__(self) -> None:
        self._gate.enter()

    def __exit__(self, *_: object) -> None:
        self._gate.leave()

    async def __aenter__(self) -> None:
        await self._gate.enter_soon()

    async def __aexit__(self, *_: object) -> None:
        self._gate.leave()


def bytes_of(buffer: Any, what: str) -> memoryview:
    """The bytes of a writable, contiguous buffer. Raises UsageError where it is none."""
    try:
        view = memoryview(buffer)
    except (TypeError, ValueError, BufferError) as error:
        raise UsageError(
            f"{what} is no buffer: {error} (of an array of such a type, give array.view('u1'))"
        ) from None
    if view.readonly:
        raise UsageError(f"{what} is read-only: give one that can be written")
    if not view.c_contiguous:
        raise UsageError(f"{what} is not contiguous in memory (C order): give a copy that is")
    if "O" in view.format:
        raise UsageError(f"{what} holds Python objects, which mean nothing in another process")
    try:
        return view.cast("B")
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UsageError(
            f"{what} cannot be taken as bytes: {error}: give array.view('u1')"
        ) from None


class BufferGuest(MemoryGuest):
    """Moves `buffer` (writable, contiguous) while this program's threads go on writing to it.

    Writers do `with guest.writing(): array[i] += 1` in threads, and `async with guest.writing()` in
    coroutines. In the last round they wait at the door for some milliseconds; after the hand-over
    the door raises GuestMoved. Programs with a way of their own to stop give `pause` and `resume`
    (coroutine functions) instead. `state` (bytes, at most 1 MiB) is asked for when all is still,
    and given to the destination.

    marks -- False: changes are found by scanning. True: the program calls `mark` after each write;
             it is trusted, and a write that it does not mark may be missing at the destination
    """

    kind = "buffer"

    def __init__(
        self,
        buffer: Any,
        *,
        pause: Callable[[], Awaitable[None]] | None = None,
        resume: Callable[[], Awaitable[None]] | None = None,
        state: Callable[[], bytes] = bytes,
        marks: bool = False,
        page_size: int = 4096,
    ) -> None:
        view = bytes_of(buffer, "the buffer")
        if not len(view):
            raise UsageError("the buffer is empty, there is nothing to move")
        if (pause is None) != (resume is None):
            raise UsageError("pause and resume go together")
        for name, given in (("pause", pause), ("resume", resume), ("state", state)):
            if given is not None and not callable(given):
                raise UsageError(f"{name}= is called when it is time: give a function")
        if page_size not in PAGE_SIZES:
            raise UsageError(f"a page of {page_size!r} bytes: it is one of {PAGE_SIZES}")
        self.marks = marks
        self.memory = Memory(len(view), view)
        self._page_size = page_size
        pages = -(-len(view) // page_size)
        self._marks = bytearray(-(-pages // 8) * 8 if marks else 0)
        self._gate = Gate()
        self._pause = pause
        self._resume = resume
        self._state = state
        self._hold: MemoryHold | None = None
        self.cautions: list[str] = []

    async def hold(self) -> None:
        if self._hold is None:
            assert self.memory.view is not None
            hold = MemoryHold(self.memory.view, "this guest")
            await hold.take()
            self._hold, self.cautions = hold, hold.cautions

    def confirm_hold(self) -> None:
        if self._hold is not None:
            self._hold.confirm()

    def unhold(self) -> None:
        """Memory of a guest that has moved stays held: it is an old copy."""
        if self._hold is not None and self.given_up:
            self._hold.keep()
        elif self._hold is not None:
            self._hold.close()
            self._hold = None

    async def close(self) -> None:
        """Let another guest be put into this memory; not while this one moves."""
        if self._hold is not None and not self.moving:
            self._hold.close()
            self._hold = None

    def writing(self) -> Writing:
        """A context in which this thread, or this task (`async with`), may write.

        Raises GuestMoved after the hand-over. A plain `with` where an event loop runs in this
        thread is warned of, and raises RuntimeError rather than stop that loop.
        """
        return Writing(self._gate)

    def check_parameters(self, parameters: Parameters) -> None:
        if self.marks and parameters.page_size != self._page_size:
            raise UsageError(
                f"this guest marks pages of {self._page_size} bytes, and is to be moved with pages "
                f"of {parameters.page_size}: give both the same page_size"
            )

    def mark(self, offset: int, length: int) -> None:
        """Says that `length` bytes from `offset` were written; call it after the write."""
        if length > 0:
            first = offset // self._page_size
            last = (offset + length - 1) // self._page_size
            set_marks(self._marks, first, last - first + 1)

    def track(self, encoder: PageEncoder) -> DirtyTracker:
        if not self.marks:
            return super().track(encoder)
        return MarkTracker(memoryview(self._marks), encoder.pages)

    async def pause(self) -> None:
        if self._pause is not None:
            await _called(self._pause)
        elif not await self._gate.close(PAUSE_PATIENCE):
            raise MigrationError(
                f"a writer stayed inside guest.writing() for {PAUSE_PATIENCE:g} s: keep it short"
            )

    async def resume(self) -> None:
        if self._resume is None:
            self._gate.open()
            return
        try:
            await _called(self._resume)
        except Exception as error:
            raise MigrationError(
                f"the guest is still here, and may stand still: resume= raised "
                f"{type(error).__name__}: {error}"
            ) from error

    def state(self) -> bytes:
        state = self._state()
        if not isinstance(state, bytes | bytearray | memoryview):
            raise UsageError(f"state= returned {type(state).__name__}: it has to be bytes")
        return bytes(state)

    async def give_up(self) -> None:
        """Nothing outlives this process that could run the guest."""

    async def release(self) -> None:
        self._gate.move()


async def _called(function: Callable[[], Awaitable[None]]) -> None:
    """A user's, who may have given a plain one."""
    done = function()
    if inspect.isawaitable(done):
        await done


class BufferPlace(Place):
    """Anonymous memory of this program, or a buffer it provides (`into`).

    A buffer of whole pages is written as pages come; another one is filled in the pause.
    """

    def __init__(self, info: GuestInfo, into: Any = None) -> None:
        padded = info.pages * info.page_size
        self.state = b""
        self.size = info.size
        self._into: memoryview | None = None
        if into is not None:
            view = bytes_of(into, "into=")
            if len(view) < info.size:
                raise UsageError(f"the guest has {info.size} bytes, the buffer for it {len(view)}")
            self._into = view[: info.size]
        if self._into is not None and info.size == padded:
            self.memory, self.zeroed = self._into, False
        else:
            try:
                self.memory = private_buffer(padded)
            except (OSError, ValueError, OverflowError) as error:
                raise UsageError(f"no memory for a guest of {info.size} bytes: {error}") from None
        self.reads = Memory(info.size, self.memory)
        self._hold: MemoryHold | None = None

    async def ready(self) -> None:
        if self._into is not None and self._hold is None:
            hold = MemoryHold(self._into, "the buffer for the guest", receives=True)
            await hold.take()
            self._hold = hold

    @property
    def received(self) -> memoryview:
        """The guest's bytes, exactly `size` of them."""
        return self.memory[: self.size] if self._into is None else self._into

    async def start(self, state: bytes) -> str:
        self.state = state
        if self._into is not None and self._into is not self.memory:
            self._into[:] = self.memory[: self.size]
        # The guest is in its memory now: nothing below may say that it was not started.
        with contextlib.suppress(OSError):
            if self._hold is not None:
                self._hold.replace()
            await self.discard()
        return f"{self.size} bytes are here"

    async def discard(self) -> None:
        if self._hold is not None:
            self._hold.close()
            self._hold = None
