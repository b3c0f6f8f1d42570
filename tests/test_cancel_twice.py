"""A second cancellation changes nothing, by command or signal, at either side."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from migrate.cli.control import Control
from migrate.errors import MigrationError
from proto.wire.errors import ErrorCode
from proto.wire.messages import Error, GuestInfo, Hello
from tests.hostile_peer import GUEST, HELLO, Peer, framed
from tests.programs import Program, destination

SIZE = 8 << 20
TWICE = [
    ("migrate_cancel", "migrate_cancel", 0.001), ("migrate_cancel", signal.SIGTERM, 0.002),
    (signal.SIGINT, "migrate_cancel", 0.001), (signal.SIGTERM, signal.SIGTERM, 0.0),
    (signal.SIGHUP, signal.SIGINT, 0.003),
]  # fmt: skip


def cancel(program: Program, control: Control, way: str | signal.Signals) -> None:
    if isinstance(way, signal.Signals):
        program.kill(way)
    else:
        with contextlib.suppress(MigrationError):  # the program may have ended
            control.execute(way)


@pytest.mark.programs
@pytest.mark.parametrize("side", ["source", "destination"])
def test_program_that_is_cancelled_twice_cleans_up_once(tmp_path: Path, side: str) -> None:
    """One --resume-cmd undoes the pause, and nothing is left at the destination."""
    guest, calls = tmp_path / "guest", tmp_path / "calls"
    guest.write_bytes(os.urandom(SIZE))
    for number, (first, second, gap) in enumerate(TWICE):
        there = tmp_path / f"there{number}"
        there.mkdir()
        calls.write_text("")
        receiver, address = destination(
            "--output", str(there / "out"), "--journal", str(tmp_path / "jd"),
            "--qmp", f"unix:{tmp_path}/d",
        )  # fmt: skip
        sender = Program(
            "migrate-src", "--guest", f"file:{guest}", "--max-bandwidth", "6m",
            "--pause-cmd", f"echo pause >> {calls}", "--resume-cmd", f"echo resume >> {calls}",
            "--journal", str(tmp_path / "js"), "--qmp", f"unix:{tmp_path}/s", address,
        )  # fmt: skip
        end = time.monotonic() + 20
        while not os.listdir(there):
            assert time.monotonic() < end
            time.sleep(0.01)
        program, path = (sender, "s") if side == "source" else (receiver, "d")
        control = Control(f"{tmp_path}/{path}", 20)
        cancel(program, control, first)
        time.sleep(gap)
        cancel(program, control, second)
        control.close()
        codes = sender.wait(), receiver.wait()
        said = f"{first!r}, {second!r}: {codes}\n{sender.err}\n{receiver.err}"
        assert all(codes), said
        assert os.listdir(there) == [], said
        assert os.listdir(tmp_path / "jd") == [], said
        assert "Traceback" not in said
        assert (sender if side == "source" else receiver).err.count("cancelled") == 1, said
        lines = calls.read_text().split()
        assert lines in ([], ["resume"], ["pause", "resume"]), said


@pytest.mark.programs
def test_source_that_gives_up_before_accept_ends_the_destination(tmp_path: Path) -> None:
    """Its ERROR is there before ACCEPT is sent; a destination that goes on listening is alone."""
    output = tmp_path / "there" / "out"
    output.parent.mkdir()
    receiver, address = destination("--output", str(output), "--journal", str(tmp_path / "j"))
    peer = Peer(address)
    guest = GuestInfo("file", GUEST.size, GUEST.page_size, GUEST.hash_seed)
    peer.send(HELLO)
    assert isinstance(peer.receive(), Hello)
    peer.send(framed(guest) + framed(Error(ErrorCode.CANCELLED, "cancelled")))
    assert receiver.wait() == 8, receiver.err
    assert "the other side gave up: cancelled" in receiver.err
    assert os.listdir(output.parent) == os.listdir(tmp_path / "j") == []
    peer.close()
