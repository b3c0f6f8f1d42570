"""Snapshots: a machine saved in a directory, and loaded from it into a QEMU.

A snapshot equals the guest's state, and appears completely or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash

from migrate.errors import MigrationError, UsageError
from migrate.files.directory import Directory
from migrate.files.identity import identity_of
from migrate.files.partial_output import PartialOutput
from migrate.memory.stream_buffer import StreamBuffer
from migrate.ownership.journal import Journal
from migrate.qemu.snapshot import files as files_module
from migrate.qemu.snapshot import memory_files, saving
from migrate.qemu.snapshot.files import ASIDE, SnapshotFiles
from migrate.qemu.snapshot.layout import Snapshot, StoredSection, block_file
from migrate.qemu.snapshot.place import SnapshotPlace
from migrate.qemu.snapshot.prepared import PreparedSnapshot, check_snapshot_output
from migrate.qemu.snapshot.saving import SnapshotSaver
from migrate.qemu.snapshot.sending import SnapshotSender
from migrate.qemu.stream.description import check_sections
from proto.qemu import _ram_files, _ram_files_twin
from proto.qemu._ram_reader import SCAN_END, RamReader
from proto.wire.errors import DecodeError
from proto.wire.ownership import Event, Role
from tests.machine import Machine, Sweep, compare
from tests.machine.between import Way, both, later
from tests.machine.qemu import DIMM_AT, PROGRAM
from tests.machine.sweep import BASE
from tests.programs import Program, destination
from tests.relay import Relay
from tests.requirements import need
from tests.trees import DEEP, deep_tree

pytestmark = pytest.mark.qemu

MIB = 1 << 20
PAGE = 4096
# It goes from one block on into the next.
SWEEP = Sweep(4 * MIB, start=30 * MIB, fill=6 * MIB, rate=1_000_000)
MACHINE: dict[str, Any] = {
    "blocks": ("low", "high"), "dimm": 16 * MIB, "devices": ["virtio-rng-pci"],
}  # fmt: skip
SLOW = 4_000_000
one_loop = pytest.mark.asyncio(loop_factories=["asyncio"])


@pytest.fixture
def qemu() -> None:
    need(shutil.which(PROGRAM), f"{PROGRAM} (qemu-system-x86)")


# ---------------------------------------------------------------- real machines


@pytest.fixture
def way(tmp_path: Path) -> Way:
    return Way(tmp_path)


@asynccontextmanager
async def counting(binary: str = PROGRAM, **options: Any) -> AsyncIterator[Machine]:
    async with Machine(SWEEP, binary=binary, **MACHINE, **options) as machine:
        await machine.wait_for_count(SWEEP.every)
        yield machine


def waiting(
    before: Machine, *, paused: bool = True, binary: str = PROGRAM, **options: Any
) -> Machine:
    return Machine(
        SWEEP, incoming="tcp:127.0.0.1:0", before=before, paused=paused, binary=binary,
        **MACHINE, **options,
    )  # fmt: skip


def digest(path: Path, first: int = 0) -> str:
    return xxhash.xxh3_128_hexdigest(path.read_bytes()[first:])


def hidden(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".")]


@one_loop
@pytest.mark.parametrize("capabilities", [(), ("xbzrle",)], ids=["plain", "xbzrle"])
async def test_machine_is_saved_and_continues_in_another_qemu(
    way: Way, tmp_path: Path, capabilities: tuple[str, ...], binary: str, accel: str
) -> None:
    vm, again = tmp_path / "vm", tmp_path / "again"
    async with counting(binary, accel=accel) as source:
        receiver = await way.landed(source, vm, *capabilities)
        assert f"the machine is in {vm}, 80.3 MiB of memory" in receiver.out
        blocks = vm / "blocks"
        # below 1 MiB the machine shows its firmware in place of some of the memory
        assert digest(blocks / "low", BASE) == await source.ram_hash(BASE, 31 * MIB)
        assert digest(blocks / "high") == await source.ram_hash(32 * MIB, 32 * MIB)
        assert digest(blocks / "dimm0") == await source.ram_hash(DIMM_AT, 16 * MIB)
        assert (blocks / "high").stat().st_blocks * 512 < 8 * MIB
        snapshot = Snapshot.read(str(vm))
        assert [section.name for section in snapshot.sections if "virtio-rng" in section.name]
        for stored in (*snapshot.blocks, snapshot.devices, snapshot.description):
            assert stored is not None
            assert digest(vm / stored.file) == stored.hash

        # lifted, the machine is the same, and is saved as the same again
        async with waiting(source, binary=binary, accel=accel) as other:
            await way.lifted(vm, other)
            await compare(source, other)
            assert await source.check_sweep() == await other.check_sweep()
            await way.landed(other, again)
        assert Snapshot.read(str(again)).blocks == snapshot.blocks

        # and once more: it continues where it was
        async with waiting(source, paused=False, binary=binary, accel=accel) as other:
            await way.lifted(vm, other)
            await other.wait_run_state("running")
            await other.wait_for_more()
            await other.stop()
            await other.check_sweep()
    assert not hidden(tmp_path)


@one_loop
async def test_machine_is_lifted_into_later_qemu(qemu: None, way: Way, tmp_path: Path) -> None:
    """A later QEMU has the machine types of earlier ones."""
    async with counting(machine="pc-i440fx-7.2") as source:
        await way.landed(source, tmp_path / "vm", "xbzrle")
        binary = await asyncio.to_thread(later)
        async with waiting(source, binary=binary, machine="pc-i440fx-7.2") as other:
            await way.lifted(tmp_path / "vm", other)
            await compare(source, other)
            await other.cont()
            await other.wait_for_more()


@one_loop
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
async def test_interrupted_saving_leaves_no_files(
    qemu: None, way: Way, tmp_path: Path, number: signal.Signals
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    async with counting() as machine:
        receiver, address = await way.land(place / "vm")
        sender, where = await way.source("qemu:tcp:127.0.0.1:0", address)
        await machine.migrate(where, "return-path", max_bandwidth=SLOW)
        await machine.wait_info(
            lambda info: info.get("ram", {}).get("transferred", 0) > 2 * MIB, "under way"
        )
        await asyncio.to_thread(receiver.read_line, "receiving a qemu guest")
        assert not (place / "vm").exists()
        receiver.kill(number)
        codes = [await asyncio.to_thread(one.wait) for one in (receiver, sender)]
        assert codes == ([130, 8] if number is signal.SIGINT else [-9, 1])
        assert os.listdir(place) == []
        await machine.wait_for_more()
        # and the next attempt succeeds
        await way.landed(machine, place / "vm", "xbzrle")
        assert os.listdir(place) == ["vm"]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system that is too small for the machine."""
    need(os.geteuid() == 0, "root, to mount a small file system")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


@one_loop
async def test_guest_runs_on_if_disk_is_full(qemu: None, way: Way, small: Path) -> None:
    async with counting() as machine:
        receiver, address = await way.land(small / "vm")
        sender, where = await way.source("qemu:tcp:127.0.0.1:0", address)
        await machine.migrate(where, "return-path", max_bandwidth=0, downtime_limit=2000)
        for program in (receiver, sender):
            assert await asyncio.to_thread(program.wait) == 1
            assert f"--output {small}/vm: No space left on device" in program.err
        assert "the guest runs on here" in sender.err
        await machine.wait_status("failed", "cancelled")
        await machine.wait_for_more()
    assert os.listdir(small) == []


@one_loop
async def test_saving_resumes_after_broken_connection(qemu: None, way: Way, tmp_path: Path) -> None:
    async with counting() as machine:
        receiver, address = await way.land(tmp_path / "vm", "--retry", "30s")
        async with Relay(address, breaks=(3 * MIB, 12 * MIB)) as relay:
            sender, where = await way.source(
                "qemu:tcp:127.0.0.1:0", relay.address, "--retry", "30s"
            )
            await machine.begin(where, "return-path", "xbzrle")
            await machine.finish()
            await both(sender, receiver)
            assert relay.broken
        assert digest(tmp_path / "vm/blocks/low", BASE) == await machine.ram_hash(BASE, 31 * MIB)


@one_loop
async def test_damaged_snapshot_is_not_run(qemu: None, way: Way, tmp_path: Path) -> None:
    vm = tmp_path / "vm"
    async with counting() as source:
        await way.landed(source, vm)
        with (vm / "blocks/high").open("r+b") as file:
            file.seek(MIB)
            byte = file.read(1)[0]
            file.seek(MIB)
            file.write(bytes([byte ^ 1]))
        async with waiting(source, paused=False) as other:
            receiver, address = await way.destination("--guest", f"qemu:{await other.uri()}")
            sender, _ = await way.source(f"snapshot:{vm}", address)
            assert await asyncio.to_thread(sender.wait) == 1
            assert f"{vm}/blocks/high is not what was saved there" in sender.err
            assert "the snapshot is as it was" in sender.err
            assert await asyncio.to_thread(receiver.wait) == 1
            assert "is not what was saved there" in receiver.err  # it waits for no other source
            assert await other.ended() == 1
        assert len(other.counted()) == len(source.counted())


@pytest.mark.parametrize("letter", ["v", "é"])
def test_longest_possible_output_name(tmp_path: Path, letter: str) -> None:
    """Also if it replaces a snapshot, which gets a hidden name then."""
    path = tmp_path / (letter * (255 // len(letter.encode())))
    files = SnapshotFiles(str(path))
    os.close(files.make("x"))
    Path(files.temporary).mkdir(exist_ok=True)
    Path(f"{files.temporary}{ASIDE}").mkdir()


def test_invalid_arguments_are_refused_early(tmp_path: Path) -> None:
    """Before the program listens or connects."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thing").touch()
    (tmp_path / "file").touch()
    for arguments, says in (
        (("--guest", "qemu"), "or qemu with --output DIR"),
        (("--guest", "qemu", "--output", f"{tmp_path}/full"), "it is not empty"),
        (
            ("--guest", "qemu", "--output", f"{tmp_path}/full", "--overwrite"),
            "it holds no saved machine",
        ),
        (("--guest", "qemu", "--output", f"{tmp_path}/file"), "it is no directory"),
        (("--guest", "qemu", "--output", f"{tmp_path}/none/vm"), "there is no directory"),
        (("--guest", "qemu:tcp:h:1", "--output", f"{tmp_path}/vm"), "one of the two"),
    ):
        program = Program("migrate-dst", "--listen", "127.0.0.1:0", *arguments)
        assert program.wait() == 2
        assert says in program.err
    for guest, says in (
        ("snapshot", "name the directory"),
        (f"snapshot:{tmp_path}", "no snapshot"),
    ):
        program = Program("migrate-src", "--guest", guest, "tcp:127.0.0.1:1")
        assert program.wait() == 2
        assert says in program.err


def test_file_guest_is_refused_for_snapshot_output(tmp_path: Path) -> None:
    receiver, address = destination(
        "--guest", "qemu", "--output", f"{tmp_path}/vm", "--journal", f"{tmp_path}/dst"
    )
    sender = Program("migrate-src", "--guest", f"file:{__file__}", address)
    assert sender.wait() == 4
    assert "receives the guest of a QEMU, not a file guest" in sender.err
    receiver.kill(signal.SIGINT)
    receiver.wait()
    assert not (tmp_path / "vm").exists()


# ---------------------------------------------------------------- without a machine

BLOCKS = ((b"pc.ram", 300 * PAGE), (b"/rom@etc/acpi/tables", 2 * PAGE), (b"../..", PAGE))
DEVICE = b"\x04\0\0\0\x09\x05timer\0\0\0\0\0\0\0\x02" + bytes(24) + b"\x7e\0\0\0\x09"
DESCRIPTION = (
    b'{"devices": [{"name": "timer", "instance_id": 0, "fields": [{"size": 8, "array_len": 3}]}]}'
)


def memory() -> list[bytes]:
    rng = random.Random(5)
    return [
        b"".join(rng.choice([bytes(PAGE), rng.randbytes(PAGE)]) for _ in range(size // PAGE))
        for _, size in BLOCKS
    ]


def stream(
    blocks: tuple[tuple[bytes, int], ...] = BLOCKS, device: bytes = DEVICE,
    description: bytes = DESCRIPTION,
) -> bytes:  # fmt: skip
    """Return the stream of a QEMU that has this memory, and one device."""
    recorder = _ram_files_twin.RamRecorder([(n, s // PAGE) for n, s in blocks], PAGE)
    mark, end = b"\x7e\0\0\0\2", struct.pack(">Q", 0x10)
    said = b"QEVM\0\0\0\3\x07\0\0\0\x02pc" + b"\x08\0\1\0\0" + b"\x08\0\2\0\4\0\0\0\1"
    said += b"\x01\0\0\0\2\x03ram\0\0\0\0\0\0\0\4"
    said += struct.pack(">Q", sum(size for _, size in blocks) | 4)
    for name, size in blocks:
        said += bytes([len(name)]) + name + struct.pack(">Q", size)
    said += end + mark
    for number, content in enumerate(memory()[: len(blocks)]):
        out = bytearray(2 * len(content) + 4096)
        used, _ = recorder.put(out, number, 0, len(content) // PAGE, content)
        said += b"\x02\0\0\0\2" + bytes(out[:used]) + end + mark
    said += b"\x03\0\0\0\2" + end + mark + device + b"\0"
    return said + (b"\x06" + struct.pack(">I", len(description)) + description) * bool(description)


def land(
    path: Path, said: bytes, announced: Sequence[tuple[bytes, int]] | None = None
) -> tuple[SnapshotSaver, bytes]:
    """Save a stream that ends after `said`; return the saver and its answer."""
    ours, theirs = socket.socketpair()
    landing = SnapshotSaver(SnapshotFiles(str(path)), theirs)
    landing.announced = announced
    with ours:
        landing.start()
        try:
            ours.sendall(said)
            ours.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        answer = b""
        while not answer.endswith((struct.pack(">HHI", 1, 4, 0), struct.pack(">HHI", 1, 4, 1))):
            answer += ours.recv(100)
        landing.close()
    return landing, answer


@pytest.fixture
def landed(tmp_path: Path) -> Iterator[Path]:
    landing, answer = land(tmp_path / "vm", stream())
    assert landing.error == ""
    assert answer == struct.pack(">HHIHHI", 2, 4, 1, 1, 4, 0)
    os.rename(landing.files.temporary, tmp_path / "vm")
    yield tmp_path / "vm"
    assert not hidden(tmp_path)


def test_saved_files_match_the_stream(landed: Path) -> None:
    names = ["blocks/pc.ram", "blocks/%2From@etc%2Facpi%2Ftables", "blocks/%2E.%2F.."]
    assert sorted(os.listdir(landed / "blocks")) == sorted(name[7:] for name in names)
    for name, content in zip(names, memory(), strict=True):
        assert (landed / name).read_bytes() == content
    assert (landed / "devices.bin").read_bytes() == b"QEVM\0\0\0\3\x07\0\0\0\x02pc" + DEVICE
    assert (landed / "description.json").read_bytes() == DESCRIPTION
    holes = sum(not any(memory()[0][i : i + PAGE]) for i in range(0, 300 * PAGE, PAGE))
    assert (landed / names[0]).stat().st_blocks * 512 <= (300 - holes) * PAGE + 8 * PAGE


def close(place: PreparedSnapshot) -> None:
    """Close a place, and wait until the snapshot that it replaced is removed."""
    place.close()
    for thread in threading.enumerate():
        if thread.name == "removal":
            thread.join()


@pytest.mark.parametrize("again", [False, True])
def test_overwrite_replaces_deep_and_wide_trees(deep_path: Path, again: bool) -> None:
    """A tree that is deeper than Python recurses neither fails GO nor delays its answer.

    It is removed after that.
    """
    deep_tree(deep_path / "before", DEEP)
    (deep_path / "before/snapshot.json").touch()
    landing, _ = land(deep_path / "before", stream())
    assert landing.snapshot is not None
    place = PreparedSnapshot(
        landing.left, landing.snapshot.id, landing.snapshot.memory, overwrite=True,
        before=identity_of(os.stat(deep_path / "before")),
    )  # fmt: skip
    if again:
        facts = json.loads(json.dumps(place.facts()))
        place.close()
        place = PreparedSnapshot.reopen(facts)
    said = asyncio.run(place.start())
    assert said == f"the machine is in {deep_path}/before, 1.2 MiB of memory"
    assert asyncio.run(place.start()) == said, "an earlier program may have died just then"
    [aside] = [path for path in deep_path.iterdir() if path.name.endswith(".before")]
    close(place)
    assert not aside.exists()
    assert (deep_path / "before/blocks/pc.ram").read_bytes() == memory()[0]
    assert not hidden(deep_path)


def exchange(first: Path, second: Path) -> None:
    """Exchange two names, as RENAME_EXCHANGE does."""
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def test_overwrite_removes_only_the_directory_that_was_locked(
    landed: Path, tmp_path: Path, monkeypatch
) -> None:
    """The directory above belongs to another user, who exchanges the landed machine with a
    directory that is not his between any two looks of ours: every such sequence of exchanges."""
    swaps: Iterator[bool] = iter(())
    vm, foreign, temporary = (tmp_path / name for name in ("out", "foreign", ".out.xbmigrate"))

    def swap_before(name: str) -> None:
        real = getattr(Directory, name)

        def method(self: Directory, what: str, *arguments: Any) -> Any:
            if what == "out" and next(swaps, False) and vm.exists() and foreign.exists():
                exchange(vm, foreign)
            return real(self, what, *arguments)

        monkeypatch.setattr(Directory, name, method)

    for name in ("lstat", "entry_is", "open_directory", "rename_noreplace"):
        swap_before(name)
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
    identity, replaced = Snapshot.read(str(landed)).id, 0
    for chosen in itertools.product([False, True], repeat=6):
        foreign.mkdir()
        (foreign / "precious").touch()
        vm.mkdir()
        (vm / "snapshot.json").touch()
        shutil.copytree(landed, temporary)
        known = identity_of(os.stat(temporary))
        left = PartialOutput(str(vm), str(tmp_path), temporary.name, known, tree=True)
        place = PreparedSnapshot(left, identity, 0, overwrite=True, before=identity_of(os.stat(vm)))
        swaps = iter(chosen)
        with contextlib.suppress(MigrationError):
            asyncio.run(place.start())
            replaced += 1
        close(place)
        there = [path for path in tmp_path.iterdir() if path != landed]
        [precious] = [path for path in there if (path / "precious").exists()]
        [machine] = [path for path in there if (path / "blocks").exists()]
        assert identity_of(os.stat(machine)) == known
        assert precious.name in ("out", "foreign"), f"{chosen}: it has lost its name"
        for path in there:
            shutil.rmtree(path)
    assert 0 < replaced < 64


def test_overwrite_refuses_directory_that_came_later(landed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    newer, _ = land(out, stream())
    assert newer.snapshot is not None
    place = PreparedSnapshot(newer.left, newer.snapshot.id, 1 << 20, overwrite=True)
    shutil.copytree(landed, out)
    with pytest.raises(MigrationError, match="out: it was replaced while"):
        asyncio.run(place.start())
    assert Snapshot.read(str(out)).id == Snapshot.read(str(landed)).id
    asyncio.run(place.discard())


@one_loop
async def test_overwrite_refuses_directory_exchanged_during_migration(
    landed: Path, tmp_path: Path
) -> None:
    place = SnapshotPlace(str(landed), overwrite=True)
    await place.make_ready()
    exchange(landed, shutil.copytree(landed, tmp_path / "other"))
    await asyncio.to_thread(place.loader.withhold, stream())
    await place.prove(return_path=True)
    with pytest.raises(MigrationError, match="vm: it was replaced while"):
        await place.start(b"")
    assert Snapshot.read(str(landed)).id == Snapshot.read(str(tmp_path / "other")).id
    await place.discard()


def test_named_snapshot_counts_as_started_even_if_damaged(landed: Path, tmp_path: Path) -> None:
    """The source hears that the guest was not started only if the snapshot has no name yet."""
    landing, _ = land(tmp_path / "out", stream())
    assert landing.snapshot is not None
    place = PreparedSnapshot(landing.left, landing.snapshot.id, 1 << 20, overwrite=False)
    asyncio.run(place.start())
    (tmp_path / "out/snapshot.json").write_text("damaged")
    assert asyncio.run(place.start()).startswith(f"the machine is in {tmp_path}/out")
    place.close()


def test_resolve_of_snapshot_guest_says_that_it_runs_nowhere_here(
    landed: Path, tmp_path: Path
) -> None:
    """No guest runs here, whatever became of the one that was lifted."""
    for number, (keep, says) in enumerate({
        "source": "ABORTED: the guest does not run at the destination; the snapshot is as it was",
        "destination": "DONE: the guest runs at the destination; the snapshot is as it was",
    }.items()):  # fmt: skip
        directory = tmp_path / keep
        journal = Journal(Role.SOURCE, bytes([number] * 16), str(directory))
        journal.begin(guest={"kind": "snapshot", "path": str(landed)}, address="tcp:127.0.0.1:1")
        journal.move(Event.READY)
        journal.close()
        words = ("--keep", keep, "--force", "--journal", str(directory))
        program = Program("migrate-src", "resolve", *words)
        assert program.wait() == 0, program.err
        assert says in program.out


def lift(path: Path) -> tuple[bytes, SnapshotSender]:
    ours, theirs = socket.socketpair()
    lifter = SnapshotSender(str(path), Snapshot.read(str(path)), theirs)
    said = bytearray()
    with ours:
        lifter.start()
        while not said.endswith(DESCRIPTION) and (piece := ours.recv(1 << 16)):
            said += piece
    lifter.join()
    return bytes(said), lifter


def test_lifted_snapshot_is_saved_identically(landed: Path, tmp_path: Path) -> None:
    said, lifter = lift(landed)
    assert lifter.error == ""
    landing, _ = land(tmp_path / "again", said)
    assert landing.snapshot is not None
    found = Snapshot.read(str(landed))
    assert replace(landing.snapshot, id="") == replace(found, id="")
    landing.files.remove()


@pytest.mark.parametrize("what", ["snapshot.json", "devices.bin", "blocks", "blocks/pc.ram"])
def test_symbolic_links_in_snapshot_are_not_followed(
    landed: Path, tmp_path: Path, what: str
) -> None:
    """A user who can write there could have root read a file of others, and send it."""
    snapshot = Snapshot.read(str(landed))
    (landed / what).rename(tmp_path / "kept")
    (landed / what).symlink_to(tmp_path / "kept")
    with pytest.raises(UsageError, match="Too many levels of symbolic links|Not a directory"):
        Snapshot.read(str(landed))
    if what == "snapshot.json":
        return  # it was read before
    ours, theirs = socket.socketpair()
    lifter = SnapshotSender(str(landed), snapshot, theirs)
    with ours:
        lifter.start()
        while ours.recv(1 << 20):
            pass
    lifter.join()
    assert "symbolic link" in lifter.error or "Not a directory" in lifter.error


def test_unannounced_ram_blocks_are_refused(tmp_path: Path) -> None:
    """A few bytes of a stream could have files of any size made and hashed."""
    right = [(name, size // PAGE) for name, size in BLOCKS]
    landing, _ = land(tmp_path / "vm", stream(), right)
    assert landing.error == ""
    landing.files.remove()
    for wrong in (right[:-1], right[::-1], [(right[0][0], right[0][1] + 1), *right[1:]]):
        landing, _ = land(tmp_path / "vm", stream(), wrong)
        assert landing.error == "the stream has other RAM blocks than were announced for it"
    assert os.listdir(tmp_path) == []


def test_hashing_stops_when_snapshot_is_discarded(tmp_path: Path, monkeypatch) -> None:
    """A terminated program waits for the thread, which may be hashing a large memory."""
    hashing, real = threading.Event(), memory_files.contents

    def slow(*arguments: Any) -> Iterator[Any]:
        for one in real(*arguments):
            hashing.set()
            while True:
                time.sleep(0.01)
                yield one

    monkeypatch.setattr(memory_files, "contents", slow)
    ours, theirs = socket.socketpair()
    landing = SnapshotSaver(SnapshotFiles(str(tmp_path / "vm")), theirs)
    with ours:
        landing.start()
        ours.sendall(stream())
        ours.shutdown(socket.SHUT_WR)
        assert hashing.wait(60)
        landing.close()
    assert landing.error == "it is not wanted any more"
    assert os.listdir(tmp_path) == []


def head_and_device(number: int = 7) -> bytes:
    """Return the beginning of a stream, up to the middle of a device's body."""
    return (
        stream()[: stream().index(DEVICE)] + b"\4" + struct.pack(">I", number) + b"\1a" + bytes(8)
    )


def test_parsing_stops_when_snapshot_is_discarded(tmp_path: Path, monkeypatch) -> None:
    """All parts are in one buffer."""
    taking, real = threading.Event(), StreamBuffer.take

    def slow(stream: StreamBuffer, count: int) -> memoryview:
        taking.set()
        time.sleep(0.01)
        return real(stream, count)

    monkeypatch.setattr(StreamBuffer, "take", slow)
    ours, theirs = socket.socketpair()
    landing = SnapshotSaver(SnapshotFiles(str(tmp_path / "vm")), theirs)
    with ours:
        landing.start()
        ours.sendall(stream()[: stream().index(DEVICE)] + 5000 * b"\x08\0\x0b\0\0")
        assert taking.wait(60)
        began = time.monotonic()
        landing.close()
    assert time.monotonic() - began < 20
    assert landing.error == "it is not wanted any more"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("what", ["commands", "sections", "section", "devices"])
def test_orders_sections_and_devices_are_bounded(tmp_path: Path, monkeypatch, what: str) -> None:
    begun, footer = head_and_device(), b"\x7e\0\0\0\7"
    start = stream()[: stream().index(DEVICE)]
    monkeypatch.setattr(saving, "MAX_COMMANDS", 50)
    monkeypatch.setattr(saving, "MAX_SECTIONS", 50)
    monkeypatch.setattr(saving, "MAX_SECTION_BYTES", 200_000)
    monkeypatch.setattr(files_module, "MAX_DEVICES_BYTES", 900_000)
    unit = begun[len(start) :]
    said, says = {
        "commands": (start + 51 * b"\x08\0\x0b\0\0", "more than 50 commands"),
        "sections": (start + 51 * (unit + footer), "more than 50 sections"),
        "section": (begun + bytes(300_000), "the section of a is longer than 195.3 KiB"),
        "devices": (start + 7 * (unit + bytes(150_000) + footer),
                    "the state of the devices is longer than 878.9 KiB"),
    }[what]  # fmt: skip
    landing, _ = land(tmp_path / "vm", said)
    assert says in landing.error
    assert os.listdir(tmp_path) == []


def test_description_is_bounded(tmp_path: Path) -> None:
    description = b'{"devices": [], "x": "\xf0\x9f\x98\x80' + b"a" * (9 << 20) + b'"}'
    landing, _ = land(tmp_path / "vm", stream(description=description))
    assert "a description of 9437" in landing.error


@pytest.mark.parametrize("size", range(0, len(stream()), 49_999))
def test_cut_stream_leaves_no_files(tmp_path: Path, size: int) -> None:
    landing, answer = land(tmp_path / "vm", stream()[:size])
    assert answer.endswith(struct.pack(">HHI", 1, 4, 1))
    assert "end" in landing.error
    assert os.listdir(tmp_path) == []


def test_stream_cut_near_its_end_is_noticed(tmp_path: Path) -> None:
    whole = stream()
    for size in range(len(whole) - 200, len(whole)):
        landing, _ = land(tmp_path / "vm", whole[:size])
        if whole[:size].endswith(DEVICE + b"\0"):
            assert landing.snapshot is not None  # some versions send no description
            landing.files.remove()
        else:
            assert landing.error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (b"nothing of the kind", "no migration stream"),
        (stream(BLOCKS[:1] * 2), "two blocks b'pc.ram'"),
        (stream(description=b'{"devices": []}'), "1 devices, which are not the 0"),
        (stream(description=b'{"devices": 5}'), "not to be understood"),
        (stream(description=b'{"devices": ' + b"[" * 100_000), "not to be understood"),
        (b"QEVM\0\0\0\3\0", "has no memory"),
    ],
)
def test_invalid_streams_are_refused(tmp_path: Path, said: bytes, says: str) -> None:
    landing, answer = land(tmp_path / "vm", said)
    assert says in landing.error
    assert answer.endswith(struct.pack(">HHI", 1, 4, 1))
    assert os.listdir(tmp_path) == []


def test_section_with_ambiguous_end_is_refused() -> None:
    """The body of the section has a footer where QEMU's description says that it ends."""
    body = bytes(24) + b"\x7e\0\0\0\x09" + bytes(7)
    section = DEVICE[:19] + body + b"\x7e\0\0\0\x09"
    stored = StoredSection(4, 9, "timer", 0, 2, 0, len(section))
    with pytest.raises(MigrationError, match="timer may end after 48 bytes as well as after 60"):
        check_sections(DESCRIPTION, [stored], 0, lambda at, size: section[at : at + size])
    # without a footer there, the description is wrong
    check_sections(DESCRIPTION, [stored], 0, lambda _at, size: bytes(size))


@pytest.mark.parametrize("name", ["blocks/pc.ram", "devices.bin", "description.json"])
def test_changed_byte_in_any_file_is_noticed(landed: Path, name: str) -> None:
    content = bytearray((landed / name).read_bytes())
    content[-3] ^= 1
    (landed / name).write_bytes(content)
    said, lifter = lift(landed)
    assert f"{landed / name} is not what was saved there" in lifter.error
    assert not said.endswith(DESCRIPTION)
    assert not said.endswith(DEVICE + b"\0")


def test_damaged_or_incomplete_snapshot_is_refused(landed: Path) -> None:
    facts = landed / "snapshot.json"
    text = facts.read_text()
    for wrong, says in (
        ("", "is damaged"),
        ("[]", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[" + "[]," * 1_000_000 + "[]]", "is damaged: it has more than 1000000 values"),
        (text.replace('"page_size": 4096', '"page_size": 8192'), "was changed"),
        (text.replace("xbmigrate snapshot", "x"), "of another program"),
        (text.replace('"format-version": 1', '"format-version": 2'), "later version"),
    ):
        facts.write_text(wrong)
        with pytest.raises(UsageError, match=says):
            Snapshot.read(str(landed))
    facts.write_text(text)
    with (landed / "blocks/pc.ram").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UsageError, match=r"has 1228801 bytes, not 1228800"):
        Snapshot.read(str(landed))
    (landed / "blocks/pc.ram").unlink()
    with pytest.raises(UsageError, match="No such file or directory: the snapshot is not whole"):
        Snapshot.read(str(landed))


def test_block_files_stay_in_their_directory() -> None:
    names = [b"..", b".", b"/", b"a/../b", b"\0", b"\xff" * 255, b"%-1", b"x" * 255, b"a", b"A"]
    files = [block_file(number, name) for number, name in enumerate(names)]
    assert len(set(files)) == len(names)
    for file in files:
        directory, _, name = file.partition("/")
        assert directory == "blocks"
        assert "/" not in name
        assert not name.startswith(".")
        assert len(name) <= 255


@one_loop
async def test_reopened_snapshot_gets_its_name(landed: Path, tmp_path: Path) -> None:
    """A prepared snapshot outlives the program, also between the two renames of --overwrite."""
    old, _ = await asyncio.to_thread(land, tmp_path / "old", stream())
    assert old.snapshot is not None
    left = replace(old.left, path=str(landed))
    place = PreparedSnapshot(
        left, old.snapshot.id, old.snapshot.memory, overwrite=True,
        before=identity_of(os.stat(landed)),
    )  # fmt: skip
    with pytest.raises(MigrationError, match="not empty"):
        await PreparedSnapshot(left, "", 0, overwrite=False).start()
    os.rename(landed, f"{place.temporary}{ASIDE}")
    later = PreparedSnapshot.reopen(place.facts())
    assert Snapshot.read(later.temporary).memory == 303 * PAGE
    await later.start()
    assert Snapshot.read(str(landed)).id == old.snapshot.id
    # doing it again does no harm
    again = PreparedSnapshot.reopen(place.facts())
    await again.start()
    await asyncio.to_thread(close, again)
    shutil.rmtree(landed)
    with pytest.raises(MigrationError, match="is gone"):
        PreparedSnapshot.reopen(place.facts())


@one_loop
async def test_overwrite_replaces_snapshot(landed: Path, tmp_path: Path) -> None:
    check_snapshot_output(str(landed), True)
    with pytest.raises(UsageError, match="give --overwrite"):
        check_snapshot_output(str(landed), False)
    newer, _ = await asyncio.to_thread(land, landed, stream())
    assert newer.snapshot is not None
    place = PreparedSnapshot(
        newer.left, newer.snapshot.id, newer.snapshot.memory, overwrite=True,
        before=identity_of(os.stat(landed)),
    )  # fmt: skip
    assert f"the machine is in {landed}" in await place.start()
    assert Snapshot.read(str(landed)).id == newer.snapshot.id
    await asyncio.to_thread(close, place)


# ---------------------------------------------------------------- pages and files


@pytest.fixture(params=[_ram_files, _ram_files_twin], ids=["kernel", "twin"])
def kernel(request: pytest.FixtureRequest) -> Any:
    return request.param


def records(*found: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("=QQII", *one) for one in found)


ZERO, RAW, DELTA = range(3)


def test_recorded_pages_apply_as_the_same_pages(kernel: Any) -> None:
    blocks = [(name, size // PAGE) for name, size in BLOCKS]
    said = b""
    recorder, room = kernel.RamRecorder(blocks, PAGE), bytearray(40_000)
    for number, content in enumerate(memory()):
        done = 0
        while done < len(content) // PAGE:
            rest = len(content) // PAGE - done
            used, count = recorder.put(room, number, done, rest, content[done * PAGE :])
            said += room[:used]
            done += count
    reader, files = RamReader(blocks, PAGE), [os.memfd_create("block") for _ in blocks]
    applier = kernel.RamApplier([pages for _, pages in blocks], files, PAGE)
    said += struct.pack(">Q", 0x10)
    at, why = 0, -1
    while why != SCAN_END:
        at, count, why = reader.scan(said, at, len(said))
        applier.apply(said, reader.records, count)
    for fd, content in zip(files, memory(), strict=True):
        assert os.pread(fd, len(content), 0) == content.rstrip(b"\0") + bytes(
            max(os.fstat(fd).st_size - len(content.rstrip(b"\0")), 0)
        )
        os.close(fd)
    # kernel and twin write the same bytes
    assert hashlib.sha256(said).hexdigest() == hashlib.sha256(_spoken(blocks)).hexdigest()


def _spoken(blocks: list[tuple[bytes, int]]) -> bytes:
    said, last = b"", -1
    for number, content in enumerate(memory()):
        name = bytes([len(blocks[number][0])]) + blocks[number][0]
        for at in range(0, len(content), PAGE):
            page = content[at : at + PAGE]
            word = at | (0x20 if last == number else 0) | (8 if any(page) else 2)
            said += struct.pack(">Q", word) + (b"" if last == number else name)
            said += page if any(page) else b"\0"
            last = number
    return said + struct.pack(">Q", 0x10)


def test_records_apply_in_order(kernel: Any) -> None:
    fd = os.memfd_create("block")
    os.ftruncate(fd, 8 * PAGE)
    applier = kernel.RamApplier([3, 5], [fd, os.dup(fd)], PAGE)
    page, delta = b"\x11" * PAGE, b"\x02\x01z"
    data = page + delta
    found = records(
        (0, 0, PAGE, RAW), (1, 0, PAGE, RAW), (0, PAGE, 3, DELTA), (0, PAGE, 0, DELTA),
        (1, 0, 0, ZERO), (2, 0, 0, ZERO), (2, PAGE, 3, DELTA),
    )  # fmt: skip
    applier.apply(data, found, 7)
    assert os.pread(fd, 3 * PAGE, 0) == (
        b"\x11\x11z" + b"\x11" * (PAGE - 3) + bytes(PAGE) + b"\0\0z" + bytes(PAGE - 3)
    )
    if kernel is _ram_files:
        assert os.fstat(fd).st_blocks * 512 == 2 * PAGE
    with pytest.raises(DecodeError, match="page 2: "):
        applier.apply(data, records((2, 0, 5, DELTA)), 1)
    os.close(fd)


@pytest.mark.parametrize(
    "wrong",
    [(8, 0, PAGE, RAW), (0, 1, PAGE, RAW), (0, 1 << 63, PAGE, RAW), (0, 0, 5, RAW), (0, 0, 0, 3)],
)
def test_invalid_records_are_refused(kernel: Any, wrong: tuple[int, int, int, int]) -> None:
    applier = kernel.RamApplier([3, 5], [-1, -1], PAGE)
    with pytest.raises(ValueError, match="not those of this data"):
        applier.apply(bytes(PAGE), records(wrong), 1)
    with pytest.raises(ValueError, match="fewer records"):
        applier.apply(bytes(PAGE), records(wrong), 2)


def test_full_disk_raises_oserror(kernel: Any) -> None:
    fd = os.open("/dev/full", os.O_RDWR)
    applier = kernel.RamApplier([3], [fd], PAGE)
    with pytest.raises(OSError, match="No space left") as caught:
        applier.apply(b"x" * 2 * PAGE, records((0, 0, PAGE, RAW), (1, PAGE, PAGE, RAW)), 2)
    assert caught.value.errno == errno.ENOSPC
    os.close(fd)


def test_invalid_blocks_and_page_sizes_are_refused(kernel: Any) -> None:
    for blocks, page in (([], PAGE), ([(b"", 1)], PAGE), ([(b"x", 1)], 1000)):
        with pytest.raises(ValueError, match="block|page"):
            kernel.RamRecorder(blocks, page)
        with pytest.raises(ValueError, match="block|page"):
            kernel.RamApplier([1] * (len(blocks) + (page == PAGE)), [1] * len(blocks), page)
    recorder = kernel.RamRecorder([(b"x", 2)], PAGE)
    for block, page, count, data in ((1, 0, 1, None), (0, 1, 2, None), (0, 0, 2, bytes(PAGE))):
        with pytest.raises(ValueError, match="block|bytes"):
            recorder.put(bytearray(9000), block, page, count, data)
    assert recorder.put(bytearray(100), 0, 0, 2, None) == (0, 0)
