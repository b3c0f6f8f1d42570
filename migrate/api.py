"""What a Python program calls: `send`, `receive`, and `resolve` if the owner is unknown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import warnings
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from migrate.destination.acceptor import Acceptor
from migrate.destination.destination import Destination
from migrate.destination.greeting import Introduction, NoPlaceError
from migrate.destination.options import DestinationOptions
from migrate.errors import MigrationError, PeerError, UsageError
from migrate.events import Observer
from migrate.guests.buffer import BufferPlace, bytes_of
from migrate.guests.guest import MemoryGuest, check_size
from migrate.ownership.records import Records
from migrate.policy.parameters import Parameters
from migrate.runtime.cancellation import cancel_once
from migrate.runtime.log_context import new_label
from migrate.source.options import RESOLVE_SECONDS, RETRY_SECONDS, SourceOptions
from migrate.source.precopy import Source
from migrate.statistics import Statistics
from migrate.transport.address import Address, parse_address
from migrate.transport.connect import dial
from migrate.transport.link import Link
from migrate.transport.listen import listen
from migrate.transport.networks import Network, parse_networks
from migrate.transport.tls import PLAIN, Credentials
from migrate.units import format_size
from proto.wire.messages import GuestInfo
from proto.wire.ownership import Role

logger = logging.getLogger(__name__)
# The guests that this program has received: a source that did not hear it may ask later.
_RECORDS = Records()


def _warn(peer: Link) -> None:
    """Warn of plain TCP to another host, once in a program, as Python's warnings do."""
    if peer.exposed:
        try:
            warnings.warn(
                PLAIN.replace("--tls-creds", "credentials="), RuntimeWarning, stacklevel=3
            )
        except Warning:  # warnings are errors in this program
            peer.abort()
            raise


@dataclass(frozen=True)
class Received:
    """A guest that has arrived.

    memory -- writable, exactly as long as the guest
    state  -- what the source's `state=` returned
    info   -- how the source described the guest
    """

    memory: memoryview
    state: bytes
    info: GuestInfo


async def send(
    guest: MemoryGuest,
    address: str,
    parameters: Parameters | None = None,
    *,
    observer: Observer | None = None,
    connect_timeout: float = 10.0,
    retry: float = RETRY_SECONDS,
    resolve_timeout: float = RESOLVE_SECONDS,
    credentials: Credentials | None = None,
) -> Statistics:
    """Move a guest to `tcp:HOST:PORT` or `unix:PATH` while it runs. Return the statistics.

    observer        -- called with an event and the statistics as things happen. The event is a
                       SourceEvent ("status", "round", ...) or a Notice, whose `text` is a sentence
                       for the user. What the observer raises is logged, and changes nothing
    connect_timeout -- seconds for the first connection that is not hung up on
    retry           -- seconds to reconnect when the connection breaks; the migration then resumes
    resolve_timeout -- seconds to ask who owns the guest, after a break in the hand-over
    credentials     -- for TLS, of the source; None: plain TCP, with a warning for another host

    Raises UsageError for wrong arguments, before any connection is made, and MigrationError, whose
    `guest_is` says where the guest is. It is "here", and runs on, except for HandOverUnknown: then
    it is "unknown" and the guest is paused; `resolve` asks again.

    A cancellation leaves the guest here, as long as the destination has not been told to run it.
    After that it waits until the owner is known, and has no effect if the guest has arrived.
    """
    if not isinstance(guest, MemoryGuest):
        raise UsageError(
            f"a {type(guest).__name__} is not a guest: give migrate.BufferGuest(buffer)"
        )
    where = parse_address(_text(address))
    parameters = Parameters() if parameters is None else parameters
    if not isinstance(parameters, Parameters):
        raise UsageError(f"parameters are migrate.Parameters, not {type(parameters).__name__}")
    guest.check_parameters(parameters)
    check_size(guest.size, "this guest")
    _check_callable(observer, "observer")
    _check_seconds(
        connect_timeout=connect_timeout, retry=retry, resolve_timeout=resolve_timeout
    )  # fmt: skip
    _check_credentials(credentials, Role.SOURCE)
    guest.check_available()
    again = dial(where, timeout=connect_timeout, credentials=credentials)

    async def connect_and_send() -> Statistics:
        new_label()
        peer = await again()
        try:
            _warn(peer)
            await guest.make_ready()
        except BaseException:
            await peer.close()
            raise
        options = SourceOptions(
            observer, again, patience=connect_timeout, retry=retry, resolve_timeout=resolve_timeout
        )
        return await Source(guest, peer, parameters, options).run()

    return await cancel_once(connect_and_send())


async def receive(
    address: str,
    *,
    into: Any = None,
    max_size: int = 1 << 40,
    listening: Callable[[Address], None] | None = None,
    retry: float = RETRY_SECONDS,
    resolve_timeout: float = RESOLVE_SECONDS,
    credentials: Credentials | None = None,
    allow: Iterable[str] = (),
) -> Received:
    """Receive one guest at `[HOST:]PORT` or `unix:PATH`. Return once it is ours and verified.

    into            -- a writable buffer for the guest; its content is undefined if this fails.
                       None: new memory is made
    max_size        -- bytes; a larger guest is refused
    listening       -- called with the address, which has the real port if 0 was given
    retry           -- seconds to wait for the source when the connection breaks: it may resume
    resolve_timeout -- seconds to wait for a lost source, once all of the guest is here: it may
                       come back and ask who owns the guest, or fetch the answer
    credentials     -- for TLS, of the destination; None: plain TCP
    allow           -- ADDRESS or ADDRESS/BITS that may connect; none: all may

    Raises UsageError for wrong arguments, before anything can connect, and MigrationError: nothing
    was received then, and `guest_is` is "there", at the source.

    A cancellation drops what has come, as long as the guest is not ours. After that it has no
    effect: the guest is returned.
    """
    where = parse_address(_text(address, "port"), listen=True)
    buffer = None if into is None else bytes_of(into, "into=")
    if isinstance(max_size, bool) or not isinstance(max_size, int) or max_size < 1:
        raise UsageError(f"max_size is a number of bytes, not {max_size!r}")
    _check_callable(listening, "listening")
    _check_seconds(retry=retry, resolve_timeout=resolve_timeout)
    _check_credentials(credentials, Role.DESTINATION)
    allowed = parse_networks((allow,) if isinstance(allow, str) else allow)

    def placer(info: GuestInfo) -> BufferPlace:
        if info.kind == "demo":
            raise NoPlaceError("a demo guest needs migrate-dst: here is a Python program")
        if info.size > max_size:
            raise NoPlaceError(
                f"a guest of {format_size(info.size)} is over the limit of {format_size(max_size)}"
            )
        return BufferPlace(info, buffer)

    reception = _Reception(placer, retry, resolve_timeout)
    try:
        return await cancel_once(reception.run(where, credentials, allowed, listening))
    except MigrationError as error:
        error.guest_is = "there"
        raise


class _Reception:
    """One call of `receive`."""

    def __init__(
        self, placer: Callable[[GuestInfo], BufferPlace], retry: float, resolve_timeout: float
    ) -> None:
        self._placer = placer
        self._retry = retry
        self._resolve_timeout = resolve_timeout

    async def run(
        self, where: Address, credentials: Credentials | None, allow: tuple[Network, ...],
        listening: Callable[[Address], None] | None,
    ) -> Received:  # fmt: skip
        """Return the guest once it is ours, whatever fails after that."""
        new_label()
        listener = await listen(where, credentials=credentials, allow=allow)
        received: Received | None = None
        acceptor = Acceptor(listener, _RECORDS, lambda source: self._welcome(source, acceptor))
        try:
            async with acceptor:
                if listening is not None:
                    listening(listener.address)
                destination, place = await self._guest(acceptor)
                received = Received(place.received, place.state, destination.arrival.info)
                await self._until_known(destination)
        except BaseException as error:
            if received is None:
                raise
            if isinstance(error, Exception):
                logger.exception("the guest is here; what followed failed")
        finally:
            _RECORDS.release_memory()
        return received

    def _welcome(self, introduction: Introduction, acceptor: Acceptor) -> Destination:
        options = DestinationOptions(
            self._placer, accept_channel=acceptor.channel, records=_RECORDS, retry=self._retry,
            resolve_timeout=self._resolve_timeout,
        )  # fmt: skip
        return Destination(introduction, options)

    async def _guest(self, acceptor: Acceptor) -> tuple[Destination, BufferPlace]:
        while True:
            destination = await acceptor.guest()
            _warn(destination.link)
            try:
                await destination.run()
            except PeerError:
                if destination.started:
                    raise  # a peer that never described a guest does not end the wait
                continue
            assert isinstance(destination.arrived, BufferPlace)
            return destination, destination.arrived

    async def _until_known(self, destination: Destination) -> None:
        """Give a source that did not hear that the guest is ours time to ask."""
        if not destination.acknowledged:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._resolve_timeout):
                    await destination.until_acknowledged()


async def resolve(
    guest: MemoryGuest, *, timeout: float = RESOLVE_SECONDS,
    keep: Literal["", "here", "there"] = "",
) -> Literal["here", "there"]:  # fmt: skip
    """Find out who owns a guest after HandOverUnknown. Return where it runs from now on.

    "here": its writers continue. "there": they get GuestMoved.

    timeout -- seconds to ask the destination for
    keep    -- "here" or "there": do not ask: an operator has checked. If wrong, two guests run

    Raises HandOverUnknown if the owner is still unknown, and UsageError if it is not in question.
    """
    if not isinstance(guest, MemoryGuest) or guest.decide_owner is None:
        raise UsageError("nothing is open here: this guest was not handed over without an answer")
    if keep not in ("", "here", "there"):
        raise UsageError(f"keep={keep!r}: it is 'here' or 'there'")
    _check_seconds(timeout=timeout)
    return await cancel_once(_resolve(guest, guest.decide_owner, timeout, keep))


async def _resolve(
    guest: MemoryGuest, decide_owner: Callable[[float, str], Awaitable[bool]], timeout: float,
    keep: Literal["", "here", "there"],
) -> Literal["here", "there"]:  # fmt: skip
    moved = await decide_owner(timeout, keep)
    guest.decide_owner = None
    if moved:
        await guest.release()
        return "there"
    await guest.reclaim()
    guest.relinquished = False
    await guest.resume()
    guest.unlock()
    return "here"


# -- arguments


def _text(address: object, form: str = "tcp:HOST:PORT") -> str:
    if not isinstance(address, str):
        raise UsageError(f"an address is text, as {form!r}, not {type(address).__name__}")
    return address


def _check_callable(given: object, name: str) -> None:
    if given is not None and not callable(given):
        raise UsageError(f"{name}= is called as things happen: give a function")


def _check_seconds(**given: object) -> None:
    for name, seconds in given.items():
        number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not number or not math.isfinite(seconds) or seconds < 0:  # type: ignore[arg-type, operator]
            raise UsageError(f"{name}= is a number of seconds, not {seconds!r}")


def _check_credentials(given: object, role: Role) -> None:
    if given is None:
        return
    if not isinstance(given, Credentials):
        raise UsageError(f"credentials are migrate.Credentials, not {type(given).__name__}")
    if given.role is not role:
        raise UsageError(
            f"these credentials are of a {given.role.value}: make some with Role.{role.name}"
        )
