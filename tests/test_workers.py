"""A hang ends as tests/workers.py says: with pytest, and the options of `make test`."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(300)

# Each is a test's body, in a module with a test before it and two after it.
HANGS = {
    "python": "threading.Event().wait()",
    "loop": "await asyncio.Event().wait()",
    "blocked_loop": "near, far = socket.socketpair()\n    near.recv(1)",
    "c": "stick(ctypes.CDLL(None))",
    "c_in_loop": "stick(ctypes.CDLL(None))",
    "gil": "stick(ctypes.PyDLL(None))",
    "teardown": "request.addfinalizer(lambda: stick(ctypes.CDLL(None)))\n    assert not 'failed'",
}
DEATHS = {
    "exit": "os._exit(0)",
    "segfault": "ctypes.string_at(0)",
    "pipe": "leave_child()\n    os._exit(0)",
    "pipe_elsewhere": "leave_child(os.setsid)\n    os._exit(0)",
}
CONFTEST = """
import uvloop
pytest_plugins = ["tests.workers"]

def pytest_asyncio_loop_factories(config, item):
    return {"uvloop": uvloop.new_event_loop}
"""
MODULE = """
import asyncio, ctypes, os, pathlib, socket, threading, time
import pytest

def stick(libc):
    # Locked twice by one thread: no signal ends that wait.
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)

def leave_child(first=lambda: None):
    # A child that has what this process has open: xdist's pipe too.
    if not os.fork():
        first()
        pathlib.Path(__file__).with_suffix(".child").write_text(str(os.getpid()))
        time.sleep(600)
        os._exit(0)
    while not pathlib.Path(__file__).with_suffix(".child").exists():
        time.sleep(0.01)

def test_before():
    pass

{mark}
{kind}def test_{name}(request):
    {body}

@pytest.mark.parametrize("number", range(2))
def test_after(number):
    pass
"""


def options() -> list[str]:
    """Return those that the Makefile gives to pytest."""
    found = re.search(r"^PYTEST = \S+/pytest (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found
    return shlex.split(found[1])


def write(directory: Path, bodies: dict[str, str]) -> None:
    (directory / "conftest.py").write_text(CONFTEST)
    for name, body in bodies.items():
        is_async = name.endswith("loop")
        (directory / f"test_{name}.py").write_text(
            MODULE.format(
                name=name, body=body, kind="async " if is_async else "",
                mark="@pytest.mark.asyncio" if is_async else "",
            )
        )  # fmt: skip


def run(directory: Path, *words: str) -> tuple[int, str]:
    """Run pytest on a directory with our configuration; return (exit code, output).

    It has a time limit, since the tests show that it ends.
    """
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    # A file: processes that are left behind keep a pipe open.
    with (directory / "printed").open("w+") as printed:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml",
             "-p", "no:cacheprovider", "-o", "timeout=4", "-o", "worker_grace=2",
             # Newer Pythons warn of a fork beside threads.
             "-W", "ignore::DeprecationWarning", *words, "-rfEp", directory],
            cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT, check=False,
            timeout=250,
        )  # fmt: skip
        printed.seek(0)
        return done.returncode, printed.read()


@pytest.mark.programs
@pytest.mark.parametrize("bodies", [HANGS, DEATHS], ids=["hangs", "deaths"])
def test_hanging_test_fails_by_name_and_the_others_run(
    tmp_path: Path, bodies: dict[str, str]
) -> None:
    write(tmp_path, bodies)
    try:
        code, text = run(tmp_path, *options())
    finally:
        for child in tmp_path.glob("*.child"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child.read_text()), signal.SIGKILL)
    assert code == 1, text
    found = {word: set(re.findall(rf"^{word} \S*?(test_\w+\.py::\w+)", text, re.MULTILINE))
             for word in ("FAILED", "ERROR", "PASSED")}  # fmt: skip
    assert found["FAILED"] == {f"test_{name}.py::test_{name}" for name in bodies}, text
    assert not found["ERROR"], text
    assert len(re.findall(r"^PASSED", text, re.MULTILINE)) == 3 * len(bodies), text


def test_hang_without_xdist_ends_the_run_with_the_stacks(tmp_path: Path) -> None:
    """Without xdist there is no other process to run the other tests."""
    write(tmp_path, {"gil": HANGS["gil"]})
    code, text = run(tmp_path, "-q")
    assert code == 1, text
    assert re.search(r"test_gil\.py.* in test_gil$", text, re.MULTILINE), text
