"""Live memory migration over TCP with XBZRLE deltas: the programs and the library.

A Python program moves a buffer with `send` and receives one with `receive`:

    guest = migrate.BufferGuest(array)                      # write in: with guest.writing()
    await migrate.send(guest, "tcp:host:4444")

    received = await migrate.receive("4444")                # at the other end
    array = numpy.frombuffer(received.memory, dtype=...)

The exceptions, and where the guest is then (`error.guest_is`):

    MigrationError            it failed. From `send`: the guest is "here", and runs on. From
    |                         `receive`: it is "there", at the source; nothing was received
    +-- UsageError            an argument is wrong. A guest that has moved is "there"
    |   +-- MemoryInUse       some of the memory is being moved, or was moved
    +-- ConnectError          cannot connect, or listen
    +-- PeerError             the other side broke the protocol
    |   +-- PeerGaveUp        it refused, or gave up, and said why
    |   +-- PeerLost          the connection broke, and did not come back in time
    |       +-- NoProgress    it broke again and again, and no new data came through
    +-- TlsError              one side does not trust the other, or may not talk to it
    +-- MismatchError         the memories differ at the end: a writer did not use `writing()`
    +-- NotConvergedError     the guest writes faster than the link carries, or time was up
    +-- CancelledByPeer       the operator of the other side cancelled
    +-- NotStartedError       the destination could not start it: the guest runs on here
    +-- HandOverUnknown       "unknown": all of it is there, and it is not known whether it runs
                              there. It is paused here; `await migrate.resolve(guest)` asks again
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
    from migrate.api import Received, receive, resolve, send
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
    from migrate.events import Notice, SourceEvent
    from migrate.guests.buffer import BufferGuest
    from migrate.guests.buffer_lock import MemoryInUse
    from migrate.guests.write_lock import GuestMoved
    from migrate.policy.downtime import Limits
    from migrate.policy.parameters import Parameters
    from migrate.statistics import Statistics, Status
    from migrate.transport.tls import Credentials
    from proto.wire.ownership import Role

# Imported when first used, so that the programs and the helper processes start faster.
_HOMES = {
    "BufferGuest": "migrate.guests.buffer",
    "CancelledByPeer": "migrate.errors",
    "ConnectError": "migrate.errors",
    "Credentials": "migrate.transport.tls",
    "GuestMoved": "migrate.guests.write_lock",
    "HandOverUnknown": "migrate.errors",
    "Limits": "migrate.policy.downtime",
    "MemoryInUse": "migrate.guests.buffer_lock",
    "MigrationError": "migrate.errors",
    "MismatchError": "migrate.errors",
    "NoProgress": "migrate.errors",
    "NotConvergedError": "migrate.errors",
    "NotStartedError": "migrate.errors",
    "Notice": "migrate.events",
    "Parameters": "migrate.policy.parameters",
    "PeerError": "migrate.errors",
    "PeerGaveUp": "migrate.errors",
    "PeerLost": "migrate.errors",
    "Received": "migrate.api",
    "Role": "proto.wire.ownership",
    "SourceEvent": "migrate.events",
    "Statistics": "migrate.statistics",
    "Status": "migrate.statistics",
    "TlsError": "migrate.errors",
    "UsageError": "migrate.errors",
    "receive": "migrate.api",
    "resolve": "migrate.api",
    "send": "migrate.api",
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
    "Notice",
    "Parameters",
    "PeerError",
    "PeerGaveUp",
    "PeerLost",
    "Received",
    "Role",
    "SourceEvent",
    "Statistics",
    "Status",
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
