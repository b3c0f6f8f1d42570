"""What can go wrong outside the bytes. Each class carries the exit code of the programs, and each
error where the guest is (`guest_is`).

MigrationError             1  failed; the source's guest is as it was
├── UsageError             2  what the user asked for cannot be
├── ConnectError           3  cannot connect or listen: trying again may help
├── PeerError              4  the other side broke the protocol
│   ├── PeerGaveUp         4  the other side refused, or gave up, and said why
│   └── PeerLost           1  the connection broke or fell silent
│       └── NoProgress     1  again and again, and nothing new came through
├── TlsError               5  a certificate, or who may connect: trying again does not help
├── MismatchError          6  the memories differ at the end
├── NotConvergedError      7  the guest writes faster than the link carries, or time was up
├── CancelledByPeer        8  somebody cancelled at the other side
├── QemuError              1  a QEMU refused a command, or does not answer
├── NotStartedError        1  the destination could not start the guest: it runs here again
├── OnCompleteError       10  the guest arrived, and --on-complete failed
└── HandOverUnknown        9  GO was sent and no answer came: the guest is paused here
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Literal

from migrate.output import printable
from proto import ErrorCode, ProtoError

if TYPE_CHECKING:
    from proto.messages import Error


class MigrationError(Exception):
    """A migration that failed, with one sentence for the user.

    The sentence may hold names of files and words of the peer: it is made printable here, for the
    terminal, the peer, JSON and reports alike.
    """

    exit_code = 1
    code = ErrorCode.INTERNAL
    guest_is: Literal["here", "there", "unknown"] = "here"
    """Where the guest is, seen from who gets this error: "here", at this end, where it runs as
    before; "there", at the other end; "unknown" (see `migrate.resolve`)."""

    def __init__(self, sentence: str = "") -> None:
        super().__init__(printable(sentence))


class UsageError(MigrationError):
    """A parameter, address or guest that cannot be used."""

    exit_code = 2


class ConnectError(MigrationError):
    """The connection could not be made."""

    exit_code = 3


class PeerError(MigrationError):
    """The peer broke the protocol."""

    exit_code = 4
    code = ErrorCode.PROTOCOL


class PeerGaveUp(PeerError):  # noqa: N818 - what the peer did, not a kind of exception
    """The peer said why it gave up."""


class PeerLost(PeerError):  # noqa: N818 - a state of the peer, not a kind of exception
    """The connection ended or fell silent without a word."""

    exit_code = 1


class NoProgress(PeerLost):
    """The connection breaks again and again, and nothing new comes through."""


class TlsError(MigrationError):
    """One side does not trust the other, or may not talk to it."""

    exit_code = 5
    code = ErrorCode.DENIED


class MismatchError(MigrationError):
    """The digests of the two memories differ."""

    exit_code = 6
    code = ErrorCode.MISMATCH


class NotConvergedError(MigrationError):
    """The policy gave up: see migrate.rounds."""

    exit_code = 7
    code = ErrorCode.NOT_CONVERGED


class CancelledByPeer(MigrationError):  # noqa: N818
    """The other side's operator cancelled."""

    exit_code = 8
    code = ErrorCode.CANCELLED


class QemuError(MigrationError):
    """A QEMU that is driven refused a command, broke QMP, or is gone.

    command -- which it was; "" where the fault is the connection's
    desc    -- QEMU's own words; "" where it said none
    kind    -- QEMU's class of the error: GenericError, CommandNotFound, ...
    """

    def __init__(self, sentence: str, command: str = "", desc: str = "", kind: str = "") -> None:
        super().__init__(sentence)
        self.command = command
        self.desc = desc
        self.kind = kind


class NotStartedError(MigrationError):
    """The destination could not start the guest, and promises that it never will."""

    code = ErrorCode.NOT_STARTED


class OnCompleteError(MigrationError):
    """The guest arrived, and the command to run then failed."""

    exit_code = 10


class HandOverUnknown(MigrationError):  # noqa: N818
    """After GO nobody but the destination may run the guest, and it has not answered.

    In a Python program `await migrate.resolve(guest)` asks again.
    """

    exit_code = 9
    guest_is = "unknown"


_REASONS: dict[ErrorCode, type[MigrationError]] = {
    ErrorCode.CANCELLED: CancelledByPeer,
    ErrorCode.MISMATCH: MismatchError,
    ErrorCode.INTERNAL: MigrationError,
    ErrorCode.NOT_STARTED: NotStartedError,
    ErrorCode.DENIED: TlsError,
}


def peer_error(message: Error) -> MigrationError:
    """The exception for the reason a peer gave."""
    return _REASONS.get(message.code, PeerGaveUp)(f"the other side gave up: {message.reason}")


def failure_of(error: BaseException, memory_fault: str) -> MigrationError | None:
    """An error as a user sees it; None for a cancellation.

    memory_fault -- what an OSError means on this side
    """
    if isinstance(error, asyncio.CancelledError):
        return None
    if isinstance(error, MigrationError):
        return error
    if isinstance(error, ProtoError):
        return PeerError(str(error))
    if isinstance(error, TimeoutError) and not error.errno:  # asyncio's; it is an OSError
        return MigrationError(str(error) or "it took too long")
    if isinstance(error, OSError):
        return MigrationError(f"{memory_fault}: {error.strerror or error}")
    return MigrationError(f"{type(error).__name__}: {error}")


def code_of(error: BaseException, failure: MigrationError | None) -> ErrorCode:
    """What the peer is told of an error and of what `failure_of` made of it."""
    if isinstance(error, ProtoError):
        return getattr(error, "code", ErrorCode.PROTOCOL)
    return ErrorCode.CANCELLED if failure is None else failure.code


def system_reason(error: OSError) -> str:
    """What the system says of it; the resolver's errors have numbers of their own."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
