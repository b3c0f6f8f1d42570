"""A directory that another user may own: what is done in it is done in it, and to our own files."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import resource
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from migrate import directory as directory_module
from migrate.directory import (
    SUFFIX,
    Directory,
    Left,
    existing_file,
    identity_of,
    leads_to,
    make_trusted,
    open_trusted,
)
from migrate.filesystem import check_file, write_whole
from tests.requirements import need


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Directory]:
    with Directory(str(tmp_path)) as directory:
        yield directory


WAYS = ["_rename_noreplace", "_link_and_unlink", "_take_and_rename"]


@pytest.fixture(params=range(len(WAYS)), ids=WAYS)
def way(request, monkeypatch):
    """The first way of rename_new that the file system has."""

    def lacking(_self, _old, _new):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    for name in WAYS[: request.param]:
        monkeypatch.setattr(Directory, name, lacking)
    return WAYS[request.param]


def test_what_is_renamed_has_its_new_name_and_no_other(way, here, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"content")
    here.rename_new("old", "new")
    assert [item.name for item in tmp_path.iterdir()] == ["new"]
    assert new.read_bytes() == b"content"


@pytest.mark.parametrize("kind", ["file", "empty", "directory", "link"])
def test_nothing_that_is_there_is_replaced(way, here, tmp_path, kind):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"content")
    if kind == "directory":
        new.mkdir()
    elif kind == "link":
        new.symlink_to("nowhere")
    else:
        new.write_bytes(b"precious" if kind == "file" else b"")
    with pytest.raises(FileExistsError):
        here.rename_new("old", "new")
    assert old.read_bytes() == b"content"
    assert kind != "file" or new.read_bytes() == b"precious"


def test_a_name_that_a_crash_left_taken_is_known_by_what_is_in_it(here, tmp_path, monkeypatch):
    old, new = tmp_path / ".new.12345678.xbmigrate", tmp_path / "new"
    old.write_bytes(b"content")

    def crash(_old, _new, **_directories):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crash)
        with pytest.raises(KeyboardInterrupt):
            here._take_and_rename(old.name, "new")
    assert new.exists()
    here._take_and_rename(old.name, "new")
    assert new.read_bytes() == b"content"
    assert not old.exists()


def test_a_name_that_was_taken_is_given_back_where_the_rename_fails(here, tmp_path):
    with pytest.raises(FileNotFoundError):
        here._take_and_rename("gone", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_nameless_file_gets_a_name_later(here, tmp_path):
    fd = here.make_nameless()
    if fd < 0:
        pytest.skip("no O_TMPFILE here")
    assert list(tmp_path.iterdir()) == []
    os.write(fd, b"x")
    here.link(fd, "name")
    os.close(fd)
    assert (tmp_path / "name").read_bytes() == b"x"


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP])
@pytest.mark.parametrize("where", [Directory, os], ids=["link", "open"])
def test_where_a_nameless_file_cannot_be_or_get_a_name_there_is_none(
    here, tmp_path, monkeypatch, where, error
):
    """It would be found when the first guest comes, and refused."""
    opened = os.open

    def lacking(*arguments, **directory):
        if where is os and arguments[1] & os.O_TMPFILE != os.O_TMPFILE:
            return opened(*arguments, **directory)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(where, "open" if where is os else "link", lacking)
    assert here.make_nameless() == -1
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- another user in the directory


def stranger(path: Path) -> None:
    """Gives it to another user."""
    os.chown(path, 65534, 65534, follow_symlinks=False)


need_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def test_the_directory_is_held_whatever_its_name_leads_to_later(here, tmp_path) -> None:
    moved, elsewhere = tmp_path.with_name("moved"), tmp_path.with_name("elsewhere")
    elsewhere.mkdir()
    tmp_path.rename(moved)
    tmp_path.symlink_to(elsewhere)
    os.close(here.make("new"))
    here.make_directory("inner").close()
    assert sorted(os.listdir(moved)) == ["inner", "new"]
    assert os.listdir(elsewhere) == []
    tmp_path.unlink()
    moved.rename(tmp_path)


@need_root
def test_a_directory_behind_a_link_is_used_where_the_link_can_be_trusted(tmp_path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "one").symlink_to("real")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    with Directory(str(tmp_path / "two")) as directory:
        os.close(directory.make("x"))
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


def test_links_on_the_way_lead_where_the_kernel_has_them_lead(tmp_path, monkeypatch) -> None:
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


@need_root
@pytest.mark.parametrize("which", ["above", "above/it"])
@pytest.mark.parametrize("how", ["owner", "mode", "group"])
def test_a_trusted_directory_is_one_that_nobody_else_can_replace(tmp_path, which, how) -> None:
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
        os.close(directory.make("file"))


@pytest.mark.parametrize("members", [[], ["anna"], ["bert"]])
@pytest.mark.parametrize("name", ["anna", "staff"])
def test_a_group_that_is_a_users_own_is_no_other_user(tmp_path, monkeypatch, name, members) -> None:
    """With umask 002, which goes with such groups, his directories are theirs to write."""
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
        pytest.skip(f"there are no access lists here: {error}")
    with pytest.raises(PermissionError, match="others may write there"):
        Directory(str(tmp_path / "it"), trusted=True)


def test_a_sticky_directory_may_be_above_a_trusted_one_and_is_none(tmp_path) -> None:
    (tmp_path / "above/it").mkdir(parents=True)
    (tmp_path / "above").chmod(0o1777)
    Directory(str(tmp_path / "above/it"), trusted=True).close()
    with pytest.raises(PermissionError, match=r"others may write there \(mode 1777\)"):
        Directory(str(tmp_path / "above"), trusted=True)
    assert leads_to(f"{tmp_path}/above/it", identity_of(os.stat(tmp_path / "above/it")))
    assert not leads_to(f"{tmp_path}/above/it", identity_of(os.stat(tmp_path)))


def test_missing_directories_are_made_for_us_alone_and_on_the_disk(tmp_path, monkeypatch) -> None:
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


def test_as_many_directories_are_made_as_are_missing(tmp_path) -> None:
    make_trusted(f"{tmp_path}/{'a/' * 1100}b").close()
    assert os.listdir(tmp_path) == ["a"]
    with Directory(str(tmp_path)) as directory:
        directory.drop("a")


@need_root
def test_a_directory_is_made_in_one_that_we_may_not_read() -> None:
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


def test_who_is_root_may_not_be_seen_from_where_we_are(tmp_path, monkeypatch) -> None:
    """In a namespace of users without root, `/` belongs to nobody."""
    (tmp_path / "it").mkdir()
    hidden = Path("/proc/sys/kernel/overflowuid").read_text()
    monkeypatch.setattr(directory_module, "is_trusted", lambda uid: False)
    monkeypatch.setattr(directory_module, "_is_hidden_root", lambda uid: True)
    Directory(str(tmp_path / "it"), trusted=True).close()
    (tmp_path / "it").chmod(0o777)
    with pytest.raises(PermissionError, match="it belongs to user"):
        Directory(str(tmp_path / "it"), trusted=True)
    monkeypatch.undo()
    assert not directory_module._is_hidden_root(int(hidden)), "root is to be seen here"


@need_root
def test_nothing_is_made_behind_a_link_of_another_user_or_in_a_directory_of_his(tmp_path) -> None:
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


@need_root
def test_a_trusted_file_is_plain_and_nobody_elses(tmp_path) -> None:
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
    for path, kind in ((tmp_path / "fifo", "no plain file"), (tmp_path, "Is a directory")):
        with pytest.raises(OSError, match=kind):
            open_trusted(str(path))
    with pytest.raises(OSError, match="no plain file"):
        open_trusted("/dev/null")


def test_a_new_file_is_new(here, tmp_path) -> None:
    (tmp_path / "there").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("there", "link"):
        with pytest.raises(FileExistsError):
            here.make(name)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("swap", ["link", "copy", "second name", "fifo", "directory", "gone"])
def test_only_the_very_file_is_taken_over(here, tmp_path, swap) -> None:
    left, victim = tmp_path / "left", tmp_path / "victim"
    left.write_bytes(b"ours")
    victim.write_bytes(b"root's own")
    known = identity_of(os.stat(left))
    os.close(here.take("left", known))
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
        here.take("left", known)
    assert victim.read_bytes() == b"root's own"


@need_root
def test_a_file_of_another_user_is_not_taken_over_though_it_has_the_inode(here, tmp_path) -> None:
    (tmp_path / "left").write_bytes(b"")
    known = identity_of(os.stat(tmp_path / "left"))
    stranger(tmp_path / "left")
    with pytest.raises(OSError, match="removed or replaced"):
        here.take("left", known)
    os.close(here.take("left", known, 65534))  # we had given it to him


@pytest.mark.parametrize("overwrite", [False, True])
def test_who_has_the_name_in_the_end_is_looked_at(here, tmp_path, monkeypatch, overwrite) -> None:
    """The hidden file is swapped just before it is renamed."""
    (tmp_path / "hidden").write_bytes(b"verified")
    known = identity_of(os.stat(tmp_path / "hidden"))
    real, way = os.rename, Directory.rename_new

    def swap() -> None:
        real(tmp_path / "hidden", tmp_path / "away")
        (tmp_path / "hidden").write_bytes(b"not so")

    def rename(old: str, new: str, **directories: int) -> None:
        swap()
        real(old, new, **directories)

    def rename_new(self: Directory, old: str, new: str) -> None:
        swap()
        way(self, old, new)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(Directory, "rename_new", rename_new)
    with pytest.raises(OSError, match="out was removed or replaced"):
        here.give_name(known, "hidden", "out", overwrite=overwrite)
    with pytest.raises(OSError, match="hidden was removed or replaced"):
        here.give_name(known, "hidden", "out", overwrite=overwrite)


def test_what_is_removed_is_the_very_one_and_no_link_is_followed(here, tmp_path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").touch()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/link").symlink_to(victim)
    known = identity_of(os.stat(tmp_path / "tree"))
    here.drop("victim", known)
    assert (victim / "file").exists()
    (tmp_path / "link").symlink_to(victim)
    here.drop("link")
    here.drop("tree", known)
    here.drop("tree", known)
    assert sorted(os.listdir(tmp_path)) == ["victim"]
    assert (victim / "file").exists()


def deep_tree(path: Path, depth: int) -> None:
    """Directories in one another, each with a file and an empty directory beside it."""
    path.mkdir()
    fd = os.open(path, os.O_PATH)
    for _ in range(depth):
        for name in ("deeper", "empty"):
            os.mkdir(name, dir_fd=fd)
        os.close(os.open("file", os.O_CREAT, dir_fd=fd))
        inner = os.open("deeper", os.O_PATH, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)


def test_a_tree_is_removed_however_deep_it_is(here, tmp_path) -> None:
    """Deeper than Python recurses, and with fewer descriptors than it is deep."""
    deep_tree(tmp_path / "tree", 2000)
    most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 256), hard))
    try:
        here.drop("tree", identity_of(os.stat(tmp_path / "tree")))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_removed_in_time_stays(here, tmp_path, monkeypatch) -> None:
    """Its owner may add to it as fast as it is removed."""
    deep_tree(tmp_path / "tree", 3)
    monkeypatch.setattr(directory_module, "DROP_SECONDS", -1.0)
    here.drop("tree")
    assert (tmp_path / "tree/deeper/deeper").is_dir()


def test_a_rename_that_was_done_though_it_failed_counts(here, tmp_path, monkeypatch) -> None:
    """A file server may have lost its answer, and been asked again."""
    (tmp_path / "hidden").write_bytes(b"verified")
    known, real = identity_of(os.stat(tmp_path / "hidden")), os.rename

    def rename(*names: str, **directories: int) -> None:
        real(*names, **directories)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(os, "rename", rename)
    here.give_name(known, "hidden", "out", overwrite=True)
    assert (tmp_path / "out").read_bytes() == b"verified"


def access_list(user: int) -> bytes:
    """One that lets a user do everything, and its own owner and group too."""
    nobody = 0xFFFFFFFF
    entries = ((1, 7, nobody), (2, 7, user), (4, 5, nobody), (16, 7, nobody), (32, 5, nobody))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def test_what_is_made_inherits_no_access_list(here, tmp_path) -> None:
    """It has no effect on a file of mode 600, and comes to effect with --mode 640."""
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", access_list(65534))
    except OSError as error:
        need(False, f"access lists in {tmp_path}: {error.strerror}")
    made = [here.make("file"), here.make_nameless()]
    with here.make_directory("directory") as inner:
        made += [inner.make("file"), os.open(tmp_path / "directory", os.O_RDONLY)]
    for fd in made:
        if fd >= 0:
            assert os.listxattr(fd) == []
            os.close(fd)


@need_root
@pytest.mark.parametrize("kind", ["ours", "stranger's", "stranger's to his own", "/proc", "round"])
def test_a_link_at_the_end_is_followed_where_its_owner_may_say_what_it_is(tmp_path, kind) -> None:
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


@need_root
@pytest.mark.parametrize("kind", ["stranger's", "full", "link"])
def test_a_new_directory_is_ours_and_empty(here, tmp_path, monkeypatch, kind) -> None:
    """Another one is put in its place between the two calls that make and open it."""
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
        here.make_directory("new")


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
def test_what_a_program_of_ours_would_not_have_written_is_not_read(path, temporary, inode) -> None:
    with pytest.raises(ValueError, match="no "):
        Left.read({"path": path, "temporary": temporary, "inode": inode})


def test_what_is_left_is_there_while_it_is_the_same(tmp_path) -> None:
    hidden = tmp_path / HIDDEN
    hidden.touch()
    facts = {
        "path": f"{tmp_path}/out",
        "temporary": str(hidden),
        "inode": [*identity_of(hidden.stat())],
    }
    left = Left.read(facts)
    assert left.there
    hidden.rename(tmp_path / "away")
    hidden.touch()
    assert not left.there
    left.drop()
    assert hidden.exists()


# ---------------------------------------------------------------- small files, whole


def test_a_file_is_put_in_place_whole_and_through_no_link(tmp_path) -> None:
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


def test_a_file_that_cannot_be_put_in_place_leaves_nothing(tmp_path) -> None:
    (tmp_path / "report").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(str(tmp_path / "report"), b"a report", "--report")
    assert os.listdir(tmp_path) == ["report"]
