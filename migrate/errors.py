"""The errors of a migration. Each class sets the exit code of the programs.

Each error also says where the guest is (`guest_is`).

MigrationError             1  failed; the source's guest is as it was
├── UsageError             2  the user asked for something impossible
├── ConnectError           3  cannot connect or listen: another attempt may succeed
├── PeerError              4  the other side broke the protocol
│   ├── PeerGaveUp         4  the other side refused, or gave up, and said why
│   └── PeerLost           1  the connection broke or fell silent
│       └── NoProgress     1  it broke again and again, and no new data came through
├── TlsError               5  a certificate or permission problem: trying again will not help
├── MismatchError          6  the memories differ at the end
├── NotConvergedError      7  the guest writes faster than the link carries, or time was up
├── CancelledByPeer        8  the operator of the other side cancelled
├── QemuError              1  a QEMU refused a command, or does not answer
├── NotStartedError        1  the destination could not start the guest: it runs here again
├── JournalError           1  the journal cannot be read or written, so the step is not taken
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
    from proto.wire.messages import Error


class MigrationError(Exception):
    """A migration failed. The error has one sentence for the user.

    The sentence may contain file names and the peer's words. It is made printable here, for the
    terminal, the peer, JSON and reports alike.
    """

    exit_code = 1
    code = ErrorCode.INTERNAL
    # Where the guest is, seen from the caller: "here", where it runs as before; "there", at the
    # other end; "unknown" (see `migrate.resolve`).
    guest_is: Literal["here", "there", "unknown"] = "here"

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
    """The peer refused or gave up, and said why."""


class PeerLost(PeerError):  # noqa: N818 - a state of the peer, not a kind of exception
    """The connection broke or fell silent."""

    exit_code = 1


class NoProgress(PeerLost):
    """The connection breaks again and again, and no new data comes through."""


class TlsError(MigrationError):
    """One side does not trust the other, or may not talk to it."""

    exit_code = 5
    code = ErrorCode.DENIED


class MismatchError(MigrationError):
    """The digests of the two memories differ."""

    exit_code = 6
    code = ErrorCode.MISMATCH


class NotConvergedError(MigrationError):
    """The policy ended the migration: see migrate.policy.convergence."""

    exit_code = 7
    code = ErrorCode.NOT_CONVERGED


class CancelledByPeer(MigrationError):  # noqa: N818
    """The operator of the other side cancelled."""

    exit_code = 8
    code = ErrorCode.CANCELLED


class QemuError(MigrationError):
    """A QEMU refused a command, broke the QMP protocol, or has ended.

    command -- the command that failed; "" if the connection did
    desc    -- QEMU's own words; "" if there are none
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


class JournalError(MigrationError):
    """The journal cannot be read or written, so the step that it would allow is not taken."""


class OnCompleteError(MigrationError):
    """The guest arrived, and --on-complete failed."""

    exit_code = 10


class HandOverUnknown(MigrationError):  # noqa: N818
    """GO was sent, so that only the destination may run the guest, and it has not answered.

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
    """Return the exception for the reason that a peer gave."""
    return _REASONS.get(message.code, PeerGaveUp)(f"the other side gave up: {message.reason}")


def failure_of(error: BaseException, memory_fault: str) -> MigrationError | None:
    """Return an error as a user sees it; None for a cancellation.

    memory_fault -- how the sentence of an OSError begins on this side
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
    """Return the code that the peer gets for an error.

    failure -- what `failure_of` made of it
    """
    if isinstance(error, ProtoError):
        return getattr(error, "code", ErrorCode.PROTOCOL)
    return ErrorCode.CANCELLED if failure is None else failure.code


def system_reason(error: OSError) -> str:
    """Return the system's error text. Resolver errors have numbers that strerror does not know."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
