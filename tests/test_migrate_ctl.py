"""--stay, --qmp and migrate-ctl: what containers and services rest on, with real programs."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate.cli import control, line_editing, migrate_ctl
from migrate.errors import UsageError
from tests.programs import BIN, Program, destination, end_guest, guest_pid, look_at
from tests.requirements import need, need_root

SMALL = "demo:16m,hot=4m,fill=random"


def ask(path: Path, command: str, *more: str) -> tuple[int, str, str]:
    """migrate-ctl's (exit code, output, error)."""
    program = Program("migrate-ctl", str(path), command, *more)
    return program.wait(), program.out, program.err


def answer(path: Path, command: str) -> Any:
    code, out, err = ask(path, command)
    assert code == 0, err
    return json.loads(out)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


class Pair:
    """Both programs, staying, with sockets `src` and `dst`."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.src, self.dst = directory / "src", directory / "dst"
        self.receiver, address = destination("--stay", "--qmp", f"unix:{self.dst}")
        self.source = Program(
            "migrate-src", "--stay", "--qmp", f"unix:{self.src}", "--guest", SMALL, *options,
            address,
        )  # fmt: skip

    def close(self) -> None:
        for program in (self.source, self.receiver):
            program.kill(signal.SIGTERM)  # SIGKILL would leave its guest behind
            program.wait(20)


@pytest.fixture
def pair(tmp_path: Path):
    made: list[Pair] = []

    def make(*options: str) -> Pair:
        made.append(Pair(tmp_path, *options))
        return made[-1]

    yield make
    for one in made:
        one.close()


# ---------------------------------------------------------------- a migration, asked about


@pytest.mark.programs
def test_queries_during_a_migration(pair) -> None:
    """Both stay: the source can be asked how it went, and the guest is there until `quit`."""
    both = pair()
    code, out, _ = ask(both.src, "wait")
    assert code == 0
    assert json.loads(out)["status"] == "completed"
    assert answer(both.src, "query-status") == {"running": False, "status": "postmigrate"}
    assert answer(both.dst, "query-status") == {"running": True, "status": "running"}
    arrived = answer(both.dst, "query-migrate")
    assert arrived["status"] == "completed"
    assert arrived["guest"] == {"kind": "demo", "size": 16 << 20}
    pid = guest_pid(arrived["running"])
    before, after, wrong = look_at(pid, 0.3)
    assert (wrong, after > before) == (-1, True)
    assert answer(both.src, "quit") == {}
    assert answer(both.dst, "quit") == {}
    assert (both.source.wait(), both.receiver.wait()) == (0, 0)
    assert not alive(pid)
    assert not both.src.exists()
    assert not both.dst.exists()


@pytest.mark.programs
def test_status_before_and_during_migration(pair) -> None:
    both = pair("--max-bandwidth", "2m")
    until(lambda: answer(both.src, "query-migrate").get("status") == "active")
    assert answer(both.src, "query-status") == {"running": True, "status": "running"}
    assert answer(both.dst, "query-status") == {"running": False, "status": "inmigrate"}
    assert 0 < answer(both.src, "query-migrate")["ram"]["remaining"] <= 16 << 20


@pytest.mark.programs
def test_source_answers_while_connecting(tmp_path: Path) -> None:
    source = Program(
        "migrate-src", "--qmp", f"unix:{tmp_path}/src", "--guest", SMALL, "tcp:127.0.0.1:1"
    )
    assert answer(tmp_path / "src", "query-status") == {"running": False, "status": "prelaunch"}
    assert answer(tmp_path / "src", "query-migrate") == {"status": "setup"}
    assert answer(tmp_path / "src", "quit") == {}
    assert source.wait() == 143


# ---------------------------------------------------------------- how staying ends


@pytest.mark.programs
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_staying_destination_ends_guest_on_signal(pair, number: int) -> None:
    both = pair()
    assert ask(both.src, "wait")[0] == 0
    pid = guest_pid(answer(both.dst, "query-migrate")["running"])
    both.receiver.kill(number)
    assert both.receiver.wait() == 0
    until(lambda: not alive(pid))


@pytest.mark.programs
def test_staying_destination_ends_when_guest_ends(pair) -> None:
    both = pair()
    assert ask(both.src, "wait")[0] == 0
    os.kill(guest_pid(answer(both.dst, "query-migrate")["running"]), signal.SIGKILL)
    assert both.receiver.wait() == 0


@pytest.mark.programs
def test_failed_source_stays_with_its_guest(pair) -> None:
    """The guest is a child of migrate-src: in a container it would die with it."""
    both = pair("--max-bandwidth", "2m")
    pid = guest_pid(both.source.read_line(r"process \d+")[0])
    until(lambda: answer(both.src, "query-migrate").get("status") == "active")
    both.receiver.kill()
    both.source.read_line(r"runs on here, in process \d+, until this program is stopped")
    code, _, err = ask(both.src, "wait")
    assert code == 1
    assert "migrate-ctl: the migration has failed: " in err
    assert answer(both.src, "query-status") == {"running": True, "status": "running"}
    before, after, wrong = look_at(pid, 0.3)
    assert (wrong, after > before) == (-1, True)
    both.source.kill(signal.SIGTERM)
    assert both.source.wait() == 1
    until(lambda: not alive(pid))


@pytest.mark.programs
def test_signal_during_migration_ends_staying_source(pair) -> None:
    both = pair("--max-bandwidth", "2m")
    pid = guest_pid(both.source.read_line(r"process \d+")[0])
    until(lambda: answer(both.src, "query-migrate").get("status") == "active")
    assert answer(both.src, "quit") == {}
    assert both.source.wait() == 143
    assert both.receiver.wait() == 8
    until(lambda: not alive(pid))


@pytest.mark.programs
def test_socket_of_killed_program_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "src"
    options = ("--qmp", f"unix:{path}", "--guest")
    killed = Program("migrate-src", *options, "demo:8m")
    pid = guest_pid(killed.read_line(r"idle: demo guest, process \d+")[0])
    killed.kill()
    killed.wait()
    assert path.is_socket()
    try:
        again = Program("migrate-src", *options, f"demo:pid={pid}")
        assert answer(path, "query-status") == {"running": True, "status": "running"}
        second = Program("migrate-src", *options, f"demo:pid={pid}")
        assert second.wait() == 3
        assert "another program listens there" in second.err
        assert answer(path, "query-status") == {"running": True, "status": "running"}
        ask(path, "quit")
        assert again.wait() == 0
        assert not path.exists()
    finally:
        end_guest(pid)


@pytest.mark.programs
@pytest.mark.parametrize("option", ["--qmp", "--monitor"])
@pytest.mark.parametrize("program", ["migrate-src", "migrate-dst"])
def test_wrong_socket_is_a_usage_error(tmp_path: Path, program: str, option: str) -> None:
    (tmp_path / "file").write_text("precious")
    for path, says in (
        (tmp_path / "file", "the file there is not a socket, and is left as it is"),
        (Path("/sys/socket"), "no socket can be made in /sys: "),
    ):
        started = Program(program, option, f"unix:{path}")
        assert started.wait() == 2
        assert started.err.startswith(f"{program}: {option} unix:{path}: {says}")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.programs
def test_guest_outlives_programs_without_stay(tmp_path: Path) -> None:
    receiver, address = destination("--qmp", f"unix:{tmp_path}/dst")
    source = Program(
        "migrate-src", "--guest", SMALL, "--qmp", f"unix:{tmp_path}/src", "--max-bandwidth", "8m",
        address,
    )  # fmt: skip
    code, _, err = ask(tmp_path / "src", "wait")
    assert code in (0, 1)
    assert code == 0 or "--stay keeps it" in err
    assert (source.wait(), receiver.wait()) == (0, 0)
    pid = guest_pid(receiver.out)
    assert alive(pid)
    end_guest(pid)


@pytest.mark.programs
def test_file_guest_with_stay(tmp_path: Path) -> None:
    memory, output = tmp_path / "memory", tmp_path / "output"
    memory.write_bytes(b"guest" * 10_000)
    receiver, address = destination(
        "--stay", "--output", str(output), "--qmp", f"unix:{tmp_path}/d"
    )
    source = Program("migrate-src", "--guest", f"file:{memory}", address)
    assert source.wait() == 0, source.err
    until(lambda: answer(tmp_path / "d", "query-migrate").get("status") == "completed")
    assert output.read_bytes() == memory.read_bytes()
    assert answer(tmp_path / "d", "quit") == {}
    assert receiver.wait() == 0


@pytest.mark.programs
def test_destination_stays_after_failed_on_complete(tmp_path: Path) -> None:
    """The guest is here: ending would kill it."""
    receiver, address = destination(
        "--stay", "--on-complete", "false", "--qmp", f"unix:{tmp_path}/d"
    )
    source = Program("migrate-src", "--guest", SMALL, address)
    assert source.wait() == 0, source.err
    receiver.read_line(r"the guest is here and whole, but --on-complete 'false' failed")
    pid = guest_pid(answer(tmp_path / "d", "query-migrate")["running"])
    assert alive(pid)
    assert answer(tmp_path / "d", "quit") == {}
    assert receiver.wait() == 10


# ---------------------------------------------------------------- migrate-ctl's own errors


def test_migrate_ctl_errors(tmp_path: Path, capsys, pair) -> None:
    assert migrate_ctl.run([str(tmp_path / "none"), "query-status", "--timeout", "0.1s"]) == 3
    assert "no answer on" in capsys.readouterr().err
    assert migrate_ctl.run([str(tmp_path / "none"), "query-status", "nonsense"]) == 2
    assert "are not a JSON object" in capsys.readouterr().err
    assert migrate_ctl.run([]) == 2
    assert "required: PATH" in capsys.readouterr().err
    both = pair("--max-bandwidth", "2m")
    assert migrate_ctl.run([f"unix:{both.src}", "fly"]) == 1
    assert capsys.readouterr().out == "unknown command: 'fly'\n"
    assert migrate_ctl.run([f"unix:{both.src}", "query-flight"]) == 1
    assert "query-flight: The command query-flight has not been" in capsys.readouterr().err
    assert migrate_ctl.run([f"unix:{both.src}", "info", "migrate"]) == 0
    assert "Migration status: " in capsys.readouterr().out
    assert migrate_ctl.run([f"unix:{both.src}", "migrate", "-d", "tcp:a:1"]) == 1
    assert "migration process in progress" in capsys.readouterr().out
    assert migrate_ctl.run([f"unix:{both.src}", "query-commands"]) == 0
    assert '"quit"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["info migrate -a"], "info migrate -a"), (["info", "migrate"], "info migrate"),
        (["migrate", "-d", "unix:/tmp/a b"], 'migrate -d "unix:/tmp/a b"'),
        (["migrate_set_parameter", "tls-creds", ""], 'migrate_set_parameter tls-creds ""'),
        (["migrate", 'unix:/a"b'], 'migrate unix:/a"b'),
    ],
)  # fmt: skip
def test_shell_words_become_monitor_words(words, line, capsys) -> None:
    said = []

    class Noting(control.Control):
        def __init__(self) -> None:
            pass

        def say(self, line: str) -> str:
            said.append(line)
            return ""

    assert migrate_ctl.ask(Noting(), words[0], words[1:]) == 0
    assert said == [line]
    capsys.readouterr()


def test_answers_are_printable(capsys) -> None:
    class Hostile:
        def say(self, _line: str) -> str:
            return "one\x1b]0;title\x07\n\u202etwo\x9b2J\n"

    assert migrate_ctl.ask(Hostile(), "info migrate", []) == 0
    assert capsys.readouterr().out == "one\\x1b]0;title\\x07\n\\u202etwo\\x9b2J\n"


def test_unwritable_answer_is_one_sentence(pair) -> None:
    both = pair()
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [BIN / "migrate-ctl", str(both.dst), "query-status"],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=30, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "migrate-ctl: No space left on device"


def test_socket_that_does_not_speak_qmp(tmp_path: Path, capsys) -> None:
    receiver, _ = destination(listen=f"unix:{tmp_path}/migration")
    assert migrate_ctl.run([str(tmp_path / "migration"), "query-status", "--timeout", "0.3s"]) == 3
    assert "does not answer" in capsys.readouterr().err
    receiver.kill(signal.SIGTERM)
    assert receiver.wait() == 143


@pytest.mark.parametrize("chatter", [b'{"event": "MIGRATION"}\n', b"{"])
def test_endless_events_time_out(tmp_path: Path, capsys, chatter: bytes) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "qmp"))
    listener.listen()

    def talk() -> None:
        peer = listener.accept()[0]
        with peer, contextlib.suppress(OSError):
            peer.sendall(b'{"QMP": {}}\n')
            peer.recv(1000)
            peer.sendall(b'{"return": {}}\n')
            while True:
                peer.sendall(chatter)
                time.sleep(0.05)

    talking = threading.Thread(target=talk)
    talking.start()
    assert migrate_ctl.run([str(tmp_path / "qmp"), "query-status", "--timeout", "0.5s"]) == 3
    assert "not answer" in capsys.readouterr().err
    talking.join()
    listener.close()


@contextlib.contextmanager
def answering(path: Path, answer: bytes) -> Iterator[None]:
    """What listens on a socket, and says the same to each command."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def talk() -> None:
        peer = listener.accept()[0]
        with peer, contextlib.suppress(OSError):
            peer.sendall(b'{"QMP": {}}\n')
            said = b'{"return": {}}\n'
            while peer.recv(1000):
                peer.sendall(said)
                said = answer + b"\n"

    talking = threading.Thread(target=talk)
    talking.start()
    yield
    talking.join()
    listener.close()


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("query-status", b"[" * 200_000), ("query-status", b'{"return": ' + b"[" * 200_000),
        ("query-status", b'{"error": 7}'), ("query-status", b"7"),
        ("wait", b'{"return": "completed"}'), ("help", b'{"return": {"name": "help"}}'),
        ("help", b'{"return": ["help"]}'),
    ],
)  # fmt: skip
def test_malformed_answer_is_one_sentence(
    tmp_path: Path, capsys, command: str, answer: bytes
) -> None:
    with answering(tmp_path / "qmp", answer):
        assert migrate_ctl.run([str(tmp_path / "qmp"), command]) == 1
    assert capsys.readouterr().err == (
        f"migrate-ctl: the program that listens on {tmp_path}/qmp does not speak QMP\n"
    )


class Saying:
    """A Control whose monitor says the same to each line."""

    def __init__(self, text: str) -> None:
        self.text = text

    def say(self, _line: str) -> str:
        return self.text


def test_completion_has_printable_names_only() -> None:
    """They get into the line that is edited, which a terminal obeys."""
    said = Saying("info x y\n\n  \nzz\x9b31m a\nzz\u202e b\nquit c\nzz\x1b[2J\n")
    assert line_editing._names(said) == ["info", "quit", "info x", "quit c"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> Path:
    """Where the history is; nothing is there yet."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    return tmp_path / ".local/state/xbmigrate"


def test_history_is_kept_and_private(home: Path) -> None:
    readline = pytest.importorskip("readline")
    readline.clear_history()
    with line_editing.line_editing(Saying("")):
        readline.add_history("info status")
        readline.add_history("\u00fc")
    readline.clear_history()
    with line_editing.line_editing(Saying("")):
        assert readline.get_history_item(2) == "\u00fc"
        readline.add_history("quit")
    readline.clear_history()
    assert line_editing._read_history() == ["info status", "\u00fc", "quit"]
    assert (home / "history").stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700


@need_root("give a directory away")
@pytest.mark.parametrize("theirs", [True, False])
def test_inputrc_of_the_user(tmp_path: Path, theirs: bool) -> None:
    """Not that of another user, whose HOME sudo may have kept."""
    (tmp_path / ".inputrc").write_text('"x": "another word"\n')
    if theirs:
        os.chown(tmp_path, 65534, 65534)
    code = (
        "from migrate.cli import line_editing\n"
        "class Silent:\n    def say(self, line): return ''\n"
        "with line_editing.line_editing(Silent()): input()\n"
    )
    terminal, own = pty.openpty()
    program = subprocess.Popen(
        [sys.executable, "-c", code], stdin=own, stdout=own, stderr=own, start_new_session=True,
        env={**os.environ, "HOME": str(tmp_path), "TERM": "dumb"},
    )  # fmt: skip
    os.close(own)
    os.write(terminal, b"x\n")
    shown = b""
    with contextlib.suppress(OSError):  # it has ended
        while more := os.read(terminal, 4096):
            shown += more
    os.close(terminal)
    assert program.wait(20) == 0, shown
    assert (b"another word" in shown) is not theirs


@pytest.mark.parametrize("kind", ["link", "fifo", "directory of others"])
def test_history_follows_no_links(home: Path, kind: str) -> None:
    victim = home / "victim"
    line_editing._write_history(["ours"])
    victim.write_text("root's own\n")
    if kind == "directory of others":
        need(os.geteuid() == 0, "root, to give a directory away")
        os.chown(home, 65534, 65534)
    else:
        (home / "history").unlink()
        (home / "history").symlink_to(victim) if kind == "link" else os.mkfifo(home / "history")
    assert line_editing._read_history() == []
    line_editing._write_history(["a line"])
    assert victim.read_text() == "root's own\n"
    if kind == "directory of others":
        assert (home / "history").read_text() == "ours\n"


# ---------------------------------------------------------------- the demo guest's check


def check_demo(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-I", "-m", "migrate.guests.demo.check", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.programs
def test_demo_check(pair) -> None:
    from migrate.guests.demo.handle import DemoProcess
    from migrate.guests.demo.layout import Command

    both = pair()
    assert ask(both.src, "wait")[0] == 0
    pid = guest_pid(answer(both.dst, "query-migrate")["running"])
    code, said = check_demo(str(pid))
    assert code == 0
    assert "every one of its 16777216 bytes is right" in said
    process = DemoProcess.attach(pid)
    process.lock()
    try:
        code, said = check_demo(str(pid))
        assert code == 2
        assert "is being moved by another program" in said
        process.command(Command.PAUSE)
    finally:
        process.close()
    process = DemoProcess.attach(pid)
    process.memory[5_000_001] ^= 1
    process.close()
    code, said = check_demo(str(pid))
    assert code == 1
    assert "byte 5000001 of 16777216 is WRONG" in said


def test_demo_check_errors() -> None:
    code, said = check_demo("1")
    assert code == 2
    assert "no demo guest in process 1" in said
    assert check_demo("me")[0] == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [("{'a-b': 'ä'}", "ä"), ("{'a-b': 'say \"\\'\"'}", 'say "\'"'), ('{"a-b": "it\'s"}', "it's")],
)
def test_single_quoted_arguments(text: str, value: str) -> None:
    """As on the socket itself, and in QEMU."""
    assert migrate_ctl.arguments_of("migrate-x", [text]) == {"a-b": value}


def test_unmatched_quotes_are_refused() -> None:
    with pytest.raises(UsageError, match="not a JSON object"):
        migrate_ctl.arguments_of("migrate-x", ["{'a-b': 'it''s'}"])
