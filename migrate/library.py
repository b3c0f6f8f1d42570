"""The calls a Python program needs: `send`, `receive`, and `resolve` where nobody answered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from migrate.address import Address, parse_address
from migrate.cancellation import once
from migrate.destination import Destination, NoPlaceError
from migrate.dialing import dial
from migrate.door import Door
from migrate.errors import HandOverUnknown, MigrationError, PeerError, UsageError
from migrate.guests.buffer import BufferPlace, bytes_of
from migrate.guests.guest import MemoryGuest, check_size
from migrate.handover import Records, ask_until_known
from migrate.link import Link
from migrate.listening import listen
from migrate.migration import RESOLVE_SECONDS, RETRY_SECONDS, Observer
from migrate.parameters import Parameters
from migrate.quantities import format_size
from migrate.source import Source
from migrate.statistics import Statistics
from migrate.tls import PLAIN, Credentials, Network, networks
from proto.messages import GuestInfo
from proto.ownership import Claim, Event, Role

logger = logging.getLogger(__name__)
# Of the guests that were received in this program: a source that could not hear it may ask later.
_RECORDS = Records()


def _warn(peer: Link) -> None:
    """Once in a program, as Python's warnings go."""
    if peer.exposed:
        try:
            warnings.warn(
                PLAIN.replace("--tls-creds", "credentials="), RuntimeWarning, stacklevel=3
            )
        except Warning:  # they are errors in this program
            peer.abort()
            raise


@dataclass(frozen=True)
class Received:
    """A guest that arrived: `memory` is writable and exactly as long as the guest."""

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
    """Moves a guest to `tcp:HOST:PORT` or `unix:PATH` while it runs; returns the statistics.

    observer -- called with an event and the statistics as things happen (see migrate.migration);
                what it raises is logged, and changes nothing
    connect_timeout -- seconds for the first connection
    retry -- seconds to connect again for when the connection breaks: the migration is resumed
    resolve_timeout -- seconds to ask whose the guest is, after a break in the hand-over
    credentials -- speak TLS with these (of the source); None: plain, which another host is warned
                   of

    Raises MigrationError: its `guest_is` says where the guest is then. It is "here", and goes on,
    but for HandOverUnknown ("unknown": it is paused; `resolve` asks again). UsageError for what
    cannot be, before anybody is connected to. A cancellation leaves the guest here, as long as the
    destination has not been told to run it; after that it waits until it is known whose the guest
    is, and is forgotten where it has arrived.
    """
    if not isinstance(guest, MemoryGuest):
        raise UsageError(f"a {type(guest).__name__} is no guest: give migrate.BufferGuest(buffer)")
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
    guest.check_home()
    again = dial(where, timeout=connect_timeout, credentials=credentials)

    async def connect_and_send() -> Statistics:
        peer = await again()
        try:
            _warn(peer)
            await guest.started()
        except BaseException:
            await peer.close()
            raise
        return await Source(
            guest, peer, parameters, observer, again, retry=retry, resolve_timeout=resolve_timeout
        ).run()

    return await once(connect_and_send())


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
    """Receives one guest at `[HOST:]PORT` or `unix:PATH`; returns when it is ours and verified.

    into      -- a writable buffer that is large enough, whose content is undefined if this fails;
                 else new memory is made
    max_size  -- a larger guest is refused (bytes)
    listening -- told the address, with the real port where 0 was asked for
    retry     -- seconds to wait for the source when the connection breaks: it may resume
    resolve_timeout -- seconds that a source which is gone may take to come back and ask, when all
                 of the guest is here; and when it is ours, to hear that
    credentials -- speak TLS with these (of the destination); None: plain
    allow     -- only these may connect: ADDRESS or ADDRESS/BITS; none: everybody

    Raises MigrationError; then nothing was received, and `guest_is` is "there", at the source.
    UsageError for what cannot be, before anybody can connect. A cancellation gives up what has
    come, as long as the guest is not ours; from then on it is returned, whatever is cancelled.
    """
    where = parse_address(_text(address, "port"), listen=True)
    buffer = None if into is None else bytes_of(into, "into=")
    if isinstance(max_size, bool) or not isinstance(max_size, int) or max_size < 1:
        raise UsageError(f"max_size is a number of bytes, not {max_size!r}")
    _check_callable(listening, "listening")
    _check_seconds(retry=retry, resolve_timeout=resolve_timeout)
    _check_credentials(credentials, Role.DESTINATION)
    allowed = networks((allow,) if isinstance(allow, str) else allow)

    def placer(info: GuestInfo) -> BufferPlace:
        if info.kind == "demo":
            raise NoPlaceError("a demo guest needs migrate-dst: here is a Python program")
        if info.size > max_size:
            raise NoPlaceError(
                f"a guest of {format_size(info.size)} is over the limit of {format_size(max_size)}"
            )
        return BufferPlace(info, buffer)

    coming = _Coming(placer, retry, resolve_timeout)
    try:
        return await once(coming.receive(where, credentials, allowed, listening))
    except MigrationError as error:
        error.guest_is = "there"
        raise


class _Coming:
    """One call of `receive`."""

    def __init__(
        self, placer: Callable[[GuestInfo], BufferPlace], retry: float, resolve_timeout: float
    ) -> None:
        self._placer = placer
        self._retry = retry
        self._resolve_timeout = resolve_timeout

    async def receive(
        self, where: Address, credentials: Credentials | None, allow: tuple[Network, ...],
        listening: Callable[[Address], None] | None,
    ) -> Received:  # fmt: skip
        """Returns the guest once it is ours, whatever comes after that."""
        listener = await listen(where, credentials=credentials, allow=allow)
        received: Received | None = None
        door = Door(listener, _RECORDS, lambda peer: self._greeted(peer, door))
        try:
            async with door:
                if listening is not None:
                    listening(listener.address)
                destination, place = await self._guest(door)
                assert destination.arrival.info is not None
                received = Received(place.received, place.state, destination.arrival.info)
                await self._until_known(destination)
        except BaseException as error:
            if received is None:
                raise
            if isinstance(error, Exception):
                logger.exception("the guest is here; what came after it failed")
        finally:
            _RECORDS.rest()
        return received

    def _greeted(self, peer: Link, door: Door) -> Destination:
        return Destination(
            peer, self._placer, accept=door.lane, records=_RECORDS, retry=self._retry,
            resolve_timeout=self._resolve_timeout,
        )  # fmt: skip

    async def _guest(self, door: Door) -> tuple[Destination, BufferPlace]:
        while True:
            destination = await door.guest()
            _warn(destination.link)
            try:
                await destination.run()
            except PeerError:
                if destination.started:
                    raise  # a visitor that never described a guest is no reason to stop
                continue
            assert isinstance(destination.arrived, BufferPlace)
            return destination, destination.arrived

    async def _until_known(self, destination: Destination) -> None:
        """The source was told; where it could not hear, it is let ask."""
        if not destination.acknowledged:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._resolve_timeout):
                    await destination.asked()


async def resolve(
    guest: MemoryGuest, *, timeout: float = RESOLVE_SECONDS,
    keep: Literal["", "here", "there"] = "",
) -> Literal["here", "there"]:  # fmt: skip
    """Finds out whose a guest is after HandOverUnknown; returns where it runs from now on.

    "here": its writers go on. "there": they get GuestMoved.

    timeout -- seconds to ask the destination for
    keep    -- do not ask: a person has looked, and answers for it. Two run where that was wrong.

    Raises HandOverUnknown where it is still not known, UsageError for a guest of which it is.
    """
    if not isinstance(guest, MemoryGuest) or guest.undecided is None:
        raise UsageError("nothing is open here: this guest was not handed over without an answer")
    if keep not in ("", "here", "there"):
        raise UsageError(f"keep={keep!r}: it is 'here' or 'there'")
    _check_seconds(timeout=timeout)
    return await once(_resolved(guest, timeout, keep))


async def _resolved(
    guest: MemoryGuest, timeout: float, keep: Literal["", "here", "there"]
) -> Literal["here", "there"]:
    assert guest.undecided is not None
    journal, dials = guest.undecided
    if journal.claim is Claim.COMMITTED and keep:
        journal.move(Event.KEEP_SOURCE if keep == "here" else Event.KEEP_DESTINATION)
    elif journal.claim is Claim.COMMITTED:
        why = await ask_until_known(dials, journal, timeout)
        if why:
            raise HandOverUnknown(f"it is still not known whose the guest is: {why}")
    guest.undecided = None
    if journal.claim is Claim.DONE:
        await guest.release()
        return "there"
    await guest.take_back()
    guest.given_up = False
    await guest.resume()
    guest.unhold()
    return "here"


# -- what is given is looked at first


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
