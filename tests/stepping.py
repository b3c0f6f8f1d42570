"""A loop in which something can happen at any one step of what it runs.

A step is an await at which a task waits, in whatever task. Work for threads is done by the loop
itself, between two steps: what happens is the same in each run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any

import uvloop


class Steps:
    """Counts steps, and calls of work for threads; at number `at` of them `happens` is called.

    What it raises, where calls are counted, is what that work raises.
    """

    def __init__(self) -> None:
        self.arm(0, lambda: None)

    def arm(self, at: int, happens: Callable[[], object], *, calls: bool = False) -> None:
        self.steps = self.calls = 0
        self._at, self._happens, self._of_calls = at, happens, calls

    @property
    def over(self) -> bool:
        """Whether it never got so far."""
        return (self.calls if self._of_calls else self.steps) < self._at

    def step(self) -> None:
        self.steps += 1
        if self.steps == self._at and not self._of_calls:
            asyncio.get_running_loop().call_soon(self._happens)

    def call(self) -> None:
        self.calls += 1
        if self.calls == self._at and self._of_calls:
            self._happens()


class _Watched(Coroutine[Any, Any, Any]):
    """A coroutine of which each step is counted."""

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
    """Work for threads is done at once, and what came of it is heard in the next turn."""

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
            return None, error.with_traceback(None)  # a thread would refer to no frame of ours


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
    """A loop of this kind that counts; its `steps` say at what."""
    loop = kind()
    loop.steps = steps = Steps()

    def task(its: Any, work: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(_Watched(work, steps), loop=its, **options)

    loop.set_task_factory(task)
    return loop
