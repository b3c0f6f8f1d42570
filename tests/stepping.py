"""An event loop that can call a function at a given step of what it runs.

A step is an await at which a task waits. The steps of all tasks are counted together. Work for
threads runs in the loop itself, between two steps, so that every run has the same order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any

import uvloop


class Steps:
    """Counts steps, and calls of work for threads. At number `at` it calls `fault`.

    If calls are counted, what `fault` raises is raised in place of that work.
    """

    def __init__(self) -> None:
        self.arm(0, lambda: None)

    def arm(self, at: int, fault: Callable[[], object], *, calls: bool = False) -> None:
        self.steps = self.calls = 0
        self._at, self._fault, self._count_calls = at, fault, calls

    @property
    def over(self) -> bool:
        """Return whether everything ended before number `at`."""
        return (self.calls if self._count_calls else self.steps) < self._at

    def step(self) -> None:
        self.steps += 1
        if self.steps == self._at and not self._count_calls:
            asyncio.get_running_loop().call_soon(self._fault)

    def call(self) -> None:
        self.calls += 1
        if self.calls == self._at and self._count_calls:
            self._fault()


class _Counted(Coroutine[Any, Any, Any]):
    """A coroutine whose steps are counted."""

    def __init__(self, work: Coroutine[Any, Any, Any], steps: Steps) -> None:
        self._work = work
        self._steps = steps

    def send(self, news: Any) -> Any:
        awaited = self._work.send(news)
        self._steps.step()
        return awaited

    def throw(self, *error: Any) -> Any:
        try:
            awaited = self._work.throw(*error)
        finally:
            del error  # it refers to this frame
        self._steps.step()
        return awaited

    def close(self) -> None:
        self._work.close()

    def __await__(self) -> Any:
        return self._work.__await__()


class _Inline:
    """A mixin for loops: work for threads runs at once; its future is done in the next turn."""

    steps: Steps

    def run_in_executor(  # type: ignore[no-untyped-def]
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ):
        del executor
        loop: Any = self
        future = loop.create_future()
        loop.call_soon(_tell, future, *self._outcome(func, *args))
        return future

    def _outcome(self, func: Callable[..., Any], *args: Any) -> tuple[Any, Exception | None]:
        try:
            self.steps.call()
            return func(*args), None
        except Exception as error:
            return None, error.with_traceback(
                None
            )  # as from a thread: without a reference to our frames


def _tell(future: asyncio.Future[Any], result: Any, fault: Exception | None) -> None:
    try:
        if future.done():
            return
        if fault is None:
            future.set_result(result)
        else:
            future.set_exception(fault)
    finally:
        del fault


class AsyncioLoop(_Inline, asyncio.SelectorEventLoop):
    pass


class UvLoop(_Inline, uvloop.Loop):
    pass


def stepping(kind: type[AsyncioLoop] | type[UvLoop]) -> AsyncioLoop | UvLoop:
    """Return a loop of this kind. Its `steps` are counted."""
    loop = kind()
    loop.steps = steps = Steps()

    def task(its: Any, work: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(_Counted(work, steps), loop=its, **options)

    loop.set_task_factory(task)
    return loop
