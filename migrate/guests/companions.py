"""Files that belong to a guest and do not come along: the log of a database beside its file.

A database keeps what it has acknowledged, or what it needs to undo half a transaction, in a second
file. Only the guest's file is moved, so a user is told of the others, in words that say what is
lost without them.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable

from migrate.guests.writers import WRITABLE, Writer, printable

SQLITE_MAGIC = b"SQLite format 3\0"
SQLITE_WAL = b"\2\2"  # bytes 18 and 19 of the header: the log is used for writing and reading
SQLITE_JOURNALS = ("-wal", "-journal")
LMDB_MAGIC = b"\xde\xc0\xef\xbe"
MAX_NAMED = 5
CHECKPOINT = (
    "stop the writer with a --pause-cmd that has it checkpoint (PRAGMA wal_checkpoint(TRUNCATE)) "
    "and hold its transactions"
)


def warnings(fd: int, path: str, writers: Iterable[Writer]) -> list[str]:
    """A sentence for each companion of the guest that `fd` is, in the order of their names."""
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
    for name in _open_beside(fd, path, writers):
        if name not in found and not name.endswith(("-shm", "-lock")):
            found[name] = (
                f"{_shown(name)}, which a writer of the guest has open beside it, does not come "
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
            f"use without {_shown(journal)}, which does not come along: {CHECKPOINT}"
        )
    return found


def _sqlite_words(name: str) -> str:
    if name.endswith("-wal"):
        return (
            f"{_shown(name)} does not come along: transactions that the database has acknowledged "
            f"and that stand only there are lost: {CHECKPOINT}"
        )
    return (
        f"{_shown(name)} does not come along: without it the database cannot undo the transaction "
        f"that is under way, and is damaged: {CHECKPOINT}"
    )


def _lmdb(path: str) -> dict[str, str]:
    """Its lock file has readers and mutexes: of no use elsewhere, and made anew there."""
    name = os.path.basename(path)
    for lock in ("lock.mdb" if name == "data.mdb" else "", f"{name}-lock"):
        if lock and os.path.exists(os.path.join(os.path.dirname(path), lock)):
            return {
                lock: f"the guest is an LMDB database, and {_shown(lock)} does not come along: "
                "LMDB makes a new one there, so do not copy it; what is committed is in the guest"
            }
    return {}


def _open_beside(fd: int, path: str, writers: Iterable[Writer]) -> set[str]:
    """Names in the guest's directory that begin with the guest's, open for writing in a writer.

    As the writer sees them: the path of a file in a container is another one here.
    """
    guest = os.fstat(fd)
    names: set[str] = set()
    for writer in writers:
        paths = {os.path.abspath(path): True}  # also where the writer has it mapped alone
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


def _shown(name: str) -> str:
    return printable(os.fsencode(name))
