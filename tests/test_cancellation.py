"""What a cancellation interrupts, and what it does not."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable

import pytest

from migrate.cancellation import finished, forget, once, undisturbed
from migrate.threads import in_thread


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Work:
    """Takes ten turns, and five more to end when it is cancelled."""

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
    """What comes of work that is waited for in this way, by who is cancelled in these turns."""
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
async def test_what_is_finished_ends_before_the_cancellation_is_raised(at: tuple[int, ...]) -> None:
    work, result = await cancelled_at(finished, *at)
    assert (work.cancelled, work.ended, result) == (0, True, asyncio.CancelledError)


@pytest.mark.asyncio
@pytest.mark.parametrize("at", [(3,), (3, 4), (3, 4, 5, 6), (1, 9)])
async def test_what_is_undisturbed_hears_nothing_and_has_its_result(at: tuple[int, ...]) -> None:
    work, result = await cancelled_at(undisturbed, *at)
    assert (work.cancelled, work.ended, result) == (0, True, "done")


@pytest.mark.asyncio
@pytest.mark.parametrize("at", [(3,), (3, 4), (3, 5, 7), (3, 4, 5, 6, 7, 8)])
async def test_who_is_cancelled_again_and_again_is_cancelled_once(at: tuple[int, ...]) -> None:
    work, result = await cancelled_at(once, *at)
    assert (work.cancelled, work.ended, result) == (1, True, asyncio.CancelledError)


@pytest.mark.asyncio
async def test_a_result_outdoes_a_cancellation_and_a_timeout_does_not_fire() -> None:
    async def stubborn() -> str:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            return "here all the same"
        return "not reached"

    async with asyncio.timeout(0.01):
        assert await once(stubborn()) == "here all the same"


@pytest.mark.asyncio
@pytest.mark.parametrize("way", [finished, undisturbed, once])
async def test_a_failure_is_raised_as_it_is(way: Callable[[Awaitable[None]], Awaitable]) -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise LookupError("nothing there")

    with pytest.raises(LookupError, match="nothing there"):
        await way(fails())


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_who_wants_to_leave_the_program_is_heard_by_the_caller(kind: type[BaseException]) -> None:
    async def leave() -> None:
        raise kind("enough")

    async def main() -> str:
        with pytest.raises(kind, match="enough"):
            await once(leave())
        return "went on"

    assert asyncio.run(main()) == "went on"


class Held:
    """Something that a frame refers to."""


@pytest.mark.asyncio
async def test_an_error_that_leaves_refers_to_nothing_but_lines() -> None:
    gone: list[weakref.ref[Held]] = []

    async def fails() -> None:
        held = Held()
        gone.append(weakref.ref(held))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(wrong(held))
                await asyncio.sleep(1)
        except BaseExceptionGroup as several:
            error = several.exceptions[0]
            raise error from None

    async def wrong(held: Held) -> None:
        raise LookupError(f"in a circle with {type(held).__name__}")

    gc.disable()
    try:
        with pytest.raises(LookupError) as raised:
            await once(fails())
        assert gone[0]() is None
        assert raised.traceback[-1].name == "wrong", "where it was can still be seen"
        del raised
    finally:
        gc.enable()


def test_an_error_that_is_dealt_with_can_be_forgotten() -> None:
    def fails() -> None:
        held = Held()
        gone.append(weakref.ref(held))
        error = LookupError("in a circle with its frame")
        raise error

    gone: list[weakref.ref[Held]] = []
    gc.disable()
    try:
        try:
            fails()
        except LookupError as error:
            assert gone[0]() is not None
            forget(error)
        assert gone[0]() is None
    finally:
        gc.enable()


@pytest.mark.asyncio
async def test_work_has_a_thread_though_all_of_the_loops_are_busy() -> None:
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
