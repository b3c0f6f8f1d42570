"""Guests of real QEMUs, migrated by the two programs: all memory arrives, and one QEMU runs it.

QEMU --> migrate-src ==> (a tap, a relay) ==> migrate-dst --> QEMU -incoming
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from proto.wire.messages import MessageType
from tests.machine import Machine, compare
from tests.machine.between import SWEEP, Carried, carried, end
from tests.machine.capture import is_end
from tests.machine.qemu import MIB, SLOW
from tests.programs import Program, destination
from tests.relay import Relay
from tests.tap import Tap

# The programs run the event loops under test; the loop of the test itself does not matter.
pytestmark = [
    pytest.mark.qemu,
    pytest.mark.asyncio(loop_factories=["asyncio"]),
    pytest.mark.timeout(300),
]


# ---------------------------------------------------------------- moves


@pytest.mark.parametrize(
    ("options", "here"),
    [
        ({}, ()),
        ({"incoming": "unix:{}/in", "out": "unix:{}/out"}, ("--channels", "3")),
        ({"blocks": ("low", "high"), "dimm": 8 * MIB, "devices": ("virtio-rng-pci",)}, ()),
        ({}, ("--capability", "xbzrle=off")),
        ({}, ("--cache-size", "1m")),
    ],
    ids=["plain", "unix and channels", "blocks and devices", "no deltas", "small cache"],
)
async def test_guest_continues_at_destination_with_all_memory(options, here, binary, accel) -> None:
    async with carried(*here, binary=binary, accel=accel, **options) as move:
        await move.begin()
        await move.source.finish()
        await move.arrived()
        if not here:
            assert count_of(move, "xbzrle pages") > 0


def count_of(move: Carried, label: str) -> int:
    """Return a count that migrate-src has printed."""
    line = next(line for line in move.here.out.splitlines() if line.startswith(f"{label}:"))
    return int(line.split(":")[1].split()[0])


async def test_deltas_of_qemu_pass_and_cache_stays_consistent(binary, accel) -> None:
    async with carried(binary=binary, accel=accel) as move:
        await move.begin("xbzrle", passes=4)
        info = await move.source.finish()
        assert info["xbzrle-cache"]["pages"] > 0
        await move.arrived()


async def test_qemu_without_return_path_is_refused() -> None:
    async with carried() as move:
        await move.source.migrate(move.uri)
        assert await asyncio.to_thread(move.here.wait) == 2
        assert "Set the capability return-path there; or say --no-return-path" in move.here.err
        await move.stayed()


@pytest.mark.parametrize("out", ["tcp:127.0.0.1:0", "unix:{}/out"])
async def test_qemu_with_multifd_is_refused_and_survives(out, binary) -> None:
    async with carried(binary=binary, out=out) as move:
        await move.source.migrate(move.uri, "return-path", "multifd")
        assert await asyncio.to_thread(move.here.wait) == 2
        assert "switch the capability multifd off" in move.here.err
        await move.stayed()


async def test_migration_without_return_path() -> None:
    async with carried("--no-return-path") as move:
        await move.begin(return_path=False)
        await move.source.finish()
        await move.arrived()


async def test_migration_driven_by_qmp_restores_settings(binary, accel) -> None:
    async with carried(
        "--downtime-limit", "2000", out="qmp=", incoming="defer", binary=binary, accel=accel
    ) as move:
        before = (
            await move.source.execute("query-migrate-capabilities"),
            await move.source.execute("query-migrate-parameters"),
        )
        await move.source.wait_run_state("postmigrate")
        await move.arrived()
        assert before == (
            await move.source.execute("query-migrate-capabilities"),
            await move.source.execute("query-migrate-parameters"),
        )
        assert "round 1: " in move.here.err  # before it, no round was complete
        assert "round 1 took" in move.here.err


async def test_killed_qemu_is_not_reported_as_running() -> None:
    async with carried("--max-bandwidth", "1m", out="qmp=", incoming="defer") as move:
        await asyncio.to_thread(move.here.read_line, "round 1: ")
        await move.source.kill()
        assert await asyncio.to_thread(move.here.wait) == 1
        assert "its QEMU answers no more" in move.here.err
        assert "runs on here" not in move.here.err
        assert await asyncio.to_thread(move.far.wait) == 1


async def test_paused_guest_stays_paused() -> None:
    """At either end, whether the migration completes or not."""

    async def pause(source: Machine) -> None:
        await source.stop()

    async with carried("--max-bandwidth", "1m", out="qmp=", incoming="defer", first=pause) as move:
        await asyncio.to_thread(move.here.read_line, "moving QEMU guest")
        move.here.kill(signal.SIGTERM)
        assert await asyncio.to_thread(move.here.wait) == 143
        assert "the guest is still here, and does not run, as before (paused)" in move.here.err
        assert "runs on here" not in move.here.err
        await move.source.wait_run_state("paused")
    async with carried(out="qmp=", incoming="defer", first=pause) as move:
        assert await asyncio.to_thread(move.here.wait) == 0, move.here.err
        assert await asyncio.to_thread(move.far.wait) == 0, move.far.err
        assert "the guest is in the QEMU" in move.far.out
        assert "does not run yet (paused)" in move.far.out


async def test_query_migrate_reports_actual_cache_size(tmp_path) -> None:
    """With `auto` the cache has its largest size from the first page on."""
    path = tmp_path / "here"
    async with carried(
        "--max-bandwidth", "1m", "--qmp", f"unix:{path}", out="qmp=", incoming="defer"
    ) as move:
        await asyncio.to_thread(move.here.read_line, "round 1: ")
        answers = []
        for command in ("query-migrate", "query-migrate-parameters"):
            asked = Program("migrate-ctl", str(path), command)
            assert await asyncio.to_thread(asked.wait) == 0, asked.err
            answers.append(json.loads(asked.out))
        there = answers[0]["xbzrle-cache"]["cache-size"]
        assert there == answers[1]["xbzrle-cache-size"]
        assert there >= 64 * MIB


async def test_wrong_page_size_is_named() -> None:
    async with carried("--page-size", "8k", out="qmp=", incoming="defer") as move:
        assert await asyncio.to_thread(move.here.wait) == 1
        assert "(--page-size 8192: has this QEMU such pages?)" in move.here.err
        await move.stayed()


async def test_ten_migrations_in_a_row() -> None:
    """The guest has the same memory after each migration, and goes on counting."""
    with tempfile.TemporaryDirectory() as directory:
        async with contextlib.AsyncExitStack() as stack:

            def machine(number: int, **options: Any) -> Machine:
                qmp = ["-qmp", f"unix:{directory}/{number}.qmp,server=on,wait=off"]
                return Machine(SWEEP, extra=qmp, **options)

            here = await stack.enter_async_context(machine(0))
            await here.wait_for_count(SWEEP.every)
            for hop in range(1, 11):
                options = {"incoming": "defer", "before": here, "paused": True}
                there = await stack.enter_async_context(machine(hop, **options))
                journals = ("--journal", directory)
                far, address = await asyncio.to_thread(
                    destination, "--guest", f"qemu:qmp={directory}/{hop}.qmp", *journals
                )
                near = Program(
                    "migrate-src", "--guest", f"qemu:qmp={directory}/{hop - 1}.qmp",
                    "--downtime-limit", "2000", *journals, address,
                )  # fmt: skip
                try:
                    assert await asyncio.to_thread(near.wait) == 0, near.err
                    assert await asyncio.to_thread(far.wait) == 0, far.err
                finally:
                    end(near)
                    end(far)
                await there.wait_run_state("paused")
                await compare(here, there)
                await there.check_sweep()
                await there.cont()
                await there.wait_for_more(1)
                await here.kill()
                here = there


# ---------------------------------------------------------------- what breaks


@pytest.mark.parametrize("channels", ["1", "3"])
async def test_resume_after_broken_connections(channels, binary, accel) -> None:
    def between(address: str) -> Relay:
        return Relay(address, breaks=(2 * MIB, 5 * MIB, 6 * MIB))

    async with carried(
        "--retry", "20", "--channels", channels, there=("--retry", "20"), between=between,
        binary=binary, accel=accel,
    ) as move:  # fmt: skip
        await move.begin()
        await move.source.finish()
        await move.arrived()
        assert "reconnects: 3" in move.here.out or "sent again" in move.here.err


CUTS = [MessageType.COMPLETE, MessageType.READY, MessageType.GO, MessageType.RUNNING]


@pytest.mark.parametrize("at", CUTS, ids=lambda kind: kind.name)
async def test_break_during_hand_over_is_resolved(at) -> None:
    taps = []

    @contextlib.contextmanager
    def between(address: str):
        tap = Tap(address, lambda kind, _head, _channel: kind is at)
        tap.act = tap.cut
        taps.append(tap)
        try:
            yield tap
        finally:
            tap.close()

    async with carried("--retry", "20", there=("--retry", "20"), between=between) as move:
        await move.begin()
        await move.source.finish()
        await move.arrived()
        assert taps[0].acted.is_set()


async def test_guest_runs_on_if_link_stays_broken() -> None:
    def between(address: str) -> Relay:
        return Relay(address, breaks=(2 * MIB,))

    async with carried(between=between) as move:
        await move.source.migrate(move.uri, "return-path", max_bandwidth=SLOW, downtime_limit=1)
        assert await asyncio.to_thread(move.here.wait) == 1
        assert "the guest runs on here" in move.here.err
        await move.stayed()


@pytest.mark.parametrize("which", ["here", "far"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
async def test_guest_runs_on_if_a_program_dies(which, number, binary) -> None:
    async with carried(binary=binary) as move:
        await move.begin(passes=2)
        await asyncio.to_thread(move.far.read_line, "receiving a qemu guest")
        getattr(move, which).kill(number)
        await move.stayed()
        await asyncio.to_thread(move.here.wait)
        await asyncio.to_thread(move.far.wait)


async def test_cancel_in_qemu_ends_migration(binary, accel) -> None:
    async with carried(binary=binary, accel=accel) as move:
        await move.begin(passes=2)
        await move.source.execute("migrate_cancel")
        assert await asyncio.to_thread(move.here.wait) == 1
        assert "QEMU has closed its stream before the end" in move.here.err
        await move.stayed()


async def test_missing_destination_qemu_fails_before_hand_over() -> None:
    """No QEMU listens at the destination."""
    async with carried() as move:
        await move.destination.kill()
        await move.source.migrate(move.uri, "return-path", max_bandwidth=SLOW, downtime_limit=1)
        assert await asyncio.to_thread(move.here.wait) != 0
        assert "no QEMU waits for a guest" in move.here.err
        assert "Connection refused: start it with -incoming" in move.here.err
        await move.stayed()


async def test_source_killed_after_go_leaves_one_owner() -> None:
    """The socket keeper keeps QEMU waiting until `resolve` has asked who owns the guest."""
    with tempfile.TemporaryDirectory() as directory:
        journals = ("--journal", directory)
        taps: list[Tap] = []

        @contextlib.contextmanager
        def between(address: str):
            tap = Tap(address, lambda kind, _head, _channel: kind is MessageType.RUNNING)
            taps.append(tap)
            try:
                yield tap
            finally:
                tap.close()

        async with carried(*journals, there=("--stay",), between=between) as move:
            taps[0].act = lambda: (move.here.kill(), taps[0].cut())
            await move.begin()
            await move.source.prepare(max_bandwidth=0, downtime_limit=2_000_000)
            await move.destination.wait_run_state("paused")  # started with -S; all is loaded
            await asyncio.to_thread(move.here.wait)
            await asyncio.sleep(0.5)
            status = await move.source.execute("query-status")
            assert not status["running"], "two would run it"
            resolve = Program("migrate-src", "resolve", *journals)
            assert await asyncio.to_thread(resolve.wait) == 0, resolve.err
            assert "the guest runs at the destination" in resolve.out
            await move.source.wait_status("completed")
            await compare(move.source, move.destination)
            assert Path(directory).exists()
            assert json.dumps(status)


# ---------------------------------------------------------------- a QEMU that fails at the end


class FakeIncoming:
    """Reads a stream as an incoming QEMU does, answers PINGs, and ends with `answer`."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._server = socket.create_server(("127.0.0.1", 0))
        self.uri = f"tcp:127.0.0.1:{self._server.getsockname()[1]}"
        self.took = bytearray()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        connection, _ = self._server.accept()
        self._server.close()
        with connection, contextlib.suppress(OSError):
            answered = 0
            while data := connection.recv(1 << 16):
                self.took += data
                pings = [found.start() for found in re.finditer(PING, self.took, re.DOTALL)]
                for at in pings[answered:]:
                    connection.sendall(b"\x00\x02\x00\x04" + self.took[at + 5 : at + 9])
                answered = len(pings)
                if is_end(bytes(self.took)):
                    connection.sendall(self._answer)
                    return


PING = rb"\x08\x00\x02\x00\x04(?:\x00\x00\x00\x01|XBM1)"


@pytest.mark.parametrize("driven", [False, True], ids=["by hand", "by qmp"])
@pytest.mark.parametrize(
    ("answer", "stays"),
    [(b"\0\1\0\4\0\0\0\5", True), (b"", False), (b"\0\1\0\4\0\0\0\0", False)],
    ids=["says no", "says nothing", "says yes"],
)
async def test_guest_returns_only_if_destination_qemu_reports_failure(
    answer, stays, driven
) -> None:
    """A QEMU that ends without a word may have run the guest: the guest counts as started."""
    fake = FakeIncoming(answer)
    with tempfile.TemporaryDirectory() as directory:
        qmp, journals = f"{directory}/qmp", ("--journal", directory)
        far, address = await asyncio.to_thread(
            destination, "--guest", f"qemu:{fake.uri}", *journals
        )
        async with Machine(SWEEP, extra=["-qmp", f"unix:{qmp},server=on,wait=off"]) as source:
            await source.wait_for_count(SWEEP.every)
            guest = f"qemu:qmp={qmp}" if driven else "qemu:tcp:127.0.0.1:0"
            near = Program(
                "migrate-src", "--guest", guest, "--downtime-limit", "2000", *journals, address
            )
            if not driven:
                uri = (await asyncio.to_thread(near.read_line, r"waiting for QEMU at (\S+)"))[1]
                await source.migrate(uri, "return-path", max_bandwidth=0, downtime_limit=2000)
            status = await asyncio.to_thread(near.wait)
            if stays:
                assert status == 1, near.err
                assert "says that it failed (5)" in near.err
                await source.wait_run_state("running")
                await source.wait_for_more()
            else:
                assert status == 0, near.err
                await source.wait_status("completed")
                await source.wait_run_state("postmigrate")
            await asyncio.to_thread(far.wait)
            end(near)
            end(far)
        if answer == b"":
            assert "which has not said" in far.out


@pytest.mark.parametrize("status", ["setup", "active", "device", "completed"])
async def test_cancel_in_each_status(status) -> None:
    """The guest runs at the destination or at the source; never at both, never at none."""
    async with carried("--max-bandwidth", "8m") as move:
        if status == "setup":
            await move.source.migrate(move.uri, "return-path", max_bandwidth=SLOW)
        else:
            await move.begin(passes=2)
        if status in ("device", "completed"):
            await move.source.prepare(max_bandwidth=0, downtime_limit=2_000_000)
            await asyncio.sleep(0.3)
        if status == "completed":
            await move.source.wait_status("completed")
        await move.source.execute("migrate_cancel")
        code = await asyncio.to_thread(move.here.wait)
        if code == 0:
            await move.arrived()
        else:
            await move.stayed()
