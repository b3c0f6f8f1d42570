"""Helper processes run our code and no other, whatever the working directory holds."""

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import migrate
from migrate.errors import MigrationError
from migrate.runtime import helper_process
from migrate.runtime.helper_process import HelperProcess
from tests.programs import destination, end_guest, guest_pid

PACKAGE = Path(migrate.__file__).parent
SHADOWS = (
    "migrate", "proto", "subprocess", "contextlib", "signal", "select", "struct", "runpy", "mmap",
    "encodings", "site", "sitecustomize", "usercustomize", "msgspec", "os", "time", "fcntl",
)  # fmt: skip


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A working directory, also in PYTHONPATH, whose files shadow what we import."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    for name in SHADOWS:
        text = f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + ' ')\nraise SystemExit(66)\n"
        (cwd / f"{name}.py").write_text(text)
    monkeypatch.chdir(cwd)
    return tmp_path / "ran"


def run(command: list[str], **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60,
        env=os.environ | more,
    )  # fmt: skip


@pytest.mark.programs
@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        ("migrate.guests.watchdog", [], b"k"),
        ("migrate.qemu.socket_keeper_process", ["0"], b"k"),
        ("migrate.guests.writer_watch", ["0", "0"], b""),
        ("migrate.guests.demo.process", ["no-number"], b""),
        ("migrate.guests.demo.check", ["me"], b""),
        ("migrate.views.drawing", [], b""),
    ],
)
def test_no_file_of_the_working_directory_runs(hostile, module, arguments, said):
    more = {"PYTHONPATH": os.getcwd(), "PYTHONSTARTUP": "os.py", "PYTHONSAFEPATH": ""}
    found = run(helper_process.command(module, *arguments), **more)
    assert not hostile.exists(), hostile.read_text()
    assert found.stdout == said
    assert found.returncode != 66
    # our module has run
    assert (
        not found.stderr
        or module.replace(".", "/") in found.stderr.decode()
        or (b"demo_check" in found.stderr)
    )


@pytest.mark.programs
def test_demo_guest_moves_in_a_hostile_directory(hostile):
    receiver, address = destination()
    from tests.programs import Program

    source = Program("migrate-src", "--guest", "demo:1m", address)
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0
    pid = guest_pid(receiver.out + receiver.err)
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert not [one for one in environment if one.startswith(b"PYTHON")]
    finally:
        end_guest(pid)
    assert not hostile.exists(), hostile.read_text()


def test_helper_runs_the_package_that_starts_it(tmp_path):
    """Another package called migrate may be installed, or lie beside ours."""
    code = "import migrate, sys; print(migrate.__path__[0], *sys.argv)"
    (tmp_path / "packages" / "migrate").mkdir(parents=True)
    command = helper_process.command("migrate.guests.watchdog")
    boot = command[3].replace("runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)",
                              code)  # fmt: skip
    assert boot != command[3]
    found = run([*command[:3], boot, *command[4:], "one", "two"])
    assert found.stdout.decode().split() == [str(PACKAGE), "migrate.guests.watchdog", "one", "two"]
    # a directory that is on the path already (a wheel's) keeps its place
    found = run([*command[:3], "import sys; print(*sys.path, sep='\\n')"])
    packages = [one for one in found.stdout.decode().split("\n") if one.endswith("-packages")]
    boot = boot.replace("print(", "print(sys.path.count(root), ")
    found = run([*command[:3], boot, packages[0], *command[5:]])
    assert found.stdout.startswith(b"1 "), found.stderr


def test_unknown_path_of_python_is_an_error(monkeypatch):
    for nothing in ("", None, "python3"):
        monkeypatch.setattr(sys, "executable", nothing)
        with pytest.raises(MigrationError, match="the path of Python is not known"):
            helper_process.command("migrate.guests.watchdog")


def test_no_other_module_starts_python():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if path.name == "helper_process.py":
            continue
        for node in ast.walk(ast.parse(text)):
            assert not (isinstance(node, ast.Attribute) and node.attr == "executable"), path
        assert not re.search(r"os\.(exec|spawn|posix_spawn)|python3? -m(?! migrate\.manual)", text)


@pytest.mark.asyncio
async def test_helper_that_dies_is_reported() -> None:
    helper = await HelperProcess.start(
        "migrate.guests.watchdog", died="the watchdog has died", patience=20
    )
    assert await helper.ask(b"r") == b""
    os.kill(helper.pid, signal.SIGKILL)
    with pytest.raises(MigrationError, match="the watchdog has died"):
        await helper.ask(b"r")
    await helper.close()


@pytest.mark.asyncio
async def test_helper_that_never_starts_is_killed_and_reported() -> None:
    with pytest.raises(MigrationError, match="no answer"):
        await HelperProcess.start(
            "migrate.guests.demo.check", "me", died="no answer", patience=20, quiet=True
        )
