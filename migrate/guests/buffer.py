"""Memory of a Python program as a guest: any writable buffer, for example a NumPy array."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from migrate.errors import MigrationError, UsageError
from migrate.guests.buffer_lock import BufferLock
from migrate.guests.guest import MemoryGuest, no_limit
from migrate.guests.place import Place
from migrate.guests.write_lock import WriteLock, Writing
from migrate.memory._memory import set_marks
from migrate.memory.dirty import DirtyTracker, MarkTracker
from migrate.memory.memory import Memory, private_buffer
from migrate.policy.parameters import PAGE_SIZES, Parameters
from migrate.tracking.own_record import OwnRecord
from migrate.tracking.tracker import RecordTracker, Tracking, is_wanted
from proto.codec.kernel import PageEncoder
from proto.wire.messages import GuestInfo

# Seconds to wait for writers inside `writing`.
PAUSE_PATIENCE = 10.0


def bytes_of(buffer: Any, what: str) -> memoryview:
    """Return the bytes of a writable, contiguous buffer. Raises UsageError for anything else.

    what -- what the error calls it
    """
    try:
        view = memoryview(buffer)
    except (TypeError, ValueError, BufferError) as error:
        raise UsageError(
            f"{what} is not a buffer: {error} (of an array of such a type, give array.view('u1'))"
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
    """Move `buffer` (writable, contiguous) while this program continues to write to it.

    Writers do `with guest.writing(): array[i] += 1` in threads, and `async with guest.writing()` in
    coroutines. In the last round that waits for some milliseconds; after the hand-over it raises
    GuestMoved.

    pause, resume -- coroutine functions of a program that stops its writers itself, without
                     `writing`
    state -- called once the writers are stopped: returns bytes for the destination, at most 1 MiB
    marks -- True: the program calls `mark` after each write. It is trusted: a write that it does
             not mark may be missing at the destination
    tracking -- how changes are found without marks: "compare" compares all of the buffer; "kernel"
                has the kernel record writes (Linux 6.7, private memory), so that the first write to
                each page costs a page fault; "auto" does so if comparing takes too long
    page_size -- bytes per mark

    Raises UsageError.
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
        tracking: str = "auto",
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
        if tracking not in {one.value for one in Tracking}:
            raise UsageError(f"tracking={tracking!r}: it is auto, kernel or compare")
        self.marks = marks
        self._tracking = Tracking(tracking)
        self._paused = False
        self._view = view
        self.memory = Memory(len(view), view)
        self._page_size = page_size
        pages = -(-len(view) // page_size)
        self._marks = bytearray(-(-pages // 8) * 8 if marks else 0)
        self._write_lock = WriteLock()
        self._pause = pause
        self._resume = resume
        self._state = state
        self._lock: BufferLock | None = None
        self.cautions: list[str] = []

    async def lock(self) -> None:
        if self._lock is None:
            lock = BufferLock(self._view, "this guest")
            await lock.acquire()
            self._lock, self.cautions = lock, lock.cautions

    def confirm_lock(self) -> None:
        if self._lock is not None:
            self._lock.confirm()

    def unlock(self) -> None:
        """Let other guests have this memory, unless the guest has moved: then it is an old copy."""
        if self._lock is not None and self.relinquished:
            self._lock.keep()
        elif self._lock is not None:
            self._lock.close()
            self._lock = None

    async def close(self) -> None:
        """Let another guest be put into this memory, unless a migration moves this one."""
        if self._lock is not None and not self.moving:
            self._lock.close()
            self._lock = None

    def writing(self) -> Writing:
        """Return a context in which this thread, or this task (`async with`), may write.

        Entering it raises GuestMoved after the hand-over. A plain `with` in a thread that runs an
        event loop warns, and raises RuntimeError if it would have to stop that loop.
        """
        return Writing(self._write_lock)

    @property
    def admits_writers(self) -> bool:
        """Whether a writer may enter `writing` at once."""
        return self._write_lock.open

    @property
    def moved(self) -> bool:
        """Whether the guest runs at the destination: writers get GuestMoved."""
        return self._write_lock.moved

    def check_parameters(self, parameters: Parameters) -> None:
        if self.marks and parameters.page_size != self._page_size:
            raise UsageError(
                f"this guest marks pages of {self._page_size} bytes, and is to be moved with pages "
                f"of {parameters.page_size}: give both the same page_size"
            )

    def mark(self, offset: int, length: int) -> None:
        """Mark `length` bytes from `offset` as written. Call it after the write."""
        if length > 0:
            first = offset // self._page_size
            last = (offset + length - 1) // self._page_size
            set_marks(self._marks, first, last - first + 1)

    def track(
        self, encoder: PageEncoder, downtime_limit: Callable[[], float] = no_limit
    ) -> DirtyTracker:
        if self.marks:
            return MarkTracker(memoryview(self._marks), encoder.pages)
        view = self.memory.view
        assert view is not None
        return RecordTracker(
            self.memory, encoder, lambda: OwnRecord(view, encoder.page_size),
            is_wanted(self._tracking, downtime_limit), lambda: not self._paused,
        )  # fmt: skip

    async def pause(self) -> None:
        self._paused = True
        if self._pause is not None:
            await _call(self._pause)
        elif not await self._write_lock.exclude(PAUSE_PATIENCE):
            raise MigrationError(
                f"a writer stayed inside guest.writing() for {PAUSE_PATIENCE:g} s: keep it short"
            )

    async def resume(self) -> None:
        self._paused = False
        if self._resume is None:
            self._write_lock.admit()
            return
        try:
            await _call(self._resume)
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

    async def relinquish(self) -> None:
        """Do nothing: the guest ends with this process."""

    async def release(self) -> None:
        self._write_lock.end()


async def _call(function: Callable[[], Awaitable[None]]) -> None:
    """Call a function of the user's, which may be a plain one instead of a coroutine function."""
    result = function()
    if inspect.isawaitable(result):
        await result


class BufferPlace(Place):
    """Anonymous memory of this program, or a buffer that it provides (`into`).

    A buffer of whole pages is written as pages come. Any other one is filled in the pause.

    Raises UsageError.
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
        self.content = Memory(info.size, self.memory)
        self._lock: BufferLock | None = None

    async def make_ready(self) -> None:
        if self._into is not None and self._lock is None:
            lock = BufferLock(self._into, "the buffer for the guest", receives=True)
            await lock.acquire()
            self._lock = lock

    @property
    def received(self) -> memoryview:
        """The memory of the guest: exactly `size` bytes."""
        return self.memory[: self.size] if self._into is None else self._into

    async def start(self, state: bytes) -> str:
        self.state = state
        if self._into is not None and self._into is not self.memory:
            self._into[:] = self.memory[: self.size]
        # The guest is complete: nothing below may report that it was not started.
        with contextlib.suppress(OSError):
            if self._lock is not None:
                self._lock.replace()
            await self.discard()
        return f"{self.size} bytes are here"

    async def discard(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None
