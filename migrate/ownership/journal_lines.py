"""The lines of a journal: one JSON object each, with a checksum in front.

    5c3a91d0 {"at": "2025-01-31T12:00:00.123+00:00", "claim": "PREPARED", "facts": {...}}

A crash can cut off the last line. Such a line is ignored, and what it would have claimed was never
acted on: a line is on disk before its claim takes effect.
"""

from __future__ import annotations

import datetime
import json
import os
import stat
import zlib
from collections.abc import Callable
from typing import Any

from migrate.errors import JournalError
from migrate.files.trust import distrust
from proto.wire.ownership import Claim

MAX_BYTES = 1 << 20
_FACTS: dict[str, type] = {"guest": dict, "place": dict, "address": str, "token": str}


def encode_line(entry: dict[str, Any]) -> bytes:
    """Return an entry as a line, with the present time and a checksum."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    text = json.dumps(_as_utf8({"at": now, **entry})).encode()
    return f"{zlib.crc32(text):08x} ".encode() + text + b"\n"


def read_lines(fd: int, path: str, *, trusted: bool = True) -> tuple[list[dict[str, Any]], int]:
    """Return the complete entries of an open journal, and their length in bytes.

    trusted -- refuse a file that other users can write; False if an operator vouches for it

    Raises JournalError, also if a good line follows a bad one: a crash does not leave that, and the
    claim of the good line must not be lost.
    """
    why = distrust(fd) if trusted else ""
    if why or not stat.S_ISREG(os.fstat(fd).st_mode):
        raise JournalError(f"journal {path}: {why or 'it is not a regular file'}")
    try:
        with open(fd, "rb", closefd=False) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise JournalError(f"journal {path}: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise JournalError(f"journal {path} is longer than any journal can be")
    entries, length, torn = [], 0, False
    for line in data.split(b"\n")[:-1]:
        check, _, text = line.partition(b" ")
        if check != f"{zlib.crc32(text):08x}".encode():
            torn = True
        elif torn:
            raise JournalError(
                f"journal {path} is damaged: a line before its last one does not match its checksum"
            )
        else:
            entries.append(_decode(text, path))
            length += len(line) + 1
    return entries, length


def _decode(text: bytes, path: str) -> dict[str, Any]:
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
    raise JournalError(
        f"journal {path} has a line that is not understood: was it written by another release?"
    )


def _as_utf8(value: Any) -> Any:
    """Return facts with every path as its bytes read in UTF-8, whatever the locale here."""
    return _mapped(value, lambda text: os.fsencode(text).decode("utf-8", "surrogateescape"))


def _as_here(value: Any) -> Any:
    """Undo `_as_utf8`, perhaps under another locale."""
    return _mapped(value, lambda text: os.fsdecode(text.encode("utf-8", "surrogateescape")))


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with each string changed."""
    if isinstance(value, str):
        try:
            return change(value)
        except UnicodeError:
            return value  # not a path
    if isinstance(value, dict):
        return {name: _mapped(one, change) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(one, change) for one in value]
    return value
