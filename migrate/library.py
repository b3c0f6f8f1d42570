"""The two calls a Python program needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from migrate.address import Address, parse_address
from migrate.destination import Destination, NoPlaceError
from migrate.dialing import dial
from migrate.door import Door
from migrate.errors import PeerError
from migrate.guests.buffer import BufferPlace
from migrate.guests.guest import MemoryGuest, check_size
from migrate.handover import Records
from migrate.link import Link
from migrate.listening import listen
from migrate.migration import RETRY_SECONDS, Observer
from migrate.parameters import Parameters
from migrate.quantities import format_size
from migrate.source import Source
from migrate.statistics import Statistics
from migrate.tls import PLAIN, Credentials, networks
from proto.messages import GuestInfo


def _warn(peer: Link) -> None:
    """Once in a program, as Python's warnings go."""
    if peer.exposed:
        warnings.warn(PLAIN.replace("--tls-creds", "credentials="), RuntimeWarning, stacklevel=3)


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
    credentials: Credentials | None = None,
) -> Statistics:
    """Moves a guest to `tcp:HOST:PORT` or `unix:PATH` while it runs; returns the statistics.

    retry -- seconds to connect again for when the connection breaks: the migration is resumed
    credentials -- speak TLS with these (of the source); None: plain, which another host is warned
                   of

    Raises MigrationError: the guest runs on here then, unless it is a HandOverUnknown.
    """
    where = parse_address(address)
    check_size(guest.size, "this guest")

    again = dial(where, timeout=connect_timeout, credentials=credentials)
    peer = await again()
    _warn(peer)
    await guest.started()

    return await Source(guest, peer, parameters, observer, again, retry=retry).run()


async def receive(
    address: str,
    *,
    into: Any = None,
    max_size: int = 1 << 40,
    listening: Callable[[Address], None] | None = None,
    retry: float = RETRY_SECONDS,
    credentials: Credentials | None = None,
    allow: Iterable[str] = (),
) -> Received:
    """Receives one guest at `[HOST:]PORT` or `unix:PATH`; returns when it is ours and verified.

    into      -- a writable buffer of exactly the guest's size, whose content is undefined if this
                 fails; else new memory is made
    max_size  -- a larger guest is refused (bytes)
    listening -- told the address, with the real port where 0 was asked for
    retry     -- seconds to wait for the source when the connection breaks: it may resume
    credentials -- speak TLS with these (of the destination); None: plain
    allow     -- only these may connect: ADDRESS or ADDRESS/BITS; none: everybody

    Raises MigrationError; then nothing was received.
    """
    place: BufferPlace | None = None

    def placer(info: GuestInfo) -> BufferPlace:
        nonlocal place
        if info.kind == "demo":
            raise NoPlaceError("a demo guest needs migrate-dst: here is a Python program")
        if info.size > max_size:
            raise NoPlaceError(
                f"a guest of {format_size(info.size)} is over the limit of {format_size(max_size)}"
            )
        place = BufferPlace(info, into)
        return place

    records = Records()
    listener = await listen(
        parse_address(address, listen=True), credentials=credentials, allow=networks(allow)
    )

    def greeter(peer: Link) -> Destination:
        return Destination(peer, placer, accept=door.lane, records=records, retry=retry)

    async with Door(listener, records, greeter) as door:
        if listening is not None:
            listening(listener.address)
        while True:
            destination = await door.guest()
            _warn(destination.link)
            try:
                arrival = await destination.run()
                break
            except PeerError:
                if destination.started:
                    raise  # a visitor that never described a guest is no reason to stop
    assert place is not None
    assert arrival.info is not None
    return Received(place.received, place.state, arrival.info)
