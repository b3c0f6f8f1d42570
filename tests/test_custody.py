"""One owner, whatever fails: kill and disconnect real programs at each step of the hand-over.

Two guests must never run at once. When both sides are back and connected, exactly one runs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate.errors import UsageError
from migrate.guests.demo.handle import DemoProcess
from proto.wire.messages import MessageType
from tests.programs import (
    Program,
    children,
    crashing,
    destination,
    end_guest,
    look_at,
)
from tests.tap import Tap, of_kind

GUEST = "demo:8m,hot=2m,fill=random"


def counts(pid: int) -> bool:
    """Return whether a demo guest is running."""
    try:
        process = DemoProcess.attach(pid)
    except UsageError:
        return False
    try:
        before, end = (
            process.position,
            time.monotonic() + 1.5,
        )  # processors may be busy
        while process.position == before and time.monotonic() < end:
            time.sleep(0.02)
        return process.position != before
    finally:
        process.close()


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class Two:
    """A source and a destination with journals in one directory, and a tap between them.

    patience -- the --resolve-timeout of the programs that are started next
    """

    def __init__(
        self, directory: Path, when: Callable[..., bool] | None = None, patience: str = "60s"
    ) -> None:
        self.options = ["--journal", str(directory)]
        self.landed: list[int] = []
        self.patience = patience
        self.start_destination()
        self.port = self.address.rpartition(":")[2]
        self.tap = Tap(self.address, when or of_kind(MessageType.GO))

    def start_destination(self, *crash: str) -> None:
        listen = f"127.0.0.1:{getattr(self, 'port', 0)}"
        words = ["--listen", listen, "--resolve-timeout", self.patience, *self.options]
        self.receiver = _program("migrate-dst", words, crash)
        self.address = self.receiver.read_line(r"listening on (\S+)")[1]

    def start_source(self, *crash: str) -> None:
        words = ["--guest", GUEST, "--resolve-timeout", self.patience, *self.options]
        self.source = _program("migrate-src", [*words, self.tap.address], crash)
        self.here = int(self.source.read_line(r"moving demo guest, process (\d+)")[1])

    def look(self) -> None:
        """Remember the guests at the destination: they outlive its program."""
        for pid in children(self.receiver.process.pid):
            if pid not in self.landed:
                self.landed.append(pid)

    def running(self) -> list[str]:
        return ["source"] * counts(self.here) + [
            "destination" for pid in self.landed if counts(pid)
        ]

    def resolve(self, *words: str, side: str = "migrate-src") -> tuple[int, str]:
        program = Program(side, "resolve", *words, *self.options)
        code = program.wait()
        return code, program.out + program.err

    def close(self) -> None:
        for program in (getattr(self, "source", None), self.receiver):
            if program is not None:
                program.kill()
                program.wait()
        for pid in (getattr(self, "here", 0), *self.landed):
            if pid:
                end_guest(pid)


def _program(name: str, words: list[str], crash: tuple[str, ...]) -> Program:
    return crashing(name, words, *crash) if crash else Program(name, *words)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Callable[..., Two]]:
    made: list[Two] = []

    def make(*args: Any, **options: Any) -> Two:
        made.append(Two(tmp_path, *args, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


# ---------------------------------------------------------------- the connection


@pytest.mark.kills
@pytest.mark.parametrize("lost", [MessageType.GO, MessageType.RUNNING])
def test_cut_after_commit_is_resolved_and_completes(two, lost) -> None:
    """GO or its answer is lost: the source asks, and both sides complete."""
    both = two(of_kind(lost))

    def cut() -> None:
        both.look()
        raise OSError("cut")

    both.tap.act = cut
    both.start_source()
    assert both.source.wait() == 0, both.source.err
    assert "asking whose the guest is" in both.source.err
    assert both.receiver.wait() == 0, both.receiver.err
    assert both.running() == ["destination"]


@pytest.mark.kills
def test_cut_before_commit_leaves_guest_to_source(two) -> None:
    """READY is lost: the source resumes its guest at once; the destination times out."""
    both = two(of_kind(MessageType.READY), patience="1s")

    def cut() -> None:
        both.look()
        raise OSError("cut")

    both.tap.act = cut
    both.start_source()
    assert both.source.wait() == 1
    assert both.running() == ["source"]
    assert both.receiver.wait() == 1
    assert "it may come back and ask" in both.receiver.err
    assert both.running() == ["source"]
    assert both.resolve() == (0, f"nothing to settle in {both.options[1]}\n")


@pytest.mark.kills
def test_duplicate_go_starts_one_guest(two) -> None:
    """The source repeats GO on a new connection while the first GO is still under way."""
    both = two(of_kind(MessageType.GO))

    def stall() -> None:
        both.look()
        time.sleep(4)  # GO is late, but arrives

    both.tap.act = stall
    both.start_source()
    both.source.process.send_signal(signal.SIGSTOP)
    both.source.process.send_signal(signal.SIGCONT)
    assert both.source.wait() == 0, both.source.err
    assert both.receiver.wait() == 0, both.receiver.err
    assert both.running() == ["destination"]


# ---------------------------------------------------------------- killed at each line written

SOURCE_LINES = {
    # (moment, line): the owner in the end
    ("before", 1): "source",
    ("after", 1): "source",
    ("before", 2): "source",
    ("after", 2): "destination",
    ("before", 3): "destination",
    ("after", 3): "destination",
}


@pytest.mark.kills
@pytest.mark.parametrize(("moment", "line"), SOURCE_LINES)
def test_source_killed_at_each_journal_line(two, moment: str, line: int) -> None:
    """Line 1 has the facts, 2 is COMMITTED, 3 is DONE."""
    # The destination waits this long for DONE from a source that is dead.
    both = two(patience="2s" if line == 3 else "60s")
    both.tap.act = both.look
    both.start_source(moment, str(line))
    assert both.source.wait() == -signal.SIGKILL
    both.look()
    assert len(both.running()) <= 1
    if line == 3:  # the destination has ended; a new one answers from its journal
        both.receiver.wait()
        both.patience = "60s"
        both.start_destination()
    code, said = both.resolve()
    assert code == 0, said
    until(lambda: both.running() == [SOURCE_LINES[moment, line]])
    both.receiver.kill(signal.SIGTERM)
    both.receiver.wait()
    assert both.resolve()[1].startswith("nothing to settle")
    until(lambda: both.running() == [SOURCE_LINES[moment, line]])


DESTINATION_LINES = {
    ("before", 1): "source",
    ("after", 1): "source",
    ("before", 2): "destination",
    ("after", 2): "destination",
    ("before", 3): "destination",
    ("after", 3): "destination",
}


@pytest.mark.kills
@pytest.mark.parametrize(("moment", "line"), DESTINATION_LINES)
def test_destination_killed_at_each_journal_line(two, moment: str, line: int) -> None:
    """Line 1 is PREPARED, 2 is OWNER, 3 is started. Another program continues from its journals."""
    both = two(of_kind(MessageType.COMPLETE))
    both.receiver.kill(signal.SIGTERM)
    both.receiver.wait()
    both.start_destination(moment, str(line))
    both.tap.act = both.look
    both.start_source()
    assert both.receiver.wait() == -signal.SIGKILL
    assert len(both.running()) <= 1
    expected = DESTINATION_LINES[moment, line]
    if expected == "source":
        both.patience = "1s"  # else the source must find it in time
    both.start_destination()
    status = both.source.wait()
    assert status == (1 if expected == "source" else 0), both.source.err
    until(lambda: both.running() == [expected])
    time.sleep(1.2)  # a prepared guest would have been aborted by now
    assert both.running() == [expected]
    both.receiver.kill(signal.SIGTERM)
    both.receiver.wait()
    assert both.resolve(side="migrate-dst")[1].startswith("nothing to settle")


def test_both_killed_at_go_are_resolved_after_restart(two) -> None:
    both = two(of_kind(MessageType.GO))

    def kill() -> None:
        both.look()
        both.receiver.kill()
        both.source.kill()
        raise OSError("cut")

    both.tap.act = kill
    both.start_source()
    both.source.wait()
    both.receiver.wait()
    time.sleep(0.2)
    assert both.running() == []
    code, said = both.resolve()
    assert code == 3
    assert "start migrate-dst there again" in said
    both.start_destination()
    assert "a complete guest waits for its source" in both.receiver.err
    code, said = both.resolve()
    assert code == 0, said
    assert "the guest runs at the destination" in said
    assert both.running() == ["destination"]


def test_guest_returns_to_source_after_destination_aborts(two) -> None:
    """Its operator aborts while the source cannot reach it; the source later learns of it."""
    both = two(of_kind(MessageType.GO))

    def kill() -> None:
        both.look()
        both.receiver.kill()
        raise OSError("cut")

    both.tap.act = kill
    both.start_source()
    both.receiver.wait()
    code, said = both.resolve("", "--keep", "source", side="migrate-dst")
    assert code == 0, said
    assert "ABORTED" in said
    both.start_destination()
    assert both.source.wait() == 1, both.source.err
    assert "the destination has given the guest up" in both.source.err
    assert both.running() == ["source"]


# ---------------------------------------------------------------- a person decides


def cut_off(both: Two) -> str:
    """Lose GO and end both sides; return the id of the migration."""
    both.patience = "1s"

    def kill() -> None:
        both.look()
        both.receiver.kill()
        raise OSError("cut")

    both.tap.act = kill
    both.start_source()
    both.receiver.wait()
    assert both.source.wait() == 9
    assert "look there first" in both.source.err
    assert both.running() == []
    [name] = [file.stem for file in Path(both.options[1]).glob("*.source")]
    assert f"`migrate-src resolve {name}`" in both.source.err
    return name


def test_resolve_keep_source_needs_proof(two, tmp_path) -> None:
    both = two()
    name = cut_off(both)
    code, said = both.resolve(name, "--keep", "source")
    assert code == 2
    assert f"--proof {name}.destination" in said
    assert "it runs twice then" in said
    code, said = both.resolve(name, "--keep", "source", "--proof", f"{tmp_path}/{name}.destination")
    assert code == 2
    assert "says PREPARED: that does not prove it" in said
    code, said = both.resolve(name, "--keep", "source", "--proof", f"{tmp_path}/{name}.source")
    assert code == 2
    assert "is not the other side's journal" in said
    assert both.running() == []
    code, said = both.resolve(name, "--keep", "source", side="migrate-dst")
    assert code == 0, said
    code, said = both.resolve(name, "--keep", "source", "--proof", f"{tmp_path}/{name}.destination")
    assert code == 0, said
    assert both.running() == ["source"]


def test_resolve_keep_destination_with_source_journal(two, tmp_path) -> None:
    both = two()
    name = cut_off(both)
    code, said = both.resolve(name, side="migrate-dst")
    assert code == 9
    assert "no GO has come from the source" in said
    code, said = both.resolve(
        name, "--keep", "destination", "--proof", f"{tmp_path}/{name}.source", side="migrate-dst"
    )
    assert code == 0, said
    assert both.running() == ["destination"]
    both.start_destination()
    assert both.resolve(name)[0] == 0
    assert both.running() == ["destination"]


def test_resolve_keep_source_by_force(two) -> None:
    both = two()
    name = cut_off(both)
    code, said = both.resolve(name, "--keep", "source", "--force")
    assert code == 0, said
    assert both.running() == ["source"]


def test_source_with_stay_leaves_relinquished_guest_alive(two) -> None:
    """It may be the only copy: neither the end of the program nor a signal ends it."""
    both = two()
    both.options.append("--stay")
    both.patience = "1s"

    def kill() -> None:
        both.look()
        both.source.kill(signal.SIGTERM)
        both.receiver.kill()
        raise OSError("cut")

    both.tap.act = kill
    both.start_source()
    assert both.source.wait() == 9
    both.options.remove("--stay")
    assert both.running() == []
    code, said = both.resolve("", "--keep", "source", "--force")
    assert code == 0, said
    assert both.running() == ["source"]


def test_relinquished_guest_is_not_migrated_again(two) -> None:
    both = two()
    cut_off(both)
    receiver, address = destination()
    again = Program("migrate-src", "--guest", f"demo:pid={both.here}", address)
    assert again.wait() == 2
    assert "is not ours to move: it was given up" in again.err
    with pytest.raises(UsageError, match="is not ours to let run"):
        look_at(both.here)
    receiver.kill(signal.SIGTERM)
    receiver.wait()
    assert both.running() == []


# ---------------------------------------------------------------- files


def test_prepared_file_is_completed_after_destination_restart(tmp_path) -> None:
    """Killed between OWNER and the rename: the next migrate-dst renames the file."""
    shm = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="xbmigrate-test-"))
    memory, output = shm / "memory", shm / "output"
    memory.write_bytes(os.urandom(4 << 20))
    options = ["--journal", str(tmp_path)]
    try:
        with subprocess.Popen(["sleep", "100"]) as writer:
            receiver = _program(
                "migrate-dst",
                ["--listen", "127.0.0.1:0", "--output", str(output), *options],
                ("after", "3"),
            )
            address = receiver.read_line(r"listening on (\S+)")[1]
            source = Program(
                "migrate-src", "--guest", f"file:{memory}", "--pid", str(writer.pid), *options,
                address,
            )  # fmt: skip
            assert receiver.wait() == -signal.SIGKILL
            assert not output.exists()
            assert [name for name in os.listdir(shm) if name.endswith(".xbmigrate")]
            port = address.rpartition(":")[2]
            second, _ = destination(*options, "--output", str(output) + "2", listen=port)
            assert "is complete" in second.err
            assert source.wait() == 0, source.err
            assert output.read_bytes() == memory.read_bytes()
            assert sorted(os.listdir(shm)) == ["memory", "output"]
            state = Path(f"/proc/{writer.pid}/stat").read_text().rpartition(")")[2].split()[0]
            assert state == "T"
            second.kill(signal.SIGTERM)
            second.wait()
            writer.kill()
    finally:
        shutil.rmtree(shm)


def test_resolve_resumes_writer_of_a_killed_source(tmp_path) -> None:
    """The source paused it but never wrote COMMITTED, so the destination cannot own it."""
    shm = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="xbmigrate-test-"))
    memory = shm / "memory"
    memory.write_bytes(os.urandom(1 << 20))
    options = ["--journal", str(tmp_path)]
    try:
        with subprocess.Popen(["sleep", "100"]) as writer:
            receiver, address = destination(
                *options, "--output", str(shm / "output"), "--resolve-timeout", "1s"
            )
            source = _program(
                "migrate-src",
                ["--guest", f"file:{memory}", "--pid", str(writer.pid), *options, address],
                ("before", "2"),
            )
            assert source.wait() == -signal.SIGKILL

            def state() -> str:
                return Path(f"/proc/{writer.pid}/stat").read_text().rpartition(")")[2].split()[0]

            assert state() == "T"
            resolve = Program("migrate-src", "resolve", *options)
            assert resolve.wait() == 0, resolve.err
            assert "the guest runs here" in resolve.out
            assert state() != "T"
            assert receiver.wait() == 1
            assert not (shm / "output").exists()
            writer.kill()
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(shm)


def test_on_complete_runs_after_destination_restart(tmp_path) -> None:
    """Killed when GO arrives: the next migrate-dst with the same arguments completes everything."""
    shm = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="xbmigrate-test-"))
    memory, output, done = shm / "memory", shm / "output", shm / "done"
    memory.write_bytes(os.urandom(4 << 20))
    options = [
        "--journal",
        str(tmp_path),
        "--output",
        str(output),
        "--on-complete",
        f"touch {done}",
    ]
    try:
        with subprocess.Popen(["sleep", "100"]) as writer:
            receiver, address = destination(*options)
            tap = Tap(address, of_kind(MessageType.GO))

            def kill() -> None:
                receiver.kill()
                raise OSError("cut")

            tap.act = kill
            source = Program(
                "migrate-src", "--guest", f"file:{memory}", "--pid", str(writer.pid),
                "--journal", str(tmp_path), tap.address,
            )  # fmt: skip
            receiver.wait()
            assert not output.exists()
            second, _ = destination(*options, listen=address.removeprefix("tcp:"))
            assert source.wait() == 0, source.err
            assert second.wait() == 0, second.err
            assert "completed and verified" in second.out
            assert done.exists()
            assert output.read_bytes() == memory.read_bytes()
            writer.kill()
    finally:
        shutil.rmtree(shm)
