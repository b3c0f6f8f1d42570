"""Live memory migration over TCP with XBZRLE deltas: the programs and the library.

A Python program moves a buffer with `send` and takes one with `receive`:

    guest = migrate.BufferGuest(array)                      # write in: with guest.writing()
    await migrate.send(guest, "tcp:host:4444")

    received = await migrate.receive("4444")                # at the other end
    array = numpy.frombuffer(received.memory, dtype=...)
"""

from __future__ import annotations

import os as _os
from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

import proto as _proto

if getattr(_proto, "__wire_name__", None) != "xbmigrate":
    raise ImportError(
        f"the package 'proto' in {_os.path.dirname(_proto.__file__ or '?')} is not xbmigrate's: "
        "another distribution (proto-plus has one of that name) was installed over it or stands "
        "before it on sys.path; install xbmigrate in an environment of its own "
        "(pipx install xbmigrate, or a virtual environment)"
    )

if _TYPE_CHECKING:
    from migrate.errors import MigrationError
    from migrate.guests.buffer import BufferGuest, GuestMoved
    from migrate.library import Received, receive, send
    from migrate.parameters import Parameters
    from migrate.rounds import Limits
    from migrate.statistics import Statistics
    from migrate.tls import Credentials
    from proto.ownership import Role

# Imported when first asked for: the programs and the guests' own processes start faster.
_HOMES = {
    "BufferGuest": "migrate.guests.buffer",
    "Credentials": "migrate.tls",
    "GuestMoved": "migrate.guests.buffer",
    "Limits": "migrate.rounds",
    "MigrationError": "migrate.errors",
    "Parameters": "migrate.parameters",
    "Received": "migrate.library",
    "Role": "proto.ownership",
    "Statistics": "migrate.statistics",
    "receive": "migrate.library",
    "send": "migrate.library",
}

__all__ = [
    "BufferGuest",
    "Credentials",
    "GuestMoved",
    "Limits",
    "MigrationError",
    "Parameters",
    "Received",
    "Role",
    "Statistics",
    "receive",
    "send",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'migrate' has no attribute {name!r}")
    value: object = getattr(_import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
