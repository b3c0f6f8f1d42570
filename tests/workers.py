"""A pytest plugin: a test that hangs fails by name, the others still run, and the command ends.

pytest-timeout raises an exception in a test that takes too long. That cannot reach a test that
is stuck in C, so each further step is `worker_grace` seconds later:

1. pytest-timeout's signal fails the test. The worker goes on with the next one.
2. faulthandler writes all stacks and ends the process. It needs neither the GIL nor a signal.
3. pytest-xdist's controller kills the worker, and no longer waits for it to close its pipe.

Without xdist there are the first two. A worker that dies takes the processes of its session
along; one that a test leaves behind could hold the pipe whose end tells xdist of the death.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import numbers, stat_of

# How often the controller looks at its workers, in seconds.
INTERVAL = 0.25


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("worker_grace", "seconds from one way to end a test to the next", default="30")


def pytest_configure(config: pytest.Config) -> None:
    grace = float(config.getini("worker_grace"))
    given = getattr(config, "workerinput", None)
    config.pluginmanager.register(Bound(grace, given and Path(given["record"])))
    if config.getoption("dist", "no") != "no":
        config.pluginmanager.register(Controller(grace))


class Record:
    """What a worker tells its controller: its process, its test, and the test's deadline.

    Three lines in a file. The stacks of a test that had to be ended are in a file beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stacks = path.with_suffix(".stacks")

    def write(self, deadline: float = 0.0, test: str = "") -> None:
        draft = self.path.with_suffix(".draft")
        draft.write_text(f"{os.getpid()}\n{deadline}\n{test}")
        draft.replace(self.path)

    def read(self) -> tuple[int, float, str]:
        """Return (process, deadline on the monotonic clock, test); 0 and "" for none."""
        try:
            pid, deadline, test = self.path.read_text().split("\n", 2)
        except FileNotFoundError:
            return 0, 0.0, ""
        return int(pid), float(deadline), test


class Bound:
    """Ends the process when a test outlives its timeout by `grace` seconds."""

    def __init__(self, grace: float, record: Path | None) -> None:
        self._grace = grace
        self._deadline = 0.0
        self._record = None
        if record is None:
            # The real one: pytest captures what is written to descriptor 2 from the first test on.
            self._stacks = os.dup(2)
            return
        # What the tests start is in this session too, and ends with it.
        os.setsid()
        self._record = Record(record)
        self._stacks = os.open(self._record.stacks, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._record.write()

    @pytest.hookimpl(wrapper=True)
    def pytest_timeout_set_timer(
        self, item: pytest.Item, settings: Any
    ) -> Generator[None, object, object]:
        last = settings.timeout + self._grace
        self._deadline = time.monotonic() + last
        self._arm()
        if self._record is not None:
            self._record.write(self._deadline, item.nodeid)
        return (yield)

    def _arm(self) -> None:
        left = max(self._deadline - time.monotonic(), 1.0)
        faulthandler.dump_traceback_later(left, exit=True, file=self._stacks)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        try:
            return (yield)
        finally:
            self._disarm()

    def _disarm(self) -> None:
        self._deadline = 0.0
        faulthandler.cancel_dump_traceback_later()
        if self._record is not None:
            self._record.write()

    @pytest.hookimpl(trylast=True)
    def pytest_exception_interact(self, node: pytest.Item) -> None:
        # A failure disarms pytest-timeout and faulthandler, but its teardown can hang too.
        if self._deadline and not node.config.getoption("usepdb"):
            self._arm()

    def pytest_enter_pdb(self) -> None:
        self._disarm()


class Controller:
    """Watches the workers of pytest-xdist from a separate thread."""

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._directory = Path(tempfile.mkdtemp(prefix="xbmigrate-workers-"))
        # By the worker's name: xdist's object for it, and when it was found to be over.
        self._nodes: dict[str, Any] = {}
        self._over: dict[str, float] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="workers", daemon=True)
        self._thread.start()

    def pytest_configure_node(self, node: Any) -> None:
        name = node.gateway.id
        node.workerinput["record"] = str(self._directory / name)
        self._nodes[name] = node

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            for name in [*self._nodes]:
                self._look_at(name)

    def _look_at(self, name: str) -> None:
        pid, deadline, _ = Record(self._directory / name).read()
        now = time.monotonic()
        if not pid:
            return  # not started yet
        if name not in self._over:
            if alive(pid) and not (deadline and now > deadline + self._grace):
                return
            self._over[name] = now
            end_session(pid)
        elif now > self._over[name] + self._grace:
            # Killed, and still its pipe is open: xdist must not wait for that.
            node = self._nodes.pop(name)
            if not node._down:
                node.notify_inproc("errordown", node=node, error="it did not close its pipe")
                node._down = True

    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport) -> None:
        """Add the stacks to the report of a test that ended its worker."""
        for name in [*self._nodes, *self._over]:
            record = Record(self._directory / name)
            if record.read()[2] == crashitem and (text := record.stacks.read_text().strip()):
                report.longrepr = f"{report.longrepr}\n{text}"

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """End the remaining processes of the workers, which xdist has ended by now."""
        self._done.set()
        self._thread.join()
        for name in self._nodes:
            if name not in self._over:
                end_session(Record(self._directory / name).read()[0])
        shutil.rmtree(self._directory)


def alive(pid: int) -> bool:
    """Return whether a process runs; one that only waits to be reaped does not."""
    with contextlib.suppress(OSError):
        return stat_of(pid)[0] not in "ZX"
    return False


def end_session(leader: int) -> None:
    """Kill all processes of a session; 0 is none."""
    if not leader:
        return
    for pid in numbers():
        with contextlib.suppress(OSError):
            if stat_of(pid)[3] == str(leader):
                os.kill(pid, signal.SIGKILL)
