"""Our own processes run our code and no other, whatever lies in the working directory."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import migrate
from migrate.errors import MigrationError
from migrate.guests import isolated
from tests.programs import destination, end_guest, guest_pid

PACKAGE = Path(migrate.__file__).parent
SHADOWS = (
    "migrate", "proto", "subprocess", "contextlib", "signal", "select", "struct", "runpy", "mmap",
    "encodings", "site", "sitecustomize", "usercustomize", "msgspec", "os", "time", "fcntl",
)  # fmt: skip


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """The working directory, and PYTHONPATH, with files in the place of what we import."""
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


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        ("migrate.guests.guard", [], b"k"),
        ("migrate.qemu.holder", ["0"], b"k"),
        ("migrate.guests.lookout", ["0", "0"], b""),
        ("migrate.guests.demo_process", ["no-number"], b""),
        ("migrate.guests.demo_check", ["me"], b""),
        ("migrate.views.drawing", [], b""),
    ],
)
def test_nothing_of_the_working_directory_is_run(hostile, module, arguments, said):
    more = {"PYTHONPATH": os.getcwd(), "PYTHONSTARTUP": "os.py", "PYTHONSAFEPATH": ""}
    found = run(isolated.command(module, *arguments), **more)
    assert not hostile.exists(), hostile.read_text()
    assert found.stdout == said
    assert found.returncode != 66
    # it is our module that has run
    assert (
        not found.stderr
        or module.replace(".", "/") in found.stderr.decode()
        or (b"demo_check" in found.stderr)
    )


def test_a_demo_guest_moves_in_a_hostile_directory(hostile):
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


def test_the_helper_runs_the_code_of_the_package_that_starts_it(tmp_path):
    """Not that of another package called migrate: one that was installed, or lies beside."""
    code = "import migrate, sys; print(migrate.__path__[0], *sys.argv)"
    (tmp_path / "packages" / "migrate").mkdir(parents=True)
    command = isolated.command("migrate.guests.guard")
    boot = command[3].replace("runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)",
                              code)  # fmt: skip
    assert boot != command[3]
    found = run([*command[:3], boot, *command[4:], "one", "two"])
    assert found.stdout.decode().split() == [str(PACKAGE), "migrate.guests.guard", "one", "two"]
    # a directory that is on the path already, as that of a wheel, is not moved
    found = run([*command[:3], "import sys; print(*sys.path, sep='\\n')"])
    packages = [one for one in found.stdout.decode().split("\n") if one.endswith("-packages")]
    boot = boot.replace("print(", "print(sys.path.count(root), ")
    found = run([*command[:3], boot, packages[0], *command[5:]])
    assert found.stdout.startswith(b"1 "), found.stderr


def test_it_is_said_where_the_path_of_python_is_not_known(monkeypatch):
    for nothing in ("", None, "python3"):
        monkeypatch.setattr(sys, "executable", nothing)
        with pytest.raises(MigrationError, match="the path of Python is not known"):
            isolated.command("migrate.guests.guard")


def test_no_other_module_starts_python_by_itself():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if path.name == "isolated.py":
            continue
        for node in ast.walk(ast.parse(text)):
            assert not (isinstance(node, ast.Attribute) and node.attr == "executable"), path
        assert not re.search(r"os\.(exec|spawn|posix_spawn)|python3? -m(?! migrate\.manual)", text)
