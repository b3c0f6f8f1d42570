"""Of all programs that receive a guest for one name, one may; and nothing is left of that."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from migrate.errors import MigrationError
from migrate.files.identity import identity_of
from migrate.files.partial_output import PartialOutput
from migrate.files.reservation import NameTaken, Reservation
from migrate.guests.file_place import FilePlace, PreparedFilePlace
from migrate.qemu.snapshot.place import SnapshotPlace
from migrate.qemu.snapshot.prepared import PreparedSnapshot
from proto import ErrorCode
from proto.wire.messages import GuestInfo
from tests.programs import Program, destination

pytestmark = pytest.mark.programs

ROOT = Path(__file__).parent.parent
INFO = GuestInfo("file", 5000, 4096, bytes(8), 1, "")


def test_name_is_reserved_once_by_any_path(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    first = Reservation(str(tmp_path / "there" / "out"))
    for name in ("there/out", "link/out", "link/../there/out"):
        with pytest.raises(NameTaken, match="another program receives a guest for it"):
            Reservation(str(tmp_path / name))
    other = Reservation(str(tmp_path / "there" / "out2"))
    first.close()
    first.close()
    again = Reservation(str(tmp_path / "link" / "out"))
    for one in (again, other):
        one.close()
    assert list((tmp_path / "there").iterdir()) == []


def reserving(path: Path, *words: str) -> subprocess.Popen[str]:
    program = (
        "import sys\nfrom migrate.files.reservation import NameTaken, Reservation\n"
        "sys.stdin.readline()\n"
        "try:\n    one = Reservation(sys.argv[1])\n    print('mine', flush=True)\n"
        "except NameTaken:\n    print('taken', flush=True)\nsys.stdin.readline()\n"
    )
    return subprocess.Popen(
        [*words, sys.executable, "-c", program, str(path)], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_one_of_many_gets_the_name_and_sigkill_frees_it(tmp_path):
    for _ in range(3):
        crowd = [reserving(tmp_path / "out") for _ in range(5)]
        for one in crowd:
            go_on(one)
        answers = [said(one) for one in crowd]
        assert sorted(answers) == ["mine", *["taken"] * 4]
        for one in crowd:
            one.kill()
            one.communicate()
    Reservation(str(tmp_path / "out")).close()


def test_name_is_taken_through_a_bind_mount_and_for_another_user(tmp_path):
    there, mounted = tmp_path / "there", tmp_path / "mounted"
    for path in (there, mounted):
        path.mkdir()
    script = 'mount --bind "$0" "$1" && shift && exec "$@"'
    words = ["unshare", "-m", "sh", "-c", script, str(there), str(mounted)]
    first = Reservation(str(there / "out"))
    other = reserving(mounted / "out", *words)
    go_on(other)
    assert said(other) == "taken"
    other.communicate("\n")
    first.close()


# ---------------------------------------------------------------- the programs


def source_of(shm: Path, number: int, address: str, *more: str) -> Program:
    guest = shm / f"guest{number}"
    if not guest.exists():
        guest.write_bytes(random.Random(number).randbytes(1 << 20))
    return Program("migrate-src", "-q", "--journal", str(shm / f"j{number}"), *more,
                   "--guest", f"file:{guest}", address)  # fmt: skip


def receiver_of(shm: Path, number: int, output: Path, *more: str) -> tuple[Program, str]:
    return destination("--output", str(output), "--journal", str(shm / f"d{number}"), *more)


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["new", "overwrite"])
def test_second_destination_for_one_output_is_refused_before_any_page(shm, overwrite):
    (shm / "link").symlink_to(".")
    if overwrite:
        (shm / "out").write_bytes(b"before")
    one, first = receiver_of(shm, 1, shm / "out", *overwrite)
    two, second = receiver_of(shm, 2, shm / "link" / "out", *overwrite)
    mover = source_of(shm, 1, first, "--max-bandwidth", "80k")
    one.read_line("receiving a file guest")
    mover.kill(signal.SIGSTOP)  # else a busy machine lets it end before the second one comes
    late = source_of(shm, 2, second)
    assert late.wait() == 4, late.err
    assert "another program receives a guest for it" in late.err
    assert two.wait() == 2
    assert "another program receives a guest for it" in two.err
    assert "receiving" not in two.err, "it was never accepted"
    mover.kill(signal.SIGCONT)
    assert mover.wait() == 0, mover.err
    assert one.wait() == 0
    assert (shm / "out").read_bytes() == (shm / "guest1").read_bytes()
    assert not [name for name in os.listdir(shm) if name.endswith(".xbmigrate")]
    assert not list((shm / "d2").iterdir()), "nothing was written down"


def test_only_one_of_two_destinations_receives(shm):
    for _ in range(2):
        ends = [receiver_of(shm, number, shm / "out", "--overwrite") for number in (1, 2)]
        sources = [source_of(shm, number, address, "--max-bandwidth", "1m")
                   for number, (_, address) in enumerate(ends, 1)]  # fmt: skip
        codes = [source.wait() for source in sources]
        assert sorted(codes) == [0, 4], [source.err for source in sources]
        assert sorted(receiver.wait() for receiver, _ in ends) == [0, 2]
        winner = codes.index(0) + 1
        assert (shm / "out").read_bytes() == (shm / f"guest{winner}").read_bytes()


def test_only_one_of_two_partial_guests_resumes_and_other_is_kept(shm):
    """Both destinations were killed, one after the other, and both start again."""
    words = ("--retry", "30s")
    movers, addresses = [], []
    for number in (1, 2):
        (shm / f"guest{number}").write_bytes(random.Random(number).randbytes(16 << 20))
        receiver, address = receiver_of(shm, number, shm / "out", *words)
        movers.append(source_of(shm, number, address, *words, "--max-bandwidth", "1m"))
        receiver.read_line("receiving a file guest")
        # A page has come: a source that was never told that it may begin does not come back.
        while sum(one.stat().st_blocks > 0 for one in shm.glob(".out.*.xbmigrate")) < number:
            time.sleep(0.005)
        receiver.kill()
        receiver.wait()
        addresses.append(address)
    again = []
    for number, address in enumerate(addresses, 1):
        receiver, _ = destination(
            "--output", str(shm / "out"), "--journal", str(shm / f"d{number}"), *words,
            listen=address.removeprefix("tcp:"),
        )  # fmt: skip
        assert "a part of a guest is here" in receiver.err
        again.append(receiver)
    refused = again[0].read_line("receiving|refused") and "refused" in again[0].err
    again[1].read_line("receiving|refused")
    assert ("refused" in again[1].err) != bool(refused)
    loser, winner = (0, 1) if refused else (1, 0)
    assert movers[loser].wait() == 4
    assert "another program receives a guest for it" in movers[loser].err
    assert len(list(shm.glob(".out.*.xbmigrate"))) == 2, "what came of the other is kept"
    for one in (movers[winner], again[winner], again[loser]):
        one.kill()
        one.wait()


# ---------------------------------------------------------------- places


@pytest.mark.asyncio
async def test_prepared_file_is_not_started_while_name_is_reserved(tmp_path):
    """An earlier program has prepared it, and was dead while another one began to receive."""
    path = str(tmp_path / "out")
    (tmp_path / "out").write_bytes(b"before")
    place = FilePlace(INFO, path, overwrite=True)
    await place.make_ready()
    place.persist()
    await place.prepare(b"")
    facts = place.facts()
    place.close()
    other = Reservation(path)
    left = PreparedFilePlace.reopen(facts)
    with pytest.raises(NameTaken):
        await left.start(b"")
    assert (tmp_path / "out").read_bytes() == b"before"
    other.close()
    await left.start(b"")
    assert len((tmp_path / "out").read_bytes()) == 5000
    left.close()
    Reservation(path).close()


@pytest.mark.asyncio
async def test_second_landing_is_refused_before_any_page(tmp_path):
    one, two = (SnapshotPlace(str(tmp_path / "vm")) for _ in range(2))
    await one.make_ready()
    with pytest.raises(MigrationError, match="another program receives") as caught:
        await two.make_ready()
    assert caught.value.code is ErrorCode.NO_PLACE
    await two.discard()
    await one.discard()
    three = SnapshotPlace(str(tmp_path / "vm"))
    await three.make_ready()
    await three.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.asyncio
async def test_landed_machine_is_not_delivered_while_name_is_reserved(tmp_path):
    (tmp_path / "hidden").mkdir()
    known = identity_of(os.stat(tmp_path / "hidden"))
    left = PartialOutput(str(tmp_path / "vm"), str(tmp_path), "hidden", known, tree=True)
    landed = PreparedSnapshot(left, "id", 0, overwrite=False)
    other = Reservation(str(tmp_path / "vm"))
    with pytest.raises(NameTaken):
        await landed.start()
    assert (tmp_path / "hidden").exists()
    other.close()


@pytest.mark.asyncio
async def test_landing_is_refused_while_directory_is_moved_away(tmp_path):
    from migrate.files.lock import DirectoryLock

    vm = tmp_path / "vm"
    vm.mkdir()
    lifting = DirectoryLock(str(vm), "guest snapshot")
    await lifting.acquire()
    place = SnapshotPlace(str(vm), overwrite=True)
    with pytest.raises(MigrationError, match=f"process {os.getpid()}\\) is moving it"):
        await place.make_ready()
    await place.discard()
    lifting.close()
    await asyncio.sleep(0)
    place = SnapshotPlace(str(vm), overwrite=True)
    await place.make_ready()
    await place.discard()
