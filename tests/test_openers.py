"""The processes that have a file open are found, however many files strangers have open."""

import subprocess
import sys
import time

import pytest

from migrate.files import openers as openers_module
from migrate.files.openers import openers
from tests.requirements import need_root

OPENS = "import os, sys, time; f = os.open(sys.argv[1], os.O_RDONLY); print(1, flush=True)\n"
MANY = """
import fcntl, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (15000, 15000))
os.setgroups([]); os.setgid(1234); os.setuid(1234)
for _ in range(14000): fcntl.fcntl(f, fcntl.F_DUPFD, 3)
print(1, flush=True)
"""


@pytest.fixture
def program():
    started = []

    def start(code: str, *arguments: object, lines: int = 1) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", f"{OPENS}{code}\ntime.sleep(90)", *map(str, arguments)]
        started.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        for _ in range(lines):
            assert started[-1].stdout.readline() == "1\n"
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()


def test_finds_processes_by_any_name_of_the_file(tmp_path, program):
    path = tmp_path / "file"
    path.touch()
    (tmp_path / "other").hardlink_to(path)
    one = program("", tmp_path / "other")
    with path.open():
        assert openers(path.stat()) == [one.pid]
    assert openers(tmp_path.stat()) == []


@need_root("become another user")
def test_open_files_of_strangers_cost_a_bounded_time(tmp_path, program, monkeypatch):
    path = tmp_path / "file"
    path.touch()
    for _ in range(4):
        program(MANY, "/dev/null", lines=2)
    one = program("", path)
    monkeypatch.setattr(openers_module, "SEARCH_SECONDS", 0.01)
    began = time.thread_time()
    assert openers(path.stat()) == [one.pid]
    assert time.thread_time() - began < 0.1
