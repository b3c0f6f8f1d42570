"""The directory of the journals: which one it is, and whether it can be trusted and written.

Our programs, root's too, act on what a journal says. So journals are read and written only in a
directory that no other user can change (see migrate.files.directory).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pwd
import secrets

from migrate.errors import UsageError
from migrate.files.directory import Directory
from migrate.files.identity import identity_of
from migrate.files.trust import is_trusted
from migrate.files.trusted_places import make_trusted

# At least what one migration writes to its journal.
TRIAL_BYTES = 8192
ELSEWHERE = "name a directory that can be written and outlasts a crash (--journal DIR)"


def default_directory() -> str:
    """Return the directory of the journals if the user names none: MIGRATE_JOURNAL, or the usual.

    Raises UsageError if there is no usual one, for a user without a home.
    """
    if named := os.environ.get("MIGRATE_JOURNAL"):
        return named
    if os.geteuid() == 0:
        return "/var/lib/xbmigrate"
    return state_directory()


def journal_directory(named: str = "") -> str:
    """Return the directory that --journal names, or the default one.

    `~` is the user's home: a shell leaves it as it is in --journal=~/x. Raises UsageError if the
    user has no home.
    """
    path = named or default_directory()
    return os.path.join(_home(), path[2:]) if path == "~" or path.startswith("~/") else path


def state_directory() -> str:
    """Return the directory for the state of this user's programs.

    Raises UsageError if the user has no home.
    """
    named = os.environ.get("XDG_STATE_HOME", "")
    # The XDG specification has us ignore a relative path.
    if os.path.isabs(named) and not is_of_another(named):
        return os.path.join(named, "xbmigrate")
    return os.path.join(_home(), ".local", "state", "xbmigrate")


def is_of_another(path: str) -> bool:
    """Return whether a directory belongs to another user, as HOME may under sudo."""
    with contextlib.suppress(OSError):
        return not is_trusted(os.stat(path).st_uid)
    return False


def _home() -> str:
    """Return the user's home directory. Raises UsageError if there is none."""
    home = os.environ.get("HOME", "")
    if not os.path.isabs(home) or is_of_another(home):
        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            home = ""
    if not os.path.isabs(home):
        raise UsageError(
            f"user {os.getuid()} has no home directory here, so there is no default directory for "
            "journals: name a directory that can be written and outlasts a crash (--journal DIR, "
            "or MIGRATE_JOURNAL)"
        )
    return home


def check_directory(path: str) -> str:
    """Return the absolute path of a directory for journals, which is made if it is missing.

    A trial file is locked, written and synced there. Raises UsageError if that fails: before a
    migration begins, and not in its middle.
    """
    path = os.path.abspath(path)
    try:
        with make_trusted(path) as directory:
            _write_trial(directory)
    except OSError as error:
        raise unusable(path, error) from None
    return path


def check_trusted(path: str) -> None:
    """Raise UsageError if other users can change the journals in a directory."""
    try:
        Directory(path, trusted=True).close()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise unusable(path, error) from None


def unusable(path: str, error: OSError) -> UsageError:
    """Return what the user is told of a directory that cannot have journals."""
    return UsageError(f"journals in {path}: {error.strerror}: {ELSEWHERE}")


def _write_trial(directory: Directory) -> None:
    """Write a file as a journal is written, and remove it. Raises OSError."""
    name = f".{secrets.token_hex(8)}.try"
    fd = directory.create_file(name)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.write(fd, bytes(TRIAL_BYTES)) != TRIAL_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)
        directory.sync()
    finally:
        directory.remove_file(name, identity_of(os.fstat(fd)))
        os.close(fd)
