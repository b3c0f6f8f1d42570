"""The dry run with the real programs: its output, no transfer, and the next source."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from migrate.guests.demo.handle import DemoProcess
from migrate.guests.demo.layout import State
from proto.wire.messages import MessageType
from tests.authority import Authority
from tests.programs import Program, destination, end_guest, guest_pid, look_at
from tests.tap import Tap

DEMO = "demo:4m,hot=1m,stride=4096,fill=random"
JOURNAL = Path(os.environ["MIGRATE_JOURNAL"])
LABELS = [
    "Migration status", "predicted total time", "predicted downtime", "predicted transferred ram",
    "predicted dirty sync count", "predicted dirty tracking", "total ram", "sampled", "round trip",
    "measured throughput",
    "duplicate", "bytes per dirty page", "xbzrle encoding rate", "xbzrle cache miss rate",
    "xbzrle overflow rate",
]  # fmt: skip


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def wait_until_ended(pid: int) -> None:
    end = time.monotonic() + 60
    while not ended(pid):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.programs
def test_dry_run_prints_prediction_and_frees_destination() -> None:
    kinds: set[MessageType] = set()

    def see(kind: MessageType, _head: bytes, _channel: int) -> bool:
        kinds.add(kind)
        return False

    receiver, address = destination()
    tap = Tap(address, see)
    before = sorted(JOURNAL.iterdir())
    source = Program("migrate-src", "--dry-run", "--guest", DEMO, tap.address)
    assert source.wait() == 0, source.err
    text = source.out.splitlines()
    assert text[0] == "dry run: nothing was moved"
    labels = [line.partition(":")[0] for line in text]
    assert [label for label in labels[1:] if not label.startswith("dirty in")] == LABELS
    assert all(re.fullmatch(r"[^:]+: \S.*", line) for line in text)
    wait_until_ended(guest_pid(source.err))
    assert kinds == {
        MessageType.HELLO, MessageType.PING, MessageType.PONG, MessageType.PROBE,
        MessageType.PROBED,
    }  # fmt: skip
    assert sorted(JOURNAL.iterdir()) == before
    again = Program("migrate-src", "-n", "--json", "--guest", DEMO, address)
    assert again.wait() == 0, again.err
    result = json.loads(again.out)
    assert result["dry-run"] is True
    assert result["status"] == "completed"
    assert result["ram"]["total"] == 4 << 20
    source = Program("migrate-src", "--guest", DEMO, address)
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0, receiver.err
    there = guest_pid(receiver.out)
    try:
        assert look_at(there)[2] == -1
    finally:
        end_guest(there)
    assert receiver.err.count("measured the path to here: nothing was moved") == 2
    assert "refused" not in receiver.err


@pytest.mark.programs
def test_dry_run_leaves_running_demo_guest_movable() -> None:
    receiver, address = destination()
    other, nowhere = destination()
    first = Program("migrate-src", "--guest", DEMO, "--max-rounds", "1", "--downtime-limit", "0",
                    nowhere)  # fmt: skip
    assert first.wait() == 7
    other.wait()
    pid = guest_pid(first.err)
    guest = DemoProcess.attach(pid)
    source = Program("migrate-src", "--dry-run", "--guest", f"demo:pid={pid}", address)
    while source.process.poll() is None:
        assert guest.state == State.RUNNING  # it is never paused
        time.sleep(0.001)
    assert source.wait() == 0, source.err
    assert guest.state == State.RUNNING
    guest.close()
    source = Program("migrate-src", "--guest", f"demo:pid={pid}", address)
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0
    end_guest(guest_pid(receiver.out))


@pytest.mark.programs
def test_dry_run_makes_no_file_and_stops_no_writer(shm: Path) -> None:
    memory, output = shm / "memory", shm / "output"
    memory.write_bytes(os.urandom(1 << 20) + bytes(1 << 20))
    (shm / "there").mkdir()
    receiver, address = destination("--output", str(shm / "there" / "output"))
    with subprocess.Popen([sys.executable, "-c", "import time\nwhile 1: time.sleep(0.001)"]) as w:
        try:
            source = Program(
                "migrate-src", "-n", "--json", "--guest", f"file:{memory}", "--pid", str(w.pid),
                address,
            )  # fmt: skip
            while source.process.poll() is None:
                assert " T " not in Path(f"/proc/{w.pid}/stat").read_text()
                assert not list((shm / "there").iterdir())
                time.sleep(0.001)
            assert source.wait() == 0, source.err
        finally:
            w.kill()
    result = json.loads(source.out)
    assert result["measured"]["duplicate"] == 256
    assert not output.exists()
    receiver.kill(signal.SIGINT)
    receiver.wait()


@pytest.mark.programs
def test_dry_run_that_would_not_converge() -> None:
    receiver, address = destination()
    guest = "demo:8m,stride=4096,fill=random"
    slow = ["--capability", "xbzrle=off", "--max-bandwidth", "2m"]
    source = Program("migrate-src", "-n", "--guest", guest, *slow, address)
    assert source.wait() == 7, source.err
    assert "Migration status: would not converge (no progress" in source.out
    assert "measured throughput: 1" in source.out  # 16.8 mbps
    source = Program(
        "migrate-src", "-n", "--json", "--guest", guest + ",rate=2000", *slow, "--auto-converge",
        address,
    )  # fmt: skip
    assert source.wait() == 0, source.err
    result = json.loads(source.out)
    assert result["status"] == "completed"
    assert result["cpu-throttle-percentage"] >= 20
    receiver.kill(signal.SIGINT)
    receiver.wait()


def test_interrupted_dry_run_leaves_nothing() -> None:
    receiver, address = destination()
    source = Program("migrate-src", "--dry-run", "--guest", DEMO, address)
    source.read_line("sampling")
    source.kill(signal.SIGINT)
    assert source.wait() == 130
    assert "nothing was moved" in source.err
    assert "Traceback" not in source.err
    wait_until_ended(guest_pid(source.err))
    receiver.kill(signal.SIGINT)
    receiver.wait()


@pytest.mark.programs
def test_dry_run_over_tls(tmp_path: Path) -> None:
    authority = Authority()
    for directory, party in (("there", "server"), ("here", "client")):
        authority.trust(tmp_path / directory)
        authority.issue(tmp_path / directory, party)
    receiver, address = destination("--tls-creds", str(tmp_path / "there"))
    source = Program("migrate-src", "-n", "--tls-creds", str(tmp_path / "here"), address)
    assert source.wait() == 0, source.err
    assert "would complete" in source.out
    source = Program("migrate-src", "-n", address)
    assert source.wait() == 5
    receiver.kill(signal.SIGINT)
    receiver.wait()
