"""The journal: what one side has written of one migration, on disk before it acts on it.

    DIRECTORY/NAME.source    DIRECTORY/NAME.destination

A file has a line for each claim (see proto.ownership), with a check; the last whole line holds.
What a later program needs to go on with the guest, the facts, stands in the first. Whoever writes
a journal holds a lock on it, so that no two programs decide about the same guest.

The name is a hash of the migration's token: who has the token may take the guest over, and names
are seen by others. What stands in a journal is done, by root too: so journals are read and written
only in a trusted directory (see migrate.directory), opened anew and checked each time.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import hmac
import json
import os
import pwd
import secrets
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from migrate.directory import Directory, Left, distrust, identity_of, is_trusted, make_trusted
from migrate.errors import MigrationError, UsageError
from migrate.guests.process import state
from proto.ownership import FINAL, Claim, Event, Role, after

# Journals of migrations that have ended are kept so long, for whoever wants to know.
KEPT_SECONDS = 30 * 86400
MAX_BYTES = 1 << 20
# What a whole migration writes to one journal, and some.
TRY_BYTES = 8192
ELSEWHERE = "name a directory that can be written and outlasts a crash (--journal DIR)"
_FACTS: dict[str, type] = {"guest": dict, "place": dict, "address": str, "token": str}
_NAME_BYTES = 16


class JournalError(MigrationError):
    """The journal cannot be written or read; nothing is done that it would have had to allow."""


def default_directory() -> str:
    """Where journals are, unless a user says otherwise: MIGRATE_JOURNAL, or the usual places.

    Raises UsageError where there is no usual place: a user without a home.
    """
    if named := os.environ.get("MIGRATE_JOURNAL"):
        return named
    if os.geteuid() == 0:
        return "/var/lib/xbmigrate"
    return state_directory()


def journal_directory(named: str = "") -> str:
    """What --journal names, or the default directory; `~` is the user's home there as in a shell,
    which leaves it as it is in --journal=~/x. Raises UsageError where there is no home."""
    path = named or default_directory()
    return os.path.join(_home(), path[2:]) if path == "~" or path.startswith("~/") else path


def state_directory() -> str:
    """Where programs keep the state of this user. Raises UsageError where they cannot."""
    named = os.environ.get("XDG_STATE_HOME", "")
    # A relative path is to be ignored, by the specification.
    if os.path.isabs(named) and not is_of_another(named):
        return os.path.join(named, "xbmigrate")
    return os.path.join(_home(), ".local", "state", "xbmigrate")


def is_of_another(path: str) -> bool:
    """Whether a directory is another user's: sudo may leave HOME as it was."""
    with contextlib.suppress(OSError):
        return not is_trusted(os.stat(path).st_uid)
    return False


def _home() -> str:
    """Raises UsageError where this user has none."""
    home = os.environ.get("HOME", "")
    if not os.path.isabs(home) or is_of_another(home):
        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            home = ""
    if not os.path.isabs(home):
        raise UsageError(
            f"user {os.getuid()} has no home directory here, and journals no usual place: name a "
            "directory that can be written and outlasts a crash (--journal DIR, or MIGRATE_JOURNAL)"
        )
    return home


def check_directory(path: str) -> str:
    """Return the absolute path of a directory for journals, which is made if it is missing.

    A journal is tried there: a file that is locked, written and brought to the disk.

    Raises UsageError where no journal can be written, before anything is begun.
    """
    path = os.path.abspath(path)
    try:
        with make_trusted(path) as directory:
            _try(directory)
    except OSError as error:
        raise UsageError(f"journals in {path}: {error.strerror}: {ELSEWHERE}") from None
    return path


def check_trusted(path: str) -> None:
    """Raises UsageError where others can write what is done by a journal in that directory."""
    try:
        Directory(path, trusted=True).close()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UsageError(f"journals in {path}: {error.strerror}: {ELSEWHERE}") from None


def name_of(token: bytes) -> str:
    """The name of a migration, which tells nobody its token."""
    return hashlib.blake2b(token, digest_size=_NAME_BYTES, person=b"xbmigrate").hexdigest()


def _try(directory: Directory) -> None:
    """Write a small journal, and remove it. Raises OSError."""
    name = f".{secrets.token_hex(8)}.try"
    fd = directory.make(name)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.write(fd, bytes(TRY_BYTES)) != TRY_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)
        directory.sync()
    finally:
        os.close(fd)
        directory.drop(name)


class Journal:
    """The claim of one side of one migration.

    directory -- "" keeps it in memory: for a guest that dies with this program anyway
    token -- b"" where it is not known: a destination is asked with it, and does not keep it
    """

    def __init__(self, role: Role, token: bytes, directory: str = "", name: str = "") -> None:
        self.role = role
        self.token = token
        self.name = name or name_of(token)
        self.claim = Claim.NONE
        self.facts: dict[str, Any] = {}
        self.begun = False
        """The guest may have been started, where that is no one moment (Place.irrevocable)."""
        self.started = False
        self._fd = -1
        self._path = os.path.join(directory, f"{self.name}.{role.value}") if directory else ""

    @property
    def directory(self) -> str:
        return os.path.dirname(self._path)

    def is_of(self, token: bytes) -> bool:
        return hmac.compare_digest(self.name, name_of(token))

    def open(self, *, create: bool = True) -> None:
        """Takes the lock, and reads what is there. Raises JournalError."""
        if not self._path or self._fd >= 0:
            return
        try:
            with self._trusted_directory(make=create) as directory:
                flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
                name = os.path.basename(self._path)
                self._fd = os.open(name, flags | os.O_NOFOLLOW, 0o600, dir_fd=directory.fd)
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                directory.sync()
        except BlockingIOError:
            self._release()
            raise JournalError(
                f"migration {self.name} is in the hands of another program here"
            ) from None
        except OSError as error:
            self._release()
            raise JournalError(f"journal {self._path}: {error.strerror}: {ELSEWHERE}") from None
        try:
            lines, whole = _lines_of(self._fd, self._path)
        except JournalError:
            self._release()
            raise
        self._take(lines)
        if whole < os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, whole)  # what a crash cut off: nothing may be written behind it

    def _trusted_directory(self, *, make: bool) -> Directory:
        return make_trusted(self.directory) if make else Directory(self.directory, trusted=True)

    def _take(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if "claim" in line:
                self.claim = Claim[line["claim"]]
            self.begun |= line.get("begun", False)
            self.started |= line.get("started", False)
            self.facts |= line.get("facts", {})
        with contextlib.suppress(ValueError):
            token = bytes.fromhex(self.facts.get("token", ""))
            if self.is_of(token):
                self.token = token

    def begin(self, **facts: Any) -> None:
        """Writes facts while nothing is claimed yet, for whoever comes after a crash.

        Raises JournalError, also where there is such a migration already: the other side made its
        name up.
        """
        if self.role is Role.SOURCE:
            facts["token"] = self.token.hex()
        self.open()
        if self.facts or self.claim is not Claim.NONE:
            self.close()
            raise JournalError(f"there was a migration {self.name} already")
        self._append({"claim": self.claim.name, "facts": facts})
        self.facts |= facts

    def move(self, event: Event, *, must: bool = True, **facts: Any) -> None:
        """Writes what follows on an event. When it returns, that outlasts a crash.

        must -- without it the claim holds though it could not be written: for what can be found
                out again, by asking

        Raises JournalError: then nothing has changed, and nothing may be done.
        """
        following = after(self.role, self.claim, event)
        if following is None:
            raise JournalError(
                f"migration {self.name}: {event.name} cannot follow on {self.claim.name}"
            )
        if following is not self.claim or facts:
            try:
                self._append({"claim": following.name, "event": event.name, "facts": facts})
            except JournalError:
                if must:
                    raise
            self.claim = following
            self.facts |= facts

    def mark_begun(self) -> None:
        """The guest is about to be started: who comes later cannot know whether it was."""
        self._append({"begun": True})
        self.begun = True

    def mark_started(self) -> None:
        """The guest was started: nobody need do it again. Says nothing about whose it is."""
        self._append({"started": True})
        self.started = True

    def _append(self, entry: dict[str, Any]) -> None:
        if not self._path:
            return
        self.open()
        self._check_there()
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        text = json.dumps(_as_utf8({"at": now, **entry}))
        line = f"{zlib.crc32(text.encode()):08x} {text}\n".encode()
        end = os.lseek(self._fd, 0, os.SEEK_END)
        try:
            if os.write(self._fd, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, end)
                os.fsync(self._fd)
            raise JournalError(f"journal {self._path}: {error.strerror}") from None

    def _check_there(self) -> None:
        """Raises JournalError where the file was removed: what is written to it would be gone."""
        ours = os.fstat(self._fd)
        with contextlib.suppress(OSError):
            there = os.stat(self._path)
            if identity_of(there) == identity_of(ours):
                return
        raise JournalError(f"journal {self._path}: it was removed or replaced meanwhile")

    def close(self, *, keep: bool = False) -> None:
        """Lets go of the lock; a journal without a claim leaves nothing behind.

        keep -- it does: for an attempt that may be resumed
        """
        if self._fd >= 0:
            if keep and self.role is Role.SOURCE:
                with contextlib.suppress(JournalError):
                    self._append({"facts": {"ended": True}})
            if self.claim is Claim.NONE and not keep:
                self._remove()
            self._release()

    def _remove(self) -> None:
        """Removes the open file, where it still has its name."""
        with contextlib.suppress(OSError), Directory(self.directory) as directory:
            directory.drop(os.path.basename(self._path), identity_of(os.fstat(self._fd)))

    def _release(self) -> None:
        """Lets go of the lock alone: what could not be read is not ours to remove."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def left(self) -> Left | None:
        """The file under a hidden name that its facts tell of."""
        with contextlib.suppress(ValueError):
            return Left.read(self.facts.get("place", {}))
        return None

    def drop_temporary(self) -> None:
        """Removes the file of a guest that was given up."""
        if self.left is not None:
            self.left.drop()

    def written_at(self) -> float:
        """When something was last written to it, in seconds since 1970."""
        with contextlib.suppress(OSError):
            return os.stat(self._path).st_mtime
        return 0.0

    def forget(self, *, alone: bool = False) -> None:
        """Removes the file, and that of a guest that never came whole; not where it is in use.

        alone -- not the guest's file: another journal names it too
        """
        try:
            self.open(create=False)
        except JournalError:
            return
        if self.claim is Claim.NONE and not alone:
            self.drop_temporary()
        self._remove()
        self._release()

    def text(self) -> str:
        return f"{self.role.value} of migration {self.name}: {self.claim.name}"


def _lines_of(fd: int, path: str, *, brought: bool = False) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of an open journal, and their bytes: what a crash cut off is left out.

    brought -- a person brought it, and answers for it: whoever wrote it

    Raises JournalError, also where a bad line has a good one behind it: no crash does that, and
    what the good one claims must not be forgotten.
    """
    there = os.fstat(fd)
    why = "" if brought else distrust(fd)
    if why or not stat.S_ISREG(there.st_mode):
        raise JournalError(f"journal {path}: {why or 'it is no plain file'}")
    try:
        with open(fd, "rb", closefd=False) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise JournalError(f"journal {path}: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise JournalError(f"journal {path} is longer than any journal: what is it?")
    lines, whole, torn = [], 0, False
    for line in data.split(b"\n")[:-1]:
        check, _, text = line.partition(b" ")
        if check != f"{zlib.crc32(text):08x}".encode():
            torn = True
        elif torn:
            raise JournalError(
                f"journal {path} is damaged: a line before its last one does not match its check"
            )
        else:
            lines.append(_entry(path, text))
            whole += len(line) + 1
    return lines, whole


def _as_utf8(value: Any) -> Any:
    """Facts with all text as under UTF-8: a path is the same bytes whatever the locale."""
    return _mapped(value, lambda text: os.fsencode(text).decode("utf-8", "surrogateescape"))


def _as_here(value: Any) -> Any:
    """Undoes `_as_utf8`, perhaps under another locale."""
    return _mapped(value, lambda text: os.fsdecode(text.encode("utf-8", "surrogateescape")))


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        try:
            return change(value)
        except UnicodeError:
            return value  # no path
    if isinstance(value, dict):
        return {name: _mapped(one, change) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(one, change) for one in value]
    return value


def _entry(path: str, text: bytes) -> dict[str, Any]:
    try:
        entry: dict[str, Any] = _as_here(json.loads(text))
        facts = entry.get("facts", {})
        if (
            entry.get("claim", Claim.NONE.name) in Claim.__members__
            and isinstance(entry.get("begun", False), bool)
            and isinstance(entry.get("started", False), bool)
            and all(isinstance(facts.get(name, kind()), kind) for name, kind in _FACTS.items())
        ):
            return entry
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise JournalError(f"journal {path} has a line that is not understood: another release's?")


def _named(path: str) -> Journal:
    """A journal by its path, not read yet. Raises UsageError where that is none of a journal."""
    name, _, role = os.path.basename(path).partition(".")
    if len(name) != 2 * _NAME_BYTES or set(name) - set("0123456789abcdef"):
        role = ""
    try:
        return Journal(Role(role), b"", os.path.dirname(path), name)
    except ValueError:
        raise UsageError(
            f"{path} is no journal: its name is NAME.source or NAME.destination"
        ) from None


def _stored(directory: Directory, name: str) -> Journal:
    """A journal as it is on disk, not locked. Raises UsageError where it is none, JournalError."""
    path = os.path.join(directory.path, name)
    journal = _named(path)
    try:
        with directory.opened(name) as fd:
            journal._take(_lines_of(fd, path)[0])
    except OSError as error:
        raise JournalError(f"journal {path}: {error.strerror}") from None
    return journal


def stored(role: Role, name: str, directory: str) -> Journal | None:
    """That of one migration, as it is on disk, not locked. Raises JournalError."""
    if not directory:
        return None
    try:
        with Directory(directory, trusted=True) as here:
            file = f"{name}.{role.value}"
            return _stored(here, file) if here.there(file) else None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JournalError(f"journals in {directory}: {error.strerror}: {ELSEWHERE}") from None


def claim_in(path: str) -> tuple[Role, str, Claim]:
    """Whose journal a file is, its name, and what it claims: a person brings it as proof.

    Raises UsageError where it is no journal, JournalError where it cannot be read.
    """
    journal = _named(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise JournalError(f"journal {path}: {error.strerror}") from None
    try:
        journal._take(_lines_of(fd, path, brought=True)[0])
    finally:
        os.close(fd)
    return journal.role, journal.name, journal.claim


def _all_stored(role: Role, directory: str) -> Iterator[Journal | JournalError]:
    """Each journal of a side, or what is wrong with it, or with the directory."""
    if not directory:
        return
    try:
        with Directory(directory, trusted=True) as here:
            for name in sorted(here.names()):
                if name.endswith(f".{role.value}"):
                    try:
                        yield _stored(here, name)
                    except JournalError as error:
                        yield error
                    except UsageError:
                        continue
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        yield JournalError(f"journals in {directory}: {error.strerror}: {ELSEWHERE}")


def journals(role: Role, directory: str) -> Iterator[Journal]:
    """All journals of a side, as they are on disk, not locked. Old ones that are settled go."""
    for one in _all_stored(role, directory):
        written = 0.0 if isinstance(one, JournalError) else one.written_at()
        if isinstance(one, JournalError) or not written:
            continue  # damaged, or gone meanwhile
        if settled(one) and time.time() - written > KEPT_SECONDS:
            one.forget()
            continue
        yield one


def damaged(role: Role, directory: str) -> list[str]:
    """What is wrong with each journal of a side that cannot be read: nobody goes by those."""
    return [str(one) for one in _all_stored(role, directory) if isinstance(one, JournalError)]


def attempt(guest: dict[str, Any], address: str, directory: str) -> Journal | None:
    """The newest journal of this guest on its way to this address, where the attempt broke off.

    guest -- its facts; the processes that write a file may be others by now

    Raises JournalError where another program has it, UsageError where the guest was handed over to
    anywhere, and nobody knows yet what became of that.
    """
    if not directory:
        return None
    found: Journal | None = None
    for journal in sorted(journals(Role.SOURCE, directory), key=Journal.written_at, reverse=True):
        facts = journal.facts
        there = facts.get("guest", {})
        if not same_guest(guest, there):
            continue
        if journal.claim is Claim.COMMITTED:
            raise UsageError(
                f"this guest was handed over to {facts.get('address')}, and it is not known "
                f"whether it runs there: `migrate-src resolve {journal.name}` asks"
            )
        if journal.claim is Claim.DONE and _stopped(guest, there):
            raise UsageError(
                f"this guest was moved to {facts.get('address')}, and its writer here is stopped "
                "since: if this one is to be moved all the same, wake it first (kill -CONT)"
            )
        if journal.claim is Claim.NONE:
            journal.open(create=False)
            if found is None and facts.get("address") == address:
                found = journal
            else:
                journal.forget()  # it goes another way now
    return found


def last_peer(address: str, directory: str) -> str:
    """HOST:PORT of what the last attempt to this address was connected to, where it broke off.

    The address may be a name of several machines, and this one has what came; "" where none has.
    """
    if not directory:
        return ""
    found = [
        one for one in journals(Role.SOURCE, directory)
        if one.claim is Claim.NONE and one.facts.get("address") == address
    ]  # fmt: skip
    newest = max(found, key=Journal.written_at, default=None)
    return str(newest.facts.get("peer", "")) if newest is not None else ""


def same_guest(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """By their facts; the processes that write a file, or hold a QEMU's stream, may be others."""
    names = ("kind", "qmp") if one.get("qmp") else ("kind", "path", "pid", "started")
    return all(one.get(name) == other.get(name) for name in names)


def _stopped(guest: dict[str, Any], there: dict[str, Any]) -> bool:
    """Whether one of the processes that write the guest is stopped, and was so when it moved."""
    then = there.get("pids", [])
    return any(one in then and state(one[0]) in ("T", "t") for one in guest.get("pids", []))


def settled(journal: Journal) -> bool:
    """Whether nothing is left to do for this side."""
    if journal.role is Role.DESTINATION and journal.claim is Claim.OWNER:
        return journal.started
    if journal.role is Role.SOURCE and journal.claim is Claim.NONE:
        # A program that died with it may have left its guest paused.
        return not journal.facts or "ended" in journal.facts
    return journal.claim in FINAL or journal.claim is Claim.NONE
