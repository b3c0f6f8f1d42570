"""Memory of a Python program: any writable buffer, a NumPy array among them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from migrate._memory import set_marks
from migrate.errors import MigrationError, UsageError
from migrate.guests.guest import MemoryGuest, Place
from migrate.guests.memory_hold import MemoryHold
from migrate.memory import Memory, private_buffer
from migrate.tracking import DirtyTracker, MarkTracker
from proto.kernel import PageEncoder
from proto.messages import GuestInfo

PAUSE_PATIENCE = 10.0


class GuestMoved(Exception):  # noqa: N818 - news, not a fault
    """The buffer has moved away: whoever still wants to write must do so at the destination."""


class Gate:
    """Lets writers in and out, one pause at a time; closed for good once the guest has moved."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._closed = False
        self._moved = False

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self._changed:
            while self._closed and not self._moved:
                self._changed.wait()
            if self._moved:
                raise GuestMoved("the guest runs at the destination now")
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def close(self, timeout: float) -> bool:
        """Keeps writers out and waits for those inside; False where they stay."""
        with self._changed:
            self._closed = True
            return self._changed.wait_for(lambda: self._inside == 0, timeout)

    def open(self) -> None:
        with self._changed:
            self._closed = False
            self._changed.notify_all()

    def move(self) -> None:
        with self._changed:
            self._moved = True
            self._changed.notify_all()


class BufferGuest(MemoryGuest):
    """Moves `buffer` (writable, contiguous) while this program's threads go on writing to it.

    Writers do `with guest.writing(): array[i] += 1`. In the last round they wait at the door for
    some milliseconds; after the hand-over the door raises GuestMoved. Programs with a way of their
    own to stop give `pause` and `resume` (coroutine functions) instead. `state` (bytes, at most
    1 MiB) is asked for when all is still, and given to the destination.

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
        try:
            view = memoryview(buffer).cast("B")
        except TypeError as error:
            raise UsageError(f"the buffer cannot be moved: {error}") from None
        if not len(view):
            raise UsageError("the buffer is empty, there is nothing to move")
        if (pause is None) != (resume is None):
            raise UsageError("pause and resume go together")
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

    def writing(self) -> Any:
        """A context in which this thread may write. Raises GuestMoved after the hand-over."""
        return self._gate.writing()

    def mark(self, offset: int, length: int) -> None:
        """Says that `length` bytes from `offset` were written; call it after the write."""
        if length > 0:
            first = offset // self._page_size
            last = (offset + length - 1) // self._page_size
            set_marks(self._marks, first, last - first + 1)

    def track(self, encoder: PageEncoder) -> DirtyTracker:
        if not self.marks:
            return super().track(encoder)
        if encoder.page_size != self._page_size:
            raise UsageError(f"this guest marks pages of {self._page_size} bytes")
        return MarkTracker(memoryview(self._marks), encoder.pages)

    async def pause(self) -> None:
        if self._pause is not None:
            await self._pause()
        elif not await asyncio.to_thread(self._gate.close, PAUSE_PATIENCE):
            raise MigrationError(
                f"a writer stayed inside guest.writing() for {PAUSE_PATIENCE:g} s: keep it short"
            )

    async def resume(self) -> None:
        if self._resume is not None:
            await self._resume()
        else:
            self._gate.open()

    def state(self) -> bytes:
        return self._state()

    async def give_up(self) -> None:
        """Nothing outlives this process that could run the guest."""

    async def release(self) -> None:
        self._gate.move()


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
            self._into = memoryview(into).cast("B")
            if len(self._into) != info.size:
                raise UsageError(
                    f"the guest has {info.size} bytes, the buffer for it {len(self._into)}"
                )
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
        if self._hold is not None:
            self._hold.replace()
        await self.discard()
        return f"{self.size} bytes are here"

    async def discard(self) -> None:
        if self._hold is not None:
            self._hold.close()
            self._hold = None
