"""Real QEMUs, moved from one to the other: what later tests say of a machine is true, and they
notice where a guest has come to harm."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from qemu.qmp import ExecuteError

from tests.machine import Machine, MachineError, Sweep, SweepError, compare
from tests.machine import qemu as qemu_module
from tests.machine.capture import capture, is_end
from tests.machine.qemu import DIMM_AT, PROGRAM
from tests.machine.sweep import BASE, differing
from tests.requirements import need

MIB = 1 << 20
SWEEP = Sweep(4 * MIB, fill=6 * MIB, rate=1_000_000)


def one_loop(test: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a test of a QEMU that need not run on both event loops."""
    return pytest.mark.qemu(pytest.mark.asyncio(loop_factories=["asyncio"])(test))


@pytest.fixture
def qemu() -> None:
    need(shutil.which(PROGRAM), f"{PROGRAM} (qemu-system-x86)")


@asynccontextmanager
async def pair(
    sweep: Sweep = SWEEP, incoming: str = "tcp:127.0.0.1:0", **options: Any
) -> AsyncIterator[tuple[Machine, Machine]]:
    """A source whose guest counts, and a destination that will not run by itself."""
    source = Machine(sweep, **options)
    destination = Machine(sweep, incoming=incoming, before=source, paused=True, **options)
    async with source, destination:
        await source.wait_for_count(sweep.every)
        yield source, destination


async def moved(source: Machine, destination: Machine, uri: str, *capabilities: str) -> Any:
    """Moves it while it runs; the last query-migrate."""
    await source.begin(uri, *capabilities, passes=4 if "xbzrle" in capabilities else 3)
    info = await source.finish()
    await destination.wait_run_state("paused")
    return info


async def unharmed(source: Machine, destination: Machine) -> None:
    """Both stand still with the same memory, and it runs on from there at the destination."""
    await compare(source, destination)
    before = await source.check_sweep(), source.counted()
    assert before == (await destination.check_sweep(), destination.counted())
    await destination.cont()
    await destination.wait_for_more()
    await destination.stop()
    await destination.check_sweep()
    assert len(source.counted()) == len(before[1])
    assert len(destination.counted()) >= len(before[1]) + 2


# ---------------------------------------------------------------- moved by QEMU alone


@pytest.mark.qemu
@pytest.mark.asyncio
async def test_qemu_pair_migrates_and_keeps_counting(qemu: None, accel: str) -> None:
    async with pair(accel=accel) as (source, destination):
        info = await moved(source, destination, await destination.uri(), "xbzrle", "return-path")
        assert info["xbzrle-cache"]["pages"] > 0
        parts = [await machine.ram_hash(BASE, 8 * MIB) for machine in (source, destination)]
        assert parts[0] == parts[1]
        await unharmed(source, destination)
        told = [event["event"] for event in source.events if event["event"] != "MIGRATION_PASS"]
        assert told == ["MIGRATION", "MIGRATION", "STOP", "MIGRATION"]
        with pytest.raises(MachineError, match=r"differ in \d+ of 16384 pages .* 0x100000"):
            await compare(source, destination)


@one_loop
@pytest.mark.parametrize(
    ("transport", "capabilities"),
    [("unix", ()), ("tcp", ("return-path",)), ("unix", ("xbzrle",))],
    ids=["unix", "tcp, return path", "unix, xbzrle"],
)
async def test_qemu_pair_migrates_over_each_transport(
    qemu: None, tmp_path, transport, capabilities
) -> None:
    where = f"unix:{tmp_path}/socket" if transport == "unix" else "tcp:127.0.0.1:0"
    async with pair(incoming=where) as (source, destination):
        uri = await destination.uri()
        assert uri.startswith(transport)
        await moved(source, destination, uri, *capabilities)
        await unharmed(source, destination)


@one_loop
async def test_several_blocks_and_devices(qemu: None) -> None:
    """The sweep goes from one block on into the next."""
    sweep = Sweep(4 * MIB, start=30 * MIB, fill=6 * MIB, rate=1_000_000)
    devices = ["virtio-rng-pci", "virtio-serial-pci", "virtio-net-pci"]
    async with pair(
        sweep, "defer", blocks=("low", "high"), dimm=16 * MIB, devices=devices
    ) as (source, destination):  # fmt: skip
        await moved(source, destination, await destination.listen("tcp:127.0.0.1:0"), "xbzrle")
        assert any(await destination.read(DIMM_AT, 4096))
        await unharmed(source, destination)


@one_loop
async def test_captured_stream_is_a_guest(qemu: None, tmp_path) -> None:
    stream, all_ways = tmp_path / "stream", ("xbzrle", "return-path")
    async with Machine(SWEEP) as source:
        await source.wait_for_count(SWEEP.every)
        info = await capture(source, stream, *all_ways)
        assert info["xbzrle-cache"]["pages"] > 0
        content = stream.read_bytes()
        assert content.startswith(b"QEVM\0\0\0\3")
        assert is_end(content[-MIB:])
        async with Machine(
            SWEEP, incoming=f"exec:cat {stream}", before=source, paused=True
        ) as destination:
            await destination.wait_run_state("paused")
            await unharmed(source, destination)


# ---------------------------------------------------------------- what fails says why


@one_loop
async def test_failed_migration_ends_the_wait(qemu: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nowhere = f"tcp:127.0.0.1:{taken.getsockname()[1]}"
    async with Machine(SWEEP) as source:
        await source.migrate(nowhere)
        with pytest.raises(MachineError, match="source is not completed but .*Connection refused"):
            await source.wait_status("completed")
        await source.wait_for_more()
        with pytest.raises(MachineError, match="source runs"):
            await source.ram_hash()
        with pytest.raises(ExecuteError, match="power of two"):
            await source.prepare(xbzrle_cache_size=3)


@one_loop
async def test_destination_that_ends_says_why(qemu: None) -> None:
    async with Machine(SWEEP, incoming="tcp:127.0.0.1:0") as destination:
        host, _, port = (await destination.uri()).removeprefix("tcp:").rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"nothing of the kind" * 9000)
        assert await destination.ended() == 1
        writer.close()
        says = "status 1.*Not a migration stream"
        with pytest.raises(MachineError, match=f"does not answer query-status.*{says}"):
            await destination.wait_run_state("paused")
    assert "Not a migration stream" in destination.stderr


@one_loop
async def test_qemu_that_does_not_start_says_why(qemu: None) -> None:
    machine = Machine(SWEEP, devices=["flux-capacitor"])
    with pytest.raises(MachineError, match="does not start.*status 1.*flux-capacitor"):
        async with machine:
            pass
    assert not machine.directory.exists()


@one_loop
async def test_nothing_is_left(qemu: None) -> None:
    async with Machine(SWEEP) as machine:
        await machine.wait_for_count(0)
        os.kill(machine.pid, 0)
    counts = machine.counted()
    assert counts
    assert not machine.directory.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(machine.pid, 0)


@one_loop
async def test_machine_that_is_killed_says_so(qemu: None) -> None:
    async with Machine(SWEEP) as machine:
        await machine.kill()
        with pytest.raises(MachineError, match="status -9"):
            await machine.stop()
        with pytest.raises(MachineError, match="has not counted to 1000000"):
            await machine.wait_for_count(1_000_000)


def test_missing_kvm_is_named(monkeypatch) -> None:
    monkeypatch.setattr(qemu_module, "KVM", "/nowhere/kvm")
    assert qemu_module.kvm_trouble.__wrapped__() == "/nowhere/kvm cannot be used"


def test_kvm_that_does_not_run_the_guest_is_named(qemu: None, monkeypatch) -> None:
    monkeypatch.setattr(qemu_module, "KVM", os.devnull)
    monkeypatch.setattr(qemu_module, "Machine", partial(Machine, extra=("-S",)))
    monkeypatch.setattr(qemu_module, "KVM_PATIENCE", 0.1)
    said = qemu_module.kvm_trouble.__wrapped__()
    assert re.search("has not counted to 64|does not start.*[kK][vV][mM]", said)


# ---------------------------------------------------------------- harm is noticed

SMALL = Sweep(8 * 4096, every=2)


def memory(*values: int) -> bytes:
    return b"".join(bytes([value]) + bytes(4095) for value in values)


@pytest.mark.parametrize(
    ("values", "counts", "value"),
    [
        ((7,) * 8, (), 7),
        ((7,) * 3 + (6,) * 5, (), 7),
        ((0,) * 7 + (255,), (), 0),
        ((7,) * 8, (2, 4, 6), 7),
        ((1,) * 4 + (0,) * 4, (254, 256), 1),
    ],
)
def test_sweep_is_consistent_at_any_moment(values, counts, value) -> None:
    assert SMALL.check(memory(*values), counts) == value


@pytest.mark.parametrize(
    ("values", "counts", "says"),
    [
        (
            (7, 7, 7, 6, 6, 5, 6, 6),
            (),
            "0x105000 is 5: of those before it 3 are 7, and the others 6",
        ),
        ((7, 7, 7, 6, 6, 7, 6, 6), (), "0x105000 is 7"),
        ((6, 6, 7, 7, 7, 7, 7, 7), (), "0x102000 is 7.* 2 are 6"),
        ((7, 7, 7, 7, 7, 7, 7, 5), (), "0x107000 is 5"),
        ((7,) * 8, (0, 2, 4), "7 after 4 sweeps"),
        ((7,) * 8, (6, 8), "7 after 8 sweeps"),
    ],
    ids=["stale", "swapped", "ahead", "stale, at the end", "processor behind", "memory behind"],
)
def test_sweep_finds_a_wrong_page(values, counts, says) -> None:
    with pytest.raises(SweepError, match=says):
        SMALL.check(memory(*values), counts)


def test_sweep_covers_every_byte() -> None:
    sweep = Sweep(4096, stride=1024)
    page = bytearray(4096)
    page[0] = page[1024] = 1
    assert sweep.check(bytes(page)) == 1
    page[3072] = 1
    with pytest.raises(SweepError, match="0x100c00"):
        sweep.check(bytes(page))


def test_counts_are_read() -> None:
    assert SMALL.counted(b"") == []
    assert SMALL.counted(b"0000") == []
    assert SMALL.counted(b"00000000\n00000002\n0000") == [0, 2]


@pytest.mark.parametrize(
    "serial",
    [
        b"00000002\n",
        b"00000000\n00000004\n",
        b"00000000\n00000000\n",
        b"00000000\n00000002\n00000000\n",
        b"00000000\n0000002\n",
        b"00000000\n00\n00000002\n",
        b"00000000\nFFFFFFFF\n",
    ],
)
def test_sweep_finds_a_gap_or_a_repetition(serial) -> None:
    with pytest.raises(SweepError, match="is due"):
        SMALL.counted(serial)


def test_pages_that_differ_are_named() -> None:
    assert differing([b"a", b"b", b"c"], [b"a", b"x", b"c"], BASE, 4096) == [BASE + 4096]
    assert differing([b"a"], [b"a", b"b"], 0, 4096) == [4096]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"stride": 0}, "stride"),
        ({"stride": 2 * MIB}, "stride"),
        ({"start": 4096}, "1 MiB"),
        ({"fill": 3}, "words"),
        ({"every": 255}, "254"),
        ({"rate": 50}, "thousands"),
    ],
)
def test_impossible_sweep_is_refused(values, says) -> None:
    with pytest.raises(ValueError, match=says):
        Sweep(MIB, **values)


def test_sweep_fits_its_machine() -> None:
    with pytest.raises(ValueError, match="2 GiB"):
        Machine(Sweep(64 * MIB), size=64 * MIB)


@pytest.mark.parametrize("length", [2, 0x7B, 0x100, 0x7B00, 0x10000, 0x17B7B])
def test_end_of_stream_is_found(length) -> None:
    text = b"{" + b"x" * (length - 2) + b"}"
    assert is_end(b"\x7e\0\0\0\1\0\x06" + length.to_bytes(4) + text)
    assert not is_end(b"\x7e\0\0\0\1\0\x06" + (length + 1).to_bytes(4) + text)
    assert not is_end(b"\x7e\0\0\0\1\0\x07" + length.to_bytes(4) + text)
    assert not is_end(text)
