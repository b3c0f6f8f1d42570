"""Cancellation, and what it must not interrupt.

asyncio can cancel a task at every await, and again later.

    finish(work)               work that must not stop half-way: the cancellation is raised after it
    checked(work, check)       work that a limit of time may end, which may change meanwhile
    ignore_cancellation(work)  work whose outcome matters more than a cancellation
    cancel_once(work)          a whole operation: it sees one cancellation, however often its caller
                               is cancelled, so that it can undo its steps undisturbed; if it has a
                               result nevertheless, that is returned

Each of them runs `work` as a task of its own, and returns only after that task has ended.

An exception refers to the frames it came through, and those refer to everything in their
variables: the guest's memory, for example. Often the references form a cycle, so that only the
garbage collector frees the memory. An exception that leaves `cancel_once` therefore keeps its lines
and loses its variables (`release_frames`).
"""

from __future__ import annotations

import asyncio
import functools
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
# How often `checked` checks, in seconds.
CHECK_SECONDS = 0.5


async def finish(work: Awaitable[T]) -> T:
    """Return the result of `work`.

    If the caller is cancelled meanwhile, raise CancelledError instead, after `work` has ended.
    """
    task = asyncio.ensure_future(_catch_exit(work))
    try:
        if await _wait_for_end(task, lambda: None):
            if not task.cancelled():
                task.exception()  # retrieved here, so that asyncio does not log it
            raise asyncio.CancelledError
        return _result(task)
    finally:
        del task  # an exception refers to this frame; together they would be a cycle


async def checked(
    work: Awaitable[T], check: Callable[[], object], seconds: float = CHECK_SECONDS
) -> T:  # fmt: skip
    """Return or raise what comes of `work`; call `check`, which may raise, each `seconds`."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=seconds))[0]:
            check()
        return task.result()
    finally:
        task.cancel()
        del task


async def ignore_cancellation(work: Awaitable[T]) -> T:
    """Return or raise what comes of `work`. A cancellation meanwhile is dropped."""
    task = asyncio.ensure_future(_catch_exit(work))
    try:
        await _wait_for_end(task, lambda: None)
        return _result(task)
    finally:
        del task


async def cancel_once(work: Awaitable[T], on_cancel: Callable[[], object] = lambda: None) -> T:
    """Return or raise what comes of `work`, which sees the first cancellation and no other.

    on_cancel -- called before `work` is cancelled. If a connection breaks at the same time, a task
                 group of Python 3.11 raises that error alone, and `work` cannot tell that it was
                 cancelled
    """
    task = asyncio.ensure_future(_catch_exit(work))
    try:
        await _wait_for_end(task, functools.partial(_cancel, on_cancel, task))
        return _result(task)
    except BaseException as error:
        release_frames(error)
        raise
    finally:
        del task


def _cancel(on_cancel: Callable[[], object], task: asyncio.Future[T]) -> None:
    on_cancel()
    task.cancel()


@dataclass(frozen=True)
class _Exit:
    """A request to end the program. A task that raised it would end the loop, not its caller."""

    error: BaseException


async def _catch_exit(work: Awaitable[T]) -> T | _Exit:
    try:
        return await work
    except (SystemExit, KeyboardInterrupt) as error:
        return _Exit(error)


def _result(task: asyncio.Future[T | _Exit]) -> T:
    result = task.result()
    if isinstance(result, _Exit):
        raise result.error
    return result


async def _wait_for_end(task: asyncio.Future[T], on_cancel: Callable[[], object]) -> bool:
    """Wait until `task` has ended, and return whether the caller was cancelled meanwhile.

    on_cancel -- called at the first cancellation
    """
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            if not cancelled:
                on_cancel()
            cancelled = True
    return cancelled


def release_frames(error: BaseException) -> None:
    """Clear the variables of all frames that a handled error refers to; its lines remain."""
    _clear_frames(error, set())


def _clear_frames(error: BaseException | None, seen: set[int]) -> None:
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    traceback.clear_frames(error.__traceback__)
    context = error.__context__
    if isinstance(context, BaseExceptionGroup) and context.subgroup(lambda one: one is error):
        error.__context__ = None  # it was taken out of that group, and raised on its own
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for one in (error.__cause__, context, *inner):
        _clear_frames(one, seen)
