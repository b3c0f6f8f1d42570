"""The cost of a guest depends on its data and its writes, not on its size; and size limits."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import migrate
from migrate.errors import NotConvergedError, UsageError
from migrate.guests.buffer import BufferPlace
from migrate.guests.file import FileGuest
from migrate.guests.guest import check_size
from migrate.memory.dirty import DirtyTracker, ScanTracker
from migrate.memory.memory import Memory
from migrate.policy import convergence
from migrate.source.batches import BatchMaker
from migrate.source.precopy import Source
from migrate.transport.address import Address
from migrate.transport.connect import connect
from migrate.transport.listen import listen
from proto.codec.kernel import PageEncoder, PageHashes
from proto.wire.frames import HEADER_BYTES
from proto.wire.messages import MAX_SIZE
from tests.programs import BIN
from tests.receiving import receive
from tests.requirements import need

PAGE = 4096
MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40


def sparse_file(path: Path, size: int) -> None:
    """Some data at its start, in its middle and at its end, and nothing between."""
    try:
        with path.open("wb") as file:
            file.truncate(size)
            for at in (0, size // 2, size - MIB):
                os.pwrite(file.fileno(), os.urandom(MIB), at)
    except OSError as error:
        need(False, f"a sparse file of {size >> 30} GiB in {path.parent}: {error.strerror}")


def moved(directory: Path, size: int) -> tuple[int, int]:
    """Moves a sparse file; the most memory that either program had, in bytes."""
    directory.mkdir()
    guest, out, socket = directory / "guest", directory / "out", directory / "s"
    sparse_file(guest, size)
    writer = subprocess.Popen(["sleep", "600"])
    environment = os.environ | {"MIGRATE_JOURNAL": str(directory)}
    try:
        far = subprocess.Popen(
            [BIN / "migrate-dst", "-q", "--listen", f"unix:{socket}", "--output", out],
            env=environment, stderr=subprocess.PIPE,
        )  # fmt: skip
        near = subprocess.Popen(
            [BIN / "migrate-src", "-q", "--guest", f"file:{guest}", "--pid", str(writer.pid),
             "--retry", "0", "--connect-timeout", "60", "--downtime-limit", "60s",
             f"unix:{socket}"],
            env=environment, stderr=subprocess.PIPE,
        )  # fmt: skip
        peaks = []
        for program in (near, far):
            _, status, usage = os.wait4(program.pid, 0)
            program.returncode = os.waitstatus_to_exitcode(status)
            assert program.returncode == 0, program.stderr.read()
            program.stderr.close()
            peaks.append(usage.ru_maxrss * 1024)
    finally:
        writer.kill()
        writer.wait()
    with guest.open("rb") as one, out.open("rb") as other:
        assert os.fstat(one.fileno()).st_size == os.fstat(other.fileno()).st_size == size
        for at in (0, size // 2, size - MIB):
            assert os.pread(one.fileno(), MIB, at) == os.pread(other.fileno(), MIB, at)
    assert out.stat().st_blocks * 512 < 16 * MIB, "holes stay holes"
    out.unlink()
    return peaks[0], peaks[1]


@pytest.mark.programs
def test_sparse_guest_takes_no_more_memory_than_a_small_one(tmp_path):
    """8 bytes for each page of 256 GiB would be 512 MiB, a bit for each page is 8 MiB."""
    small, large = moved(tmp_path / "small", 64 * MIB), moved(tmp_path / "large", 256 * GIB)
    for side, few, many in zip(("source", "destination"), small, large, strict=True):
        assert many < few + 40 * MIB, f"the {side} had {few >> 20} and {many >> 20} MiB"


def test_holes_that_the_peer_holds_already_are_not_counted_as_sent(tmp_path):
    """Else the rest of the round would be negative after a resume."""
    pages = 1000
    with (tmp_path / "guest").open("wb+") as file:
        file.truncate(pages * PAGE)
        os.pwrite(file.fileno(), bytes([1]) * PAGE, 500 * PAGE)
        encoder = PageEncoder(PageHashes(pages, PAGE, bytes(16)), headroom=HEADER_BYTES)
        encoder.adopt_zeros(0, pages - 10)
        memory = Memory(pages * PAGE, fd=file.fileno())
        dirty = ScanTracker(memory, encoder).take()
        assert set(dirty) == {500, *range(pages - 10, pages)}
        feeder = BatchMaker(memory, encoder)
        feeder.begin_round(1)
        turn = feeder.turn(dirty, 0, holes=True)
        assert turn.over
        assert turn.pages == len(dirty)


# ---------------------------------------------------------------- the limit


def test_too_large_file_is_refused_before_connecting(tmp_path):
    path = tmp_path / "guest"
    sparse_file(path, MAX_SIZE + 1 * GIB)
    program = subprocess.run(
        [BIN / "migrate-src", "--guest", f"file:{path}", "unix:/nowhere"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert program.returncode == UsageError.exit_code
    assert "it has 4.0 TiB" in program.stderr or "4.0 TiB" in program.stderr
    assert "the most that can be moved" in program.stderr
    assert "connecting" not in program.stderr
    with pytest.raises(UsageError, match=r"the most that can be moved.* is 4\.0 TiB"):
        FileGuest(str(path))


@pytest.mark.asyncio
async def test_send_raises_usage_error_for_too_large_guest():
    guest = migrate.BufferGuest(bytearray(PAGE))
    guest.memory.size = 5 * TIB
    with pytest.raises(UsageError, match=r"it has 5\.0 TiB; the most .* is 4\.0 TiB"):
        await migrate.send(guest, "unix:/nowhere")
    check_size(MAX_SIZE, "a guest of just that size")


# ---------------------------------------------------------------- a guest that stands still


class Slow(migrate.BufferGuest):
    """One that is looked through in `seconds`, as it says itself, and can be slowed."""

    can_throttle = True

    def __init__(self, seconds: float, rewritten: int = 0) -> None:
        super().__init__(bytearray(os.urandom(64 * PAGE)))
        self.seconds, self.rewritten = seconds, rewritten
        self.slowed: list[int] = []

    def track(self, encoder: PageEncoder, *limit: Any) -> DirtyTracker:
        tracker = super().track(encoder, *limit)
        take = tracker.take

        def taken() -> Any:
            for page in range(self.rewritten):
                self.memory.view[page * PAGE] ^= 1
            dirty = take()
            tracker.take_seconds = self.seconds
            return dirty

        tracker.take = taken  # type: ignore[method-assign]
        return tracker

    async def throttle(self, percent: int) -> None:
        self.slowed.append(percent)


async def abort_reason(guest: Slow, *, auto: bool, **limits: Any) -> str:
    """Why this guest was not moved."""
    listener = await listen(Address("127.0.0.1", 0))
    near = await connect(listener.address)
    far = await listener.accept()
    parameters = migrate.Parameters(
        capabilities={"auto-converge": auto, "xbzrle": False}, limits=migrate.Limits(**limits)
    )
    receiving = asyncio.create_task(receive(far, BufferPlace))
    try:
        async with asyncio.timeout(60):
            with pytest.raises(NotConvergedError) as raised:
                await Source(guest, near, parameters).run()
        await asyncio.wait([receiving])
        assert isinstance(receiving.exception(), migrate.MigrationError)
    finally:
        await listener.close()
    return str(raised.value)


@pytest.mark.asyncio
@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("rewritten", [0, 1, 64])
async def test_too_large_guest_is_refused_and_never_throttled(monkeypatch, auto, rewritten):
    monkeypatch.setattr(convergence, "LARGE_SECONDS", 0.0)
    guest = Slow(seconds=0.9, rewritten=rewritten)
    text = await abort_reason(guest, auto=auto)
    assert "too large for --downtime-limit, whatever it writes" in text
    assert "finding what changed takes 900 ms" in text
    assert "raise --downtime-limit to 1" in text
    assert "auto-converge" not in text
    assert "slow" not in text
    assert guest.slowed == []


@pytest.mark.asyncio
async def test_throttling_is_advised_when_writes_are_the_obstacle():
    """The rest of the advice depends on what the pause would be made of."""
    writes = await abort_reason(
        Slow(seconds=0.0, rewritten=64), auto=False, max_rounds=3, downtime_limit=0.3,
        max_bandwidth=64 * PAGE,
    )  # fmt: skip
    assert "or slow the guest with --auto-converge" in writes
    large = await abort_reason(Slow(seconds=0.9), auto=False, max_rounds=1)
    assert "auto-converge" not in large


@pytest.mark.asyncio
async def test_long_first_round_does_not_advise_throttling():
    text = await abort_reason(Slow(seconds=0.0), auto=False, timeout=0.5, max_bandwidth=16 * PAGE)
    assert "--timeout" in text
    assert "auto-converge" not in text
