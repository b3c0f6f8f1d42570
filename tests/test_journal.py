"""Journals as files: crashes, damage, and files of other users."""

import errno
import os
import pwd
import shutil
import zlib

import pytest

from migrate.errors import JournalError, UsageError
from migrate.ownership.journal import Journal, name_of
from migrate.ownership.journal_directory import (
    check_directory,
    check_trusted,
    default_directory,
    journal_directory,
    state_directory,
)
from migrate.ownership.journal_lines import MAX_BYTES
from migrate.ownership.stored_journals import claim_in, damaged, find_journal, journals
from proto.wire.ownership import Claim, Event, Role
from tests.requirements import need_root

TOKEN = bytes(16)


def line(text: str) -> bytes:
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


PREPARED, OWNER = line('{"claim": "PREPARED"}'), line('{"claim": "OWNER"}')


def stored(directory, content: bytes) -> str:
    path = directory / f"{name_of(TOKEN)}.destination"
    path.write_bytes(content)
    return str(path)


@pytest.fixture
def journal(tmp_path):
    found = Journal(Role.DESTINATION, TOKEN, str(tmp_path))
    yield found
    found.close()


@pytest.mark.parametrize("cut", range(1, len(OWNER) + 1))
def test_line_truncated_by_a_crash_is_dropped(tmp_path, journal, cut):
    path = stored(tmp_path, PREPARED + OWNER[:-cut])
    journal.open()
    assert journal.claim is Claim.PREPARED
    journal.move(Event.GO)
    assert claim_in(path)[2] is Claim.OWNER


@pytest.mark.parametrize("torn", [bytes(40) + b"\n", OWNER[:20] + bytes(20) + b"\n"])
def test_torn_last_line_with_line_end_is_dropped(tmp_path, journal, torn):
    path = stored(tmp_path, PREPARED + torn)
    journal.open()
    assert journal.claim is Claim.PREPARED
    journal.move(Event.GO)
    assert claim_in(path)[2] is Claim.OWNER


@pytest.mark.parametrize("at", range(0, len(PREPARED) - 1, 5))
def test_claim_after_damaged_line_is_refused(tmp_path, journal, at):
    """Ignoring OWNER after a flipped bit in the line before it would abandon the only guest."""
    content = bytearray(PREPARED + OWNER)
    content[at] ^= 1
    path = stored(tmp_path, bytes(content))
    with pytest.raises(JournalError, match="damaged"):
        journal.open()
    journal.close()
    assert list(journals(Role.DESTINATION, str(tmp_path))) == []
    [said] = damaged(Role.DESTINATION, str(tmp_path))
    assert "damaged" in said
    assert damaged(Role.SOURCE, str(tmp_path)) == []
    with open(path, "rb") as file:
        assert file.read() == content


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", "null", '"x"', '{"claim": 7}', '{"claim": "ours"}', '{"claim": []}',
     '{"claim": null}', '{"facts": 7}', '{"facts": {"guest": 7}}', '{"facts": {"place": null}}',
     '{"facts": {"address": []}}', '{"started": "yes"}', "[" * 100_000,
     '{"claim": ' + "9" * 5000 + "}", '{"x": "\udcff"}'],
)  # fmt: skip
def test_malformed_line_is_refused(tmp_path, journal, text):
    bare = text.encode(errors="surrogateescape")
    path = stored(tmp_path, PREPARED + f"{zlib.crc32(bare):08x} ".encode() + bare + b"\n")
    with pytest.raises(JournalError, match="not understood"):
        journal.open()
    with pytest.raises(JournalError, match="not understood"):
        claim_in(path)
    assert list(journals(Role.DESTINATION, str(tmp_path))) == []


def test_oversized_journal_keeps_its_end(tmp_path, journal):
    path = stored(tmp_path, PREPARED * (MAX_BYTES // len(PREPARED) + 1) + OWNER)
    with pytest.raises(JournalError, match="longer than any journal"):
        journal.open()
    with open(path, "rb") as file:
        assert file.read().endswith(OWNER)


def test_journal_in_use_by_another_program_is_not_opened(tmp_path, journal):
    """It may be the only record of who owns the guest."""
    journal.begin(place={})
    journal.move(Event.VERIFIED)
    other = Journal(Role.DESTINATION, TOKEN, str(tmp_path))
    with pytest.raises(JournalError, match="in use by another program"):
        other.open(create=False)
    other.close()
    [found] = journals(Role.DESTINATION, str(tmp_path))
    assert found.claim is Claim.PREPARED


# ---------------------------------------------------------------- where they are


@pytest.fixture
def user(monkeypatch):
    """A user without an entry in the password file and without an environment."""

    def unknown(_uid):
        raise KeyError

    for name in ("MIGRATE_JOURNAL", "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    return monkeypatch


@pytest.mark.parametrize("home", [None, "", "relative", "~"])
def test_missing_home_asks_for_a_journal_directory(user, home):
    """Journals in a directory called ~ would not be found from another working directory."""
    if home is not None:
        user.setenv("HOME", home)
    with pytest.raises(UsageError, match=r"has no home directory .*--journal DIR"):
        default_directory()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"HOME": "/h"}, "/h/.local/state/xbmigrate"),
        ({"HOME": "/h", "XDG_STATE_HOME": ""}, "/h/.local/state/xbmigrate"),
        ({"HOME": "/h", "XDG_STATE_HOME": "state"}, "/h/.local/state/xbmigrate"),
        ({"HOME": "/h", "XDG_STATE_HOME": "/s"}, "/s/xbmigrate"),
        ({"XDG_STATE_HOME": "/s"}, "/s/xbmigrate"),
        ({"MIGRATE_JOURNAL": "/j", "XDG_STATE_HOME": "/s"}, "/j"),
    ],
)
def test_default_journal_directories(user, names, expected):
    for name, value in names.items():
        user.setenv(name, value)
    assert default_directory() == expected


def test_home_is_read_from_the_password_file(user):
    user.setattr(pwd, "getpwuid", lambda _uid: pwd.struct_passwd(("u", "", 1, 1, "", "/h", "")))
    assert default_directory() == "/h/.local/state/xbmigrate"


@pytest.mark.parametrize(
    ("named", "environment", "expected"),
    [
        ("~/x", "/e", "/h/x"), ("~", "/e", "/h/"), ("", "~/x", "/h/x"), ("", "/e", "/e"),
        ("./~/x", "/e", "./~/x"), ("/a/~", "/e", "/a/~"), ("~x", "/e", "~x"),
    ],
)  # fmt: skip
def test_tilde_is_expanded_without_a_shell(user, named, environment, expected):
    user.setenv("HOME", "/h")
    user.setenv("MIGRATE_JOURNAL", environment)
    assert journal_directory(named) == expected


def test_tilde_without_home_is_refused(user):
    with pytest.raises(UsageError, match="has no home directory"):
        journal_directory("~/x")


def test_relative_directory_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_directory("a/b") == str(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_unwritable_directory_is_refused_at_start(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        with pytest.raises(UsageError, match="Not a directory: .*--journal DIR"):
            check_directory(str(path))

    def full(_fd, _data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(UsageError, match="No space left on device: .*--journal DIR"):
            check_directory(str(tmp_path))
    assert list(tmp_path.iterdir()) == [file]


def test_no_claim_is_written_to_a_removed_journal(tmp_path, journal):
    """Data written to an unlinked file is lost when the program ends."""
    journal.begin(place={})
    shutil.rmtree(tmp_path)
    with pytest.raises(JournalError, match="removed or replaced meanwhile"):
        journal.move(Event.VERIFIED)
    assert journal.claim is Claim.NONE


# ---------------------------------------------------------------- who may have written them


def test_token_is_in_no_file_name_and_no_destination_journal(tmp_path, journal):
    """Anyone who has the token may take over the guest."""
    token = os.urandom(16)
    for role in Role:
        written = Journal(role, token, str(tmp_path))
        written.begin(place={})
        written.close(keep=True)
    names = sorted(os.listdir(tmp_path))
    assert len(names) == 2
    assert not [name for name in names if token.hex() in name]
    mine = {name: (tmp_path / name).read_text() for name in names}
    [source] = [name for name, text in mine.items() if token.hex() in text]
    assert source.endswith(".source")
    assert (tmp_path / source).stat().st_mode & 0o077 == 0
    [found] = journals(Role.SOURCE, str(tmp_path))
    assert found.token == token
    [found] = journals(Role.DESTINATION, str(tmp_path))
    assert found.token == b""
    assert found.is_of(token)
    assert not found.is_of(b"")


@need_root("give files away")
def test_link_of_another_user_is_not_followed(tmp_path) -> None:
    """That user could make it lead to the journals of other migrations."""
    (tmp_path / "ours").mkdir(mode=0o700)
    (tmp_path / "theirs").symlink_to("ours")
    check_directory(str(tmp_path / "theirs"))
    os.chown(tmp_path / "theirs", 65534, 65534, follow_symlinks=False)
    with pytest.raises(UsageError, match="theirs is a symbolic link of user 65534"):
        check_directory(str(tmp_path / "theirs"))
    with pytest.raises(UsageError, match="theirs is a symbolic link of user 65534"):
        check_trusted(str(tmp_path / "theirs"))


@need_root("give files away")
@pytest.mark.parametrize("how", ["mode", "owner", "group"])
def test_directory_writable_by_others_is_refused(tmp_path, how):
    here = tmp_path / "journals"
    here.mkdir(0o700)
    if how == "owner":
        os.chown(here, 65534, 65534)
    else:
        here.chmod(0o777 if how == "mode" else 0o770)
    mends = f"`chown 0 {here}; chmod go-w {here}`" if how == "owner" else f": `chmod go-w {here}`"
    with pytest.raises(UsageError, match=mends):
        check_directory(str(here))
    os.chown(here, 0, 0)
    here.chmod(0o755)
    check_directory(str(here))


@need_root("give files away")
@pytest.mark.parametrize("how", ["owner", "mode"])
def test_directory_replaceable_by_others_is_refused(tmp_path, how):
    """A user who may write in its parent can put another directory in its place."""
    above, here = tmp_path / "above", tmp_path / "above" / "journals"
    here.mkdir(0o700, parents=True)
    stored(here, PREPARED)
    os.chown(above, 65534, 65534) if how == "owner" else above.chmod(0o777)
    why = f"{above} is not trusted, because it belongs to user 65534: name another place"
    if how == "mode":
        why = f"`chmod go-w {above}` mends that"
    for check in (check_directory, check_trusted):
        with pytest.raises(UsageError, match=why):
            check(str(here))
    for create in (True, False):
        with pytest.raises(JournalError, match=why):
            Journal(Role.DESTINATION, TOKEN, str(here)).open(create=create)
    with pytest.raises(JournalError, match=why):
        find_journal(Role.DESTINATION, name_of(TOKEN), str(here))
    assert list(journals(Role.DESTINATION, str(here))) == []
    assert [why in said for said in damaged(Role.DESTINATION, str(here))] == [True]
    above.chmod(0o1777)
    os.chown(above, 0, 0)
    assert len(list(journals(Role.DESTINATION, str(here)))) == 1


@need_root("give files away")
def test_replaced_journal_is_not_removed(tmp_path, journal):
    """Another file may have taken its name."""
    journal.begin(place={})
    path = tmp_path / f"{name_of(TOKEN)}.destination"
    path.rename(tmp_path / "moved")
    path.write_text("another's")
    journal.close()
    assert path.read_text() == "another's"


@need_root("give files away")
@pytest.mark.parametrize("name", ["HOME", "XDG_STATE_HOME"])
def test_home_of_another_user_is_not_used(monkeypatch, tmp_path, name):
    """sudo may leave HOME and XDG_STATE_HOME as they were."""
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setenv(name, str(tmp_path))
    assert state_directory().startswith(str(tmp_path))
    os.chown(tmp_path, 65534, 65534)
    home = pwd.getpwuid(0).pw_dir if name == "HOME" else "/nowhere"
    assert state_directory() == f"{home}/.local/state/xbmigrate"


@need_root("give files away")
@pytest.mark.parametrize("how", ["owner", "mode", "link", "fifo"])
def test_journal_writable_by_others_is_ignored(tmp_path, how):
    path = tmp_path / f"{name_of(TOKEN)}.destination"
    path.write_bytes(PREPARED)
    [found] = journals(Role.DESTINATION, str(tmp_path))
    assert found.claim is Claim.PREPARED
    if how == "owner":
        os.chown(path, 65534, 65534)
    elif how == "mode":
        path.chmod(0o664)
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to("elsewhere") if how == "link" else os.mkfifo(path)
    assert list(journals(Role.DESTINATION, str(tmp_path))) == []
    assert len(damaged(Role.DESTINATION, str(tmp_path))) == 1
    with pytest.raises(JournalError):
        Journal(Role.DESTINATION, TOKEN, str(tmp_path)).open(create=False)
    if how in ("owner", "mode"):
        assert claim_in(str(path)) == (Role.DESTINATION, name_of(TOKEN), Claim.PREPARED)
