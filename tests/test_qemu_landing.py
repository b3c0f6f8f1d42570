"""Machines that land in a directory, and are lifted out of it: what is there is what the guest had,
and it is there whole, or not at all."""

from __future__ import annotations

import asyncio
import errno
import hashlib
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

from migrate import bounded_json
from migrate.directory import identity_of
from migrate.errors import MigrationError, UsageError
from migrate.journal import Journal
from migrate.qemu import landing as landing_module
from migrate.qemu.description import check_sections
from migrate.qemu.landing import BEFORE, Files, LandedPlace, Landing, check_landing
from migrate.qemu.lifting import Lifter
from migrate.qemu.snapshot import Snapshot, StoredSection, block_file
from proto import _ram_apply, _twin_ram_apply
from proto._ram import SCAN_END, RamReader
from proto.errors import DecodeError
from proto.ownership import Event, Role
from tests.machine import Machine, Sweep, compare
from tests.machine.between import Way, both, later
from tests.machine.qemu import DIMM_AT, PROGRAM
from tests.machine.sweep import BASE
from tests.programs import Program, destination
from tests.relay import Relay
from tests.requirements import need
from tests.test_directory import deep_tree

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
async def test_a_machine_lands_and_runs_on_in_another(
    way: Way, tmp_path: Path, capabilities: tuple[str, ...], binary: str
) -> None:
    vm, again = tmp_path / "vm", tmp_path / "again"
    async with counting(binary) as source:
        receiver = await way.landed(source, vm, *capabilities)
        assert f"the machine is in {vm}, 80.5 MiB of memory" in receiver.out
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

        # lifted, it is the same, and lands as the same again
        async with waiting(source, binary=binary) as other:
            await way.lifted(vm, other)
            await compare(source, other)
            assert await source.check_sweep() == await other.check_sweep()
            await way.landed(other, again)
        assert Snapshot.read(str(again)).blocks == snapshot.blocks

        # and once more: it runs on from where it was
        async with waiting(source, paused=False, binary=binary) as other:
            await way.lifted(vm, other)
            await other.wait_run_state("running")
            await other.wait_for_more()
            await other.stop()
            await other.check_sweep()
    assert not hidden(tmp_path)


@one_loop
async def test_it_is_lifted_into_a_later_qemu_than_it_landed_from(
    qemu: None, way: Way, tmp_path: Path
) -> None:
    """Which has machines of the types that earlier ones had."""
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
async def test_half_a_machine_leaves_nothing(
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
        # nor is anything in the way of the next one
        await way.landed(machine, place / "vm", "xbzrle")
        assert os.listdir(place) == ["vm"]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system that is too small for the machine."""
    need(os.geteuid() == 0, "root, to mount a small file system")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


@one_loop
async def test_a_full_disk_says_so_and_the_guest_runs_on(qemu: None, way: Way, small: Path) -> None:
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
async def test_a_connection_that_breaks_is_no_harm(qemu: None, way: Way, tmp_path: Path) -> None:
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
async def test_a_damaged_snapshot_never_runs(qemu: None, way: Way, tmp_path: Path) -> None:
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
            assert f"{vm}/blocks/high is not what had landed there" in sender.err
            assert "the snapshot is as it was" in sender.err
            assert await asyncio.to_thread(receiver.wait) == 1
            assert "is not what had landed there" in receiver.err  # it does not wait for another
            assert await other.ended() == 1
        assert len(other.counted()) == len(source.counted())


@pytest.mark.parametrize("letter", ["v", "é"])
def test_a_machine_lands_under_the_longest_name_there_is(tmp_path: Path, letter: str) -> None:
    """Also where it takes the place of another, which has a hidden name of its own then."""
    path = tmp_path / (letter * (255 // len(letter.encode())))
    files = Files(str(path))
    os.close(files.make("x"))
    Path(files.temporary).mkdir(exist_ok=True)
    Path(f"{files.temporary}{BEFORE}").mkdir()


def test_what_cannot_be_is_refused_early(tmp_path: Path) -> None:
    """Before anything listens, or connects."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thing").touch()
    (tmp_path / "file").touch()
    for arguments, says in (
        (("--guest", "qemu"), "with --output where its guest is to land"),
        (("--guest", "qemu", "--output", f"{tmp_path}/full"), "it is not empty"),
        (("--guest", "qemu", "--output", f"{tmp_path}/full", "--overwrite"), "no machine has"),
        (("--guest", "qemu", "--output", f"{tmp_path}/file"), "it is no directory"),
        (("--guest", "qemu", "--output", f"{tmp_path}/none/vm"), "there is no directory"),
        (("--guest", "qemu:tcp:h:1", "--output", f"{tmp_path}/vm"), "one of both"),
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


def test_only_a_qemu_lands(tmp_path: Path) -> None:
    receiver, address = destination(
        "--guest", "qemu", "--output", f"{tmp_path}/vm", "--journal", f"{tmp_path}/dst"
    )
    sender = Program("migrate-src", "--guest", f"file:{__file__}", address)
    assert sender.wait() == 4
    assert "a QEMU's guest is awaited here, and no file guest" in sender.err
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
    """As a QEMU would send it that has such memory, and one device."""
    recorder = _twin_ram_apply.RamRecorder([(n, s // PAGE) for n, s in blocks], PAGE)
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
) -> tuple[Landing, bytes]:
    """A landing of what is said, and then no more; and what it says."""
    landing = Landing(str(path))
    landing.announced = announced
    ours, theirs = socket.socketpair()
    with ours:
        landing.start(theirs)
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


def test_what_landed_is_what_was_sent(landed: Path) -> None:
    names = ["blocks/pc.ram", "blocks/%2From@etc%2Facpi%2Ftables", "blocks/%2E.%2F.."]
    assert sorted(os.listdir(landed / "blocks")) == sorted(name[7:] for name in names)
    for name, content in zip(names, memory(), strict=True):
        assert (landed / name).read_bytes() == content
    assert (landed / "devices.bin").read_bytes() == b"QEVM\0\0\0\3\x07\0\0\0\x02pc" + DEVICE
    assert (landed / "description.json").read_bytes() == DESCRIPTION
    holes = sum(not any(memory()[0][i : i + PAGE]) for i in range(0, 300 * PAGE, PAGE))
    assert (landed / names[0]).stat().st_blocks * 512 <= (300 - holes) * PAGE + 8 * PAGE


def close(place: LandedPlace) -> None:
    """What it has taken the place of is gone when this returns."""
    place.close()
    for thread in threading.enumerate():
        if thread.name == "drop":
            thread.join()


@pytest.mark.parametrize("again", [False, True])
def test_a_machine_takes_the_place_of_whatever_tree_is_there(
    landed: Path, tmp_path: Path, again: bool
) -> None:
    """One that is deeper than Python recurses, or has many names, neither fails GO nor delays its
    answer: it is removed when that was said."""
    deep_tree(tmp_path / "before", 1500)
    (tmp_path / "before/snapshot.json").touch()
    landing, _ = land(tmp_path / "before", stream())
    assert landing.snapshot is not None
    place = LandedPlace(
        landing.files.left, landing.snapshot.id, landing.snapshot.memory, overwrite=True,
        before=landing.files.before,
    )  # fmt: skip
    if again:
        facts = json.loads(json.dumps(place.facts()))
        place.close()
        place = LandedPlace.reopen(facts)
    said = asyncio.run(place.start())
    assert said == f"the machine is in {tmp_path}/before, 1.2 MiB of memory"
    assert asyncio.run(place.start()) == said, "an earlier program may have died just then"
    [aside] = [path for path in tmp_path.iterdir() if path.name.endswith(".before")]
    close(place)
    assert not aside.exists()
    assert (tmp_path / "before/blocks/pc.ram").read_bytes() == memory()[0]


def test_a_machine_that_has_its_name_is_there_whatever_is_wrong_with_it(
    landed: Path, tmp_path: Path
) -> None:
    """The source is told that it was not started where nothing has the name alone."""
    landing, _ = land(tmp_path / "out", stream())
    assert landing.snapshot is not None
    place = LandedPlace(landing.files.left, landing.snapshot.id, 1 << 20, overwrite=False)
    asyncio.run(place.start())
    (tmp_path / "out/snapshot.json").write_text("damaged")
    assert asyncio.run(place.start()).startswith(f"the machine is in {tmp_path}/out")
    place.close()


def test_what_is_settled_of_a_lifted_guest_says_what_is_so(landed: Path, tmp_path: Path) -> None:
    """No guest runs here, whatever became of the one that was lifted out of the snapshot."""
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


def lift(path: Path) -> tuple[bytes, Lifter]:
    lifter = Lifter(str(path), Snapshot.read(str(path)))
    ours, theirs = socket.socketpair()
    said = bytearray()
    with ours:
        lifter.start(theirs)
        while not said.endswith(DESCRIPTION) and (piece := ours.recv(1 << 16)):
            said += piece
    lifter.join()
    return bytes(said), lifter


def test_what_is_lifted_lands_as_the_same(landed: Path, tmp_path: Path) -> None:
    said, lifter = lift(landed)
    assert lifter.error == ""
    landing, _ = land(tmp_path / "again", said)
    assert landing.snapshot is not None
    found = Snapshot.read(str(landed))
    assert replace(landing.snapshot, id="") == replace(found, id="")
    landing.files.remove()


@pytest.mark.parametrize("what", ["snapshot.json", "devices.bin", "blocks", "blocks/pc.ram"])
def test_no_link_in_a_snapshot_is_followed(landed: Path, tmp_path: Path, what: str) -> None:
    """Whoever may write there would have root read a file, and send it."""
    snapshot = Snapshot.read(str(landed))
    (landed / what).rename(tmp_path / "kept")
    (landed / what).symlink_to(tmp_path / "kept")
    with pytest.raises(UsageError, match="Too many levels of symbolic links|Not a directory"):
        Snapshot.read(str(landed))
    if what == "snapshot.json":
        return  # it was read before
    ours, theirs = socket.socketpair()
    lifter = Lifter(str(landed), snapshot)
    with ours:
        lifter.start(theirs)
        while ours.recv(1 << 20):
            pass
    lifter.join()
    assert "symbolic link" in lifter.error or "Not a directory" in lifter.error


def test_blocks_that_were_not_announced_do_not_land(tmp_path: Path) -> None:
    """They would be made and hashed, as large as the stream has them, for a few bytes."""
    right = [(name, size // PAGE) for name, size in BLOCKS]
    landing, _ = land(tmp_path / "vm", stream(), right)
    assert landing.error == ""
    landing.files.remove()
    for wrong in (right[:-1], right[::-1], [(right[0][0], right[0][1] + 1), *right[1:]]):
        landing, _ = land(tmp_path / "vm", stream(), wrong)
        assert landing.error == "the stream has other RAM blocks than were announced for it"
    assert os.listdir(tmp_path) == []


def test_what_takes_long_ends_when_it_is_not_wanted(tmp_path: Path, monkeypatch) -> None:
    """The hashes of a large memory: the thread is waited for when a program is told to end."""
    hashing, real = threading.Event(), landing_module.contents

    def slow(*arguments: Any) -> Iterator[Any]:
        for one in real(*arguments):
            hashing.set()
            while True:
                time.sleep(0.01)
                yield one

    monkeypatch.setattr(landing_module, "contents", slow)
    landing = Landing(str(tmp_path / "vm"))
    ours, theirs = socket.socketpair()
    with ours:
        landing.start(theirs)
        ours.sendall(stream())
        ours.shutdown(socket.SHUT_WR)
        assert hashing.wait(60)
        landing.close()
    assert landing.error == "it is not wanted any more"
    assert os.listdir(tmp_path) == []


def head_and_device(number: int = 7) -> bytes:
    """The beginning of a stream, up to where a device's body goes on."""
    return (
        stream()[: stream().index(DEVICE)] + b"\4" + struct.pack(">I", number) + b"\1a" + bytes(8)
    )


def test_many_small_parts_end_when_they_are_not_wanted(tmp_path: Path, monkeypatch) -> None:
    """All of them are in one buffer."""
    taking, real = threading.Event(), Landing._take

    def slow(self: Landing, *arguments: Any) -> None:
        real(self, *arguments)
        taking.set()
        time.sleep(0.01)

    monkeypatch.setattr(Landing, "_take", slow)
    landing = Landing(str(tmp_path / "vm"))
    ours, theirs = socket.socketpair()
    with ours:
        landing.start(theirs)
        ours.sendall(stream()[: stream().index(DEVICE)] + 5000 * b"\x08\0\x0b\0\0")
        assert taking.wait(60)
        began = time.monotonic()
        landing.close()
    assert time.monotonic() - began < 20
    assert landing.error == "it is not wanted any more"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("what", ["orders", "sections", "section", "devices"])
def test_what_a_stream_may_have_beside_its_memory_is_bounded(
    tmp_path: Path, monkeypatch, what: str
) -> None:
    begun, footer = head_and_device(), b"\x7e\0\0\0\7"
    start = stream()[: stream().index(DEVICE)]
    monkeypatch.setattr(landing_module, "MAX_ORDERS", 50)
    monkeypatch.setattr(landing_module, "MAX_SECTIONS", 50)
    monkeypatch.setattr(landing_module, "MAX_SECTION_BYTES", 200_000)
    monkeypatch.setattr(landing_module, "MAX_DEVICES_BYTES", 900_000)
    unit = begun[len(start) :]
    said, says = {
        "orders": (start + 51 * b"\x08\0\x0b\0\0", "more than 50 orders"),
        "sections": (start + 51 * (unit + footer), "more than 50 sections"),
        "section": (begun + bytes(300_000), "the section of a is longer than 195.3 KiB"),
        "devices": (start + 7 * (unit + bytes(150_000) + footer),
                    "the state of the devices is longer than 878.9 KiB"),
    }[what]  # fmt: skip
    landing, _ = land(tmp_path / "vm", said)
    assert says in landing.error
    assert os.listdir(tmp_path) == []


def test_a_description_is_bounded_in_bytes(tmp_path: Path) -> None:
    description = b'{"devices": [], "x": "\xf0\x9f\x98\x80' + b"a" * (9 << 20) + b'"}'
    landing, _ = land(tmp_path / "vm", stream(description=description))
    assert "a description of 9437" in landing.error
    with pytest.raises(ValueError, match="bytes"):
        bounded_json.loads(b'"' + b"a" * bounded_json.MOST_BYTES + b'"')


@pytest.mark.parametrize("size", range(0, len(stream()), 49_999))
def test_half_a_stream_is_nothing(tmp_path: Path, size: int) -> None:
    landing, answer = land(tmp_path / "vm", stream()[:size])
    assert answer.endswith(struct.pack(">HHI", 1, 4, 1))
    assert "end" in landing.error
    assert os.listdir(tmp_path) == []


def test_any_end_but_the_true_one_is_noticed(tmp_path: Path) -> None:
    whole = stream()
    for size in range(len(whole) - 200, len(whole)):
        landing, _ = land(tmp_path / "vm", whole[:size])
        if whole[:size].endswith(DEVICE + b"\0"):
            assert landing.snapshot is not None  # some versions have no description
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
def test_a_stream_that_makes_no_sense(tmp_path: Path, said: bytes, says: str) -> None:
    landing, answer = land(tmp_path / "vm", said)
    assert says in landing.error
    assert answer.endswith(struct.pack(">HHI", 1, 4, 1))
    assert os.listdir(tmp_path) == []


def test_a_section_that_may_be_cut_in_two_ways() -> None:
    """Its body has a footer where QEMU says that it ends."""
    body = bytes(24) + b"\x7e\0\0\0\x09" + bytes(7)
    section = DEVICE[:19] + body + b"\x7e\0\0\0\x09"
    stored = StoredSection(4, 9, "timer", 0, 2, 0, len(section))
    with pytest.raises(MigrationError, match="timer may end after 48 bytes as well as after 60"):
        check_sections(DESCRIPTION, [stored], 0, lambda at, size: section[at : at + size])
    # where it has none, QEMU's note is wrong
    check_sections(DESCRIPTION, [stored], 0, lambda _at, size: bytes(size))


@pytest.mark.parametrize("name", ["blocks/pc.ram", "devices.bin", "description.json"])
def test_each_byte_is_checked(landed: Path, name: str) -> None:
    content = bytearray((landed / name).read_bytes())
    content[-3] ^= 1
    (landed / name).write_bytes(content)
    said, lifter = lift(landed)
    assert f"{landed / name} is not what had landed there" in lifter.error
    assert not said.endswith(DESCRIPTION)
    assert not said.endswith(DEVICE + b"\0")


def test_a_snapshot_that_is_not_whole(landed: Path) -> None:
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


def test_no_block_has_a_file_elsewhere() -> None:
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
async def test_a_later_program_gives_it_its_name(landed: Path, tmp_path: Path) -> None:
    """What was prepared outlives the program, also between the steps of overwriting."""
    old, _ = await asyncio.to_thread(land, tmp_path / "old", stream())
    assert old.snapshot is not None
    left = replace(old.files.left, path=str(landed))
    place = LandedPlace(left, old.snapshot.id, old.snapshot.memory, overwrite=True)
    with pytest.raises(MigrationError, match="not empty"):
        await LandedPlace(place._left, "", 0, overwrite=False).start()
    place._before = identity_of(os.stat(landed))
    os.rename(landed, tmp_path / place._aside)
    later = LandedPlace.reopen(place.facts())
    assert Snapshot.read(later.temporary).memory == 303 * PAGE
    await later.start()
    assert Snapshot.read(str(landed)).id == old.snapshot.id
    # it is done; and doing it again is no harm
    again = LandedPlace.reopen(place.facts())
    await again.start()
    await asyncio.to_thread(close, again)
    shutil.rmtree(landed)
    with pytest.raises(MigrationError, match="is gone"):
        LandedPlace.reopen(place.facts())


@one_loop
async def test_one_landing_replaces_another(landed: Path, tmp_path: Path) -> None:
    check_landing(str(landed), True)
    with pytest.raises(UsageError, match="give --overwrite"):
        check_landing(str(landed), False)
    newer, _ = await asyncio.to_thread(land, landed, stream())
    assert newer.snapshot is not None
    place = LandedPlace(newer.files.left, newer.snapshot.id, newer.snapshot.memory, overwrite=True)
    assert f"the machine is in {landed}" in await place.start()
    assert Snapshot.read(str(landed)).id == newer.snapshot.id
    await asyncio.to_thread(close, place)


# ---------------------------------------------------------------- pages and files


@pytest.fixture(params=[_ram_apply, _twin_ram_apply], ids=["kernel", "twin"])
def kernel(request: pytest.FixtureRequest) -> Any:
    return request.param


def records(*found: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("=QQII", *one) for one in found)


ZERO, RAW, DELTA = range(3)


def test_pages_come_out_as_they_went_in(kernel: Any) -> None:
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
    # the same bytes, whoever writes them
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


def test_pages_change_in_the_order_of_their_records(kernel: Any) -> None:
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
    if kernel is _ram_apply:
        assert os.fstat(fd).st_blocks * 512 == 2 * PAGE
    with pytest.raises(DecodeError, match="page 2: "):
        applier.apply(data, records((2, 0, 5, DELTA)), 1)
    os.close(fd)


@pytest.mark.parametrize(
    "wrong",
    [(8, 0, PAGE, RAW), (0, 1, PAGE, RAW), (0, 1 << 63, PAGE, RAW), (0, 0, 5, RAW), (0, 0, 0, 3)],
)
def test_records_that_cannot_be(kernel: Any, wrong: tuple[int, int, int, int]) -> None:
    applier = kernel.RamApplier([3, 5], [-1, -1], PAGE)
    with pytest.raises(ValueError, match="not those of this data"):
        applier.apply(bytes(PAGE), records(wrong), 1)
    with pytest.raises(ValueError, match="fewer records"):
        applier.apply(bytes(PAGE), records(wrong), 2)


def test_a_full_disk_is_an_error(kernel: Any) -> None:
    fd = os.open("/dev/full", os.O_RDWR)
    applier = kernel.RamApplier([3], [fd], PAGE)
    with pytest.raises(OSError, match="No space left") as caught:
        applier.apply(b"x" * 2 * PAGE, records((0, 0, PAGE, RAW), (1, PAGE, PAGE, RAW)), 2)
    assert caught.value.errno == errno.ENOSPC
    os.close(fd)


def test_what_no_guest_has(kernel: Any) -> None:
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
