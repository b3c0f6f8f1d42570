"""Printing fails, in every possible way, and the migration completes all the same."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from migrate.guests.watchdog import Found
from migrate.ownership.journal import Journal
from migrate.ownership.stored_journals import journals
from proto.wire.ownership import Role
from tests.outlets import NASTY, SHOWN, full_pipe
from tests.programs import BIN, Program

GUEST_BYTES = 300_000
LISTENING_SECONDS = 60


@contextmanager
def gone() -> Iterator[int]:
    """Yield the writing end of a pipe whose reader is gone."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@contextmanager
def stopped_pipe(*, blocking: bool) -> Iterator[int]:
    """Yield the writing end of a full pipe that is not read."""
    with full_pipe() as (_, writing):
        os.set_blocking(writing, blocking)
        yield writing


@contextmanager
def terminal(*, hung_up: bool) -> Iterator[int]:
    """Yield a terminal that was closed, or is stopped (^S)."""
    leader, follower = pty.openpty()
    if hung_up:
        os.close(leader)
    else:
        termios.tcflow(follower, termios.TCOOFF)
    yield follower
    os.close(follower)
    if not hung_up:
        os.close(leader)


@contextmanager
def full_disk() -> Iterator[int]:
    with open("/dev/full", "wb") as file:
        yield file.fileno()


WAYS: dict[str, Any] = {
    "full disk": full_disk,
    "no reader": gone,
    "stopped reader": lambda: stopped_pipe(blocking=True),
    "stopped reader, non-blocking": lambda: stopped_pipe(blocking=False),
    "stopped terminal": lambda: terminal(hung_up=False),
    "closed terminal": lambda: terminal(hung_up=True),
}


STARTED: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def none_is_left() -> Iterator[None]:
    """End the programs of a failed test."""
    yield
    for program in STARTED:
        program.kill()
        program.wait()
    STARTED.clear()


def started(
    name: str, *words: str | bytes, printing: int | None = None, shell: str = "",
    **environment: str,
) -> subprocess.Popen[bytes]:  # fmt: skip
    """Start a program with both streams on `printing`; shell -- further redirections."""
    program = subprocess.Popen(
        ["/bin/sh", "-c", f'exec "$0" "$@" {shell}', str(BIN / name), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if printing is None else printing,
        stderr=subprocess.DEVNULL if printing is None else printing,
        env=os.environ | {"TERM": "xterm"} | environment,
    )
    STARTED.append(program)
    return program


def await_file(path: str | bytes | Path, program: subprocess.Popen[bytes]) -> None:
    """Wait until a program has made a file."""
    until = time.monotonic() + LISTENING_SECONDS
    while not os.path.exists(path):
        assert program.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)


class Move:
    """A migration of a file guest between two programs, one of which cannot print."""

    def __init__(self, directory: Path) -> None:
        self.guest, self.output = directory / "guest", directory / "output"
        self.ran, self.socket = directory / "ran", directory / "socket"
        self.before_source: Callable[[], object] = lambda: None
        self.guest.write_bytes(os.urandom(GUEST_BYTES))

    def run(self, fails: str, *words: str, **how: Any) -> None:
        """Migrate, and check the result. fails -- the program that gets `how` and `words`."""
        of = {fails: how}
        more = {fails: words}
        receiver = started(
            "migrate-dst", "--listen", f"unix:{self.socket}", "--output", str(self.output),
            "--on-complete", f"touch {self.ran}", "--retry", "0",
            *more.get("migrate-dst", ()), **of.get("migrate-dst", {}),
        )  # fmt: skip
        await_file(self.socket, receiver)
        self.before_source()
        source = started(
            "migrate-src", "--guest", f"file:{self.guest}", "--retry", "0",
            *more.get("migrate-src", ()), f"unix:{self.socket}", **of.get("migrate-src", {}),
        )  # fmt: skip
        assert source.wait(60) == 0
        assert receiver.wait(60) == 0
        assert self.ran.exists(), "--on-complete"
        assert self.output.read_bytes() == self.guest.read_bytes()


@pytest.fixture
def move(tmp_path: Path) -> Move:
    return Move(tmp_path)


@pytest.mark.programs
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["migrate-src", "migrate-dst"])
def test_failing_output_changes_nothing(name: str, way: str, move: Move) -> None:
    with WAYS[way]() as printing:
        move.run(name, printing=printing)


SLOW = pytest.mark.programs
# The quick set has each way once, in one of the two programs.
NAMES_AND_WAYS = [
    pytest.param(name, way, marks=[] if number % 2 == turn else SLOW)
    for turn, name in enumerate(["migrate-src", "migrate-dst"])
    for number, way in enumerate(WAYS)
]


@pytest.mark.parametrize(("name", "way"), NAMES_AND_WAYS)
def test_failing_log_output_changes_nothing(name: str, way: str, move: Move) -> None:
    with WAYS[way]() as printing:
        move.run(name, "-vv", printing=printing)


@pytest.mark.parametrize(
    "shell", [*(pytest.param(one, marks=SLOW) for one in ("<&-", ">&-", "2>&-")), "<&- >&- 2>&-"]
)
@pytest.mark.parametrize("name", ["migrate-src", "migrate-dst"])
def test_closed_descriptors_change_nothing(name: str, shell: str, move: Move) -> None:
    move.run(name, shell=shell)


@pytest.mark.parametrize(
    ("words", "way"),
    [
        pytest.param(words, way, marks=[] if row == column else SLOW, id=f"{words[-1]}-{way}")
        for row, words in enumerate([["--json"], ["--events", "json"], ["--events", "json:2"]])
        for column, way in enumerate(["stopped reader", "full disk", "no reader"])
    ],
)
def test_failing_machine_output_changes_nothing(words: list[str], way: str, move: Move) -> None:
    with WAYS[way]() as printing:
        move.run("migrate-src", *words, printing=printing)


def test_failing_destination_result_changes_nothing(move: Move) -> None:
    with full_disk() as printing:
        move.run("migrate-dst", "--json", printing=printing)


@pytest.mark.parametrize("name", ["migrate-src", "migrate-dst"])
def test_ascii_locale_changes_nothing(name: str, move: Move) -> None:
    move.guest = move.guest.rename(move.guest.with_name("größe"))
    move.output = move.output.with_name("Ausgabe für größe")
    with open(move.socket.with_name("said"), "wb") as said:
        move.run(name, printing=said.fileno(), PYTHONIOENCODING="ascii:strict")
    text = move.socket.with_name("said").read_bytes().decode("ascii")
    assert r"gr\xf6\xdfe" in text


def test_textfile_failure_is_reported_once(move: Move) -> None:
    metrics = move.guest.with_name("metrics")
    metrics.mkdir()
    move.before_source = lambda: shutil.rmtree(metrics)
    with open(move.guest.with_name("said"), "wb") as said:
        words = ["--metrics-textfile", str(metrics / "file")]
        move.run("migrate-dst", *words, printing=said.fileno())
    text = move.guest.with_name("said").read_text()
    assert text.count("--metrics-textfile: No such file or directory") == 1


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "environment",
    [{}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["utf-8", "ascii"],
)
def test_file_names_of_any_bytes(environment: dict[str, str], tmp_path: Path) -> None:
    directory = os.path.join(os.fsencode(tmp_path), NASTY)
    os.mkdir(directory)

    def named(what: bytes) -> bytes:
        return os.path.join(directory, what + NASTY)

    guest, place, socket = named(b"guest"), named(b"place"), named(b"socket")
    Path(os.fsdecode(guest)).write_bytes(os.urandom(GUEST_BYTES))
    common = ["--json", "--retry", "60s", "--journal", named(b"journal")]
    outputs = [tmp_path / "source", tmp_path / "destination"]
    with ExitStack() as stack:
        said = [stack.enter_context(open(path, "wb")).fileno() for path in outputs]
        receiver = started(
            "migrate-dst", *common, "--listen", b"unix:" + socket, "--output", place,
            "--metrics-textfile", named(b"metrics"), "--qmp", b"unix:" + named(b"qmp"),
            "--on-complete", b'test -f "$MIGRATE_OUTPUT" && touch "' + named(b"ran") + b'"',
            printing=said[1], **environment,
        )  # fmt: skip
        await_file(socket, receiver)
        source = started(
            "migrate-src", *common, "--guest", b"file:" + guest, "--report", named(b"report"),
            "--metrics-textfile", named(b"numbers"), "--qmp", b"unix:" + named(b"asked"),
            b"unix:" + socket, printing=said[0], **environment,
        )  # fmt: skip
        assert source.wait(60) == 0
        assert receiver.wait(60) == 0
    there = set(os.listdir(directory))
    made = (b"place", b"journal", b"metrics", b"ran", b"report", b"numbers")
    assert {os.path.basename(named(one)) for one in made} <= there
    with open(place, "rb") as arrived, open(guest, "rb") as left:
        assert arrived.read() == left.read()
    shown = SHOWN if not environment else SHOWN.replace(r"\u202e", r"\xe2\x80\xae")
    for path in outputs:
        text = path.read_text("ascii")
        assert all(line.isprintable() for line in text.splitlines())
        assert shown in text
    result = json.loads(outputs[1].read_text().splitlines()[-1])
    assert result["running"].endswith(f"place{shown} is complete, 293.0 KiB")
    report = Path(os.fsdecode(named(b"report"))).read_text("utf-8")
    assert f"guest{shown}" in report


def test_journal_file_name_in_each_locale(tmp_path: Path) -> None:
    """A program that cron starts reads what one that a user started has written."""
    path = tmp_path / "größe \udcff"
    path.write_bytes(b"guest")
    journal = Journal(Role.SOURCE, bytes(16), str(tmp_path / "journals"))
    journal.begin(guest={"kind": "file", "path": str(path), "pids": [[1, "2"]]})
    journal.close(keep=True)
    code = (
        "import sys\n"
        "from migrate.ownership.stored_journals import journals\n"
        "from proto.wire.ownership import Role\n"
        "found, = journals(Role.SOURCE, sys.argv[1])\n"
        "assert found.facts['guest']['pids'] == [[1, '2']]\n"
        "assert open(found.facts['guest']['path'], 'rb').read() == b'guest'\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "journals")], check=True, timeout=60,
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )  # fmt: skip
    (again,) = journals(Role.SOURCE, str(tmp_path / "journals"))
    assert again.facts["guest"]["path"] == str(path)


def test_writer_with_undecodable_name_is_stopped(move: Move) -> None:
    code = (
        "import mmap, os, sys\n"
        "open('/proc/self/comm', 'wb').write(b'\\xff) R 1\\xe2\\n')\n"
        "memory = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 0)\n"
        "print(flush=True)\n"
        "while True: memory[:8] = os.urandom(8)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(move.guest)], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        assert writer.stdout.read(1) == b"\n"
        move.run("migrate-src", "--pid", str(writer.pid))
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()


# ---------------------------------------------------------------- help, and the other programs


@pytest.mark.parametrize("word", ["--help", "--version"])
@pytest.mark.parametrize("name", ["migrate-src", "migrate-dst", "migrate-ctl", "migrate-stream"])
def test_unprintable_help_is_no_traceback(name: str, word: str, tmp_path: Path) -> None:
    with full_disk() as full, open(tmp_path / "said", "wb") as said:
        program = subprocess.run(
            [BIN / name, word], stdout=full, stderr=said, timeout=60, check=False
        )
    # Printing is the work of the last two.
    assert program.returncode == (name in ("migrate-ctl", "migrate-stream"))
    sentence = f"{name}: standard output: No space left on device\n"
    assert (tmp_path / "said").read_text() == sentence
    with gone() as nobody:
        program = subprocess.run(
            [BIN / name, word], stdout=nobody, stderr=subprocess.PIPE, timeout=60, check=False
        )
    assert program.stderr == b""


class Asked:
    """A migrate-dst, and a migrate-ctl that queries it."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "qmp"
        self.program = Program("migrate-dst", "--listen", "127.0.0.1:0", "--qmp",
                               f"unix:{self.socket}", "--stay")  # fmt: skip
        self.program.read_line("listening")

    def ask(
        self, *words: str, printing: int | None = None, given: bytes = b""
    ) -> tuple[int, str]:  # fmt: skip
        found = subprocess.run(
            [BIN / "migrate-ctl", self.socket, *words], stdout=printing, stderr=subprocess.PIPE,
            input=given, timeout=60, check=False,
        )  # fmt: skip
        return found.returncode, found.stderr.decode()


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Asked]:
    program = Asked(tmp_path)
    yield program
    program.program.kill()
    program.program.wait()


NO_SPACE = "migrate-ctl: No space left on device\n"


def test_unwritable_answer_is_reported(asked: Asked) -> None:
    with full_disk() as full:
        assert asked.ask("query-status", printing=full) == (1, NO_SPACE)
        assert asked.ask("info", "status", printing=full) == (1, NO_SPACE)
        # There is nothing to know but that it was done.
        code, said = asked.ask("migrate_cancel", "{}", printing=full)
        assert (code, said) == (0, NO_SPACE)


def test_script_continues_without_a_reader(asked: Asked) -> None:
    script = b"info status\ninfo status\nmigrate_set_cache_size 1m\n"
    with gone() as nobody:
        assert asked.ask(printing=nobody, given=script) == (0, "")
    found = subprocess.run(
        [BIN / "migrate-ctl", asked.socket, "query-migrate-cache-size"], capture_output=True,
        timeout=60, check=True,
    )  # fmt: skip
    assert json.loads(found.stdout) == 1 << 20


def test_wait_exit_code_without_output(tmp_path: Path) -> None:
    guest, socket = tmp_path / "guest", tmp_path / "qmp"
    guest.write_bytes(os.urandom(GUEST_BYTES))
    receiver = Program("migrate-dst", "--listen", f"unix:{tmp_path}/s", "--output",
                       f"{tmp_path}/output")  # fmt: skip
    receiver.read_line("listening")
    source = Program("migrate-src", "--guest", f"file:{guest}", "--qmp", f"unix:{socket}",
                     "--stay", f"unix:{tmp_path}/s")  # fmt: skip
    with full_disk() as full:
        found = subprocess.run(
            [BIN / "migrate-ctl", "--timeout", "60s", socket, "wait"], stdout=full,
            stderr=subprocess.PIPE, timeout=60, check=False,
        )  # fmt: skip
    assert (found.returncode, found.stderr.decode()) == (0, NO_SPACE)
    source.kill(signal.SIGTERM)
    assert source.wait() == 0
    assert receiver.wait() == 0


@pytest.mark.parametrize(
    ("way", "code", "said"),
    [
        ("full disk", 1, "migrate-stream: standard output: No space left on device\n"),
        ("no reader", 1, ""),
    ],
)
def test_unwritable_survey_is_reported(way: str, code: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "stream").write_bytes(b"QEVM\0\0\0\3")
    with WAYS[way]() as printing:
        found = subprocess.run(
            [BIN / "migrate-stream", tmp_path / "stream"], stdout=printing,
            stderr=subprocess.PIPE, timeout=60, check=False,
        )  # fmt: skip
    assert (found.returncode, found.stderr.decode()) == (code, said)


def test_watchdog_with_a_broken_standard_error_resumes_all_writers() -> None:
    """It fails to report the writer that it cannot resume, and must still resume the others."""
    writer = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ended = subprocess.Popen(["/bin/true"])
    ended.wait()
    with full_disk() as full, gone() as nobody:
        for printing in (full, nobody):
            watchdog = subprocess.Popen(
                [sys.executable, "-m", "migrate.guests.watchdog", str(ended.pid), str(writer.pid)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printing,
            )  # fmt: skip
            assert watchdog.stdin is not None
            assert watchdog.stdout is not None
            assert watchdog.stdout.read(1) == b"k"
            watchdog.stdin.write(b"p")
            watchdog.stdin.flush()
            assert watchdog.stdout.read(3) == bytes([ord("k"), Found.ENDED, Found.RUNS])
            writer.send_signal(signal.SIGSTOP)
            watchdog.stdin.close()
            assert watchdog.wait(60) == 0
            watchdog.stdout.close()
    writer.communicate(b"\n", timeout=60)  # it runs
    assert writer.returncode == 0
