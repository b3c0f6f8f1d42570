"""What waits in the thread of an event loop fails, and what does not wait there is let pass."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable

import pytest

from tests.programs import Program


def sleeper() -> None:
    with subprocess.Popen(["sleep", "0"]) as process:
        try:
            process.wait()
        finally:
            process.wait(10)  # else it is said to run still


def connect() -> None:
    with socket.socket() as sock:
        sock.connect(("127.0.0.1", 1))


BLOCKS: dict[str, Callable[[], object]] = {
    "time.sleep": lambda: time.sleep(0),
    "socket.connect": connect,
    "Popen.wait": sleeper,
    "os.waitpid": lambda: os.waitpid(-1, 0),
    "select.select": lambda: select.select((), (), (), 1),
    "Event.wait": threading.Event().wait,
    "Thread.join": threading.Thread().join,
    "Program.read_line": lambda: Program.__new__(Program).read_line("x"),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("name", BLOCKS)
async def test_blocking_call_in_a_loop_thread_fails_by_name(name: str) -> None:
    with pytest.raises(pytest.fail.Exception, match=f"{name} blocks the event loop"):
        BLOCKS[name]()


@pytest.mark.asyncio
async def test_nonblocking_call_in_a_loop_thread_is_allowed() -> None:
    await asyncio.to_thread(time.sleep, 0)
    subprocess.run(["sleep", "0.1"], check=True, timeout=60)  # noqa: ASYNC221 - it has a limit
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        with pytest.raises(BlockingIOError):
            near.recv(1)
    select.select((), (), (), 0)
