"""Calls that may hang in the kernel, as reads of /proc/PID/maps do as long as that process likes.

    each(items, look, patience)     one thread calls look(item) for one item after the other
        it answers in time          go on
        it does not                 leave the thread behind at this item, which "hangs"; go on with
                                    the next item in a new thread
        the call returns after all  the thread ends, and the item may be looked at again

A thread that hangs in the kernel cannot be ended, but the end of the program ends it too: these
waits are killable. A thread starts in 0.1 ms, and keeps what the program knows; another process
would take 100 ms, in a pause.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from migrate.runtime import processes

# Threads that may be left behind at once. With that many, nothing is looked at until one is back.
MAX_HANGING = 64

CHECKS = 4  # in the time of the patience
RUNNABLE = "R"  # see proc(5)

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Run(threading.Thread, Generic[Item, Result]):
    """A thread that looks at items; a daemon, since nothing waits for its end.

    at      -- the item that it looks at
    results -- of the items before that one
    raised  -- the error that has ended it
    seconds -- of the processor, up to the last result
    """

    def __init__(self, items: list[Item], look: Callable[[Item], Result]) -> None:
        super().__init__(name="look", daemon=True)
        self.at: Item | None = None
        self.results: list[Result] = []
        self.raised: BaseException | None = None
        self.seconds = 0.0
        self.left_behind = False
        self.done = threading.Event()
        self._items, self._look = items, look

    def run(self) -> None:
        try:
            for item in self._items:
                self.at = item
                result = self._look(item)
                if self.left_behind:
                    break
                self.results.append(result)
                self.seconds = time.thread_time()
        except BaseException as error:
            self.raised = error
        finally:
            self.done.set()


def _await(run: _Run[Item, Result], patience: float) -> None:
    """Wait until a thread is done, or hangs."""
    count, moved = 0, time.monotonic()
    while not run.done.wait(patience / CHECKS):
        now = time.monotonic()
        if len(run.results) > count:
            count, moved = len(run.results), now
        elif now - moved >= patience and processes.state(run.native_id or 0) != RUNNABLE:
            return


class HangGuard(Generic[Item, Result]):
    """Looks at items, of which any may hang; it remembers which do.

    seconds -- of the processor that all looks have taken
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._left_behind: list[_Run[Item, Result]] = []

    @property
    def hanging(self) -> set[Item]:
        """The items at which a thread hangs now."""
        self._left_behind = [run for run in self._left_behind if not run.done.is_set()]
        return {run.at for run in self._left_behind if run.at is not None}

    def each(
        self, items: Iterable[Item], look: Callable[[Item], Result], patience: float
    ) -> dict[Item, Result]:
        """Look at each item; return the results. Items that hang, now or from before, have none.

        patience -- seconds after which a look hangs, unless its thread waits for a processor

        The looks come one after the other, in the order of the items. An error of `look` is raised
        here.
        """
        hanging = self.hanging
        results: dict[Item, Result] = {}
        left = [item for item in items if item not in hanging]
        while left and len(self._left_behind) < MAX_HANGING:
            run = _Run(left, look)
            try:
                run.start()
            except RuntimeError:
                break  # this user may have no more threads
            _await(run, patience)
            self.seconds += run.seconds
            if run.raised is not None:
                raise run.raised
            found = run.results[:]  # a thread that is left behind may still add to its list
            results.update(zip(left, found, strict=False))
            if len(found) == len(left):
                break
            run.left_behind = True
            self._left_behind.append(run)
            left = left[len(found) + 1 :]
        return results
