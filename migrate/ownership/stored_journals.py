"""Find and list the journals on disk. They are read as they are, and not locked."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from migrate.errors import JournalError, UsageError
from migrate.files.directory import Directory
from migrate.ownership.journal import NAME_BYTES, Journal
from migrate.ownership.journal_directory import ELSEWHERE
from proto.wire.ownership import Claim, Role

# Journals of migrations that have ended are kept this long, for people to look at.
KEPT_SECONDS = 30 * 86400


def find_journal(role: Role, name: str, directory: str) -> Journal | None:
    """Return the journal of one migration, or None if there is none. Raises JournalError."""
    if not directory:
        return None
    try:
        with Directory(directory, trusted=True) as here:
            file = f"{name}.{role.value}"
            return _read(here, file) if here.exists(file) else None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(directory, error) from None


def journals(role: Role, directory: str) -> Iterator[Journal]:
    """Yield the journals of a side. Remove those that were settled long ago."""
    for one in _all(role, directory):
        written = 0.0 if isinstance(one, JournalError) else one.written_at()
        if isinstance(one, JournalError) or not written:
            continue  # damaged, or removed meanwhile
        if one.settled and time.time() - written > KEPT_SECONDS:
            one.forget()
            continue
        yield one


def damaged(role: Role, directory: str) -> list[str]:
    """Return what is wrong with each journal of a side that cannot be read, and so is ignored."""
    return [str(one) for one in _all(role, directory) if isinstance(one, JournalError)]


def claim_in(path: str) -> tuple[Role, str, Claim]:
    """Return the side, name and claim of a journal that an operator brings as proof.

    Raises UsageError if the file is not a journal, JournalError if it cannot be read.
    """
    journal = _journal_at(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise JournalError(f"journal {path}: {error.strerror}") from None
    try:
        journal.read(fd, trusted=False)
    finally:
        os.close(fd)
    return journal.role, journal.name, journal.claim


def _all(role: Role, directory: str) -> Iterator[Journal | JournalError]:
    """Yield each journal of a side, or what is wrong with it or with the directory."""
    if not directory:
        return
    try:
        with Directory(directory, trusted=True) as here:
            for name in sorted(here.names()):
                if name.endswith(f".{role.value}"):
                    try:
                        yield _read(here, name)
                    except JournalError as error:
                        yield error
                    except UsageError:
                        continue
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        yield _unreadable(directory, error)


def _journal_at(path: str) -> Journal:
    """Return the journal that has this path, unread. Raises UsageError if it has no such name."""
    name, _, role = os.path.basename(path).partition(".")
    if len(name) != 2 * NAME_BYTES or set(name) - set("0123456789abcdef"):
        role = ""
    try:
        return Journal(Role(role), b"", os.path.dirname(path), name)
    except ValueError:
        raise UsageError(
            f"{path} is not a journal: a journal's name is NAME.source or NAME.destination"
        ) from None


def _read(directory: Directory, name: str) -> Journal:
    """Return a journal as it is on disk. Raises UsageError if it is not one, and JournalError."""
    path = os.path.join(directory.path, name)
    journal = _journal_at(path)
    try:
        with directory.reading(name) as fd:
            journal.read(fd)
    except OSError as error:
        raise JournalError(f"journal {path}: {error.strerror}") from None
    return journal


def _unreadable(directory: str, error: OSError) -> JournalError:
    return JournalError(f"journals in {directory}: {error.strerror}: {ELSEWHERE}")
