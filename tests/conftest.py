"""Every async test runs on both loops; the header says which kernel is under test."""

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop
from hypothesis import HealthCheck, settings

from migrate.output import ENDING
from proto import kernel
from tests import blocking
from tests.machine.between import later
from tests.machine.qemu import PROGRAM
from tests.programs import ended

pytest_plugins = ["tests.workers"]
blocking.forbid()

# nohup, or a shell's `&`, has us ignore them, and the programs with us: they go by that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# Journals of migrations in tests are nobody else's; the programs inherit this.
os.environ["MIGRATE_JOURNAL"] = tempfile.mkdtemp(prefix="xbmigrate-journal-")
atexit.register(shutil.rmtree, os.environ["MIGRATE_JOURNAL"], ignore_errors=True)

# The machine decides how long an example takes, not the code under test.
settings.register_profile("machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("machine")


@pytest.fixture(autouse=True)
def programs() -> Iterator[None]:
    """Those of a test end with it."""
    with ended():
        yield


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A program that was run in this process does not listen to them any more."""
    before = {number: signal.getsignal(number) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def shm() -> Iterator[Path]:
    """A directory in memory."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="xbmigrate-test-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=["system's", "later"])
def binary(request: pytest.FixtureRequest) -> str:
    """The QEMUs that there are here: Debian's own, and its backport."""
    return later() if request.param == "later" else PROGRAM


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def pytest_report_header() -> str:
    return f"kernel: {kernel.NAME}"
