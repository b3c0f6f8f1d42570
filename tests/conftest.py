"""Async tests run on uvloop, as the programs do, and on asyncio with --both-loops."""

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop
from hypothesis import HealthCheck, settings

from migrate.output.run import ENDING
from proto.codec import kernel
from tests import blocking
from tests.machine.between import later
from tests.machine.qemu import PROGRAM, need_kvm
from tests.programs import ended

pytest_plugins = ["tests.workers"]
# Helpers whose assertions are worth the details that pytest gives for those in tests.
pytest.register_assert_rewrite("tests.batches", "tests.by_hand", "tests.hostile_peer")
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


@pytest.fixture
def deep_path() -> Iterator[Path]:
    """A directory for trees that are deeper than Python recurses.

    pytest removes the temporary directories of earlier runs itself, recursively: a test that is
    killed would leave a tree in tmp_path that no later run can remove.
    """
    path = Path(tempfile.mkdtemp(prefix="xbmigrate-deep-"))
    yield path
    subprocess.run(["rm", "-rf", path], check=True)


@pytest.fixture(params=["system's", "later"])
def binary(request: pytest.FixtureRequest) -> str:
    """The QEMUs that there are here: Debian's own, and its backport."""
    return later() if request.param == "later" else PROGRAM


@pytest.fixture(params=["tcg", "kvm"])
def accel(request: pytest.FixtureRequest) -> str:
    """Run a test of a machine under TCG and under KVM."""
    if request.param == "kvm":
        need_kvm()
    return str(request.param)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--both-loops",
        action="store_true",
        help="run tests on asyncio's loop too, not on uvloop alone",
    )


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Return the loops to run a test on. A test that names its loops is never skipped for them."""
    both = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    mark = item.get_closest_marker("asyncio")
    named = mark is not None and "loop_factories" in mark.kwargs
    if named or config.getoption("--both-loops"):
        return both
    return {"uvloop": uvloop.new_event_loop}


def pytest_report_header() -> str:
    return f"kernel: {kernel.NAME}"
