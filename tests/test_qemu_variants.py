"""Machines with unusual devices and capabilities: they are migrated, saved and lifted, or refused
with a message that says what to do, while the guest runs on.

Capabilities are refused if the user tells QEMU to migrate. In a QEMU that we drive over QMP they
are off during the migration.
"""

from __future__ import annotations

import asyncio
import random
import re
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError

from migrate.errors import MigrationError
from migrate.qemu import place
from migrate.qemu.snapshot.layout import Snapshot
from migrate.qemu.stream import loader
from migrate.transport.address import parse_address
from proto.qemu.parts import MAGIC, CommandCode, pack_command
from tests.machine import Machine, Sweep, compare
from tests.machine.between import SWEEP, Way, carried, later
from tests.machine.plug import Qtest, plug
from tests.machine.qemu import MIB, PROGRAM, SLOW, MachineError

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.asyncio(loop_factories=["asyncio"]),
    pytest.mark.timeout(300),
]


@pytest.fixture
def way(tmp_path: Path) -> Way:
    return Way(tmp_path)


# ---------------------------------------------------------------- bitmaps of dirty blocks

DISK: dict[str, Any] = {
    "extra": ("-blockdev", "driver=null-co,node-name=data,size=8388608,read-zeroes=on"),
    "capabilities": ("dirty-bitmaps",),
}


async def mark(machine: Machine) -> None:
    """Make a bitmap of the disk, with 3 of 128 bits set."""
    await machine.execute(
        "block-dirty-bitmap-add", node="data", name="backup", granularity=1 << 16, persistent=False
    )
    for at in ("0", "1M", "5M"):
        await machine.execute("human-monitor-command", command_line=f'qemu-io data "write {at} 4k"')
    assert await marked(machine) == [("backup", 3 << 16, 1 << 16)]


async def marked(machine: Machine) -> list[tuple[str, int, int]]:
    nodes = await machine.execute("query-named-block-nodes")
    (data,) = (one for one in nodes if one["node-name"] == "data")
    bitmaps = data.get("dirty-bitmaps", [])
    return [(one["name"], one["count"], one["granularity"]) for one in bitmaps]


async def test_dirty_bitmaps_are_migrated(binary) -> None:
    async with carried(binary=binary, **DISK) as move:
        await mark(move.source)
        await move.begin()
        await move.source.finish()
        await move.arrived()
        assert await marked(move.destination) == [("backup", 3 << 16, 1 << 16)]


async def test_dirty_bitmaps_are_saved_and_lifted(binary, way, tmp_path) -> None:
    async with Machine(SWEEP, binary=binary, **DISK) as source:
        await source.wait_for_count(SWEEP.every)
        await mark(source)
        await way.landed(source, tmp_path / "vm")
        snapshot = Snapshot.read(str(tmp_path / "vm"))
        assert [one.name for one in snapshot.sections].count("dirty-bitmap") >= 2
        async with Machine(
            SWEEP, binary=binary, incoming="tcp:127.0.0.1:0", before=source, **DISK
        ) as other:
            await way.lifted(tmp_path / "vm", other)
            assert await marked(other) == [("backup", 3 << 16, 1 << 16)]
            await other.wait_for_more()


@pytest.mark.parametrize("driven", [False, True], ids=["by hand", "by qmp"])
async def test_guest_survives_switch_to_postcopy_for_bitmaps(binary, driven) -> None:
    """With dirty-bitmaps QEMU can be told to switch: the guest runs at the destination before the
    bitmaps are there. 7.2 never lets the guest run on if the stream ends after that."""
    node = "driver=null-co,node-name=data,size=8589934592,read-zeroes=on"
    options: dict[str, Any] = {
        "capabilities": ("dirty-bitmaps",), "extra": ("-blockdev", node), "binary": binary,
        "sweep": Sweep(MIB // 4, fill=2 * MIB, rate=1000, every=8), "first": large,
    }  # fmt: skip
    if driven:
        options |= {"out": "qmp=", "incoming": "defer"}
    async with carried(
        *(("--max-bandwidth", "16m", "--downtime-limit", "10") if driven else ()), **options
    ) as move:
        source = move.source
        if not driven:
            await source.migrate(move.uri, "return-path", max_bandwidth=SLOW, downtime_limit=10)
        await source.wait_status("active")
        await source.execute("migrate-start-postcopy")
        assert await asyncio.to_thread(move.here.wait) == 1
        assert "was switched to postcopy, which cannot be carried" in move.here.err
        if not driven:
            assert "`cont` in its monitor lets it run on here" in move.here.err
            await source.wait_run_state("postmigrate")
            await source.cont()
        await source.wait_run_state("running")
        await source.wait_for_more()


async def large(machine: Machine) -> None:
    """Make a bitmap that takes QEMU longer to send than the downtime limit."""
    await machine.execute(
        "block-dirty-bitmap-add", node="data", name="backup", granularity=512, persistent=False
    )
    for at in range(2):
        await machine.execute(
            "human-monitor-command", command_line=f'qemu-io data "write {at}G 1G"'
        )


# ---------------------------------------------------------------- memory that is plugged

GROWING: dict[str, Any] = {
    "blocks": ("low",),  # the first block that QEMU makes: see `grow`
    "extra": (
        "-m", "64M,maxmem=256M", "-object", "memory-backend-ram,id=more,size=64M",
        "-device", "virtio-mem-pci,id=more0,memdev=more,requested-size=32M",
        "-qtest", "unix:{here}/qtest,server=on,wait=off", "-qtest-log", "none",
    ),
}  # fmt: skip
BLOCK = 2 * MIB
WIDE = Sweep(16 * MIB, fill=18 * MIB, rate=1_000_000)


async def grow(machine: Machine) -> tuple[int, int]:
    """Plug blocks 3 to 7 of the further memory, and write two of them; return its address and size.

    Without KVM, QEMU misses writes to pages that its TLB has held since they were dirty before:
    7.2 in all blocks, 10.0 in all but the first. The TLB grows when the memory of a device changes.
    Here it holds 4 MiB and not 8, so the guest sweeps 16.
    """
    await machine.stop()
    qtest = await Qtest.connect(machine.directory / "qtest")
    try:
        address = await plug(qtest, 48 * MIB, 3, 5)
        await qtest.write(address + 4 * BLOCK, random.Random(1).randbytes(2 * BLOCK))
    finally:
        await qtest.close()
    await machine.cont()
    return address, 64 * MIB


async def grown(machine: Machine) -> int:
    """Return the bytes of the further memory that are plugged."""
    (one,) = await machine.execute("query-memory-devices")
    return int(one["data"]["size"])


async def test_plugged_memory_is_migrated_saved_and_lifted(binary, accel, way, tmp_path) -> None:
    """QEMU sends nothing of memory that is not plugged. From 8.0 on it sends the size of the device
    before all pages, because its memory must be there when they come."""
    async with carried(binary=binary, accel=accel, sweep=WIDE, **GROWING) as move:
        more = await grow(move.source)
        await move.begin()
        await move.source.finish()
        await move.arrived()
        await move.destination.stop()
        assert await grown(move.destination) == 5 * BLOCK
        await way.landed(move.destination, tmp_path / "vm")
        snapshot = Snapshot.read(str(tmp_path / "vm"))
        early = [one.name for one in snapshot.sections if one.at < snapshot.head]
        assert early == ([] if binary == PROGRAM else ["0000:00:02.0/virtio-mem-device-early"])
        (block,) = (tmp_path / "vm/blocks").glob("*more")
        assert (block.stat().st_size, block.stat().st_blocks * 512) == (64 * MIB, 2 * BLOCK)
        async with Machine(
            WIDE, binary=binary, accel=accel, incoming="tcp:127.0.0.1:0",
            before=move.destination, paused=True, **GROWING,
        ) as other:  # fmt: skip
            await way.lifted(tmp_path / "vm", other)
            await compare(move.destination, other)
            assert await grown(other) == 5 * BLOCK
            assert await other.ram_hash(*more) == await move.destination.ram_hash(*more)
            await other.cont()
            await other.wait_for_more()


# ---------------------------------------------------------------- no description at the end


async def test_stream_without_description(binary, way, tmp_path) -> None:
    """It ends when nothing more comes. Its last byte could be part of any section."""
    options = {"binary": binary, "machine": "pc,suppress-vmdesc=on"}
    async with carried(**options) as move:
        await move.begin()
        await move.source.finish()
        await move.arrived()
        await way.landed(move.destination, tmp_path / "vm")
        assert Snapshot.read(str(tmp_path / "vm")).description is None
        async with Machine(
            SWEEP, incoming="tcp:127.0.0.1:0", before=move.destination, **options
        ) as other:
            await way.lifted(tmp_path / "vm", other)
            await other.wait_for_more()


# ---------------------------------------------------------------- switchover-ack


async def test_switchover_ack_is_passed_on() -> None:
    """From 8.1 on: there is no last round before the destination has said that its devices are
    ready for it."""
    async with carried(
        binary=await asyncio.to_thread(later), capabilities=("switchover-ack", "return-path")
    ) as move:
        await move.begin()
        await move.source.finish()
        await move.arrived()


async def test_saving_acknowledges_switchover(way, tmp_path) -> None:
    async with Machine(SWEEP, binary=await asyncio.to_thread(later)) as source:
        await source.wait_for_count(SWEEP.every)
        await way.landed(source, tmp_path / "vm", "switchover-ack")


# ---------------------------------------------------------------- a large one


async def test_guest_of_one_gibibyte() -> None:
    sweep = Sweep(16 * MIB, fill=900 * MIB, rate=1_000_000)
    async with carried(sweep=sweep, size=1024 * MIB) as move:
        await move.source.migrate(move.uri, "return-path", max_bandwidth=0, downtime_limit=1000)
        await move.source.wait_status("completed")
        await move.arrived()


# ---------------------------------------------------------------- what cannot be carried

REFUSED = [
    (("multifd",), "switch the capability multifd off"),
    (("multifd", "zero-copy-send"), "switch the capability multifd off"),
    (("postcopy-ram",), "switch the capability postcopy-ram off"),
    (("postcopy-ram", "postcopy-preempt"), "postcopy-"),
]


@pytest.mark.parametrize(("names", "says"), REFUSED, ids=["+".join(one) for one, _ in REFUSED])
async def test_unfit_capabilities_are_refused(names, says, binary) -> None:
    async with carried(binary=binary) as move:
        await move.source.migrate(
            move.uri, "return-path", *names, max_bandwidth=SLOW, downtime_limit=1
        )
        assert await asyncio.to_thread(move.here.wait) == 2, move.here.err
        assert says in move.here.err
        try:
            await move.stayed()
        except MachineError as error:
            # 7.2 aborts if its second connection finds that the stream has just ended
            if "yank_register_function" not in str(error) or len(names) == 1:
                raise


async def refuses_shared(binary: str, *extra: str) -> None:
    memory = "memory-backend-file,id=mem,size=64M,mem-path={here}/mem,share=on"
    shared = ("-object", memory, "-machine", "memory-backend=mem")
    async with carried(binary=binary, extra=(*shared, *extra)) as move:
        await move.source.migrate(
            move.uri, "return-path", "x-ignore-shared", max_bandwidth=SLOW, downtime_limit=1
        )
        assert await asyncio.to_thread(move.here.wait) == 1
        assert re.search("switch the capabilit.* x-ignore-shared .*off", move.here.err)
        await move.stayed()


async def test_shared_memory_is_refused(binary) -> None:
    """x-ignore-shared leaves out memory that both QEMUs have in one file."""
    await refuses_shared(binary)


async def test_shared_memory_is_refused_by_list_of_blocks() -> None:
    """If the stream has no configuration, the list of blocks tells. (Without one, 10.0.2 fails an
    assertion of its own, leave_container, when its guest is paused, whatever it migrates to.)"""
    await refuses_shared(PROGRAM, "-global", "migration.send-configuration=off")


async def test_multifd_is_refused_on_unix_socket(binary) -> None:
    async with carried(out="unix:{}/out", binary=binary) as move:
        await move.source.migrate(
            move.uri, "return-path", "multifd", max_bandwidth=SLOW, multifd_channels=16
        )
        assert await asyncio.to_thread(move.here.wait) == 2, move.here.err
        assert "switch the capability multifd off" in move.here.err
        await move.stayed()
        assert not Path(move.uri.removeprefix("unix:")).exists()


async def test_mapped_ram_is_refused_by_qemu() -> None:
    """QEMU has not connected, so the next attempt is like any other."""
    async with carried(binary=await asyncio.to_thread(later)) as move:
        await move.source.prepare("mapped-ram")
        with pytest.raises(ExecuteError, match="seekable"):
            await move.source.migrate(move.uri, "return-path")
        switched = [{"capability": "mapped-ram", "state": False}]
        await move.source.execute("migrate-set-capabilities", capabilities=switched)
        await move.begin()
        await move.source.finish()
        await move.arrived()


@pytest.mark.parametrize(
    "on",
    [("multifd",), ("postcopy-ram", "postcopy-preempt"), ("x-ignore-shared",)],
    ids="+".join,
)
async def test_unfit_capabilities_are_off_while_driven_by_qmp(binary, on) -> None:
    """At the source and at the destination; afterwards both are as they were."""
    async with carried(
        "--downtime-limit", "2000", out="qmp=", incoming="defer", binary=binary, capabilities=on
    ) as move:
        await move.source.wait_run_state("postmigrate")
        await move.arrived()
        for machine in (move.source, move.destination):
            states = await machine.execute("query-migrate-capabilities")
            assert {one["capability"] for one in states if one["state"]} >= set(on)


@pytest.mark.parametrize("size", [1, 16 * MIB], ids=["all of it", "more than it takes"])
async def test_destination_qemu_that_does_not_read_fails_soon(binary, size, monkeypatch) -> None:
    """QEMU reads nothing before it has all connections that it waits for. Without this check the
    guest would be paused for as long as loading it may take."""
    monkeypatch.setattr(loader, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(place, "SEND_BYTES", 1 << 16)
    capabilities = ("multifd",)
    async with Machine(
        SWEEP, binary=binary, incoming="defer", capabilities=capabilities
    ) as machine:
        there = place.QemuPlace(parse_address(await machine.listen("tcp:127.0.0.1:0")))
        await there.make_ready()

        async def take() -> None:
            asks = (
                MAGIC
                + pack_command(CommandCode.OPEN_RETURN_PATH)
                + pack_command(CommandCode.PING, bytes(4))
            )
            await asyncio.to_thread(there.loader.send, asks + bytes(size))
            await there.prove(return_path=True)

        with pytest.raises(MigrationError, match="capabilities multifd and postcopy-preempt off"):
            await take()
        await there.discard()


async def test_block_migration() -> None:
    """QEMU has it up to 9.0."""
    content = random.Random(2).randbytes(MIB)
    async with carried(binary=PROGRAM, disk=content) as move:
        disk = move.destination.directory / "disk"
        disk.write_bytes(bytes(MIB))
        await move.begin("block")
        await move.source.finish()
        await move.arrived()
        assert disk.read_bytes() == content


async def test_compressed_pages_are_refused() -> None:
    """QEMU has them up to 9.0."""
    async with carried(binary=PROGRAM) as move:
        await move.source.migrate(
            move.uri, "return-path", "compress", max_bandwidth=SLOW, downtime_limit=1
        )
        assert await asyncio.to_thread(move.here.wait) == 1
        assert "switch the capability compress off" in move.here.err
        await move.stayed()
