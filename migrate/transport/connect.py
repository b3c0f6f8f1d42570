"""Connects to a destination, as the source.

    name -> addresses -> Race: a TCP connection -> [TLS handshake] -> a Link that is ready to speak

A destination that refuses, or hangs up in the TLS handshake, is tried again until the time is over:
it may be about to start, or have too many connections. A fault of trust is final.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from migrate.errors import ConnectError, TlsError, UsageError, system_reason
from migrate.files.directory import Directory
from migrate.files.trust import distrust, is_trusted
from migrate.transport import tls
from migrate.transport.address import Address
from migrate.transport.happy_eyeballs import AGAIN_SECONDS, Race
from migrate.transport.link import PEER_TIMEOUT, Link
from migrate.transport.name_lookup import Endpoint, look_up, name_of, unanswered
from migrate.transport.tls_transport import HungUp, TlsTransport
from proto.wire.session import Role

logger = logging.getLogger(__name__)

LISTENING = "is migrate-dst listening there?"
NOBODY = (1 << 32) - 1
_PEER = struct.Struct("iII")  # struct ucred: process, user, group


def check_congestion(name: str) -> None:
    """Raise UsageError if this system does not have, or allow, that congestion control."""
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
        except (OSError, AttributeError):
            there = "/proc/sys/net/ipv4/tcp_available_congestion_control"
            known = Path(there).read_text().split() if os.path.exists(there) else []
            raise UsageError(
                f"--congestion {name!r}: this system does not have it, or does not allow it; there "
                f"are {', '.join(known) or 'none to choose from'}"
            ) from None


async def connect(
    address: Address, *, timeout: float = 10.0, peer_timeout: float = PEER_TIMEOUT,
    congestion: str = "", credentials: tls.Credentials | None = None,
    at: Endpoint | None = None, first: str = "",
) -> Link:  # fmt: skip
    """Connect as the source, to the address of the host that answers first.

    A destination that refuses is tried again until `timeout` seconds are over.

    credentials -- speak TLS with these; None: plain
    at          -- connect to this address alone: another one may be another machine's
    first       -- HOST:PORT of the address to try first, if the name has it

    Raise ConnectError; TlsError if one side does not trust the other, or if TLS is required and
    there are no credentials.
    """
    make = functools.partial(Link, Role.SOURCE, peer_timeout, congestion)
    attempt = _Attempt(address, timeout, credentials, make, at, first)
    try:
        async with asyncio.timeout(timeout):
            return await attempt.run()
    except TimeoutError:
        raise attempt.late() from None


def dial(address: Address, **options: Any) -> Callable[[], Awaitable[Link]]:
    """Return a function that connects there each time it is called; see `connect`.

    `Link.redial` of such a link connects to the very address that the link has.
    """

    async def once(at: Endpoint | None = None) -> Link:
        link = await connect(address, at=at, **options)
        if link.endpoint is not None:
            link.redial = functools.partial(once, link.endpoint)
        return link

    return once


async def open_tcp(address: Address, timeout: float) -> socket.socket:
    """Return a socket that is connected to the address of the host that answers first.

    No address is tried twice. Raise ConnectError, with the reason alone.
    """
    race: Race | None = None
    try:
        async with asyncio.timeout(timeout):
            race = Race(await look_up(address.host, address.port), patient=False)
            return (await race.run())[1]
    except TimeoutError:
        raise (
            ConnectError(race.reasons()) if race else unanswered(address.host, timeout)
        ) from None
    except OSError as error:
        raise ConnectError(system_reason(error)) from None


def check_listener(
    connection: socket.socket, path: str,
    remedy: str = "have migrate-dst listen in a directory of its own user, or give TLS credentials "
    "(--tls-creds)",
) -> None:  # fmt: skip
    """Check who listens on the unix socket that `connection` is connected to.

    It must be root, our own user, or the owner of the socket's directory: in /tmp any user may have
    made the socket first. If only root and our user can make one in that directory, the listener is
    trusted whoever it is: root or we have given it the socket.

    remedy -- what the error tells the user to do

    Raise ConnectError if it is not trusted, ConnectionRefusedError if the socket is not connected
    because the listener's queue is full.
    """
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    _, peer, _ = _PEER.unpack(found)
    if peer == NOBODY:
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    where = os.path.dirname(os.path.abspath(path))
    try:
        with Directory(where) as directory:
            owner, shared = os.fstat(directory.fd).st_uid, distrust(directory.fd)
    except OSError as error:
        raise ConnectError(f"cannot connect to unix:{path}: {error.strerror}") from None
    if not is_trusted(peer) and peer != owner and shared:
        raise ConnectError(
            f"cannot connect to unix:{path}: user {peer} listens there, who is neither root nor "
            f"you nor the owner of {where}, and would get the guest: {remedy}"
        )


class _Attempt:
    """The attempts of one `connect`, and why it failed if its time is over."""

    def __init__(
        self, address: Address, timeout: float, credentials: tls.Credentials | None,
        make: Callable[[], Link], at: Endpoint | None, first: str,
    ) -> None:  # fmt: skip
        self._address = address
        self._timeout = timeout
        self._credentials = credentials
        self._make = make
        self._at = at
        self._first = first
        self._race: Race | None = None
        self._fault = ""
        """Why the last try failed, if another one may help."""
        self._hung_up: list[Endpoint] = []
        """Addresses that hung up in the TLS handshake; they are tried last."""
        self._looking = False
        self._shaking: Endpoint | None = None

    async def run(self) -> Link:
        """Try until cancelled. Raise ConnectError, TlsError."""
        while True:
            link = self._make()
            try:
                await self._connect(link)
                return link
            except HungUp as error:
                self._fault, self._shaking = str(error), None
                if link.endpoint is not None:
                    self._hung_up.append(link.endpoint)
            except (ConnectionRefusedError, FileNotFoundError) as error:
                self._fault = f"{system_reason(error)}: {LISTENING}"
            except OSError as error:
                raise ConnectError(
                    f"cannot connect to {self._address}: {system_reason(error)}"
                ) from None
            logger.debug("%s: %s; trying again", self._address, self._fault)
            await asyncio.sleep(AGAIN_SECONDS)

    def late(self) -> ConnectError:
        """Return the error to raise when the time is over."""
        to, seconds = self._address, f"within {self._timeout:g} s"
        if self._looking:
            return unanswered(to.host, self._timeout)
        if self._race is not None and self._race.faults:
            why = self._race.reasons()
            if not self._race.silent:
                return ConnectError(f"cannot connect to {to}: {why}: {LISTENING}")
            several = f": {why}" if len(self._race.faults) > 1 else ""
            return ConnectError(f"no answer from {to} {seconds}{several}")
        if self._shaking is not None:
            return ConnectError(
                f"no answer from {to} {seconds}: {self._shaking} has taken the connection, and "
                "says nothing in the TLS handshake"
            )
        if self._fault:
            return ConnectError(f"cannot connect to {to}: {self._fault}")
        return ConnectError(f"no answer from {to} {seconds}")

    async def _connect(self, link: Link) -> None:
        """Try once. When this returns the link is ready to speak; if it raises, nothing is open."""
        loop = asyncio.get_running_loop()
        credentials, address = self._credentials, self._address
        protocol: Link | TlsTransport = link
        if credentials is not None:
            protocol = TlsTransport(credentials, link, credentials.name_of(address))
        required = tls.required()
        connection = await (self._unix_socket() if address.path else self._socket(link))
        try:
            if address.path:
                await loop.create_unix_connection(lambda: protocol, sock=connection)
            else:
                await loop.create_connection(lambda: protocol, sock=connection)
        except BaseException:
            connection.close()
            raise
        if isinstance(protocol, TlsTransport):
            self._shaking = link.endpoint
            try:
                await protocol.ready()
                self._shaking = None
            except HungUp:
                raise
            except ConnectError as error:
                raise ConnectError(f"cannot connect to {address}: {error}") from None
            except TlsError as error:
                raise TlsError(f"{address}: {error}") from None
        elif link.exposed and required:
            link.abort()
            await link.close()
            raise tls.plain_refused()

    async def _unix_socket(self) -> socket.socket:
        """Return a socket that is connected to the unix socket.

        Without TLS, its listener must be trusted with the guest: see `check_listener`.
        Raise ConnectError, OSError.
        """
        connection, path = socket.socket(socket.AF_UNIX), self._address.path
        try:
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, path)
            if self._credentials is None:
                check_listener(connection, path)
        except BaseException:
            connection.close()
            raise
        return connection

    async def _socket(self, link: Link) -> socket.socket:
        """Return the socket of a new TCP connection. Raise ConnectError, OSError."""
        endpoints = [self._at] if self._at is not None else await self._endpoints()
        self._race = Race(sorted(endpoints, key=self._hung_up.count))
        try:
            link.endpoint, connection = await self._race.run()
        except ConnectError as error:
            raise ConnectError(f"cannot connect to {self._address}: {error}") from None
        self._race = None
        return connection

    async def _endpoints(self) -> list[Endpoint]:
        self._looking = True
        found = await look_up(self._address.host, self._address.port)
        self._looking = False
        return sorted(found, key=lambda one: name_of(one.name) != self._first)
