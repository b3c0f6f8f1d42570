"""A terminal that takes nothing keeps nobody waiting, and gets all of it later."""

from __future__ import annotations

import io
import os
import pty
import termios
import threading

import pytest

from migrate.views.terminal import Terminal


@pytest.fixture
def ends():
    leader, follower = pty.openpty()
    attributes = termios.tcgetattr(follower)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(follower, termios.TCSANOW, attributes)
    stream = os.fdopen(follower, "w")
    terminal = Terminal(stream)
    yield leader, follower, terminal
    terminal.close()
    stream.close()
    os.close(leader)


def test_what_a_stopped_terminal_does_not_take_comes_later(ends):
    leader, follower, terminal = ends
    assert terminal.isatty()
    termios.tcflow(follower, termios.TCOOFF)
    text = "→ a frame\n" * 5000
    terminal.write(text)
    terminal.flush()
    assert terminal.behind
    termios.tcflow(follower, termios.TCOON)
    taken = bytearray()

    def read() -> None:
        while len(taken) < len(text.encode()):
            taken.extend(os.read(leader, 65536))

    reader = threading.Thread(target=read)
    reader.start()
    terminal.drain()
    assert not terminal.behind
    reader.join()
    assert taken.decode() == text


def test_the_shared_description_still_blocks(ends):
    _, follower, _ = ends
    assert os.get_blocking(follower)


def test_a_terminal_that_is_gone_takes_all():
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as stream:
        terminal = Terminal(stream)
        os.close(leader)
        terminal.write("nobody reads this")
        terminal.drain()
        assert not terminal.behind
        terminal.close()


def test_what_is_no_terminal_is_refused(tmp_path):
    with open(tmp_path / "f", "w") as file, pytest.raises(OSError, match=r"Inappropriate ioctl"):
        Terminal(file)
    with pytest.raises(io.UnsupportedOperation):
        Terminal(io.StringIO())
