"""Mode and owner of an output: their precedence, what a source may send, how they are set."""

from __future__ import annotations

import json
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import PeerError, UsageError
from migrate.guests.rights import Rights, keep_attributes, parse_mode, parse_owner
from tests.requirements import need

SAID = {"version": 1, "mode": 0o640, "uid": 5, "gid": 6}


def test_rights_survive_packing():
    assert Rights.unpack(Rights(0o640, 5, 6).pack()) == Rights(0o640, 5, 6)
    assert Rights.unpack(Rights().pack()) == Rights()


def test_other_releases_give_no_rights():
    assert Rights.unpack(b"") == Rights()
    assert Rights.unpack(json.dumps({"version": 2, "mode": "rw"}).encode()) == Rights()
    assert Rights.unpack(json.dumps({**SAID, "more": 1}).encode()) == Rights(0o640, 5, 6)


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o1777, 0o107777])
def test_source_cannot_set_setuid_setgid_or_sticky(mode):
    got = Rights.unpack(json.dumps({**SAID, "mode": mode}).encode())
    assert got.mode == mode & 0o777


@pytest.mark.parametrize(
    "state",
    [
        b"x", b"[]", b"7", b"{}", b"\xff", b"[" * 4000, b'{"version": 1}' + b" " * 5000,
        *(json.dumps({**SAID, name: value}).encode() for name, value in (
            ("version", True), ("mode", -1), ("mode", 1 << 16), ("mode", "640"), ("mode", 6.4),
            ("mode", True), ("uid", -1), ("uid", (1 << 32) - 1), ("uid", []), ("gid", 1 << 64),
        )),
    ],
)  # fmt: skip
def test_rights_that_make_no_sense_are_refused(state):
    with pytest.raises(PeerError, match="mode and owner"):
        Rights.unpack(state)


@given(st.binary(max_size=200))
def test_any_bytes_are_rights_or_refused(state):
    try:
        Rights.unpack(state)
    except PeerError:
        pass


@pytest.mark.parametrize("found", [None, {}, [], [1, 2], ["x", 1, 2], [True, 1, 2], [1, 2, -1]])
def test_journal_that_makes_no_sense_gives_no_rights(found):
    assert Rights.read(found) == Rights()
    assert Rights.read([0o640, None, 6]) == Rights(0o640, None, 6)


def test_over_prefers_the_first_rights():
    assert Rights(mode=0o600).over(Rights(0o640, 5, 6)) == Rights(0o600, 5, 6)
    assert Rights(uid=0).over(Rights(0o640, 5, 6)) == Rights(0o640, 0, 6)


def test_root_sets_rights_without_widening_them_meanwhile(tmp_path, monkeypatch):
    """Neither the new owner nor the old group may do more than in the end."""
    need(os.geteuid() == 0, "root, to give files away")
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT, 0o600)
    seen = []

    def noting(real):
        def act(*arguments):
            real(*arguments)
            here = os.fstat(fd)
            seen.append((stat.S_IMODE(here.st_mode), here.st_uid, here.st_gid))

        return act

    monkeypatch.setattr(os, "fchmod", noting(os.fchmod))
    monkeypatch.setattr(os, "fchown", noting(os.fchown))
    try:
        assert Rights(0o460, 65534, 65533).give(fd) == ""
        assert seen == [(0o400, 0, 0), (0o400, 65534, 65533), (0o460, 65534, 65533)]
    finally:
        os.close(fd)


def test_rights_that_cannot_be_set_are_reported(tmp_path, monkeypatch):
    """A destination that is not root still sets the mode."""

    def refuse(*_arguments):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refuse)
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT, 0o600)
    ours = f"{os.geteuid()}:{os.getegid()}"
    try:
        said = Rights(0o640, 65534, 65534).give(fd)
        assert said == (
            f"mode and owner are 640 {ours} and could not be 640 65534:65534: "
            "Operation not permitted"
        )
        assert Rights(0o644).give(fd) == ""
    finally:
        os.close(fd)


def test_user_sets_a_group_that_they_are_in(tmp_path, monkeypatch):
    need(os.geteuid() == 0, "root, to give files away")
    real = os.fchown

    def group_alone(fd, uid, gid):
        if uid != -1:
            raise PermissionError(1, "Operation not permitted")
        real(fd, uid, gid)

    monkeypatch.setattr(os, "fchown", group_alone)
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        assert "are 640 0:65533 and could not be 640 65534:65533" in Rights(
            0o640, 65534, 65533
        ).give(fd)
    finally:
        os.close(fd)


def test_file_system_that_ignores_a_mode_is_reported(tmp_path, monkeypatch):
    """exFAT ignores it, and reports success."""
    monkeypatch.setattr(os, "fchmod", lambda *_: None)
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        assert "are 600 " in Rights(0o640).give(fd)
    finally:
        os.close(fd)


def test_attributes_of_the_replaced_file_are_kept(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    before.touch()
    after.touch()
    try:
        os.setxattr(before, "user.note", b"kept")
        os.setxattr(before, "trusted.vouches", b"1")
    except OSError as error:
        need(False, f"extended attributes in {tmp_path}, and root: {error.strerror}")
    with after.open("r+b") as file:
        left = keep_attributes(str(before), file.fileno(), access_list=True)
        assert left == ["trusted.vouches"]
    assert os.listxattr(after) == ["user.note"]
    assert os.getxattr(after, "user.note") == b"kept"


# ---------------------------------------------------------------- as people write them


@pytest.mark.parametrize(
    ("text", "mode"), [("", None), ("640", 0o640), ("0600", 0o600), ("0", 0), ("04755", 0o4755)]
)
def test_parse_mode_is_octal(text, mode):
    assert parse_mode(text) == mode


@pytest.mark.parametrize("text", ["8", "u+w", "0o640", "77777", "-1", " 640", "000640", "\u0661"])
def test_parse_mode_refuses_other_text(text):
    with pytest.raises(UsageError, match="octal digits, as for chmod: 640"):
        parse_mode(text)


@pytest.mark.parametrize(
    ("text", "owner"),
    [
        ("", (None, None)), ("root", (0, None)), ("root:", (0, 0)), (":root", (None, 0)),
        ("12345:54321", (12345, 54321)), ("0:54321", (0, 54321)), ("root:root", (0, 0)),
        (":54321", (None, 54321)),
    ],
)  # fmt: skip
def test_parse_owner_accepts_what_chown_does(text, owner):
    assert parse_owner(text) == owner


@pytest.mark.parametrize(
    "text", [":", "nobody-of-that-name", "root:nobody-of-that-name", "-1", "4294967295", "1.5",
             "99999999999", "54321:", "root:root:root", "\u0661"],
)  # fmt: skip
def test_parse_owner_refuses_unknown_names(text):
    with pytest.raises(UsageError, match="--owner"):
        parse_owner(text)
