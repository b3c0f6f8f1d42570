"""Guest memory stays out of core dumps, unless the user asks for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from migrate.guests.demo.guest import parse_demo
from migrate.guests.demo.handle import DemoProcess
from migrate.runtime import core_dumps
from tests.programs import end_guest
from tests.requirements import need


@pytest.mark.parametrize(("value", "allowed"), [("", False), ("0", False), ("1", True)])
def test_core_dumps_are_allowed_by_the_environment_only(monkeypatch, value, allowed) -> None:
    monkeypatch.setenv(core_dumps.VARIABLE, value)
    assert core_dumps.allowed() == allowed


def memory_flags(pid: int) -> set[str]:
    """Return the kernel's flags (proc(5), smaps) of the guest memory of a demo process."""
    [mapping] = Path(f"/proc/{pid}/smaps").read_text().split("/memfd:xbmigrate-demo")[1:]
    return set(mapping.partition("VmFlags:")[2].partition("\n")[0].split())


@pytest.mark.parametrize("value", ["", "1"])
def test_core_dump_of_a_demo_guest_has_no_guest_memory(monkeypatch, value) -> None:
    monkeypatch.setenv(core_dumps.VARIABLE, value)
    process = DemoProcess.create(parse_demo("64k", 4096), paused=False)
    try:
        while not process.position[0]:
            assert process.alive()
        assert ("dd" in memory_flags(process.pid)) == (value == "")  # dd: do not dump
    finally:
        process.close()
        end_guest(process.pid)


ATTACH = """
from migrate.guests.demo.guest import parse_demo
from migrate.guests.demo.handle import DemoProcess
process = DemoProcess.create(parse_demo("64k", 4096), paused=False)
try:
    while not process.position[0]:
        assert process.alive()
    DemoProcess.attach(process.pid).close()
finally:
    process.kill()
"""


def test_user_without_privileges_attaches_to_a_demo_guest() -> None:
    """An undumpable process would hide its descriptors from everyone without CAP_SYS_PTRACE."""
    command = [sys.executable, "-c", ATTACH]
    if os.geteuid() == 0:
        need(shutil.which("setpriv"), "setpriv (util-linux)")
        command = ["setpriv", "--bounding-set=-sys_ptrace", *command]
    subprocess.run(command, check=True, timeout=60)
