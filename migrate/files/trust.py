"""Which users, files and directories are trusted: those that only root and we can change.

A file that our programs obey (a journal, a certificate) is read only from a trusted place. Each
directory on the way to it belongs to root or to us, and either nobody else can write in it or it is
sticky, as /tmp is. Then no other user can replace anything on the way, now or later.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import shlex
import stat
from pathlib import Path

from migrate.runtime.proc_lines import proc_lines

ACCESS_LIST = "system.posix_acl_access"


def is_trusted(uid: int) -> bool:
    """Return whether a user is root, or the user that we run as."""
    return uid in (0, os.geteuid())


def may_be_root(uid: int) -> bool:
    """Return whether a user may be root, whom our user namespace does not show.

    There all that belongs to root, `/` for one, belongs to the overflow user ("nobody").
    """
    try:
        overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
        lines = proc_lines("/proc/self/uid_map")
    except (OSError, ValueError):
        return False
    return uid == overflow and not any(line.split()[1] == b"0" for line in lines)


def distrust(fd: int, *, sticky: bool = False) -> str:
    """Return why another user than root and us could write to an open file or directory.

    sticky -- accept a directory in which each user can replace his own entries only

    Returns "" if no other user can.
    """
    status = os.fstat(fd)
    mode = stat.S_IMODE(status.st_mode)
    shared = bool(mode & 0o022) and not (sticky and mode & stat.S_ISVTX)
    if not is_trusted(status.st_uid) and (shared or not may_be_root(status.st_uid)):
        return f"it belongs to user {status.st_uid}"
    if not shared:
        return ""
    if not mode & 0o002 and _is_own_group(status.st_gid) and not _has_access_list(fd):
        return ""  # as a user with umask 002 makes it
    return f"others may write there (mode {mode:o})"


def check_trusted(fd: int, *, last: bool, sticky: bool = False) -> None:
    """Check that an open file or directory is trusted.

    last   -- it is what the user named, and not a directory on the way there
    sticky -- see `distrust`

    Raises PermissionError, which says what to do.
    """
    if not (why := distrust(fd, sticky=sticky)):
        return
    path, status = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd)
    shown = shlex.quote(path)
    remedy = f"`chmod go-w {shown}` mends that"
    if not is_trusted(status.st_uid):
        remedy = f"`chown {os.geteuid()} {shown}; chmod go-w {shown}` mends that"
        if not last:
            remedy = "name another place"
    elif stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX:
        remedy = "name a directory in it"
    raise PermissionError(errno.EPERM, f"{path} is not trusted, because {why}: {remedy}")


def _is_own_group(gid: int) -> bool:
    """Return whether a group is our user's own: it has our name and no other member."""
    with contextlib.suppress(KeyError):
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
        ours = user.pw_gid == gid and group.gr_name == user.pw_name
        names = {*group.gr_mem, *(one.pw_name for one in pwd.getpwall() if one.pw_gid == gid)}
        return ours and user.pw_uid != 0 and names <= {user.pw_name}
    return False


def _has_access_list(fd: int) -> bool:
    """Return whether a file may have an access list.

    With one, the group's bits of the mode do not say whom they are for.
    """
    try:
        os.getxattr(f"/proc/self/fd/{fd}", ACCESS_LIST)
    except OSError as error:
        return error.errno not in (errno.ENODATA, errno.EOPNOTSUPP)
    return True
