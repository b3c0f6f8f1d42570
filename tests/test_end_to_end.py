"""Whole migrations: real processes, real memory, and the death of either process."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.guests.demo.handle import DemoProcess
from proto.codec._batch_twin import GAP_MASK, HEAD, OP_DELTA, OP_MASK, OP_RAW
from proto.codec._xbzrle_twin import get_uleb
from proto.wire.messages import MessageType, Round, unpack
from tests.programs import (
    Program,
    destination,
    end_guest,
    ended_or_given_up,
    guest_pid,
    look_at,
)
from tests.tap import Tap, is_last_round, of_kind

pytestmark = pytest.mark.kills

SMALL = "demo:32m,hot=8m,stride=1024,fill=random"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def process_state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def assert_guest_is_right(pid: int, seconds: float = 0.2) -> None:
    """Assert that the guest makes at least one sweep in `seconds`, and that every byte is right."""
    before, after, wrong = look_at(pid, seconds)
    assert wrong == -1
    assert after > before


# ---------------------------------------------------------------- what must work


def test_demo_guest_runs_at_the_destination() -> None:
    receiver, address = destination()
    source = Program("migrate-src", "--json", "--guest", SMALL, address)
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0, receiver.err
    there, here = guest_pid(receiver.out), guest_pid(source.err)
    try:
        assert_guest_is_right(there)
        assert ended_or_given_up(here)
    finally:
        end_guest(there)
    result = json.loads(source.out)
    assert result["status"] == "completed"
    assert result["ram"]["remaining"] == 0
    assert result["ram"]["transferred"] > 32 << 20
    assert result["ram"]["normal"] + result["ram"]["duplicate"] >= 8192
    assert result["xbzrle-cache"]["pages"] > 0


@contextlib.contextmanager
def seed_writer(memory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the seed's load generator, a C program, on a shared file."""
    binary = memory.with_name("load")
    subprocess.run(["gcc", "-O2", "-o", binary, Path(__file__).parent / "seed_load.c"], check=True)
    with subprocess.Popen([binary, memory], stdout=subprocess.DEVNULL) as writer:
        try:
            while not memory.exists() or memory.stat().st_size == 0:
                time.sleep(0.01)
            time.sleep(0.2)
            yield writer
        finally:
            writer.kill()


def test_load_generator_of_the_seed_in_a_shared_file(shm: Path) -> None:
    """An unmodified C program writes until it is stopped; the copies are equal."""
    memory, output = shm / "memory", shm / "output"
    with seed_writer(memory) as writer:
        receiver, address = destination("--output", str(output))
        source = Program(
            "migrate-src", "--guest", f"file:{memory}", "--pid", str(writer.pid), address
        )
        assert source.wait() == 0, source.err
        assert receiver.wait() == 0, receiver.err
        assert process_state(writer.pid) == "T"  # it runs there, and only there
        assert sha256(memory) == sha256(output)
        assert len(set(output.read_bytes()[::1024])) <= 2  # one sweep, cut at one place
        assert "xbzrle pages: 0 " not in source.out


def test_lmdb_database_with_a_live_writer(shm: Path) -> None:
    lmdb = pytest.importorskip("lmdb", reason="lmdb is in the dev extra")
    with subprocess.Popen(
        [sys.executable, "-m", "tests.lmdb_writer", shm / "db"],
        stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent,
    ) as writer:  # fmt: skip
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"busy\n"
            (shm / "copy").mkdir()
            data, copy = shm / "db" / "data.mdb", shm / "copy" / "data.mdb"
            receiver, address = destination("--output", str(copy))
            source = Program(
                "migrate-src", "--guest", f"file:{data}", "--pid", str(writer.pid), address
            )
            assert source.wait() == 0, source.err
            assert receiver.wait() == 0, receiver.err
            assert sha256(data) == sha256(copy)
        finally:
            writer.kill()
    with (
        lmdb.open(str(shm / "copy"), readonly=True, lock=False) as environment,
        environment.begin() as transaction,
    ):
        entries = dict(transaction.cursor())
    turn = int(entries.pop(b"turn"))
    assert len(entries) == 5000
    for key, value in entries.items():
        number = int(key)
        written = max(t for t in (turn - back for back in range(250)) if number // 20 == t % 250)
        assert value == b"%06d:%012d" % (number, written) * 20


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 65536 + 5, 1_000_003, 3 << 20])
@pytest.mark.parametrize("content", ["zero", "random"])
def test_file_sizes(shm: Path, size: int, content: str) -> None:
    memory, output = shm / "memory", shm / "output"
    memory.write_bytes(bytes(size) if content == "zero" else random.Random(size).randbytes(size))
    receiver, address = destination("--output", str(output), "--json")
    source = Program("migrate-src", "--json", "--guest", f"file:{memory}", address)
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0, receiver.err
    assert output.read_bytes() == memory.read_bytes()
    result = json.loads(source.out)
    pages = -(-size // 4096)
    assert result["ram"]["duplicate" if content == "zero" else "normal"] == pages
    if content == "zero":
        assert result["ram"]["transferred"] < 1500
        assert output.stat().st_blocks == 0


@pytest.mark.parametrize("size", [64 << 30, 4 << 40], ids=["64 GiB", "4 TiB"])
def test_huge_sparse_file_takes_seconds(shm: Path, size: int) -> None:
    memory, output = shm / "memory", shm / "output"
    with memory.open("wb") as file:
        file.truncate(size)
        file.seek(5 << 30)
        file.write(b"here")
    receiver, address = destination("--output", str(output))
    source = Program("migrate-src", "--json", "--guest", f"file:{memory}", address)
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0, receiver.err
    assert output.stat().st_size == size
    assert output.stat().st_blocks * 512 <= 65536
    assert memory.stat().st_blocks * 512 <= 65536
    with output.open("rb") as file:
        file.seek(5 << 30)
        assert file.read(5) == b"here\0"
    assert json.loads(source.out)["ram"]["transferred"] < 20000


@pytest.mark.parametrize(
    ("options", "there"),
    [
        (["--cache-size", "4k"], []),
        (["--cache-size", "1m"], []),
        (["--cache-size", "256m"], []),
        (["--cache-size", "auto"], []),
        (["--cache-size", "auto", "--cache-max", "1m"], ["--cache-size", "8m"]),
        (["--page-size", "1k"], []),
        (["--page-size", "16k"], []),
        (["--capability", "xbzrle=off"], []),
        ([], ["--capability", "xbzrle=off"]),
        ([], ["--cache-size", "8m"]),
    ],
)
def test_parameters(options: list[str], there: list[str]) -> None:
    """With any parameters the memory is right, and the statistics report what was used."""
    receiver, address = destination(*there)
    guest = "demo:8m,hot=4m,rate=300000,fill=random"
    source = Program("migrate-src", "--json", "--guest", guest, *options, address)
    try:
        assert source.wait() == 0, source.err
        assert receiver.wait() == 0, receiver.err
        assert_guest_is_right(guest_pid(receiver.out))
    finally:
        end_guest(guest_pid(receiver.out or source.err))
    result = json.loads(source.out)
    off = "xbzrle=off" in options + there
    assert ("xbzrle-cache" not in result) == off
    if there and off:
        assert "the destination has no xbzrle" in source.err
    if "8m" in there:
        assert result["xbzrle-cache"]["cache-size"] == 8 << 20


def test_migration_over_a_unix_socket(shm: Path) -> None:
    path = shm / "socket"
    receiver, address = destination(listen=f"unix:{path}")
    assert address == f"unix:{path}"
    source = Program("migrate-src", "--guest", "demo:1m", address)
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0
    end_guest(guest_pid(receiver.out))
    assert not path.exists()


def test_on_complete_runs_when_the_guest_is_ours(shm: Path) -> None:
    (shm / "memory").write_bytes(b"x" * 5000)
    receiver, address = destination(
        "--output", str(shm / "out"), "--on-complete", f"cp $MIGRATE_OUTPUT {shm}/copied"
    )
    assert Program("migrate-src", "--guest", f"file:{shm}/memory", address).wait() == 0
    assert receiver.wait() == 0
    assert (shm / "copied").read_bytes() == b"x" * 5000


# ---------------------------------------------------------------- what must be refused


def test_file_guest_without_output_is_refused_before_any_page(shm: Path) -> None:
    (shm / "memory").write_bytes(bytes(1 << 20))
    receiver, address = destination()
    source = Program("migrate-src", "--guest", f"file:{shm}/memory", address)
    assert source.wait() == 4
    assert "this is a file guest: start migrate-dst with --output PATH" in source.err
    receiver.kill()
    receiver.wait()


def test_destination_keeps_listening_after_garbage() -> None:
    receiver, address = destination()
    host, port = address.removeprefix("tcp:").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        connection.settimeout(60)
        assert connection.recv(1 << 16)[:4] == b"XBM1"  # the reason, as an ERROR frame
    receiver.read_line("refused .*not an xbmigrate stream")
    source = Program("migrate-src", "--guest", "demo:1m", address)
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0
    end_guest(guest_pid(receiver.out))


def test_unstopped_writer_is_refused_before_anything_is_sent(shm: Path) -> None:
    """The writer is named and the migration refused, rather than copying a mixture."""
    memory = shm / "memory"
    memory.write_bytes(bytes(4 << 20))
    stop = threading.Event()

    def write() -> None:
        with memory.open("r+b") as file:
            value = 0
            while not stop.is_set():
                for offset in range(0, 4 << 20, 4096):
                    value += 1
                    os.pwrite(file.fileno(), value.to_bytes(8, "little"), offset)

    thread = threading.Thread(target=write)
    thread.start()
    receiver, address = destination("--output", str(shm / "out"))
    source = Program("migrate-src", "--guest", f"file:{memory}", address)
    status = source.wait()
    stop.set()
    thread.join()
    receiver.kill(signal.SIGTERM)
    receiver.wait()
    assert status == 2
    assert f"process {os.getpid()} (" in source.err
    assert "would go on writing a copy that is no longer the guest" in source.err
    assert "connecting" not in source.err
    assert not (shm / "out").exists()


def test_source_gives_advice() -> None:
    receiver, address = destination()
    source = Program(
        "migrate-src", "--guest", SMALL, "--cache-size", "1m", "--max-bandwidth", "16m",
        "--downtime-limit", "5000", address,
    )  # fmt: skip
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0
    end_guest(guest_pid(receiver.out))
    assert "migrate-src: advice: the working set is about 8.0 MiB: a cache of 8m" in source.err
    assert source.err.endswith("use --cache-size 8m\n")


def test_source_explains_why_it_does_not_converge() -> None:
    receiver, address = destination()
    source = Program(
        "migrate-src", "--guest", SMALL, "--capability", "xbzrle=off", "--max-bandwidth", "16m",
        "--max-rounds", "3", address,
    )  # fmt: skip
    assert source.wait() == 7
    assert "did not converge in 3 rounds" in source.err
    assert "the guest writes 2048 pages again in each round, 8.0 MiB" in source.err
    assert "the working set is about 8.0 MiB, and xbzrle is off" in source.err
    assert "--cache-size 8m" in source.err
    assert "advice:" not in source.err, "it is in the message already"
    assert receiver.wait() == 1 or receiver.process.returncode in (4, 7)
    pid = guest_pid(source.err)
    assert_guest_is_right(pid)
    end_guest(pid)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_cancelling_leaves_the_guest_running_and_a_second_attempt_succeeds(
    number: int, status: int
) -> None:
    receiver, address = destination()
    source = Program(
        "migrate-src", "--guest", SMALL, "--max-bandwidth", "16m", "--progress", "plain", address
    )
    source.read_line("round 1")
    time.sleep(0.3)
    source.kill(number)
    assert source.wait() == status
    assert receiver.wait() == 8
    assert "cancelled at the source" in receiver.err
    pid = guest_pid(source.err)
    assert_guest_is_right(pid)
    again(pid)


def again(pid: int) -> None:
    """Migrate the demo guest in process `pid`, and check it at the destination."""
    receiver, address = destination()
    source = Program("migrate-src", "--guest", f"demo:pid={pid}", address)
    try:
        assert source.wait() == 0, source.err
        assert receiver.wait() == 0, receiver.err
        assert_guest_is_right(guest_pid(receiver.out))
    finally:
        end_guest(guest_pid(receiver.out) if receiver.out else pid)


# ---------------------------------------------------------------- killed at the worst moment


MOMENTS = {
    **{
        kind.name: of_kind(kind)
        for kind in (
            MessageType.HELLO, MessageType.GUEST, MessageType.ACCEPT, MessageType.CACHE_SIZE,
            MessageType.PAGES, MessageType.ROUND, MessageType.ROUND_ACK, MessageType.COMPLETE,
            MessageType.READY,
        )
    },
    "LAST_ROUND": is_last_round,
}  # fmt: skip


# A connection that breaks before the destination has said a word is made again.
KILLED = [
    (moment, victim)
    for moment in MOMENTS
    for victim in ("source", "destination", "connection")
    if (moment, victim) != ("HELLO", "connection")
]


@pytest.mark.parametrize(("moment", "victim"), KILLED)
def test_killed_before_the_commit(moment: str, victim: str) -> None:
    """The guest runs on at the source only, and the next migration succeeds.

    READY is the last moment: the tap acts before it passes the message on.
    """
    receiver, address = destination("--resolve-timeout", "1s")
    tap = Tap(address, MOMENTS[moment])
    source = Program("migrate-src", "--guest", "demo:8m,hot=2m,fill=random", tap.address)
    pid = int(source.read_line(r"moving demo guest, process (\d+)")[1])

    def act() -> None:
        if victim == "source":
            source.kill()
        elif victim == "destination":
            receiver.kill()
        raise OSError("cut")

    tap.act = act
    status = source.wait()
    assert tap.acted.is_set()
    if moment in ("HELLO", "GUEST", "ACCEPT", "CACHE_SIZE"):
        receiver.kill()  # it refused a broken visitor and listens on
    received = receiver.wait()
    assert status != 0
    assert received != 0
    assert_guest_is_right(pid)
    again(pid)


def test_source_retries_after_silent_hang_up() -> None:
    receiver, address = destination()
    tap = Tap(address, of_kind(MessageType.HELLO))
    source = Program("migrate-src", "--guest", "demo:8m,hot=2m,fill=random", tap.address)
    pid = int(source.read_line(r"moving demo guest, process (\d+)")[1])

    def act() -> None:
        raise OSError("cut")

    tap.act = act
    try:
        assert source.wait() == 0, source.err
        assert tap.acted.is_set()
        assert "connecting again, for 10 s at most" in source.err
        assert receiver.wait() == 0, receiver.err
        assert_guest_is_right(guest_pid(receiver.out))
    finally:
        end_guest(guest_pid(receiver.out) if receiver.out else pid)


def test_guest_returns_when_destination_cannot_start_it(shm: Path) -> None:
    """The output's name is taken between READY and GO; the writer resumes at the source."""
    memory, output = shm / "memory", shm / "output"
    memory.write_bytes(os.urandom(1 << 20))
    with subprocess.Popen(["sleep", "100"]) as writer:
        try:
            receiver, address = destination("--output", str(output))
            tap = Tap(address, of_kind(MessageType.GO))
            tap.act = lambda: output.write_text("mine")
            source = Program(
                "migrate-src", "--guest", f"file:{memory}", "--pid", str(writer.pid), tap.address
            )
            assert source.wait() == 1, source.err
            assert "File exists" in source.err
            assert receiver.wait() == 1
            assert output.read_text() == "mine"
            assert process_state(writer.pid) != "T"
            assert sorted(os.listdir(shm)) == ["memory", "output"]
        finally:
            writer.kill()


@pytest.mark.parametrize("victim", ["source", "destination"])
def test_writer_resumes_when_one_side_is_killed(shm: Path, victim: str) -> None:
    """The writer is stopped in the last round, and must not stay stopped."""
    memory = shm / "memory"
    memory.write_bytes(os.urandom(4 << 20))
    with subprocess.Popen(["sleep", "100"]) as writer:
        try:
            # The frame may be on its way when the source dies: then the destination waits for it.
            receiver, address = destination(
                "--output", str(shm / "output"), "--resolve-timeout", "1s"
            )
            tap = Tap(address, MOMENTS["COMPLETE"])
            source = Program(
                "migrate-src", "--guest", f"file:{memory}", "--pid", str(writer.pid), tap.address
            )

            def act() -> None:
                assert process_state(writer.pid) == "T"
                (source if victim == "source" else receiver).kill()

            tap.act = act
            assert source.wait() != 0
            receiver.wait()
            for _ in range(200):
                if process_state(writer.pid) == "S":
                    break
                time.sleep(0.02)
            assert process_state(writer.pid) != "T"
            assert not (shm / "output").exists()
        finally:
            writer.kill()


def test_killed_at_random_moments() -> None:
    """The guest is intact after each of many kills, and is migrated in the end.

    The first round takes 4 s here, and the kills come within 1.2 s: always before the commit.
    """
    chance = random.Random(4444)
    receiver, address = destination()
    source = Program("migrate-src", "--guest", SMALL, "--max-bandwidth", "8m", address)
    pid = int(source.read_line(r"moving demo guest, process (\d+)")[1])
    for turn in range(6):
        time.sleep(chance.uniform(0, 1.2))
        (source if turn % 2 else receiver).kill()
        assert source.wait() != 0
        receiver.kill()  # it listens on where the source died before it had described a guest
        receiver.wait()
        assert_guest_is_right(pid)
        receiver, address = destination()
        source = Program(
            "migrate-src", "--guest", f"demo:pid={pid}", "--max-bandwidth", "8m", address
        )
    source.wait()
    receiver.wait()
    assert_guest_is_right(guest_pid(receiver.out))
    end_guest(guest_pid(receiver.out))


# ---------------------------------------------------------------- what a hostile review found


def test_replaced_guest_file_is_refused(shm: Path) -> None:
    memory, other = shm / "memory", shm / "other"
    memory.write_bytes(os.urandom(4 << 20))
    other.write_bytes(os.urandom(4 << 20))
    receiver, address = destination("--output", str(shm / "output"))
    tap = Tap(address, of_kind(MessageType.ROUND))
    tap.act = lambda: other.rename(memory)
    source = Program("migrate-src", "--guest", f"file:{memory}", tap.address)
    assert source.wait() == 1
    assert "replaced by another file" in source.err
    receiver.wait()
    assert not (shm / "output").exists()


def test_cancelled_pause_command_does_not_stop_the_guest_later(shm: Path) -> None:
    """However many signals come, the command ends before the writer is resumed, once."""
    memory, log = shm / "memory", shm / "log"
    memory.write_bytes(os.urandom(1 << 20))
    receiver, address = destination("--output", str(shm / "output"))
    source = Program(
        "migrate-src", "--guest", f"file:{memory}",
        "--pause-cmd", f"echo begin >> {log}; sleep 3; echo stopped >> {log}",
        "--resume-cmd", f"sleep 0.5; echo resumed >> {log}", address,
    )  # fmt: skip
    while not log.exists():
        time.sleep(0.01)
    source.kill(signal.SIGINT)
    time.sleep(0.1)
    source.kill(signal.SIGINT)
    assert source.wait() == 130, source.err
    receiver.wait()
    time.sleep(3)
    assert log.read_text().split() == ["begin", "resumed"]


def test_ended_writer_counts_as_stopped(shm: Path) -> None:
    memory = shm / "memory"
    memory.write_bytes(os.urandom(1 << 20))
    with subprocess.Popen(["sleep", "100"]) as writer:
        receiver, address = destination("--output", str(shm / "output"))
        tap = Tap(address, of_kind(MessageType.ROUND))

        def act() -> None:
            writer.kill()
            writer.wait()

        tap.act = act
        source = Program(
            "migrate-src", "--guest", f"file:{memory}", "--pid", str(writer.pid), tap.address
        )
        assert source.wait() == 0, source.err
        assert receiver.wait() == 0
    assert sha256(memory) == sha256(shm / "output")


def test_time_limit_applies_within_a_round() -> None:
    receiver, address = destination()
    source = Program(
        "migrate-src", "--json", "--guest", "demo:64m,hot=1m,fill=random", "--max-bandwidth", "8m",
        "--timeout", "1s", address,
    )  # fmt: skip
    assert source.wait() == 7
    receiver.wait()
    end_guest(guest_pid(source.err))
    assert json.loads(source.out)["total-time"] < 5000


def test_failing_on_complete_has_its_own_exit_code(shm: Path) -> None:
    (shm / "memory").write_bytes(b"x" * 5000)
    receiver, address = destination("--output", str(shm / "out"), "--on-complete", "false")
    assert Program("migrate-src", "--guest", f"file:{shm}/memory", address).wait() == 0
    assert receiver.wait() == 10
    assert "the guest is here and whole" in receiver.err
    assert (shm / "out").exists()


# ---------------------------------------------------------------- several channels


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("path", ["tcp", "unix"])
def test_demo_guest_over_many_channels(channels: int, path: str, shm: Path) -> None:
    listen = "127.0.0.1:0" if path == "tcp" else f"unix:{shm}/socket"
    receiver, address = destination("--json", listen=listen)
    source = Program(
        "migrate-src", "--json", "--guest", SMALL, "--channels", str(channels), address
    )
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0, receiver.err
    arrival, result = json.loads(receiver.out), json.loads(source.out)
    there, here = guest_pid(arrival["running"]), guest_pid(source.err)
    try:
        assert_guest_is_right(there)
        assert ended_or_given_up(here)
    finally:
        end_guest(there)
    assert result["ram"]["remaining"] == 0
    assert result["xbzrle-cache"]["pages"] > 0
    # they are equally fast: all channels but the first carry their share
    raw = result["ram"]["normal-bytes"]
    share = result["ram"]["multifd-bytes"] / result["ram"]["transferred"]
    assert raw >= 32 << 20
    assert share == pytest.approx((channels - 1) / channels, abs=0.15)
    assert arrival["ram"]["received"] <= result["ram"]["transferred"]


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_file_with_live_writer_over_many_channels(shm: Path, channels: int) -> None:
    memory, output = shm / "memory", shm / "output"
    with seed_writer(memory) as writer:
        receiver, address = destination("--output", str(output))
        source = Program(
            "migrate-src", "--guest", f"file:{memory}", "--pid", str(writer.pid),
            "--channels", str(channels), address,
        )  # fmt: skip
        assert source.wait() == 0, source.err
        assert receiver.wait() == 0, receiver.err
        assert process_state(writer.pid) == "T"
        assert sha256(memory) == sha256(output)
        assert "xbzrle pages: 0 " not in source.out
        assert f"\nchannels: {channels}\n" in source.out


@pytest.mark.parametrize("size", [1, 4097, (1 << 20) - 1, (3 << 20) + 5, 16 << 20])
@pytest.mark.parametrize("options", [[], ["--page-size", "16k"], ["--capability", "xbzrle=off"]])
def test_file_sizes_over_three_channels(shm: Path, size: int, options: list[str]) -> None:
    """Some channels then carry nothing; holes stay holes."""
    memory, output = shm / "memory", shm / "output"
    with memory.open("wb") as file:
        file.truncate(size)
        file.write(os.urandom(min(size, 2 << 20)))
    receiver, address = destination("--output", str(output))
    source = Program(
        "migrate-src", "--guest", f"file:{memory}", "--channels", "3", *options, address
    )
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0, receiver.err
    assert sha256(memory) == sha256(output)
    assert output.stat().st_blocks * 512 <= (2 << 20) + 65536


def pages_of(head: bytes) -> list[tuple[int, int]]:
    """Return the (page, count) of each record of a batch."""
    at, page, found = HEAD, int.from_bytes(head[4:12], "big"), []
    while at < len(head):
        op, gap = head[at] & OP_MASK, head[at] & GAP_MASK
        at += 1
        if gap == GAP_MASK:
            more, at = get_uleb(head, at, 9)
            gap += more
        page, count = page + gap, 1
        if op == OP_RAW:
            count, at = int.from_bytes(head[at : at + 2], "big"), at + 2
        elif op == OP_DELTA:
            length, at = get_uleb(head, at, 3)
            at += length
        else:
            count, at = get_uleb(head, at, 9)
        found.append((page, count))
        page += count
    return found


@pytest.mark.parametrize(("channels", "page_size"), [(2, 4096), (3, 1024), (4, 16384)])
def test_page_is_sent_once_per_round_over_all_channels(channels: int, page_size: int) -> None:
    receiver, address = destination()
    seen: dict[int, list[int]] = {}
    carried: set[int] = set()
    rounds: list[tuple[int, int]] = []

    def look(kind: MessageType, head: bytes, channel: int) -> bool:
        if kind is MessageType.PAGES:
            number = int.from_bytes(head[:4], "big")
            carried.add(channel)
            for page, count in pages_of(head):
                seen.setdefault(number, []).extend(range(page, page + count))
        elif kind is MessageType.ROUND:
            message = unpack(kind, head)
            assert isinstance(message, Round)
            rounds.append((message.number, channel))
        return False

    tap = Tap(address, look)
    guest = "demo:12m,hot=5m,stride=1024,fill=random"
    source = Program(
        "migrate-src", "--guest", guest, "--page-size", str(page_size), "--channels",
        str(channels), "--max-bandwidth", "24m", "--capability", "zstd=off", tap.address,
    )  # fmt: skip
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0, receiver.err
    assert_guest_is_right(guest_pid(receiver.out))
    end_guest(guest_pid(receiver.out))
    pages = (12 << 20) // page_size
    assert sorted(seen[1]) == list(range(pages))
    for each in seen.values():
        assert len(set(each)) == len(each)
    assert carried == set(range(channels))
    assert len(rounds) % channels == 0
    for at in range(0, len(rounds), channels):
        assert sorted(rounds[at : at + channels]) == [
            (at // channels + 1, channel) for channel in range(channels)
        ]


@pytest.mark.parametrize(
    ("moment", "cut"), [("JOINED", 2), *itertools.product(["PAGES", "ROUND"], [0, 1, 2])]
)
def test_lost_channel_ends_the_migration(shm: Path, moment: str, cut: int) -> None:
    """The guest runs on at the source, nothing is left at the destination, and a retry succeeds."""
    memory = shm / "memory"
    memory.write_bytes(os.urandom(24 << 20))
    before = sha256(memory)
    with subprocess.Popen(["sleep", "100"]) as writer:
        try:
            receiver, address = destination("--output", str(shm / "output"))
            tap = Tap(address, of_kind(MessageType[moment], cut))

            def act() -> None:
                raise OSError("cut")

            tap.act = act
            arguments = ["--guest", f"file:{memory}", "--pid", str(writer.pid), "--channels", "3"]
            source = Program("migrate-src", *arguments, tap.address)
            assert source.wait() == 1, source.err
            assert tap.acted.is_set()
            assert "closed the connection" in source.err or "broke" in source.err
            assert "the guest runs on here" in source.err
            assert receiver.wait() == 1, receiver.err
            assert sorted(os.listdir(shm)) == ["memory"]
            assert process_state(writer.pid) != "T"
            assert sha256(memory) == before
            receiver, address = destination("--output", str(shm / "output"))
            assert Program("migrate-src", *arguments, address).wait() == 0
            assert receiver.wait() == 0
            assert sha256(shm / "output") == before
        finally:
            writer.kill()


@pytest.mark.parametrize("victim", ["source", "destination"])
@pytest.mark.parametrize("moment", ["JOIN", "JOINED", "PAGES"])
def test_killed_with_several_channels_open(victim: str, moment: str) -> None:
    receiver, address = destination()
    tap = Tap(address, of_kind(MessageType[moment], 2))
    source = Program(
        "migrate-src", "--guest", "demo:8m,hot=2m,fill=random", "--channels", "4", tap.address
    )
    pid = int(source.read_line(r"moving demo guest, process (\d+)")[1])

    def act() -> None:
        (source if victim == "source" else receiver).kill()
        raise OSError("cut")

    tap.act = act
    assert source.wait() != 0
    assert tap.acted.is_set()
    assert receiver.wait(10) != 0
    assert_guest_is_right(pid)
    again(pid)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_cancelling_is_understood_over_several_channels(side: str) -> None:
    receiver, address = destination()
    source = Program(
        "migrate-src", "--guest", SMALL, "--max-bandwidth", "16m", "--channels", "3",
        "--downtime-limit", "1", address,
    )  # fmt: skip
    pid = int(source.read_line(r"moving demo guest, process (\d+)")[1])
    receiver.read_line("receiving a demo guest")
    time.sleep(0.3)
    (source if side == "source" else receiver).kill(signal.SIGINT)
    assert source.wait() == (130 if side == "source" else 8), source.err
    assert receiver.wait() == (8 if side == "source" else 130), receiver.err
    loser = receiver if side == "source" else source
    assert f"cancelled at the {side}" in loser.err
    assert_guest_is_right(pid)
    again(pid)


def test_strangers_at_the_door_do_not_disturb_a_migration_of_many_channels() -> None:
    """They connect while channels are awaited, and during the migration."""
    receiver, address = destination()
    host, port = address.removeprefix("tcp:").split(":")
    visitors = []

    def visit(kind: MessageType, head: bytes, channel: int) -> bool:
        if kind in (MessageType.ACCEPT, MessageType.JOINED, MessageType.ROUND_ACK):
            visitors.append(socket.create_connection((host, int(port))))
            visitors[-1].sendall(b"GET / HTTP/1.0\r\n\r\n")
        return False

    tap = Tap(address, visit)
    source = Program("migrate-src", "--guest", SMALL, "--channels", "3", tap.address)
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0, receiver.err
    assert len(visitors) >= 4
    for visitor in visitors:
        visitor.close()
    assert_guest_is_right(guest_pid(receiver.out))
    end_guest(guest_pid(receiver.out))


# ---------------------------------------------------------------- slowed, where nothing else helps


# Without deltas, what is written again and again is more than the link carries.
STUCK = ["--capability", "xbzrle=off", "--max-bandwidth", "16m", "--stall-timeout", "2s"]
SLOWED = [
    *STUCK, "--progress", "plain", "--auto-converge",
    "--cpu-throttle-initial", "70", "--cpu-throttle-increment", "15",
]  # fmt: skip
STUCK_DEMO = "demo:8m,hot=8m,stride=4096,rate=8000,fill=random"
# Some pages after each nap: a writer that is stopped in it is late by so much.
PAGE_WRITER = """
import mmap, sys, time
file = open(sys.argv[1], "r+b")
memory = mmap.mmap(file.fileno(), 0)
print("ready", flush=True)
page = 0
while True:
    for _ in range(8):
        memory[page * 4096] = (memory[page * 4096] + 1) % 256
        page = (page + 1) % (len(memory) // 4096)
    time.sleep(0.001)
"""


@contextlib.contextmanager
def page_writer(memory: Path) -> Iterator[subprocess.Popen[bytes]]:
    memory.write_bytes(os.urandom(8 << 20))
    with subprocess.Popen(
        [sys.executable, "-c", PAGE_WRITER, memory], stdout=subprocess.PIPE
    ) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            yield writer
        finally:
            writer.kill()


def assert_runs(pid: int) -> None:
    """Assert that the process has been resumed."""
    end = time.monotonic() + 60
    while process_state(pid) == "T":
        assert time.monotonic() < end, "it stands still"
        time.sleep(0.005)
    for _ in range(100):
        assert process_state(pid) != "T"
        time.sleep(0.005)


def test_throttled_demo_guest_converges() -> None:
    receiver, address = destination()
    source = Program("migrate-src", "--guest", STUCK_DEMO, *STUCK, address)
    assert source.wait() == 7, source.err
    assert receiver.wait() != 0
    pid = guest_pid(source.err)
    receiver, address = destination()
    source = Program("migrate-src", "--guest", f"demo:pid={pid}", *SLOWED, "--json", address)
    try:
        assert source.wait(120) == 0, source.err
        assert receiver.wait() == 0, receiver.err
        assert "auto-converge: the guest is slowed by 70 %" in source.err
        assert "cpu-throttle-percentage" not in json.loads(source.out)
        assert json.loads(source.out)["cpu-throttle-highest"] >= 70
        there = DemoProcess.attach(guest_pid(receiver.out))
        assert there.throttle == 0
        there.close()
        assert_guest_is_right(guest_pid(receiver.out), 1.0)
        assert ended_or_given_up(pid)
    finally:
        end_guest(guest_pid(receiver.out) if receiver.out else pid)


def test_file_with_throttled_writer_converges(shm: Path) -> None:
    memory, output = shm / "memory", shm / "output"
    with page_writer(memory) as writer:
        guest = ["--guest", f"file:{memory}", "--pid", str(writer.pid)]
        receiver, address = destination("--output", str(output))
        source = Program("migrate-src", *guest, *SLOWED, address)
        assert source.wait(120) == 0, source.err
        assert receiver.wait() == 0, receiver.err
        assert "auto-converge: the guest is slowed by 70 %" in source.err
        assert process_state(writer.pid) == "T"  # it runs there, and only there
        assert sha256(memory) == sha256(output)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_throttled_writer_is_released_when_source_is_stopped(shm: Path, end: int) -> None:
    memory = shm / "memory"
    with page_writer(memory) as writer:
        receiver, address = destination("--output", str(shm / "output"))
        source = Program(
            "migrate-src", "--guest", f"file:{memory}", "--pid", str(writer.pid), *SLOWED,
            "--cpu-throttle-initial", "99", "--downtime-limit", "100", address,
        )  # fmt: skip
        source.read_line("slowed by 99 %")
        while process_state(writer.pid) != "T":
            assert source.process.poll() is None
        source.kill(end)
        assert_runs(writer.pid)
        source.wait()
        receiver.wait()


def test_throttled_demo_guest_is_released_when_migration_fails() -> None:
    receiver, address = destination()
    source = Program(
        "migrate-src", "--guest", STUCK_DEMO, *SLOWED, "--cpu-throttle-initial", "10",
        "--max-cpu-throttle", "20", address,
    )  # fmt: skip
    assert source.wait(120) == 7, source.err
    assert receiver.wait() != 0
    assert "slowed by 20 %" in source.err
    pid = guest_pid(source.err)
    here = DemoProcess.attach(pid)
    assert here.throttle == 0
    here.close()
    assert_guest_is_right(pid, 1.0)
    end_guest(pid)


def test_guest_without_throttling_is_reported_once(shm: Path) -> None:
    (shm / "memory").write_bytes(os.urandom(1 << 20))
    receiver, address = destination("--output", str(shm / "output"))
    source = Program("migrate-src", "--guest", f"file:{shm}/memory", "--auto-converge", address)
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0
    assert source.err.count("this guest cannot be slowed") == 1
