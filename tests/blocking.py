"""Fail a test that blocks the thread of its own event loop.

Such a test hangs if what it waits for needs that loop, and otherwise hides how long the loop was
blocked. The loop's own calls do not count: its sockets never block.

blockbuster does the same, but patches C types through a package under the GPL, and counts each
read of a file as blocking.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import os
import queue
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.programs import Program

HERE = str(Path(__file__).parent)
SOCKET_CALLS = (
    "accept", "connect", "recv", "recv_into", "recvfrom", "recvfrom_into", "recvmsg",
    "recvmsg_into", "send", "sendall", "sendfile", "sendmsg", "sendto",
)  # fmt: skip


def forbid() -> None:
    """Make blocking calls raise wherever an event loop runs in the same thread."""
    for name in SOCKET_CALLS:
        _guard(socket.socket, name, lambda sock, *_, **__: sock.gettimeout() != 0)
    # subprocess sleeps while it waits within a limit.
    _guard(time, "sleep", lambda _: sys._getframe(2).f_code.co_filename != subprocess.__file__)
    _guard(subprocess.Popen, "wait", lambda process, timeout=None: _endless(process, timeout))
    _guard(
        subprocess.Popen, "communicate",
        lambda process, _given=None, timeout=None, **_: _endless(process, timeout),
    )  # fmt: skip
    _guard(os, "waitpid", lambda _pid, options: not options & os.WNOHANG)
    _guard(Program, "read_line")
    # The standard library needs these in passing: a thread that starts says so to who started it.
    _guard(os, "read", lambda descriptor, _size: os.get_blocking(descriptor), ours=True)
    _guard(select, "select", lambda *arguments: arguments[3:] != (0,), ours=True)
    for owner, name in (
        (threading.Event, "wait"), (threading.Thread, "join"), (queue.Queue, "get"),
        (concurrent.futures.Future, "result"),
    ):  # fmt: skip
        _guard(owner, name, ours=True)


def not_in_a_loop(what: str) -> None:
    """Fail the test if an event loop runs in this thread."""
    # asyncio.get_running_loop raises where there is none.
    if asyncio._get_running_loop() is not None:
        pytest.fail(f"{what} blocks the event loop of its own thread: await it, or use a thread")


def _endless(process: subprocess.Popen[Any], timeout: float | None) -> bool:
    """Return whether a wait for a process has no limit; one that was waited for is over."""
    return timeout is None and process.returncode is None


def _guard(
    owner: Any, name: str, blocks: Callable[..., bool] = lambda *_, **__: True, *,
    ours: bool = False,
) -> None:  # fmt: skip
    """Replace a function.

    blocks -- whether a call with these arguments may wait, whatever it would find
    ours   -- only calls straight from a file of the tests count
    """
    real = getattr(owner, name)

    @functools.wraps(real)
    def guarded(*arguments: Any, **words: Any) -> Any:
        if (
            asyncio._get_running_loop() is not None
            and (not ours or sys._getframe(1).f_code.co_filename.startswith(HERE))
            and blocks(*arguments, **words)
        ):
            not_in_a_loop(f"{owner.__name__}.{name}")
        return real(*arguments, **words)

    setattr(owner, name, guarded)
