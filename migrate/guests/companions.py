"""Files beside a guest's file that belong to it and are not moved, such as the log of a database.

A database keeps in a second file what it has acknowledged, or what it needs to undo half a
transaction. Only the guest's file is moved, so the user is told of the others, and of what is lost
without them.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable

from migrate.guests.guest_file import WRITABLE
from migrate.guests.writer_search import Writer
from migrate.output import printable
from migrate.runtime.hang_guard import HangGuard

SQLITE_MAGIC = b"SQLite format 3\0"
SQLITE_WAL = b"\2\2"  # bytes 18 and 19 of the header: the log is used for writing and reading
SQLITE_JOURNALS = ("-wal", "-journal")
LMDB_MAGIC = b"\xde\xc0\xef\xbe"
MAX_NAMED = 5
PATIENCE = 0.5  # for one writer; seconds
CHECKPOINT = (
    "stop the writer with a --pause-cmd that has it checkpoint (PRAGMA wal_checkpoint(TRUNCATE)) "
    "and hold its transactions"
)


def warnings(fd: int, path: str, writers: Iterable[Writer]) -> list[str]:
    """Word a warning for each companion of the guest that is open at `fd`, ordered by name."""
    writers = list(writers)
    found: dict[str, str] = {}
    magic = b""
    path = os.path.realpath(path)  # a database puts its log beside the file that a link leads to
    with contextlib.suppress(OSError):
        magic = os.pread(fd, 24, 0)
    if magic.startswith(SQLITE_MAGIC):
        found |= _sqlite(path, magic, running=bool(writers))
    elif magic[16:20] in (LMDB_MAGIC, LMDB_MAGIC[::-1]):
        found |= _lmdb(path)
    look = HangGuard[Writer, set[str]]()
    beside = look.each(writers, lambda writer: _open_beside(fd, path, writer), PATIENCE)
    for name in set().union(*beside.values()):
        if name not in found and not name.endswith(("-shm", "-lock")):
            found[name] = (
                f"{printable(name)}, which a writer of the guest has open beside it, does not come "
                "along: if the guest is of no use without it, move it too, while both stand still"
            )
    return [found[name] for name in sorted(found)][:MAX_NAMED]


def _sqlite(path: str, magic: bytes, *, running: bool) -> dict[str, str]:
    name, found = os.path.basename(path), {}
    for suffix in SQLITE_JOURNALS:
        with contextlib.suppress(OSError):
            if os.path.getsize(path + suffix):
                found[name + suffix] = _sqlite_words(name + suffix)
    wal = name + "-wal"
    if running and magic[18:20] == SQLITE_WAL and wal not in found:
        found[wal] = _sqlite_words(wal)
    journal = name + "-journal"
    if running and magic[18:20] != SQLITE_WAL and journal not in found:
        found[journal] = (
            f"the guest is a SQLite database: if it is stopped within a transaction, it is of no "
            f"use without {printable(journal)}, which does not come along: {CHECKPOINT}"
        )
    return found


def _sqlite_words(name: str) -> str:
    if name.endswith("-wal"):
        return (
            f"{printable(name)} does not come along: transactions that the database has "
            f"acknowledged and that stand only there are lost: {CHECKPOINT}"
        )
    return (
        f"{printable(name)} does not come along: without it the database cannot undo the "
        f"transaction that is under way, and is damaged: {CHECKPOINT}"
    )


def _lmdb(path: str) -> dict[str, str]:
    """Return a warning about the lock file of LMDB.

    It contains readers and mutexes, which mean nothing on another machine; LMDB makes a new one.
    """
    name = os.path.basename(path)
    for lock in ("lock.mdb" if name == "data.mdb" else "", f"{name}-lock"):
        if lock and os.path.exists(os.path.join(os.path.dirname(path), lock)):
            return {
                lock: f"the guest is an LMDB database, and {printable(lock)} does not come along: "
                "LMDB makes a new one there, so do not copy it; what is committed is in the guest"
            }
    return {}


def _open_beside(fd: int, path: str, writer: Writer) -> set[str]:
    """Find files beside the guest that begin with its name and that a writer has open for writing.

    Paths are compared as the writer sees them: a file in a container has another path here. May
    hang: the file system of a file that the writer has open, such as FUSE, is asked for its state.
    """
    guest = os.fstat(fd)
    names: set[str] = set()
    paths = {os.path.abspath(path): True}  # if the writer has only mapped it
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{writer.pid}/fd"):
            with contextlib.suppress(OSError):
                link = f"/proc/{writer.pid}/fd/{number}"
                there = os.stat(link)
                if stat.S_ISREG(there.st_mode) and os.lstat(link).st_mode & WRITABLE:
                    same = (there.st_dev, there.st_ino) == (guest.st_dev, guest.st_ino)
                    paths[os.readlink(link)] = same
    for own in [one for one, same in paths.items() if same]:
        names |= {
            os.path.basename(other) for other, same in paths.items()
            if not same and other.startswith(own) and not other.endswith(" (deleted)")
            and os.path.dirname(other) == os.path.dirname(own)
        }  # fmt: skip
    return names
