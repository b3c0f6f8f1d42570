"""The live view on terminals of all sizes, and the state in which it leaves them."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from migrate.events import Notice, SourceEvent
from migrate.statistics import Statistics, Status
from migrate.views.history import History
from migrate.views.live import BLOCKS, Live, picture, sparkline, stacked
from tests.programs import BIN, destination, end_guest, guest_pid
from tests.story import story

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
FACTS = {"guest": "demo guest, process 1", "destination": "tcp:h:1", "downtime limit": "300 ms"}


def shown(width: int, height: int = 40, until: str = "end", rounds: int = 3) -> str:
    history = History()
    for event, s in story(rounds):
        history.observe(event, s)
        if event == until:
            break
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(picture(history, FACTS, width, height))
    text = console.file.getvalue()
    assert isinstance(text, str)
    return text


def test_frame_contents():
    text = shown(100)
    for words in (
        "demo guest, process 1 → tcp:h:1", "completed", "0 B of 64.0 MiB", "on the wire",
        "56.0 MiB", "8.0 MiB", "840.0 KiB  as 2.0 KiB", "cache hits", "99.0%",
        "50 ms, 67 ms expected",
    ):  # fmt: skip
        assert words in text, words


def test_frame_shows_predicted_and_allowed_downtime():
    assert "200 ms of 300 ms allowed" in shown(100, until="round")


@pytest.mark.parametrize("width", [20, 40, 60, 80, 139, 140, 250])
def test_frame_fits_terminal_width(width):
    text = shown(width, rounds=30)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "completed" in text or width < 30


@pytest.mark.parametrize("width", [40, 80, 160])
def test_frame_fits_terminal_height(width):
    assert len(shown(width, 24, rounds=30).splitlines()) <= 24


def test_markup_in_guest_name_is_literal():
    history = History()
    for event, s in story():
        history.observe(event, s)
    console = Console(file=io.StringIO(), width=100)
    console.print(picture(history, {**FACTS, "guest": "[red]x[/red]"}, 100, 30))
    assert "[red]x[/red]" in console.file.getvalue()


@given(st.lists(st.floats(0, 1e15), max_size=100), st.integers(1, 60))
def test_sparkline_width(values, width):
    line = sparkline(values, width)
    assert len(line) == min(len(values), width)
    assert set(line) <= set(BLOCKS[1:])


@given(st.lists(st.integers(0, 10**12), min_size=3, max_size=3), st.integers(8, 60))
def test_stacked_bar_width(values, width):
    assert len(stacked([(value, "red") for value in values], width).plain) == width


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nothing_is_drawn_in_the_pause(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    history, stream, now = History(), Terminal(), [0.0]
    view = Live(history, "migrate-src", stream, clock=lambda: now[0])
    view.describe(FACTS)
    written = {}
    for event, s in story():
        now[0] += 10.0
        before = stream.tell()
        history.observe(event, s)
        view.end(s) if event == "end" else view.observe(event, s)
        written.setdefault((event, s.status), stream.tell() - before)
        if event == "paused":  # what the last round tells
            before = stream.tell()
            view.observe(SourceEvent.PROGRESS, s)
            assert stream.tell() == before
    assert written["status", "device"] > 0
    assert written["paused", "device"] == 0
    assert written["status", "completed"] == 0
    assert written["end", "completed"] > 0


def test_frame_rate_and_notices(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    history, stream, now = History(), Terminal(), [0.0]
    view = Live(history, "migrate-src", stream, clock=lambda: now[0])
    s = Statistics(status=Status.ACTIVE, total=1 << 20)
    history.observe(SourceEvent.STATUS, s)
    view.observe(SourceEvent.STATUS, s)
    frames = 0
    for tick in range(100):
        now[0] = tick / 100
        before = stream.tell()
        view.observe(SourceEvent.PROGRESS, s)
        frames += stream.tell() > before
    assert frames <= 5
    view.observe(Notice("something [bold]is[/bold]"), s)
    view.clear()
    assert "migrate-src: something [bold]is[/bold]" in stream.getvalue()
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is back


# ---------------------------------------------------------------- a real terminal


class Session:
    """A migrate-src on a new terminal."""

    def __init__(self, *arguments: str, columns: int = 100, rows: int = 40) -> None:
        self.leader, follower = pty.openpty()
        self.resize(columns, rows)
        self.before = termios.tcgetattr(follower)
        environment = {**os.environ, "TERM": "xterm-256color"}
        for name in ("NO_COLOR", "COLUMNS", "LINES"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [str(BIN / "migrate-src"), "--retry", "0", *arguments], stdin=follower,
            stdout=follower, stderr=follower, env=environment, start_new_session=True,
        )  # fmt: skip
        self.follower = follower
        self.raw = ""

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.leader, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read_until(self, pattern: str) -> None:
        while not re.search(pattern, ESCAPE.sub("", self.raw)):
            self.raw += os.read(self.leader, 65536).decode(errors="replace")

    def end(self) -> int:
        """Reads on to the end; the exit code."""
        os.set_blocking(self.leader, False)
        while True:
            over = self.process.poll()
            try:
                while text := os.read(self.leader, 65536).decode(errors="replace"):
                    self.raw += text
            except BlockingIOError:
                pass
            if over is not None:
                break
            time.sleep(0.02)
        self.after = termios.tcgetattr(self.follower)
        os.close(self.follower)
        os.close(self.leader)
        return over

    def assert_restored(self) -> None:
        assert self.after == self.before
        hidden, back = self.raw.rfind("\x1b[?25l"), self.raw.rfind("\x1b[?25h")
        assert 0 <= hidden < back

    @property
    def text(self) -> str:
        return ESCAPE.sub("", self.raw)

    @property
    def last_frame(self) -> str:
        return "╭" + self.text.rpartition("╭")[2].partition("╯")[0]


GUEST = ("--guest", "demo:16m,hot=4m,fill=random", "--max-bandwidth", "16m")


@pytest.mark.programs
def test_last_frame_of_a_real_migration():
    receiver, address = destination()
    session = Session(*GUEST, address)
    assert session.end() == 0
    assert receiver.wait() == 0
    end_guest(guest_pid(receiver.out))
    session.assert_restored()
    frame = session.last_frame
    assert "completed" in frame
    assert "0 B of 16.0 MiB" in frame
    final = session.text.rpartition("╯")[2]
    downtime = re.search(r"downtime: (\d+) milliseconds", final)
    assert downtime
    assert f"{downtime[1]} ms" in frame
    rounds = re.search(r"dirty sync count: (\d+)", final)
    assert rounds
    assert re.search(rf"completed\s+round {rounds[1]} ", frame)
    assert "moving demo guest" in session.text


@pytest.mark.programs
def test_interrupt_restores_terminal():
    receiver, address = destination()
    session = Session(*GUEST, "--max-bandwidth", "2m", address)
    session.read_until("active")
    session.resize(70, 30)  # narrower: lines that were drawn are wrapped
    session.process.send_signal(signal.SIGWINCH)
    time.sleep(0.5)
    session.process.send_signal(signal.SIGINT)
    assert session.end() == 130
    receiver.wait()
    end_guest(guest_pid(session.text.replace("\r\n", "")))
    session.assert_restored()
    assert "cancelled; the guest runs on here" in session.text
    assert "cancelled" in session.last_frame


@pytest.mark.programs
@pytest.mark.parametrize(
    ("variable", "value", "drawn"),
    [("TERM", "dumb", False), ("NO_COLOR", "1", True)],
)
def test_no_color_and_dumb_terminal(monkeypatch, variable, value, drawn):
    real = subprocess.Popen

    def popen(*arguments, env=None, **others):
        return real(*arguments, env={**(env or os.environ), variable: value}, **others)

    monkeypatch.setattr(subprocess, "Popen", popen)
    receiver, address = destination()
    session = Session(*GUEST, address)
    assert session.end() == 0
    receiver.wait()
    end_guest(guest_pid(receiver.out))
    assert ("╭" in session.raw) == drawn
    assert not re.search(r"\x1b\[[0-9;]*3[1-7]m", session.raw)  # no colour
    if not drawn:
        assert "\x1b" not in session.raw
        assert "round 1 took" in session.raw


def test_quiet_draws_nothing():
    receiver, address = destination()
    session = Session(*GUEST, "-q", address)
    assert session.end() == 0
    receiver.wait()
    end_guest(guest_pid(receiver.out))
    assert "╭" not in session.raw


@pytest.mark.programs
def test_stopped_terminal_does_not_stop_migration():
    receiver, address = destination()
    session = Session(*GUEST, address)
    session.read_until("active")
    termios.tcflow(session.follower, termios.TCOOFF)  # ^S
    assert receiver.wait() == 0
    end_guest(guest_pid(receiver.out))
    termios.tcflow(session.follower, termios.TCOON)
    assert session.end() == 0
    assert "Migration status: completed" in session.text
    session.assert_restored()
