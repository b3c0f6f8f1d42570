"""What can go wrong with the bytes, split by the side that did wrong.

ProtoError
├── LocalError          ours: a message that must not be sent now, a value past its limit
│   └── CacheSizeError  a cache size that breaks the rule (also a ValueError)
├── StreamError         QEMU's stream cannot be read: `at` is the byte
└── RemoteError         the peer's: it carries the code to send back before hanging up
    ├── FrameError      the framing is broken: nothing after this byte can be understood
    ├── MessageError    a message that does not parse, breaks a limit or comes at the wrong time
    ├── CapabilityError one side requires what the other does not know
    └── DecodeError     page data that cannot be applied
"""

from __future__ import annotations

from enum import IntEnum


class ErrorCode(IntEnum):
    """The code of an ERROR frame (proto/README.md, "ERROR")."""

    PROTOCOL = 1
    CAPABILITY = 2
    NO_PLACE = 3
    LIMIT = 4
    CANCELLED = 5
    MISMATCH = 6
    NOT_CONVERGED = 7
    NOT_STARTED = 8
    INTERNAL = 9
    DENIED = 10


class ProtoError(Exception):
    """Any fault in the protocol, ours or the peer's."""


class LocalError(ProtoError):
    """We tried what the protocol forbids. Nothing was sent."""


class CacheSizeError(LocalError, ValueError):
    """A cache size that is not a power of two, or smaller than a page."""


class StreamError(ProtoError):
    """A migration stream of QEMU that cannot be read, or not be carried.

    at -- index, in the data that was given, of the byte at which it goes wrong
    """

    def __init__(self, text: str, at: int = 0) -> None:
        super().__init__(text)
        self.at = at


class RemoteError(ProtoError):
    """The peer sent what the protocol forbids. `code` is for the ERROR that answers it."""

    code = ErrorCode.PROTOCOL


class FrameError(RemoteError):
    """The framing is broken: a wrong magic, a length over its limit, a check that differs."""


class MessageError(RemoteError):
    """A message that does not parse, breaks a limit, or is out of order."""


class CapabilityError(RemoteError):
    """A required capability that one side does not have."""

    code = ErrorCode.CAPABILITY


class DecodeError(RemoteError):
    """Page data that cannot be applied. The page that the message names is as it was."""
