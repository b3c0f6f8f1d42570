"""Operations in a directory that another user may own stay in it, and touch only our files."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import resource
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from migrate.errors import UsageError
from migrate.files import filesystem, removal, trust, walk
from migrate.files.directory import SUFFIX, Directory
from migrate.files.filesystem import check_file, try_directory, write_whole
from migrate.files.identity import identity_of
from migrate.files.partial_output import PartialOutput
from migrate.files.trusted_places import leads_to, make_trusted, open_trusted
from migrate.files.walk import existing_file
from migrate.ownership.journal_directory import check_directory
from tests.requirements import need, need_root
from tests.trees import DEEP, access_list, deep_tree


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Directory]:
    with Directory(str(tmp_path)) as directory:
        yield directory


WAYS = ["_renameat2", "_link_and_unlink", "_reserve_and_rename"]


@pytest.fixture(params=range(len(WAYS)), ids=WAYS)
def way(request, monkeypatch):
    """Make this way of rename_new the first one that the file system supports."""

    def lacking(_self, _old, _new):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    for name in WAYS[: request.param]:
        monkeypatch.setattr(Directory, name, lacking)
    return WAYS[request.param]


def test_rename_leaves_only_the_new_name(way, here, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"content")
    here.rename_noreplace("old", "new")
    assert [item.name for item in tmp_path.iterdir()] == ["new"]
    assert new.read_bytes() == b"content"


@pytest.mark.parametrize("kind", ["file", "empty", "directory", "link"])
def test_rename_noreplace_replaces_nothing(way, here, tmp_path, kind):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"content")
    if kind == "directory":
        new.mkdir()
    elif kind == "link":
        new.symlink_to("nowhere")
    else:
        new.write_bytes(b"precious" if kind == "file" else b"")
    with pytest.raises(FileExistsError):
        here.rename_noreplace("old", "new")
    assert old.read_bytes() == b"content"
    assert kind != "file" or new.read_bytes() == b"precious"


def test_name_reserved_before_a_crash_is_reused(here, tmp_path, monkeypatch):
    old, new = tmp_path / ".new.12345678.xbmigrate", tmp_path / "new"
    old.write_bytes(b"content")

    def crash(_old, _new, **_directories):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crash)
        with pytest.raises(KeyboardInterrupt):
            here._reserve_and_rename(old.name, "new")
    assert new.exists()
    here._reserve_and_rename(old.name, "new")
    assert new.read_bytes() == b"content"
    assert not old.exists()


def test_reserved_name_is_removed_when_rename_fails(here, tmp_path):
    with pytest.raises(FileNotFoundError):
        here._reserve_and_rename("gone", "new")
    assert list(tmp_path.iterdir()) == []


def test_unnamed_file_gets_a_name_later(here, tmp_path):
    fd = here.create_unnamed_file()
    need(fd >= 0, f"O_TMPFILE in {tmp_path}")
    assert list(tmp_path.iterdir()) == []
    os.write(fd, b"x")
    here.link(fd, "name")
    os.close(fd)
    assert (tmp_path / "name").read_bytes() == b"x"


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP])
@pytest.mark.parametrize("where", [Directory, os], ids=["link", "open"])
def test_no_unnamed_file_where_it_could_not_be_named(here, tmp_path, monkeypatch, where, error):
    """Otherwise the failure would only show when the first guest arrives."""
    opened = os.open

    def lacking(*arguments, **directory):
        if where is os and arguments[1] & os.O_TMPFILE != os.O_TMPFILE:
            return opened(*arguments, **directory)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(where, "open" if where is os else "link", lacking)
    assert here.create_unnamed_file() == -1
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- another user in the directory


def stranger(path: Path) -> None:
    """Give a file to another user."""
    os.chown(path, 65534, 65534, follow_symlinks=False)


def test_directory_stays_open_when_its_path_is_replaced(here, tmp_path) -> None:
    moved, elsewhere = tmp_path.with_name("moved"), tmp_path.with_name("elsewhere")
    elsewhere.mkdir()
    tmp_path.rename(moved)
    tmp_path.symlink_to(elsewhere)
    os.close(here.create_file("new"))
    here.create_directory("inner").close()
    assert sorted(os.listdir(moved)) == ["inner", "new"]
    assert os.listdir(elsewhere) == []
    tmp_path.unlink()
    moved.rename(tmp_path)


@need_root("give files away")
def test_link_to_directory_is_followed_only_if_trusted(tmp_path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "one").symlink_to("real")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    with Directory(str(tmp_path / "two")) as directory:
        os.close(directory.create_file("x"))
    assert (tmp_path / "real/x").exists()
    stranger(tmp_path / "one")
    for name in ("one", "two"):
        with pytest.raises(OSError, match="is a symbolic link of user 65534"):
            Directory(str(tmp_path / name))
    with pytest.raises(OSError, match="one is a symbolic link of user 65534"):
        Directory(str(tmp_path / "one/inner"))
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(OSError, match="Too many levels"):
        Directory(str(tmp_path / "round"))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        Directory(str(tmp_path / "file"))


def test_links_on_the_way_resolve_as_in_the_kernel(tmp_path, monkeypatch) -> None:
    (tmp_path / "real/inner/deep").mkdir(parents=True)
    (tmp_path / "up").symlink_to("real/inner/..")
    (tmp_path / "whole").symlink_to(tmp_path / "up")
    monkeypatch.chdir(tmp_path / "real")
    held = os.open(tmp_path / "real", os.O_PATH)
    at_last = identity_of(os.stat(tmp_path / "real/inner/deep"))
    for way in (tmp_path / "whole", tmp_path / "real/inner/../../up", "/proc/self/cwd",
                f"/proc/self/fd/{held}", f"/proc/self/root/{tmp_path}/real"):  # fmt: skip
        with Directory(f"{way}/inner//./deep/") as directory:
            assert directory.identity == at_last
    os.rename(tmp_path / "real", tmp_path / "moved")  # and the link in /proc says so
    with Directory(f"/proc/self/fd/{held}/inner/deep") as directory:
        assert directory.identity == at_last
    os.close(held)


# ---------------------------------------------------------------- what programs obey


@need_root("give files away")
@pytest.mark.parametrize("which", ["above", "above/it"])
@pytest.mark.parametrize("how", ["owner", "mode", "group"])
def test_trusted_directory_cannot_be_replaced_by_other_users(tmp_path, which, how) -> None:
    (tmp_path / "above/it").mkdir(parents=True)
    Directory(str(tmp_path / "above/it"), trusted=True).close()
    wrong = tmp_path / which
    stranger(wrong) if how == "owner" else wrong.chmod(0o777 if how == "mode" else 0o775)
    why = f"{wrong} is not trusted, because .*: `chmod go-w {wrong}` mends that"
    if how == "owner":
        why = why.replace("`chmod", f"`chown 0 {wrong}; chmod")
        why = why if which == "above/it" else f"{wrong} is not trusted.*: name another place"
    for way in (tmp_path / "above/it", tmp_path / "above/../above/it"):
        with pytest.raises(PermissionError, match=why):
            Directory(str(way), trusted=True)
    (tmp_path / "link").symlink_to("above/it")
    with pytest.raises(PermissionError, match=why):
        Directory(str(tmp_path / "link"), trusted=True)
    assert not leads_to(f"{tmp_path}/above/it", identity_of(os.stat(tmp_path / "above/it")))
    with Directory(str(tmp_path / "above/it")) as directory:  # whoever owns it
        os.close(directory.create_file("file"))


@pytest.mark.parametrize("members", [[], ["anna"], ["bert"]])
@pytest.mark.parametrize("name", ["anna", "staff"])
def test_own_group_of_a_user_is_trusted(tmp_path, monkeypatch, name, members) -> None:
    """With umask 002, as usual with private groups, a user's directories are group-writable."""
    (tmp_path / "it").mkdir()
    (tmp_path / "it").chmod(0o775)
    gid = (tmp_path / "it").stat().st_gid
    user = SimpleNamespace(pw_gid=gid, pw_name="anna", pw_uid=1000)
    monkeypatch.setattr(pwd, "getpwuid", lambda _uid: user)
    monkeypatch.setattr(pwd, "getpwall", lambda: [user])
    monkeypatch.setattr(grp, "getgrgid", lambda _gid: SimpleNamespace(gr_name=name, gr_mem=members))
    if name == "anna" and "bert" not in members:
        Directory(str(tmp_path / "it"), trusted=True).close()
    else:
        with pytest.raises(PermissionError, match="others may write there"):
            Directory(str(tmp_path / "it"), trusted=True)
    entries = ((1, 7, -1), (2, 7, 65534), (4, 5, -1), (16, 7, -1), (32, 5, -1))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(tmp_path / "it", "system.posix_acl_access", acl)
    except OSError as error:
        need(False, f"access lists in {tmp_path}: {error.strerror}")
    with pytest.raises(PermissionError, match="others may write there"):
        Directory(str(tmp_path / "it"), trusted=True)


def test_sticky_directory_is_accepted_above_a_trusted_one_only(tmp_path) -> None:
    (tmp_path / "above/it").mkdir(parents=True)
    (tmp_path / "above").chmod(0o1777)
    Directory(str(tmp_path / "above/it"), trusted=True).close()
    with pytest.raises(PermissionError, match=r"others may write there \(mode 1777\)"):
        Directory(str(tmp_path / "above"), trusted=True)
    assert leads_to(f"{tmp_path}/above/it", identity_of(os.stat(tmp_path / "above/it")))
    assert not leads_to(f"{tmp_path}/above/it", identity_of(os.stat(tmp_path)))


def test_missing_directories_are_made_private_and_synced(tmp_path, monkeypatch) -> None:
    real, synced = os.fsync, []

    def sync(fd: int) -> None:
        synced.append(identity_of(os.fstat(fd)))
        real(fd)

    monkeypatch.setattr(os, "fsync", sync)
    before = os.umask(0)
    try:
        make_trusted(str(tmp_path / "a/b/c")).close()
    finally:
        os.umask(before)
    for name in ("a", "a/b", "a/b/c"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700
    assert synced == [identity_of(os.stat(tmp_path / name)) for name in (".", "a", "a/b")]
    synced.clear()
    make_trusted(str(tmp_path / "a/b/c")).close()
    assert synced == []


def test_make_trusted_makes_deep_paths(deep_path) -> None:
    make_trusted(f"{deep_path}/{'a/' * DEEP}b").close()
    assert os.listdir(deep_path) == ["a"]
    with Directory(str(deep_path)) as directory:
        directory.remove_tree("a", identity_of(directory.lstat("a")))


@need_root("give files away")
def test_make_trusted_in_unreadable_directory() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as top:
        os.chmod(top, 0o711)
        blind = Path(top, "blind")
        blind.mkdir()
        blind.chmod(0o1733)
        os.seteuid(65534)
        try:
            make_trusted(f"{blind}/j/k").close()
        finally:
            os.seteuid(0)
        assert os.listdir(blind / "j") == ["k"]


def test_root_hidden_by_user_namespace_is_trusted(tmp_path, monkeypatch) -> None:
    """In a namespace of users without root, `/` belongs to nobody."""
    (tmp_path / "it").mkdir()
    hidden = Path("/proc/sys/kernel/overflowuid").read_text()
    for module in (walk, trust):
        monkeypatch.setattr(module, "is_trusted", lambda uid: False)
        monkeypatch.setattr(module, "may_be_root", lambda uid: True)
    Directory(str(tmp_path / "it"), trusted=True).close()
    (tmp_path / "it").chmod(0o777)
    with pytest.raises(PermissionError, match="it belongs to user"):
        Directory(str(tmp_path / "it"), trusted=True)
    monkeypatch.undo()
    assert not trust.may_be_root(int(hidden)), "root is to be seen here"


@need_root("give files away")
def test_make_trusted_refuses_links_and_directories_of_other_users(tmp_path) -> None:
    for name in ("etc", "home"):
        (tmp_path / name).mkdir()
    (tmp_path / "home/x").symlink_to(tmp_path / "etc")
    os.chown(tmp_path / "home/x", 65534, 65534, follow_symlinks=False)
    with pytest.raises(OSError, match="x is a symbolic link of user 65534"):
        make_trusted(str(tmp_path / "home/x/j/k"))
    stranger(tmp_path / "home")
    for path in ("home/x/j/k", "home/j/k"):
        with pytest.raises(PermissionError, match="home is not trusted"):
            make_trusted(str(tmp_path / path))
    assert os.listdir(tmp_path / "etc") == []
    assert os.listdir(tmp_path / "home") == ["x"]
    (tmp_path / "ours").symlink_to("unmounted/j")
    with pytest.raises(FileNotFoundError):
        make_trusted(str(tmp_path / "ours/deep"))


@need_root("give files away")
def test_open_trusted_refuses_special_and_foreign_files(tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("ours")
    (tmp_path / "..data").symlink_to(".")
    (tmp_path / "link").symlink_to("..data/file")  # as Kubernetes mounts secrets
    for path in (file, tmp_path / "link"):
        with open(open_trusted(str(path))) as opened:
            assert opened.read() == "ours"
    file.chmod(0o620)
    with pytest.raises(PermissionError, match=rf"chmod go-w {file}`"):
        open_trusted(str(tmp_path / "link"))
    file.chmod(0o600)
    stranger(file)
    with pytest.raises(PermissionError, match="it belongs to user 65534"):
        open_trusted(str(file))
    os.mkfifo(tmp_path / "fifo")
    for path, kind in ((tmp_path / "fifo", "not a regular file"), (tmp_path, "Is a directory")):
        with pytest.raises(OSError, match=kind):
            open_trusted(str(path))
    with pytest.raises(OSError, match="not a regular file"):
        open_trusted("/dev/null")


def test_create_file_refuses_existing_names(here, tmp_path) -> None:
    (tmp_path / "there").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("there", "link"):
        with pytest.raises(FileExistsError):
            here.create_file(name)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("swap", ["link", "copy", "second name", "fifo", "directory", "gone"])
def test_reopen_file_refuses_another_file(here, tmp_path, swap) -> None:
    left, victim = tmp_path / "left", tmp_path / "victim"
    left.write_bytes(b"ours")
    victim.write_bytes(b"root's own")
    known = identity_of(os.stat(left))
    os.close(here.reopen_file("left", known))
    kept = tmp_path / "kept"
    if swap == "second name":
        os.link(left, kept)
    else:
        left.rename(kept)  # so that its inode is no other file's
    if swap == "link":
        left.symlink_to(victim)
    elif swap == "copy":
        left.write_bytes(b"ours")
    elif swap == "fifo":
        os.mkfifo(left)
    elif swap == "directory":
        left.mkdir()
    with pytest.raises(OSError):  # noqa: PT011 - of many kinds
        here.reopen_file("left", known)
    assert victim.read_bytes() == b"root's own"


@need_root("give files away")
def test_reopen_file_refuses_file_of_another_user(here, tmp_path) -> None:
    (tmp_path / "left").write_bytes(b"")
    known = identity_of(os.stat(tmp_path / "left"))
    stranger(tmp_path / "left")
    with pytest.raises(OSError, match="removed or replaced"):
        here.reopen_file("left", known)
    os.close(here.reopen_file("left", known, 65534))  # we had given it to him


@pytest.mark.parametrize("overwrite", [False, True])
def test_rename_notices_a_file_swapped_before_it(here, tmp_path, monkeypatch, overwrite) -> None:
    """The hidden file is swapped just before it is renamed."""
    (tmp_path / "hidden").write_bytes(b"verified")
    known = identity_of(os.stat(tmp_path / "hidden"))
    real, way = os.rename, Directory.rename_noreplace

    def swap() -> None:
        real(tmp_path / "hidden", tmp_path / "away")
        (tmp_path / "hidden").write_bytes(b"not so")

    def rename(old: str, new: str, **directories: int) -> None:
        swap()
        real(old, new, **directories)

    def rename_noreplace(self: Directory, old: str, new: str) -> None:
        swap()
        way(self, old, new)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(Directory, "rename_noreplace", rename_noreplace)
    with pytest.raises(OSError, match="out was removed or replaced"):
        here.rename(known, "hidden", "out", overwrite=overwrite)
    with pytest.raises(OSError, match="hidden was removed or replaced"):
        here.rename(known, "hidden", "out", overwrite=overwrite)


def test_remove_file_removes_no_other_entry(here, tmp_path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/precious").touch()
    (tmp_path / "ours").touch()
    (tmp_path / "other").touch()
    (tmp_path / "link").symlink_to("ours")
    ours = identity_of(os.stat(tmp_path / "ours"))
    for name in ("tree", "other", "link", "missing"):
        here.remove_file(name, ours)
    here.remove_file("tree", identity_of(os.stat(tmp_path / "tree")))
    assert sorted(os.listdir(tmp_path)) == ["link", "other", "ours", "tree"]
    here.remove_file("ours", ours)
    assert sorted(os.listdir(tmp_path)) == ["link", "other", "tree"]
    assert (tmp_path / "tree/precious").exists()


def test_remove_file_removes_no_full_directory_after_its_check(here, tmp_path, monkeypatch) -> None:
    """The name is given to a directory between the check and the removal."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/precious").touch()
    (tmp_path / "ours").touch()
    ours, real = identity_of(os.stat(tmp_path / "ours")), os.unlink

    def unlink(name: str, **directory: int) -> None:
        os.rename(tmp_path / "ours", tmp_path / "away")
        os.rename(tmp_path / "tree", tmp_path / "ours")
        real(name, **directory)

    monkeypatch.setattr(os, "unlink", unlink)
    here.remove_file("ours", ours)
    assert (tmp_path / "ours/precious").exists()


def test_remove_tree_checks_identity_and_follows_no_link(here, tmp_path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").touch()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/link").symlink_to(victim)
    known = identity_of(os.stat(tmp_path / "tree"))
    here.remove_tree("victim", known)
    assert (victim / "file").exists()
    (tmp_path / "link").symlink_to(victim)
    here.remove_tree("link", identity_of(os.stat(victim)))
    here.remove_tree("tree", known)
    here.remove_tree("tree", known)
    assert sorted(os.listdir(tmp_path)) == ["link", "victim"]
    assert (victim / "file").exists()


def test_remove_deep_tree(deep_path) -> None:
    """Remove a tree deeper than Python recurses, with fewer descriptors than it has levels."""
    deep_tree(deep_path / "tree", DEEP)
    most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 256), hard))
    try:
        with Directory(str(deep_path)) as directory:
            directory.remove_tree("tree", identity_of(os.stat(deep_path / "tree")))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    assert os.listdir(deep_path) == []


def test_removal_ends_after_its_time(here, tmp_path, monkeypatch) -> None:
    """Its owner may add to it as fast as it is removed."""
    deep_tree(tmp_path / "tree", 3)
    monkeypatch.setattr(removal, "REMOVAL_SECONDS", -1.0)
    here.remove_tree("tree", identity_of(os.stat(tmp_path / "tree")))
    assert (tmp_path / "tree/deeper/deeper").is_dir()


class Slowly:
    """Make each unlink wait until `go` is set, or for `most` seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: float = 60.0) -> None:
        self.began, self.go = threading.Event(), threading.Event()
        self._real, self._end = os.unlink, time.monotonic() + most
        monkeypatch.setattr(os, "unlink", self._unlink)

    def _unlink(self, path: str, **directory: int) -> None:
        self.began.set()
        while not self.go.wait(0.01) and time.monotonic() < self._end:
            if time.monotonic() > removal._TreeRemoval.all_end:
                raise OSError(errno.EIO, "nothing is removed any more")
        self._real(path, **directory)


def test_finish_removals_waits_no_longer_than_end_seconds(here, tmp_path, monkeypatch) -> None:
    deep_tree(tmp_path / "tree", 3)
    monkeypatch.setattr(removal, "END_SECONDS", 0.2)
    slowly, began = Slowly(monkeypatch), time.monotonic()
    here.remove_later("tree", identity_of(os.stat(tmp_path / "tree")))
    assert slowly.began.wait(60)
    assert removal.finish_removals() == [str(tmp_path / "tree")]
    assert time.monotonic() - began < 30
    assert (tmp_path / "tree").is_dir()
    assert removal.finish_removals() == [], "it is told once"


def test_finish_removals_waits_for_a_removal_in_time(here, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(removal, "END_SECONDS", 60.0)
    deep_tree(tmp_path / "tree", 30)
    slowly = Slowly(monkeypatch)
    here.remove_later("tree", identity_of(os.stat(tmp_path / "tree")))
    assert slowly.began.wait(60)
    threading.Timer(0.2, slowly.go.set).start()
    assert removal.finish_removals() == []
    assert os.listdir(tmp_path) == []


def test_remove_later_without_threads_is_reported(here, tmp_path, monkeypatch) -> None:
    def full(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    (tmp_path / "tree").mkdir()
    known, before = identity_of(os.stat(tmp_path / "tree")), len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", full)
        here.remove_later("tree", known)
    assert len(os.listdir("/proc/self/fd")) == before
    assert removal.finish_removals() == [str(tmp_path / "tree")]


def test_program_ends_while_tree_grows_and_names_the_rest(tmp_path) -> None:
    """Its owner adds to it as fast as it is removed."""
    tree = tmp_path / "tree"
    tree.mkdir()
    program = f"""
import argparse, os, sys, time
from migrate.files import removal
from migrate.files.directory import Directory
from migrate.files.identity import identity_of
from migrate.cli import options, program
from migrate.cli.log_options import add_log_options
removal.END_SECONDS = 0.3
real = os.unlink
def unlink(name, **where):
    real(name, **where)
    time.sleep(0.01)
    os.close(os.open("one more", os.O_CREAT, dir_fd=where["dir_fd"]))
os.unlink = unlink
open({str(tree / "file")!r}, "x").close()
async def run(_args):
    with Directory({str(tmp_path)!r}) as here:
        here.remove_later("tree", identity_of(os.stat({str(tree)!r})))
    return 7
parser = options.Parser("prog")
add_log_options(parser)
sys.exit(program.run(parser, run, []))
"""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 7, done.stderr
    assert done.stderr == f"prog: the replaced output is not wholly removed: remove {tree}\n"
    assert time.monotonic() - began < 30


def test_rename_done_despite_an_error_counts(here, tmp_path, monkeypatch) -> None:
    """A file server's answer may be lost, and the request repeated."""
    (tmp_path / "hidden").write_bytes(b"verified")
    known, real = identity_of(os.stat(tmp_path / "hidden")), os.rename

    def rename(*names: str, **directories: int) -> None:
        real(*names, **directories)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(os, "rename", rename)
    here.rename(known, "hidden", "out", overwrite=True)
    assert (tmp_path / "out").read_bytes() == b"verified"


def test_new_files_inherit_no_access_list(here, tmp_path) -> None:
    """The list has no effect on a file of mode 600, but would with --mode 640."""
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", access_list(65534))
    except OSError as error:
        need(False, f"access lists in {tmp_path}: {error.strerror}")
    made = [here.create_file("file"), here.create_unnamed_file()]
    with here.create_directory("directory") as inner:
        made += [inner.create_file("file"), os.open(tmp_path / "directory", os.O_RDONLY)]
    for fd in made:
        if fd >= 0:
            assert os.listxattr(fd) == []
            os.close(fd)


@need_root("give files away")
@pytest.mark.parametrize("kind", ["ours", "stranger's", "stranger's to his own", "/proc", "round"])
def test_existing_file_follows_link_of_the_files_owner_only(tmp_path, kind) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_bytes(b"content")
    (tmp_path / "up").symlink_to("real")
    (tmp_path / "link").symlink_to("round" if kind == "round" else "up/../real/file")
    (tmp_path / "round").symlink_to("link")
    path, held = str(tmp_path / "link"), os.open(tmp_path / "real/file", os.O_RDONLY)
    if kind.startswith("stranger's"):
        stranger(tmp_path / "link")
    if kind.endswith("his own"):
        stranger(tmp_path / "real/file")
    if kind == "/proc":
        path = f"/proc/self/fd/{held}"
    if kind in ("stranger's", "round"):
        says = "many levels" if kind == "round" else "link is a symbolic link of user 65534"
        with pytest.raises(OSError, match=says), existing_file(path):
            pass
    else:
        with existing_file(path) as fd:
            assert identity_of(os.fstat(fd)) == identity_of(os.fstat(held))
    os.close(held)


@need_root("give files away")
@pytest.mark.parametrize("kind", ["stranger's", "full", "link"])
def test_create_directory_refuses_foreign_or_filled_directory(
    here, tmp_path, monkeypatch, kind
) -> None:
    """Another directory takes its place between mkdir and open."""
    his = tmp_path / "his"
    if kind == "link":
        his.symlink_to("/")
    else:
        his.mkdir()
    if kind == "full":
        (his / "file").touch()
    elif kind == "stranger's":
        stranger(his)
    real = os.mkdir

    def make(name: str, mode: int, *, dir_fd: int) -> None:
        real(name, mode, dir_fd=dir_fd)
        os.rmdir(name, dir_fd=dir_fd)
        his.rename(tmp_path / name)

    monkeypatch.setattr(os, "mkdir", make)
    with pytest.raises(OSError):  # noqa: PT011 - of two kinds
        here.create_directory("new")


# ---------------------------------------------------------------- what a journal says


HIDDEN = f".out.12345678{SUFFIX}"


@pytest.mark.parametrize(
    ("path", "temporary", "inode"),
    [
        ("/d/out", f"/e/{HIDDEN}", [1, 2]), ("/d/out", "/d/passwd", [1, 2]),
        ("/d/out", f"/d/../e/{HIDDEN}", [1, 2]), ("/d/../e/out", f"/d/../e/{HIDDEN}", [1, 2]),
        ("out", HIDDEN, [1, 2]), ("/d/out", f"/d/{HIDDEN}", [1]), ("/d/out", f"/d/{HIDDEN}", None),
        ("/d/out", f"/d/{HIDDEN}", [True, 2]), (None, f"/d/{HIDDEN}", [1, 2]),
        ("/d/out", 7, [1, 2]), ("/d/out", f"/d/x{SUFFIX}", [1, 2]),
    ],
)  # fmt: skip
def test_partial_output_refuses_foreign_facts(path, temporary, inode) -> None:
    with pytest.raises(ValueError, match="no "):
        PartialOutput.from_facts({"path": path, "temporary": temporary, "inode": inode})


def test_partial_output_exists_while_identity_matches(tmp_path) -> None:
    hidden = tmp_path / HIDDEN
    hidden.touch()
    facts = {
        "path": f"{tmp_path}/out",
        "temporary": str(hidden),
        "inode": [*identity_of(hidden.stat())],
    }
    left = PartialOutput.from_facts(facts)
    assert left.exists
    hidden.rename(tmp_path / "away")
    hidden.touch()
    assert not left.exists
    left.remove()
    assert hidden.exists()


@pytest.mark.parametrize("kind", ["file", "snapshot"])
def test_partial_output_empties_a_directory_only_if_it_was_one(tmp_path, kind) -> None:
    """A directory of others may have the inode by now that a removed file had."""
    tree = tmp_path / HIDDEN
    tree.mkdir()
    (tree / "inner").touch()
    facts = {
        "kind": kind, "path": f"{tmp_path}/out", "temporary": str(tree),
        "inode": [*identity_of(tree.stat())],
    }  # fmt: skip
    PartialOutput.from_facts(facts).remove()
    assert tree.exists() == (kind == "file")
    assert kind != "file" or (tree / "inner").exists()


# ---------------------------------------------------------------- small files, whole


def test_write_whole_replaces_atomically_and_follows_no_link(tmp_path) -> None:
    victim, file = tmp_path / "victim", tmp_path / "report"
    victim.write_bytes(b"root's own")
    file.symlink_to(victim)
    write_whole(str(file), b"a report", "--report")
    assert file.read_bytes() == b"a report"
    assert not file.is_symlink()
    assert victim.read_bytes() == b"root's own"
    assert stat.S_IMODE(file.stat().st_mode) & 0o600 == 0o600
    assert sorted(os.listdir(tmp_path)) == ["report", "victim"]
    check_file(str(file), "--report")


def test_failed_write_whole_leaves_nothing(tmp_path) -> None:
    (tmp_path / "report").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(str(tmp_path / "report"), b"a report", "--report")
    assert os.listdir(tmp_path) == ["report"]


class SwappedIn:
    """A full directory that its finder cannot empty, and that the owner of the directory above can
    rename: `swap` gives it the name of our hidden file."""

    def __init__(self, above: Path) -> None:
        self._above = above
        (above / "precious").mkdir()
        (above / "precious/data").touch()

    def swap(self) -> None:
        [hidden] = [name for name in os.listdir(self._above) if name.startswith(".")]
        os.rename(self._above / hidden, self._above / "old")
        os.rename(self._above / "precious", self._above / hidden)

    @property
    def whole(self) -> bool:
        return [*self._above.glob("**/data")] != []

    def before(self, monkeypatch: pytest.MonkeyPatch, where: object, name: str) -> None:
        """Swap before the first call of a function, or method."""
        real = getattr(where, name)

        def method(*arguments: object, **named: object) -> object:
            monkeypatch.setattr(where, name, real)
            self.swap()
            return real(*arguments, **named)

        monkeypatch.setattr(where, name, method)


@pytest.fixture
def swapped_in(tmp_path: Path) -> SwappedIn:
    return SwappedIn(tmp_path)


def test_failed_write_whole_removes_no_directory_of_others(
    tmp_path, monkeypatch, swapped_in
) -> None:
    swapped_in.before(monkeypatch, Directory, "rename")
    with pytest.raises(OSError, match="removed or replaced"):
        write_whole(str(tmp_path / "report"), b"a report", "--report")
    assert swapped_in.whole


def test_check_file_removes_no_directory_of_others(tmp_path, monkeypatch, swapped_in) -> None:
    swapped_in.before(monkeypatch, filesystem, "remove_file")
    check_file(str(tmp_path / "report"), "--report")
    assert swapped_in.whole


@pytest.mark.parametrize("operation", ["pwrite", "fsync", "close"])
def test_try_directory_removes_no_directory_of_others(
    tmp_path, monkeypatch, swapped_in, operation
) -> None:
    if operation == "close":
        swapped_in.before(monkeypatch, Directory, "remove_file")
        try_directory(str(tmp_path / "out"), "--output out")
    else:
        swapped_in.before(monkeypatch, os, operation)
        with pytest.raises(
            UsageError, match="rename a file in .* removed or replaced.* no other user"
        ):
            try_directory(str(tmp_path / "out"), "--output out")
    assert swapped_in.whole


def test_trial_of_journals_removes_no_directory_of_others(
    tmp_path, monkeypatch, swapped_in
) -> None:
    tmp_path.chmod(0o700)
    swapped_in.before(monkeypatch, os, "write")
    check_directory(str(tmp_path))
    assert swapped_in.whole
