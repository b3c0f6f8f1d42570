"""Work in a thread, and never in one of the loop's own.

Those are the caller's: a program that keeps all of them busy, with the writers of the guest say,
would have the migration wait for one that is never free.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `work` returns, or raises. A cancellation does not stop it: see `finished`."""
    pool = ThreadPoolExecutor(1, "xbmigrate")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, lambda: work(*args, **kwargs))
    finally:
        pool.shutdown(wait=False)
