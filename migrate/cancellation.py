"""What a cancellation may interrupt. asyncio's can come at every await, and come again.

    finished(work)     what cannot be undone half-way: a cancellation is raised after its end
    undisturbed(work)  what comes of it outdoes a cancellation
    once(work)         a whole operation: it hears of one cancellation, however often its caller is
                       cancelled, so that it undoes what it did undisturbed; where it has a result
                       all the same, that is returned

Each runs `work` as a task of its own. None of them leaves it behind.

An exception refers to the frames it came through, and they to all they worked on, the guest's
memory for one, perhaps in a circle, which only the garbage collector finds. So an exception that
leaves `once` refers to lines, and no more to what was in the variables there.
"""

from __future__ import annotations

import asyncio
import functools
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


async def finished(work: Awaitable[T]) -> T:
    """The result of `work`; CancelledError instead, after its end, if that came meanwhile."""
    task = asyncio.ensure_future(_kept(work))
    try:
        if await _ended(task, lambda: None):
            if not task.cancelled():
                task.exception()  # nobody else asks for it
            raise asyncio.CancelledError
        return _result(task)
    finally:
        del task  # an exception refers to this frame, and must not be referred to by it


async def undisturbed(work: Awaitable[T]) -> T:
    """What comes of `work`; a cancellation is forgotten."""
    task = asyncio.ensure_future(_kept(work))
    try:
        await _ended(task, lambda: None)
        return _result(task)
    finally:
        del task


async def once(work: Awaitable[T], told: Callable[[], object] = lambda: None) -> T:
    """What comes of `work`, which is told of the first cancellation, and of no other.

    told -- called before that: where a connection breaks at the same time, a task group of Python
            3.11 raises that alone, and the task cannot tell
    """
    task = asyncio.ensure_future(_kept(work))
    try:
        await _ended(task, functools.partial(_tell, told, task))
        return _result(task)
    except BaseException as error:
        forget(error)
        raise
    finally:
        del task


def _tell(told: Callable[[], object], task: asyncio.Future[T]) -> None:
    told()
    task.cancel()


@dataclass(frozen=True)
class _Leaving:
    """The program is to end. A task that raised that would end its loop, and not its caller."""

    error: BaseException


async def _kept(work: Awaitable[T]) -> T | _Leaving:
    try:
        return await work
    except (SystemExit, KeyboardInterrupt) as error:
        return _Leaving(error)


def _result(task: asyncio.Future[T | _Leaving]) -> T:
    result = task.result()
    if isinstance(result, _Leaving):
        raise result.error
    return result


async def _ended(task: asyncio.Future[T], tell: Callable[[], object]) -> bool:
    """Waits for the end of `task`, whatever happens; whether we were cancelled meanwhile."""
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            if not cancelled:
                tell()
            cancelled = True
    return cancelled


def forget(error: BaseException) -> None:
    """Lets an error that is dealt with refer to nothing but lines."""
    _clear_frames(error, set())


def _clear_frames(error: BaseException | None, seen: set[int]) -> None:
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    traceback.clear_frames(error.__traceback__)
    around = error.__context__
    if isinstance(around, BaseExceptionGroup) and around.subgroup(lambda one: one is error):
        error.__context__ = None  # it was taken out of that group, and raised by itself
    inside = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for one in (error.__cause__, around, *inside):
        _clear_frames(one, seen)
