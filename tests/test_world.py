"""What the rest of the world does: full disks, limits, clocks that jump; and nothing is lost."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import migrate
from migrate.cli.options import Parser
from migrate.cli.program import run
from migrate.errors import PeerLost
from migrate.transport.address import Address
from migrate.transport.listen import listen
from proto.wire.frames import HEADER_BYTES, seal
from proto.wire.messages import MessageType, Ping, pack
from proto.wire.session import Role
from tests.programs import BIN, Program, destination
from tests.requirements import need

pytestmark = pytest.mark.programs

# Runs a program where so many threads can be started, and no more.
FEW_THREADS = """
import sys, threading
from importlib import import_module
left, start = int(sys.argv[1]), threading.Thread.start
def limited(thread):
    global left
    if left <= 0:
        raise RuntimeError("can't start new thread")
    left -= 1
    start(thread)
threading.Thread.start = limited
sys.argv[0:] = sys.argv[2:]
import_module("migrate.cli." + sys.argv[0].replace("-", "_")).main()
"""


def one_sentence(text: str, name: str) -> str:
    """The last thing that a program said, which is no traceback."""
    assert "Traceback" not in text
    assert "Warning" not in text
    said = text.strip().splitlines()[-1]
    assert said.startswith(f"{name}: "), text
    return said


def test_full_disk_leaves_no_output(shm: Path) -> None:
    need(os.geteuid() == 0, "a disk of our own needs root")
    memory, small = shm / "memory", shm / "small"
    content = random.Random(1).randbytes(12 << 20)
    memory.write_bytes(content)
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(small)], check=True)
    try:
        receiver, address = destination("--output", str(small / "output"), "--retry", "20s")
        source = Program("migrate-src", "--quiet", "--guest", f"file:{memory}", address)
        assert source.wait() == 1
        assert receiver.wait() == 1
        assert "No space left on device" in one_sentence(source.err, "migrate-src")
        assert "the guest runs on here" in source.err
        assert "No space left on device" in one_sentence(receiver.err, "migrate-dst")
        assert os.listdir(small) == []
        assert memory.read_bytes() == content
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("name", ["migrate-src", "migrate-dst"])
@pytest.mark.parametrize("wrong", ["file", "/proc/there"])
def test_unwritable_journal_is_found_first(shm: Path, name, wrong) -> None:
    (shm / "file").write_bytes(b"")
    words = ["tcp:127.0.0.1:1"] if name == "migrate-src" else ["--listen", "127.0.0.1:0"]
    program = Program(name, "--journal", str(shm / wrong), *words)
    assert program.wait() == 2
    assert "name a directory that can be written" in one_sentence(program.err, name)


@pytest.mark.parametrize("name", ["migrate-src", "migrate-dst"])
@pytest.mark.parametrize("files", [8, 10, 16, 200])
def test_too_few_file_descriptors_are_found_first(name: str, files: int) -> None:
    words = ["tcp:127.0.0.1:1"] if name == "migrate-src" else ["--listen", "127.0.0.1:0"]
    done = subprocess.run(
        [BIN / name, *words], capture_output=True, text=True, timeout=30, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
    )  # fmt: skip
    assert done.returncode == 2
    assert "ulimit -n" in one_sentence(done.stderr, name)


@pytest.mark.parametrize("name", ["migrate-src", "migrate-dst"])
@pytest.mark.parametrize("threads", [0, 3, 7])
def test_too_few_threads_are_found_first(name: str, threads: int) -> None:
    """Else the guest would move, and the program end with a traceback behind it."""
    words = ["tcp:127.0.0.1:1"] if name == "migrate-src" else ["--listen", "127.0.0.1:0"]
    done = subprocess.run(
        [sys.executable, "-c", FEW_THREADS, str(threads), name, *words],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    said = one_sentence(done.stderr, name)
    assert f"only {threads} threads can be started here" in said
    assert "ulimit -u" in said


def test_missing_last_thread_keeps_exit_code(monkeypatch) -> None:
    """Closing the loop takes one more."""

    async def program(_args: object) -> int:
        await asyncio.to_thread(int)
        monkeypatch.setattr(threading.Thread, "start", no_thread)
        return 10

    assert run(Parser(prog="migrate-dst"), program, []) == 10


def no_thread(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_open_files_limit_is_raised(shm: Path) -> None:
    code = "from migrate.cli.process_limits import check_open_files as c; import resource; c(); "
    code += "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096)),
    )  # fmt: skip
    assert done.stdout == "1024\n"


@pytest.mark.asyncio
async def test_clock_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock keeps jumping by years, back and forth; time-outs use another clock."""
    noise, real = random.Random(1), time.time
    monkeypatch.setattr(time, "time", lambda: real() + noise.uniform(-1e8, 1e8))
    memory = bytearray(random.Random(2).randbytes(8 << 20))
    ready: asyncio.Future[Address] = asyncio.get_running_loop().create_future()
    receiving = asyncio.create_task(migrate.receive("127.0.0.1:0", listening=ready.set_result))
    statistics = await migrate.send(migrate.BufferGuest(memory), str(await ready))
    assert (await receiving).memory == memory
    assert 0 < statistics.total_time < 60


def frame(message: Ping, kind: MessageType) -> bytearray:
    body = pack(message, HEADER_BYTES)
    seal(body, kind)
    return body


@pytest.mark.asyncio
async def test_trickling_peer_is_lost() -> None:
    """It is never silent for as long as the timeout; but it will never be done either."""
    listener = await listen(Address("127.0.0.1", 0), peer_timeout=1.0)
    _, writer = await asyncio.open_connection(listener.address.host, listener.address.port)
    peer = await listener.accept()
    assert peer.session.role is Role.DESTINATION

    async def trickle() -> None:
        for byte in frame(Ping(1), MessageType.HELLO):
            writer.write(bytes([byte]))
            await asyncio.sleep(0.3)

    trickling = asyncio.create_task(trickle())
    began = time.monotonic()
    try:
        with pytest.raises(PeerLost, match="sends less than 256 bytes a second"):
            async with asyncio.timeout(60):
                await peer.receive_message()
        assert time.monotonic() - began >= 1.0
    finally:
        trickling.cancel()
        writer.close()
        await peer.close()
        await listener.close()
