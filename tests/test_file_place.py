"""The output of a file guest is complete and has its rights, or is not there."""

import asyncio
import json
import os
import random
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from migrate.errors import MigrationError, PeerError, UsageError
from migrate.files.identity import identity_of
from migrate.files.partial_output import PartialOutput
from migrate.guests.file_place import FilePlace, PreparedFilePlace
from migrate.guests.rights import Rights
from proto.wire.messages import GuestInfo
from tests.killable import KillableProgram
from tests.requirements import need
from tests.trees import access_list
from tests.waiting import wait_until

pytestmark = pytest.mark.programs

PAGE = 4096


@pytest.fixture(params=["named-later", "hidden-name"])
def place_of(request, monkeypatch):
    """Make file places, on file systems with and without nameless files (O_TMPFILE)."""
    real = os.open

    def without_tmpfile(path, flags, *mode, **more):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real(path, flags, *mode, **more)

    if request.param == "hidden-name":
        monkeypatch.setattr(os, "open", without_tmpfile)

    def make(size: int, path: Path, *, overwrite: bool = False, left: str = "") -> FilePlace:
        info = GuestInfo("file", size, PAGE, bytes(16))
        found = None
        if left:
            inode = list(identity_of(os.stat(left)))
            found = PartialOutput.from_facts({"path": str(path), "temporary": left, "inode": inode})
        return FilePlace(info, str(path), overwrite, found)

    return make


def visible(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


@pytest.mark.asyncio
async def test_output_appears_complete_or_not_at_all(place_of, tmp_path):
    size = 10 * PAGE + 33
    path = tmp_path / "out"
    place = place_of(size, path)
    content = random.Random(1).randbytes(size)
    for page in range(11):
        place.allocate(page)
    place.memory[:size] = content
    place.sync()
    assert visible(tmp_path) == []
    place.persist()
    await place.prepare(b"")
    place.mark_complete()
    assert visible(tmp_path) == []
    assert "out is complete" in await place.start(b"")
    place.close()
    assert [item.name for item in tmp_path.iterdir()] == ["out"]
    assert path.read_bytes() == content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.asyncio
@pytest.mark.parametrize("prepared", [False, True])
async def test_discarded_output_leaves_nothing(place_of, tmp_path, prepared):
    place = place_of(PAGE, tmp_path / "out")
    place.allocate(0)
    place.memory[:5] = b"half "
    if prepared:
        place.persist()
        await place.prepare(b"")
        place.mark_complete()
    await place.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.asyncio
async def test_pages_that_were_never_written_stay_holes(place_of, tmp_path):
    size = 16 << 20
    path = tmp_path / "out"
    place = place_of(size, path)
    place.allocate(100)
    place.memory[100 * PAGE : 101 * PAGE] = b"d" * PAGE
    os.pwrite(place.fd, b"d" * PAGE, place.fd_offset + 101 * PAGE)
    into = memoryview(bytearray(size))
    assert place.content.read(0, into) == size
    place.persist()
    await place.prepare(b"")
    place.mark_complete()
    await place.start(b"")
    place.close()
    assert path.stat().st_size == size
    assert path.stat().st_blocks * 512 < 1 << 20
    assert path.read_bytes() == bytes(100 * PAGE) + b"d" * 2 * PAGE + bytes(size - 102 * PAGE)


@pytest.mark.asyncio
async def test_existing_output_is_refused(place_of, tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"precious")
    with pytest.raises(UsageError, match="it exists: remove it or give --overwrite"):
        place_of(PAGE, path)
    assert [item.name for item in tmp_path.iterdir()] == ["out"]
    path.unlink()
    place = place_of(PAGE, path)
    place.persist()
    await place.prepare(b"")
    place.mark_complete()
    path.write_bytes(b"came meanwhile")
    with pytest.raises(MigrationError, match="File exists"):
        await place.start(b"")
    await place.discard()
    assert path.read_bytes() == b"came meanwhile"
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


@pytest.mark.asyncio
async def test_overwritten_output_is_replaced_at_once(place_of, tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    place = place_of(3, path, overwrite=True)
    place.allocate(0)
    place.memory[:3] = b"new"
    place.persist()
    await place.prepare(b"")
    place.mark_complete()
    assert path.read_bytes() == b"old"
    await place.start(b"")
    place.close()
    assert path.read_bytes() == b"new"
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


@pytest.mark.asyncio
async def test_discarded_replacement_leaves_the_old_file(place_of, tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    place = place_of(3, path, overwrite=True)
    place.persist()
    await place.prepare(b"")
    place.mark_complete()
    await place.discard()
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


@pytest.mark.asyncio
async def test_full_disk_is_an_error(place_of, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    place = place_of(PAGE, tmp_path / "out")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device"):
        place.allocate(0)
    await place.discard()


async def arrive(place: FilePlace, state: bytes = b"") -> str:
    place.persist()
    await place.prepare(state)
    place.mark_complete()
    said = await place.start(state)
    place.close()
    return said


def rights(path: Path) -> Rights:
    here = path.stat()
    return Rights(stat.S_IMODE(here.st_mode), here.st_uid, here.st_gid)


@pytest.mark.asyncio
async def test_output_gets_the_rights_of_the_guests_file(place_of, tmp_path):
    need(os.geteuid() == 0, "root, to give files away")
    path = tmp_path / "out"
    said = await arrive(place_of(3, path), Rights(0o664, 65534, 65533).pack())
    assert said == f"{path} is complete, 3 B"
    assert rights(path) == Rights(0o664, 65534, 65533)


@pytest.mark.asyncio
async def test_output_gets_the_rights_of_the_file_it_replaces(place_of, tmp_path):
    need(os.geteuid() == 0, "root, to give files away")
    path = tmp_path / "out"
    path.write_bytes(b"old")
    os.chown(path, 65533, 65532)
    path.chmod(0o2604)
    await arrive(place_of(3, path, overwrite=True), Rights(0o664, 65534, 65534).pack())
    assert rights(path) == Rights(0o604, 65533, 65532), "and no setgid for what a source sent"


@pytest.mark.asyncio
async def test_output_gets_nothing_from_a_file_that_another_user_may_have_put_there(
    place_of, tmp_path
):
    """In a directory like /tmp, another user could so own or read what lands over it."""
    need(os.geteuid() == 0, "root, to give files away")
    tmp_path.chmod(0o1777)
    path = tmp_path / "out"
    path.write_bytes(b"")
    os.chown(path, 65534, 65534)
    path.chmod(0o666)
    os.setxattr(path, "system.posix_acl_access", access_list(65533))
    os.setxattr(path, "user.note", b"theirs")
    await arrive(place_of(3, path, overwrite=True), Rights(0o600, 0, 0).pack())
    assert rights(path) == Rights(0o600, 0, 0)
    assert os.listxattr(path) == []


@pytest.mark.asyncio
@pytest.mark.parametrize("asked", [Rights(), Rights(mode=0o640), Rights(uid=0), Rights(gid=0)])
@pytest.mark.parametrize("later", [False, True])
async def test_access_list_is_kept_unless_mode_or_owner_is_given(tmp_path, asked, later):
    need(os.geteuid() == 0, "root, to give files away")
    path = tmp_path / "out"
    path.write_bytes(b"old")
    os.setxattr(path, "system.posix_acl_access", access_list(65533))
    place = FilePlace(GuestInfo("file", 3, PAGE, bytes(16)), str(path), True, rights=asked)
    if later:
        place.persist()
        await place.prepare(b"")
        facts = json.loads(json.dumps(place.facts()))
        place.close()
        place = PreparedFilePlace.reopen(facts)
        await place.start(b"")
        place.close()
    else:
        await arrive(place, b"")
    assert bool(os.listxattr(path)) == (asked == Rights())


@pytest.mark.asyncio
async def test_rights_that_the_user_gives_come_first(tmp_path):
    need(os.geteuid() == 0, "root, to give files away")
    path = tmp_path / "out"
    path.write_bytes(b"old")
    asked = Rights(mode=0o400, gid=65531)
    place = FilePlace(
        GuestInfo("file", 3, PAGE, bytes(16)), str(path), True, rights=asked,
    )  # fmt: skip
    await arrive(place, Rights(0o664, 65534, 65534).pack())
    assert rights(path) == Rights(0o400, 0, 65531)


@pytest.mark.asyncio
async def test_later_program_sets_the_prepared_rights(place_of, tmp_path):
    need(os.geteuid() == 0, "root, to give files away")
    path = tmp_path / "out"
    place = place_of(3, path)
    place.persist()
    await place.prepare(Rights(0o640, 65534, 65533).pack())
    assert stat.S_IMODE(os.fstat(place.fd).st_mode) == 0o600, "it is private before it is ours"
    facts = json.loads(json.dumps(place.facts()))
    place.close()
    again = PreparedFilePlace.reopen(facts)
    await again.start(b"")
    again.close()
    assert rights(path) == Rights(0o640, 65534, 65533)


@pytest.mark.asyncio
async def test_later_program_starts_an_output_that_it_may_not_open(place_of, tmp_path, monkeypatch):
    """The file may have come with mode 0400, or 0."""
    path = tmp_path / "out"
    place = place_of(3, path)
    await arrive(place, Rights(0).pack())
    facts = json.loads(
        json.dumps({**place_facts(path), "temporary": str(tmp_path / ".gone.xbmigrate")})
    )
    real = os.open

    def denied(name, flags, *mode, **more):
        if name in (str(path), path.name) and not flags & os.O_PATH:
            raise PermissionError(13, "Permission denied")
        return real(name, flags, *mode, **more)

    monkeypatch.setattr(os, "open", denied)
    again = PreparedFilePlace.reopen(facts)
    assert "is complete" in await again.start(b"")
    again.close()
    assert rights(path).mode == 0


def place_facts(path: Path) -> dict:
    here = path.stat()
    return {
        "path": str(path), "overwrite": False, "size": 3, "inode": [here.st_dev, here.st_ino],
    }  # fmt: skip


@pytest.mark.asyncio
async def test_rights_that_make_no_sense_are_refused_before_the_guest_is_ours(place_of, tmp_path):
    place = place_of(3, tmp_path / "out")
    place.persist()
    with pytest.raises(PeerError, match="mode and owner"):
        await place.prepare(b"nonsense")
    await place.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.asyncio
@pytest.mark.parametrize("moment", ["round", "end"])
async def test_removed_output_is_noticed_before_the_guest_is_ours(place_of, tmp_path, moment):
    directory = tmp_path / "there"
    directory.mkdir()
    place = place_of(3, directory / "out")
    place.persist()
    place.sync()
    shutil.rmtree(directory)
    directory.mkdir()
    with pytest.raises(MigrationError, match=r"what had come .* was removed or replaced meanwhile"):
        place.sync() if moment == "round" else await place.prepare(b"")
    await place.discard()


@pytest.mark.asyncio
async def test_file_that_takes_the_name_is_noticed_before_the_guest_is_ours(place_of, tmp_path):
    path = tmp_path / "out"
    place = place_of(3, path)
    place.persist()
    path.write_bytes(b"came meanwhile")
    with pytest.raises(MigrationError, match="it exists"):
        await place.prepare(b"")
    await place.discard()
    assert path.read_bytes() == b"came meanwhile"


def test_guest_larger_than_the_file_size_limit_is_refused(tmp_path):
    code = """
import resource
from migrate.errors import UsageError
from migrate.guests.file_place import FilePlace
from proto.wire.messages import GuestInfo
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
FilePlace(GuestInfo("file", 1 << 20, 4096, bytes(16)), sys.argv[1], False)
try:
    FilePlace(GuestInfo("file", (1 << 20) + 1, 4096, bytes(16)), sys.argv[1], False)
except UsageError as error:
    assert "ulimit -f" in str(error), error
"""
    with KillableProgram(code, tmp_path / "out"):
        assert list(tmp_path.iterdir()) == []


def test_notice_of_a_disk_that_may_be_too_small(place_of, tmp_path):
    """It is only a notice, since a sparse guest may fit."""
    room = os.statvfs(tmp_path)
    place = place_of(2 * room.f_bavail * room.f_frsize, tmp_path / "out")
    [said] = place.notices()
    assert "it fits only if all else is zeros" in said
    asyncio.run(place.discard())
    place = place_of(3, tmp_path / "out")
    assert place.notices() == []
    asyncio.run(place.discard())


def test_notice_of_processes_that_have_the_old_file_open(place_of, tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with KillableProgram("file = open(sys.argv[1])", path) as program:
        place = place_of(3, path, overwrite=True)
        [said] = place.notices()
        assert f"process {program.process.pid} " in said
        assert "will go on with the old file" in said
        asyncio.run(place.discard())
    place = place_of(3, path, overwrite=True)
    assert place.notices() == []
    asyncio.run(place.discard())


@pytest.mark.parametrize("whose", [0, 65534])
def test_only_migrate_src_of_this_user_prevents_replacing_the_file(place_of, tmp_path, whose):
    """Any process can call itself migrate-src."""
    need(os.geteuid() == 0, "root, to be another user")
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with path.open() as file, subprocess.Popen(
        ["bash", "-c", "echo; exec -a migrate-src sleep 60"], stdin=file, stdout=subprocess.PIPE,
        user=whose,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        child.stdout.readline()
        wait_until(lambda: b"migrate-src" in Path(f"/proc/{child.pid}/cmdline").read_bytes()[:12])
        if whose:
            asyncio.run(place_of(3, path, overwrite=True).discard())
        else:
            with pytest.raises(UsageError, match="a guest cannot replace itself"):
                place_of(3, path, overwrite=True)
        child.kill()


def test_later_receiver_resumes_what_a_killed_one_persisted(place_of, tmp_path):
    code = """
from migrate.guests.file_place import FilePlace
from proto.wire.messages import GuestInfo
place = FilePlace(GuestInfo("file", 1 << 20, 4096, bytes(16)), sys.argv[1], False)
for page in range(256):
    place.allocate(page)
place.memory[:] = b"x" * (1 << 20)
"""
    with KillableProgram(code, tmp_path / "out") as program:
        program.kill()
    assert list(tmp_path.iterdir()) == [], "it was not persisted"
    code += "place.persist()"
    with KillableProgram(code, tmp_path / "out") as program:
        program.kill()
        [left] = tmp_path.iterdir()
        assert visible(tmp_path) == []
    place = place_of(1 << 20, tmp_path / "out", left=str(left))
    assert place.partial
    assert bytes(place.memory) == b"x" * (1 << 20)
    assert list(place.content.extents(PAGE)) == [(0, 256, True)]
    asyncio.run(place.discard())
    assert list(tmp_path.iterdir()) == []
