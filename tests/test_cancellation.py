"""Cancellation: which calls it interrupts, and which it does not."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import weakref
from collections.abc import Awaitable, Callable

import pytest

from migrate.runtime.cancellation import (
    cancel_once,
    checked,
    finish,
    ignore_cancellation,
    release_frames,
)
from migrate.runtime.threads import in_thread


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Work:
    """Work of ten turns of the loop; it needs five more to end after a cancellation."""

    def __init__(self) -> None:
        self.cancelled = 0
        self.ended = False

    async def run(self) -> str:
        try:
            await turns(10)
            return "done"
        except asyncio.CancelledError:
            self.cancelled += 1
            await turns(5)
            raise
        finally:
            self.ended = True


async def cancelled_at(
    way: Callable[[Awaitable[str]], Awaitable[str]], *at: int
) -> tuple[Work, object]:
    """Await work in one of the ways, cancelled in turns `at`; return the work and its outcome."""
    work = Work()
    task = asyncio.ensure_future(way(work.run()))
    for turn in range(30):
        if turn in at:
            task.cancel()
        await asyncio.sleep(0)
    try:
        return work, await task
    except asyncio.CancelledError:
        return work, asyncio.CancelledError


@pytest.mark.asyncio
@pytest.mark.parametrize("at", [(3,), (3, 4), (3, 4, 5, 6), (1, 9)])
async def test_finish_raises_the_cancellation_after_the_work(at: tuple[int, ...]) -> None:
    work, result = await cancelled_at(finish, *at)
    assert (work.cancelled, work.ended, result) == (0, True, asyncio.CancelledError)


@pytest.mark.asyncio
@pytest.mark.parametrize("at", [(3,), (3, 4), (3, 4, 5, 6), (1, 9)])
async def test_ignore_cancellation_returns_the_result(at: tuple[int, ...]) -> None:
    work, result = await cancelled_at(ignore_cancellation, *at)
    assert (work.cancelled, work.ended, result) == (0, True, "done")


@pytest.mark.asyncio
@pytest.mark.parametrize("at", [(3,), (3, 4), (3, 5, 7), (3, 4, 5, 6, 7, 8)])
async def test_cancel_once_passes_on_one_cancellation(at: tuple[int, ...]) -> None:
    work, result = await cancelled_at(cancel_once, *at)
    assert (work.cancelled, work.ended, result) == (1, True, asyncio.CancelledError)


@pytest.mark.asyncio
async def test_cancel_once_returns_a_result_in_spite_of_a_timeout() -> None:
    async def stubborn() -> str:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            return "here all the same"
        return "not reached"

    async with asyncio.timeout(0.01):
        assert await cancel_once(stubborn()) == "here all the same"


@pytest.mark.asyncio
@pytest.mark.parametrize("way", [finish, ignore_cancellation, cancel_once])
async def test_failure_of_the_work_is_raised_unchanged(
    way: Callable[[Awaitable[None]], Awaitable],
) -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise LookupError("nothing there")

    with pytest.raises(LookupError, match="nothing there"):
        await way(fails())


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_exit_reaches_the_caller(kind: type[BaseException]) -> None:
    async def leave() -> None:
        raise kind("enough")

    async def main() -> str:
        with pytest.raises(kind, match="enough"):
            await cancel_once(leave())
        return "went on"

    assert asyncio.run(main()) == "went on"


class Local:
    """An object that a frame refers to."""


@pytest.mark.asyncio
async def test_cancel_once_releases_the_frames_of_an_error() -> None:
    gone: list[weakref.ref[Local]] = []

    async def fails() -> None:
        local = Local()
        gone.append(weakref.ref(local))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(wrong(local))
                await asyncio.sleep(1)
        except BaseExceptionGroup as several:
            error = several.exceptions[0]
            raise error from None

    async def wrong(local: Local) -> None:
        raise LookupError(f"in a circle with {type(local).__name__}")

    gc.disable()
    try:
        with pytest.raises(LookupError) as raised:
            await cancel_once(fails())
        assert gone[0]() is None
        assert raised.traceback[-1].name == "wrong", "the traceback has its lines"
        del raised
    finally:
        gc.enable()


def test_release_frames_of_a_handled_error() -> None:
    def fails() -> None:
        local = Local()
        gone.append(weakref.ref(local))
        error = LookupError("in a circle with its frame")
        raise error

    gone: list[weakref.ref[Local]] = []
    gc.disable()
    try:
        try:
            fails()
        except LookupError as error:
            assert gone[0]() is not None
            release_frames(error)
        assert gone[0]() is None
    finally:
        gc.enable()


@pytest.mark.asyncio
async def test_in_thread_works_while_all_threads_of_the_loop_are_busy() -> None:
    loop, release = asyncio.get_running_loop(), threading.Event()
    busy = [loop.run_in_executor(None, release.wait) for _ in range(64)]
    before = threading.active_count()
    try:
        async with asyncio.timeout(20):
            assert await in_thread(int, "7") == 7
            with pytest.raises(ValueError, match="invalid literal"):
                await in_thread(int, "seven")
    finally:
        release.set()
        await asyncio.gather(*busy)
    assert threading.active_count() <= before + 1


@pytest.mark.asyncio
async def test_work_is_checked_until_it_ends() -> None:
    checks = itertools.count()
    assert await checked(asyncio.sleep(0.05, "done"), lambda: next(checks), 0.001) == "done"
    assert next(checks) > 2


@pytest.mark.asyncio
async def test_check_ends_the_work() -> None:
    ended: list[bool] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    def check() -> None:
        raise TimeoutError("over")

    with pytest.raises(TimeoutError, match="over"):
        await checked(work(), check, 0.01)
    await asyncio.sleep(0)
    assert ended == [True]
