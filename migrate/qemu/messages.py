"""What QEMU says on its control socket, text by text: a greeting, answers, events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CLOSED = "CLOSED"
"""The event that we add: the connection has ended. Its data: {"error": a sentence}."""


class Garbage(Exception):  # noqa: N818 - what was sent, not a kind of exception
    """It is not QMP as QEMU speaks it; says what it is."""


@dataclass(frozen=True)
class Event:
    """What happened, and when by QEMU's clock (seconds since 1970; 0: not said)."""

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)
    time: float = 0.0


def parse(text: bytes) -> dict[str, Any]:
    """NaN and Infinity, which QEMU has been seen to send as rates, are 0."""
    try:
        message = json.loads(text, parse_constant=lambda _name: 0)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise Garbage(f"{short(text)} is no JSON object")
    return message


def version_in(message: dict[str, Any]) -> tuple[int, int, int]:
    try:
        version = message["QMP"]["version"]
        package = str(version.get("package", ""))
        numbers = version["qemu"]
        found = (int(numbers["major"]), int(numbers["minor"]), int(numbers["micro"]))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise Garbage(f"{short(message)} is no greeting") from None
    if package.startswith("xbmigrate"):
        raise Garbage(f"it is {short(package)}, no QEMU: name the socket of QEMU's -qmp")
    return found


def event_in(message: dict[str, Any]) -> Event:
    name, data, when = message["event"], message.get("data", {}), message.get("timestamp", {})
    if not isinstance(name, str) or not isinstance(data, dict):
        raise Garbage(f"{short(message)} is no event")
    try:
        time = when["seconds"] + when["microseconds"] / 1e6
    except (KeyError, TypeError, OverflowError):
        time = 0.0
    return Event(name, data, time)


def closed(why: str) -> Event:
    return Event(CLOSED, {"error": why})


def short(what: object) -> str:
    text = repr(what)
    return text if len(text) <= 80 else text[:77] + "..."
