"""Printing affects neither a program's work nor its exit code."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.output import printable
from migrate.output.outlet import MAX_WAITING_BYTES, Outlet
from migrate.output.streams import Output, behind
from tests.outlets import NASTY, SHOWN, full_pipe

# ---------------------------------------------------------------- text


@given(st.text(st.characters(exclude_categories=[])), st.integers(3, 40))
def test_printable_text_is_one_safe_line(text: str, limit: int) -> None:
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()
    assert printable(shown) == shown
    assert len(printable(text, limit)) <= limit
    if len(shown) <= limit:
        assert printable(text, limit) == shown
    if text.isprintable():
        assert shown == text


@given(st.binary(max_size=64))
def test_names_of_any_bytes_are_printable(name: bytes) -> None:
    shown = printable(os.fsdecode(name))
    assert shown.isprintable()
    if b"\\" not in name and name.isascii():
        assert shown.encode("latin-1").decode("unicode_escape").encode("latin-1") == name


def test_printable_escapes_can_be_read_back() -> None:
    assert printable(os.fsdecode(NASTY)) == SHOWN
    assert printable("größe → 1\xa0kB \x7f\x9b\ud800\U000e0001") == (
        r"größe → 1\xa0kB \x7f\x9b\ud800\U000e0001"
    )


# ---------------------------------------------------------------- an outlet


def emptied(reading: int) -> bytes:
    """Return the current content of a pipe."""
    taken = b""
    while select.select([reading], [], [], 0)[0]:
        taken += os.read(reading, 1 << 16)
    return taken


@pytest.mark.parametrize("blocking", [True, False])
def test_text_that_a_full_pipe_refuses_is_written_later(blocking: bool) -> None:
    with full_pipe() as (reading, writing):
        os.set_blocking(writing, blocking)
        stream = Output(writing)
        print("one", file=stream)
        print("two", file=stream, flush=True)
        assert behind(stream)
        assert os.get_blocking(writing) == blocking, "others share its mode"
        assert emptied(reading).strip(b"x") == b""
        assert not behind(stream)
        assert emptied(reading) == b"one\ntwo\n"
        stream.outlet.close()


def test_oldest_of_too_many_lines_are_left_out() -> None:
    with full_pipe() as (reading, writing):
        stream = Output(writing)
        for number in range(3000):
            print(f"{number:01000}", file=stream)
        assert stream.outlet.waiting_bytes <= MAX_WAITING_BYTES
        taken = emptied(reading).strip(b"x")
        while behind(stream):
            taken += emptied(reading)
        lines = (taken + emptied(reading)).decode().splitlines()
        left_out = re.fullmatch(r"\.\.\. (\d+) lines were left out: .*", lines[0])
        assert left_out
        assert [int(line) for line in lines[1:]] == list(range(int(left_out[1]), 3000))
        assert stream.outlet.lost == int(left_out[1])
        stream.outlet.close()


def test_reader_that_resumes_at_the_end_gets_all() -> None:
    with full_pipe() as (reading, writing):
        stream = Output(writing)
        print("the result", file=stream)
        taken = []
        reader = threading.Thread(target=lambda: taken.append(os.read(reading, 1 << 20)))
        reader.start()
        stream.flush_for(60.0)
        reader.join()
        assert emptied(reading) == b"the result\n"
        stream.outlet.close()


def test_stopped_terminal_gets_all_later() -> None:
    leader, follower = pty.openpty()
    attributes = termios.tcgetattr(follower)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(follower, termios.TCSANOW, attributes)
    stream = Output(follower)
    assert stream.isatty()
    termios.tcflow(follower, termios.TCOOFF)
    text = "→ a line\n" * 5000
    stream.write(text)
    assert behind(stream)
    assert os.get_blocking(follower), "the shell has it too"
    termios.tcflow(follower, termios.TCOON)
    taken = bytearray()
    while len(taken) < len(text.encode()):
        stream.flush()
        taken += os.read(leader, 65536)
    assert taken.decode() == text
    stream.outlet.close()
    os.close(follower)
    os.close(leader)


def test_failing_descriptor_keeps_its_error(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    os.close(leader)
    reading, gone = os.pipe()
    os.close(reading)
    with open("/dev/full", "wb") as full, open(tmp_path / "f", "w") as file:
        read_only = os.open(tmp_path / "f", os.O_RDONLY)
        closed = os.dup(read_only)
        os.close(closed)
        for fd, words in [
            (full.fileno(), "No space left"), (gone, "Broken pipe"),
            (follower, "Input/output error"), (read_only, "Bad file"), (closed, "Bad file"),
        ]:  # fmt: skip
            stream = Output(fd) if fd != closed else Output(fd, Outlet(fd))
            print("lost", file=stream)
            stream.flush()
            assert not behind(stream)
            assert stream.outlet.fault is not None
            assert words in str(stream.outlet.fault)
            assert stream.outlet.lost == 1
            stream.outlet.close()
        os.close(read_only)
        # Room that comes back is used again.
        stream = Output(file.fileno())
        stream.outlet.fault = OSError("earlier")
        print("here", file=stream)
        assert (tmp_path / "f").read_text() == "here\n"
    os.close(follower)
    os.close(gone)


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1", "utf-8", "cp1252"])
def test_characters_that_the_encoding_lacks_are_escaped(encoding: str, tmp_path: Path) -> None:
    with open(tmp_path / "f", "wb") as file:
        stream = Output(file.fileno(), encoding=encoding)
        print("größe → \udcff", file=stream)
    said = (tmp_path / "f").read_bytes().decode(encoding)
    assert said in ("gr\\xf6\\xdfe \\u2192 \\udcff\n", "größe \\u2192 \\udcff\n",
                    "größe → \\udcff\n")  # fmt: skip


def test_waiting_stream_raises_once() -> None:
    with open("/dev/full", "wb") as full:
        stream = Output(full.fileno(), waits=True)
        stream.write("kept until there is more of it")
        with pytest.raises(OSError, match=r"No space left on device: 'standard output'"):
            stream.flush()
        print("nothing is heard of this", file=stream, flush=True)


def test_waiting_stream_waits_for_its_reader() -> None:
    with full_pipe() as (reading, writing):
        stream = Output(writing, waits=True)
        text = "a line\n" * 100_000
        writer = threading.Thread(target=lambda: print(text, end="", file=stream, flush=True))
        writer.start()
        taken = b""
        while len(taken.lstrip(b"x")) < len(text):
            taken += os.read(reading, 1 << 16)
        writer.join()
        assert taken.lstrip(b"x").decode() == text
        stream.outlet.close()


# ---------------------------------------------------------------- the start and end of a program


def run(code: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code as a program of its own, with descriptors redirected by `shell`."""
    return subprocess.run(
        ["/bin/sh", "-c", f'exec "$0" -c "$1" {shell}', sys.executable, code],
        capture_output=True, text=True, env={**os.environ, **environment}, timeout=60, check=False,
    )  # fmt: skip


PROGRAM = """
import sys
from migrate.output import say
from migrate.output.run import run_program
def run():
    print("a result", "\\u2192")
    say("a sentence")
    return 7
run_program("name", run)
"""


@pytest.mark.parametrize("shell", ["", "<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_descriptors_are_opened(shell: str) -> None:
    code = (
        "import os, subprocess, sys\n"
        "from migrate.output.run import run_program\n"
        "def run():\n"
        "    print(sys.stdin.read(), 'out', flush=True)\n"
        "    print('err', file=sys.stderr)\n"
        "    shell = 'exec </dev/fd/0 && echo child && echo child >&2'\n"
        "    found = subprocess.run(shell, shell=True)\n"
        "    return 3 if os.open('/dev/null', 0) > 2 and found.returncode == 0 else 4\n"
        "run_program('name', run)\n"
    )
    found = run(code, f"</dev/null {shell}")
    assert found.returncode == 3
    assert ("child" in found.stdout) == (">&-" not in shell.replace("2>&-", ""))
    assert ("child" in found.stderr) == ("2>&-" not in shell)


@pytest.mark.parametrize("shell", [">/dev/full", "2>/dev/full", ">/dev/full 2>&1", ">&- 2>&-"])
def test_exit_code_is_that_of_the_program(shell: str) -> None:
    found = run(PROGRAM, shell)
    assert found.returncode == 7
    assert "Traceback" not in found.stderr
    assert "Exception ignored" not in found.stderr
    if shell == ">/dev/full":
        assert found.stderr == "a sentence\nname: standard output: No space left on device\n"


def test_strict_encoding_does_not_fail_a_program() -> None:
    found = run(PROGRAM, PYTHONIOENCODING="ascii:strict")
    assert (found.returncode, found.stdout) == (7, "a result \\u2192\n")


def test_both_streams_to_one_file_keep_their_order() -> None:
    found = run(PROGRAM, "2>&1")
    assert found.stdout == "a result →\na sentence\n"


def test_pipe_without_a_reader_does_not_fail_a_program() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], stdout=writing, stderr=writing, timeout=60, check=False
    )
    os.close(writing)
    assert found.returncode == 7


@pytest.mark.parametrize("number", [0, signal.SIGINT, signal.SIGTERM])
def test_end_of_a_program_waits_some_seconds_for_a_reader(number: int) -> None:
    """A signal ends the wait; the exit code stays that of the program."""
    with full_pipe() as (_, writing):
        code = PROGRAM.replace("return 7", "sys.stderr.flush(); return 7")
        if number:
            code = "from migrate.output import run as end\nend.EXIT_SECONDS = 3600.0\n" + code
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        assert process.stderr.readline() == "a sentence\n"
        if number:
            status = Path(f"/proc/{process.pid}/status")
            # Both handlers are there as soon as the end waits.
            while not 1 << signal.SIGTERM - 1 & int(
                re.search(r"SigCgt:\s*(\w+)", status.read_text())[1],
                16,  # type: ignore[index]
            ):
                time.sleep(0.01)
            process.send_signal(number)
        assert process.wait(60) == 7
        assert process.stderr.read() == ""
        process.stderr.close()


def test_program_in_the_background_is_not_stopped_by_its_terminal() -> None:
    """With `stty tostop` a terminal stops background programs that print to it."""
    code = (
        "import fcntl, os, sys, termios\n"
        "_, terminal = os.openpty()\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)\n"
        "    attributes = termios.tcgetattr(terminal)\n"
        "    attributes[3] |= termios.TOSTOP\n"
        "    termios.tcsetattr(terminal, termios.TCSANOW, attributes)\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os.setpgid(0, 0)\n"
        "        os.dup2(terminal, 1); os.dup2(terminal, 2)\n"
        "        exec(sys.argv[1])\n"
        "    status = os.waitpid(child, os.WUNTRACED)[1]\n"
        "    os._exit(99 if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status))\n"
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    found = subprocess.run([sys.executable, "-c", code, PROGRAM], timeout=60, check=False)
    assert found.returncode == 7
