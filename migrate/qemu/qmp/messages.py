"""The messages of QEMU's control socket, parsed one by one: greeting, answers and events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The event that the client adds when the connection has ended. Its data: {"error": a sentence}.
CLOSED = "CLOSED"


class InvalidMessage(Exception):  # noqa: N818 - it names what was received
    """A message is not QMP as QEMU speaks it. The text says what is wrong with it."""


@dataclass(frozen=True)
class Event:
    """An event; `time` is by QEMU's clock, in seconds since 1970, or 0 if QEMU gave none."""

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)
    time: float = 0.0


def parse(text: bytes) -> dict[str, Any]:
    """Return the JSON object in `text`. Raises InvalidMessage if it is none.

    QEMU has been seen to send NaN as a rate (fixed by its commit 27ff42e2); JSON has no such
    number. NaN and Infinity are read as 0.
    """
    try:
        message = json.loads(text, parse_constant=lambda _name: 0)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise InvalidMessage(f"{short(text)} is no JSON object")
    return message


def version_in(message: dict[str, Any]) -> tuple[int, int, int]:
    """Return QEMU's version (major, minor, micro) from its greeting.

    Raises InvalidMessage if it is no greeting, or the greeting of a program of ours.
    """
    try:
        version = message["QMP"]["version"]
        package = str(version.get("package", ""))
        numbers = version["qemu"]
        found = (int(numbers["major"]), int(numbers["minor"]), int(numbers["micro"]))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise InvalidMessage(f"{short(message)} is no greeting") from None
    if package.startswith("xbmigrate"):
        raise InvalidMessage(f"it is {short(package)}, no QEMU: name the socket of QEMU's -qmp")
    return found


def event_in(message: dict[str, Any]) -> Event:
    """Return the event that a message announces. Raises InvalidMessage."""
    name, data, when = message["event"], message.get("data", {}), message.get("timestamp", {})
    if not isinstance(name, str) or not isinstance(data, dict):
        raise InvalidMessage(f"{short(message)} is no event")
    try:
        time = when["seconds"] + when["microseconds"] / 1e6
    except (KeyError, TypeError, OverflowError):
        time = 0.0
    return Event(name, data, time)


def closed(why: str) -> Event:
    """Return the event that tells listeners why the connection has ended."""
    return Event(CLOSED, {"error": why})


def short(what: object) -> str:
    """Return the repr of something, cut to 80 characters, for messages."""
    text = repr(what)
    return text if len(text) <= 80 else text[:77] + "..."
