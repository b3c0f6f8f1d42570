"""Work in a thread of its own, never in one of the event loop's pool.

The pool belongs to the caller. A program can keep all its threads busy, with the writers of the
guest for instance, and a migration would then wait forever for a free one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return or raise what comes of `work`, which runs in a new thread.

    A cancellation does not stop the thread (see migrate.runtime.cancellation.finish).
    """
    pool = ThreadPoolExecutor(1, "xbmigrate")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, lambda: work(*args, **kwargs))
    finally:
        pool.shutdown(wait=False)
