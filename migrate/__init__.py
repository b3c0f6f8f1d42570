"""Live memory migration over TCP with XBZRLE deltas: the programs and the library.

A Python program moves a buffer with `send` and takes one with `receive`:

    guest = migrate.BufferGuest(array)                      # write in: with guest.writing()
    await migrate.send(guest, "tcp:host:4444")

    received = await migrate.receive("4444")                # at the other end
    array = numpy.frombuffer(received.memory, dtype=...)

What can be raised, and where the guest is then (`error.guest_is`):

    MigrationError            it failed. From `send`: the guest is "here", and goes on. From
    |                         `receive`: it is "there", at the source; nothing was received
    +-- UsageError            what was asked for cannot be. A guest that has moved is "there"
    |   +-- MemoryInUse       some of the memory is being moved, or was moved
    +-- ConnectError          cannot connect, or listen
    +-- PeerError             the other side broke the protocol
    |   +-- PeerGaveUp        it refused, or gave up, and said why
    |   +-- PeerLost          the connection broke, and did not come back in time
    |       +-- NoProgress    it came back again and again, and nothing new came through
    +-- TlsError              one side does not trust the other, or may not talk to it
    +-- MismatchError         the memories differ at the end: somebody wrote past `writing()`
    +-- NotConvergedError     the guest writes faster than the link carries, or time was up
    +-- CancelledByPeer       somebody cancelled at the other side
    +-- NotStartedError       the destination could not take it: the guest goes on here
    +-- HandOverUnknown       "unknown": all of it is there, and whether it was taken over is not
                              known. It is paused here; `await migrate.resolve(guest)` asks again
    GuestMoved                from `guest.writing()`: the guest is "there", and nothing failed
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
    from migrate.errors import (
        CancelledByPeer,
        ConnectError,
        HandOverUnknown,
        MigrationError,
        MismatchError,
        NoProgress,
        NotConvergedError,
        NotStartedError,
        PeerError,
        PeerGaveUp,
        PeerLost,
        TlsError,
        UsageError,
    )
    from migrate.guests.buffer import BufferGuest, GuestMoved
    from migrate.guests.memory_hold import MemoryInUse
    from migrate.library import Received, receive, resolve, send
    from migrate.parameters import Parameters
    from migrate.rounds import Limits
    from migrate.statistics import Statistics
    from migrate.tls import Credentials
    from proto.ownership import Role

# Imported when first asked for: the programs and the guests' own processes start faster.
_HOMES = {
    "BufferGuest": "migrate.guests.buffer",
    "CancelledByPeer": "migrate.errors",
    "ConnectError": "migrate.errors",
    "Credentials": "migrate.tls",
    "GuestMoved": "migrate.guests.buffer",
    "HandOverUnknown": "migrate.errors",
    "Limits": "migrate.rounds",
    "MemoryInUse": "migrate.guests.memory_hold",
    "MigrationError": "migrate.errors",
    "MismatchError": "migrate.errors",
    "NoProgress": "migrate.errors",
    "NotConvergedError": "migrate.errors",
    "NotStartedError": "migrate.errors",
    "Parameters": "migrate.parameters",
    "PeerError": "migrate.errors",
    "PeerGaveUp": "migrate.errors",
    "PeerLost": "migrate.errors",
    "Received": "migrate.library",
    "Role": "proto.ownership",
    "Statistics": "migrate.statistics",
    "TlsError": "migrate.errors",
    "UsageError": "migrate.errors",
    "receive": "migrate.library",
    "resolve": "migrate.library",
    "send": "migrate.library",
}

__all__ = [
    "BufferGuest",
    "CancelledByPeer",
    "ConnectError",
    "Credentials",
    "GuestMoved",
    "HandOverUnknown",
    "Limits",
    "MemoryInUse",
    "MigrationError",
    "MismatchError",
    "NoProgress",
    "NotConvergedError",
    "NotStartedError",
    "Parameters",
    "PeerError",
    "PeerGaveUp",
    "PeerLost",
    "Received",
    "Role",
    "Statistics",
    "TlsError",
    "UsageError",
    "receive",
    "resolve",
    "send",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'migrate' has no attribute {name!r}")
    value: object = getattr(_import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
