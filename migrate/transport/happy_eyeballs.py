"""Connects to whichever address of a host answers first (RFC 8305, "happy eyeballs").

    first address   |------------------- no answer ------------------
    second          250 ms |--- refused, again, again ... ----------
    third                  |---- connected: the others are given up

The address families alternate, so that a broken IPv6 path costs one delay, not one per address.
An address has 250 ms to itself before the next one is tried beside it, or less if it fails. An
address that refuses is tried again: the program there may be about to start.

Why our own: asyncio can do this, uvloop cannot, neither tries an address again, and uvloop's
`sock_connect` drops the scope of link-local addresses.

An address that accepts the connection has won the race, whether a destination answers there or not.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections import deque
from collections.abc import Iterable

from migrate.errors import ConnectError
from migrate.transport.name_lookup import Endpoint

# RFC 8305, 5: Connection Attempt Delay
STAGGER_SECONDS = 0.25
AGAIN_SECONDS = 0.1
# Addresses of a host that are tried, and those that an error names.
MAX_ADDRESSES = 32
MAX_NAMED = 4


class Race:
    """Makes one connection to one of several addresses.

    patient -- try an address that refuses again
    """

    def __init__(self, endpoints: Iterable[Endpoint], *, patient: bool = True) -> None:
        self._patient = patient
        self._waiting = deque(interleaved(endpoints)[:MAX_ADDRESSES])
        self.faults: dict[Endpoint, str] = {}
        """Why each address that was tried has failed so far; "" while it has not answered."""
        self._failed: asyncio.Future[None] | None = None
        self._winner: tuple[Endpoint, socket.socket] | None = None

    @property
    def silent(self) -> bool:
        """Whether an address that was tried has not answered at all."""
        return not all(self.faults.values())

    def reasons(self) -> str:
        """Return why each address has failed, for people; a single address is not named."""
        said = {str(one): why or "no answer" for one, why in self.faults.items()}
        if len(self.faults) == 1:
            return next(iter(said.values()))
        texts = [f"{one}: {why}" for one, why in said.items()][:MAX_NAMED]
        more = len(said) - len(texts)
        return "; ".join(texts) + (f"; and {more} more" if more else "")

    async def run(self) -> tuple[Endpoint, socket.socket]:
        """Return the first connection that is made; the caller closes the socket.

        A patient race has no end of its own while an address refuses: the caller cancels it.

        Raise ConnectError, with `reasons`, if no address is worth another try.
        """
        running: set[asyncio.Task[None]] = set()
        try:
            while self._winner is None:
                if self._waiting:
                    endpoint = self._waiting.popleft()
                    self.faults[endpoint] = ""
                    running.add(asyncio.create_task(self._try(endpoint)))
                running = await self._wait(running)
                if not running and not self._waiting and self._winner is None:
                    raise ConnectError(self.reasons())
            (endpoint, connection), self._winner = self._winner, None
            return endpoint, connection
        finally:
            for task in running:
                task.cancel()
            if self._winner is not None:
                self._winner[1].close()  # it came as this was cancelled
            self._winner = None
            if running:
                await asyncio.wait(running)

    async def _wait(self, running: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
        """Wait until the next address may be tried or an attempt has ended; return those that go
        on."""
        self._failed = asyncio.get_running_loop().create_future()
        waited: set[asyncio.Future[None]] = {*running, self._failed}
        await asyncio.wait(
            waited, timeout=STAGGER_SECONDS if self._waiting else None,
            return_when=asyncio.FIRST_COMPLETED,
        )  # fmt: skip
        for task in (done := {one for one in running if one.done()}):
            task.result()
        return running - done

    async def _try(self, endpoint: Endpoint) -> None:
        """Try one address until it is connected or not worth another try."""
        while True:
            try:
                connection = await _connected(endpoint)
            except OSError as error:
                self.faults[endpoint] = _reason(endpoint, error)
                if self._failed is not None:
                    _settle(self._failed)
                if error.errno != errno.ECONNREFUSED or not self._patient:
                    return
            else:
                if self._winner is not None:
                    connection.close()
                else:
                    self._winner = endpoint, connection
                return
            await asyncio.sleep(AGAIN_SECONDS)


async def _connected(endpoint: Endpoint) -> socket.socket:
    """Return a connected socket. Raise OSError."""
    loop = asyncio.get_running_loop()
    # asyncio switches Nagle's algorithm off only if the protocol of the socket is given as TCP.
    connection = socket.socket(endpoint.family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        connection.setblocking(False)
        number = connection.connect_ex(endpoint.name)
        if number == errno.EINPROGRESS:
            writable = loop.create_future()
            loop.add_writer(connection, _settle, writable)
            try:
                await writable
            finally:
                loop.remove_writer(connection)
            number = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number))
        return connection
    except BaseException:
        connection.close()
        raise


def interleaved(endpoints: Iterable[Endpoint]) -> list[Endpoint]:
    """Return the addresses with their families alternating, beginning with that of the first.

    RFC 8305, section 4.
    """
    families: dict[int, deque[Endpoint]] = {}
    for one in endpoints:
        families.setdefault(one.family, deque()).append(one)
    result = []
    while any(families.values()):
        result += [one.popleft() for one in families.values() if one]
    return result


def _reason(endpoint: Endpoint, error: OSError) -> str:
    """Return why an address has failed, for people."""
    why = os.strerror(error.errno or 0)
    host, *rest = endpoint.name
    if error.errno == errno.EINVAL and str(host).startswith("fe80:") and not rest[-1]:
        why += f": a link-local address needs its interface: [{host}%eth0]"
    return why


def _settle(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
