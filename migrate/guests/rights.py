"""Mode and owner of an output, as they travel with a file guest and as they are set.

First --mode and --owner decide; then the file that --overwrite replaces; then the guest's own file,
which the source describes in the state of COMPLETE. What the source says may be hostile, as all it
sends: it is bounded here, and setuid, setgid and sticky never come from a source.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import stat
from dataclasses import dataclass

from migrate.errors import PeerError, UsageError
from migrate.guests import moved_mark

VERSION = 1
MAX_STATE_BYTES = 4096
# Bits of a mode: without and with setuid, setgid and sticky.
PLAIN_BITS = 0o777
ALL_BITS = 0o7777
MAX_ID = (1 << 32) - 2  # the next number means "no change" to chown(2)
# Attributes that an output keeps of the file that it replaces. Not those that vouch for content,
# as security.ima does.
ACCESS_LIST = "system.posix_acl_access"
KEPT_ATTRIBUTES = ("user.", ACCESS_LIST, "security.selinux", "security.SMACK64")


@dataclass(frozen=True)
class Rights:
    """Mode and owner; None is for what is not given."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None

    @classmethod
    def of(cls, found: os.stat_result) -> Rights:
        """Return those of an existing file, without setuid, setgid and sticky."""
        return cls(found.st_mode & PLAIN_BITS, found.st_uid, found.st_gid)

    def over(self, other: Rights) -> Rights:
        """Return these, with what is not given here from `other`."""
        return Rights(
            other.mode if self.mode is None else self.mode,
            other.uid if self.uid is None else self.uid,
            other.gid if self.gid is None else self.gid,
        )

    # -- as they travel

    def pack(self) -> bytes:
        """Return them as a source sends them."""
        said = {"version": VERSION, "mode": self.mode, "uid": self.uid, "gid": self.gid}
        return json.dumps(said).encode()

    @classmethod
    def unpack(cls, state: bytes) -> Rights:
        """Read what a source has sent.

        An earlier release sends nothing; the version of a later one means nothing to us.

        Raises PeerError for what makes no sense.
        """
        if not state:
            return cls()
        try:
            if len(state) > MAX_STATE_BYTES:
                raise ValueError
            said = json.loads(state)
            if not isinstance(said, dict) or type(said.get("version")) is not int:
                raise ValueError
            if said["version"] != VERSION:
                return cls()
            mode = _bounded(said.get("mode"), (1 << 16) - 1)
            rights = cls(
                None if mode is None else mode & PLAIN_BITS,
                _bounded(said.get("uid"), MAX_ID), _bounded(said.get("gid"), MAX_ID),
            )  # fmt: skip
        except (ValueError, RecursionError):
            raise PeerError("the mode and owner of the guest's file make no sense") from None
        return rights

    @classmethod
    def read(cls, found: object) -> Rights:
        """Read the list in a journal. What makes no sense counts as not given."""
        if not isinstance(found, list) or len(found) != 3:
            return cls()
        try:
            return cls(_bounded(found[0], ALL_BITS), *(_bounded(one, MAX_ID) for one in found[1:]))
        except ValueError:
            return cls()

    # -- as they are set

    def give(self, fd: int) -> str:
        """Set them on an open file. Return why some of them could not be set, or "".

        The owner is set before the mode: at no time may a user do more than in the end.
        """
        why, before = "", os.fstat(fd)
        try:
            if self.mode is not None:
                os.fchmod(fd, stat.S_IMODE(before.st_mode) & self.mode)
            why = self._give_owner(fd, before)
            if self.mode is not None:
                os.fchmod(fd, self.mode)
        except OSError as error:
            why = why or str(error.strerror)
        got = os.fstat(fd)
        wanted = self.over(Rights(stat.S_IMODE(got.st_mode), got.st_uid, got.st_gid))
        if wanted == Rights(stat.S_IMODE(got.st_mode), got.st_uid, got.st_gid):
            return ""
        has = f"{stat.S_IMODE(got.st_mode):o} {got.st_uid}:{got.st_gid}"
        wish = f"{wanted.mode:o} {wanted.uid}:{wanted.gid}"
        return f"mode and owner are {has} and could not be {wish}{f': {why}' if why else ''}"

    def _give_owner(self, fd: int, before: os.stat_result) -> str:
        """Set user and group, or the group alone, which a user may often set. Return why not."""
        uid, gid = (-1 if one is None else one for one in (self.uid, self.gid))
        if uid in (-1, before.st_uid) and gid in (-1, before.st_gid):
            return ""
        for one in (uid, -1):
            try:
                os.fchown(fd, one, gid)
            except OSError as error:
                why = str(error.strerror)
                continue
            return "" if one == uid else why
        return why


def _bounded(value: object, most: int) -> int | None:
    """Return a number from 0 to `most`, or None as it is. Raises ValueError for anything else."""
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError
    return value


def keep_attributes(path: str, fd: int, *, access_list: bool) -> list[str]:
    """Copy the extended attributes of the file at `path` to an open file that replaces it.

    Return the names of those that were not copied.

    access_list -- whether to copy the access list too: it may admit users that a mode excludes
    """
    not_kept = []
    try:
        names = os.listxattr(path)
    except OSError:
        return []
    for name in names:
        if name == moved_mark.ATTRIBUTE:
            continue  # it belongs to the file that is replaced
        if not name.startswith(KEPT_ATTRIBUTES) or (name == ACCESS_LIST and not access_list):
            not_kept.append(name)
            continue
        try:
            os.setxattr(fd, name, os.getxattr(path, name))
        except OSError:
            not_kept.append(name)
    return not_kept


# ---------------------------------------------------------------- as people write them


def parse_mode(text: str) -> int | None:
    """Parse --mode: octal digits, as for chmod(1). Raises UsageError."""
    if not text:
        return None
    if len(text) > 5 or not set(text) <= set("01234567") or int(text, 8) > ALL_BITS:
        raise UsageError(f"--mode {text!r}: write it in octal digits, as for chmod: 640")
    return int(text, 8)


def parse_owner(text: str) -> tuple[int | None, int | None]:
    """Parse --owner: USER, USER:GROUP, USER: (with the user's own group) or :GROUP.

    Names and numbers are accepted, as by chown(1). Returns user and group. Raises UsageError.
    """
    if not text:
        return None, None
    user, colon, group = text.partition(":")
    if not user and not group:
        raise UsageError("--owner: write USER, USER:GROUP or :GROUP, by name or number")
    uid = _number_of(user, "user") if user else None
    if group:
        return uid, _number_of(group, "group")
    if not colon:
        return uid, None
    try:
        return uid, pwd.getpwuid(uid).pw_gid if uid is not None else None
    except KeyError:
        raise UsageError(f"--owner {text!r}: user {user} has no group of its own here") from None


def _number_of(name: str, kind: str) -> int:
    """Return the number of a user or group: POSIX has chown try a name before a number."""
    try:
        if kind == "user":
            return pwd.getpwnam(name).pw_uid
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        pass
    if not name.isascii() or not name.isdigit() or len(name) > 10 or int(name) > MAX_ID:
        raise UsageError(f"--owner: there is no {kind} {name!r} here")
    return int(name)
