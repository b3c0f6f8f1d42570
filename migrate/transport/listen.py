"""Listens for sources and their further channels, as a destination.

    kernel's queue --> [TLS handshake] --> a queue of Links --> accept()
       BACKLOG           AdmissionQueue       MAX_WAITING

A peer that may not connect, by its address (--allow) or its certificate (--tls-authz), is told so
and closed. What a connection is for is the Acceptor's question (migrate.destination.acceptor).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable, Sequence

from migrate.errors import ConnectError, MigrationError, UsageError, system_reason
from migrate.files.socket_file import SocketFile
from migrate.transport import networks, tls
from migrate.transport.address import Address
from migrate.transport.admission import SPEAKS, AdmissionQueue
from migrate.transport.link import PEER_TIMEOUT, Link
from migrate.transport.listening_sockets import listening_sockets, takes_both
from migrate.transport.name_lookup import host_text, name_of
from migrate.transport.tls_transport import TlsTransport
from proto import ErrorCode
from proto.wire.session import Role

logger = logging.getLogger(__name__)

# The kernel holds this many connections until we take them. The event loop takes all there are in
# one turn, and more that come in the next ones before the Acceptor's task has run.
BACKLOG = 64
MAX_WAITING = 4 * BACKLOG
# This many peers are told at the same time why they are refused; more are just closed.
MAX_REFUSALS = 2 * BACKLOG
# A peer that is refused is told so when it has sent something, or after this time: one that has not
# spoken yet may not expect an answer.
REFUSAL_SECONDS = 5.0

Refused = Callable[[str, str], object]


class Listener:
    """Accepts connections; `addresses` says where, with the real port.

    path    -- of the unix socket; "" for TCP
    refused -- called with the name of each peer that is refused here, and why
    """

    def __init__(
        self, path: str, peer_timeout: float, credentials: tls.Credentials | None,
        allow: Sequence[networks.Network], refused: Refused,
    ) -> None:  # fmt: skip
        self.servers: list[asyncio.Server] = []
        self.sockets: list[socket.socket] = []
        self.file: SocketFile | None = None
        self.addresses = [Address(path=path)]
        """One for each address that the name has."""
        self.closed = False
        self._text = str(self.address)
        self._peer_timeout = peer_timeout
        self._credentials = credentials
        self._allow = allow
        self._refused = refused
        self._links: asyncio.Queue[Link] = asyncio.Queue(MAX_WAITING)
        self._handshakes: AdmissionQueue[TlsTransport] = AdmissionQueue(TlsTransport.abort)
        self._refusals: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> Address:
        return self.addresses[0]

    @property
    def handshakes(self) -> AdmissionQueue[TlsTransport]:
        """The connections whose TLS handshake is going on."""
        return self._handshakes

    def __str__(self) -> str:
        """Return where it listens, for people."""
        return self._text

    def listens_on(self, sockets: list[socket.socket]) -> None:
        """Take these sockets, and their addresses for `addresses`."""
        self.sockets = sockets
        names = [one.getsockname() for one in sockets]
        self.addresses = [Address(host=host_text(name), port=name[1]) for name in names]
        self._text = " and ".join(
            f"{where} (IPv4 and IPv6)" if takes_both(one) else f"{where}"
            for where, one in zip(self.addresses, sockets, strict=True)
        )

    async def accept(self) -> Link:
        """Return the next connection."""
        return await self._links.get()

    async def close(self) -> None:
        """Listen no more, and close the connections that were not accepted."""
        self.closed = True
        await self._stop_accepting()
        for server in self.servers:
            server.close()
        for one in self.sockets:
            one.close()
        for transport in self._handshakes.members():
            transport.abort()
        for task in [*self._refusals]:
            task.cancel()
        await asyncio.gather(*self._refusals, return_exceptions=True)
        while not self._links.empty():
            self._links.get_nowait().abort()
        if self.file is not None:
            self.file.close()

    async def _stop_accepting(self) -> None:
        """Have the loop accept no more, and give it a turn for what it has accepted.

        asyncio makes a protocol for an accepted socket in the turn after. If its server is closed
        before that turn, it forgets the socket, and leaves it open.
        """
        listening = [*self.sockets, *([self.file.socket] if self.file is not None else [])]
        for one in listening:
            with contextlib.suppress(ValueError, OSError):  # it is closed
                asyncio.get_running_loop().remove_reader(one)
        await asyncio.sleep(0)

    def protocol(self) -> asyncio.BufferedProtocol:
        """Make the protocol of a new connection."""
        link = _IncomingLink(self._peer_timeout, self._connected)
        if self._credentials is None:
            return link
        return _IncomingTls(self._credentials, link, self)

    # -- called by a connection

    def admits(self, transport: asyncio.BaseTransport) -> bool:
        """Return whether its address may connect; report one that may not."""
        far = transport.get_extra_info("peername")
        if networks.is_allowed(far, self._allow):
            return True
        self._refused(name_of(far), "its address may not connect (--allow)")
        return False

    def handshake_ended(self, transport: TlsTransport, fault: MigrationError | None) -> None:
        """Report a handshake that has failed; one that has not is no concern any more.

        A failed one stays in the queue until its connection is closed: it has a descriptor still.
        """
        if fault is not None:
            self._refused(name_of(transport.get_extra_info("peername")), str(fault))
        else:
            self._handshakes.discard(transport)

    def _connected(self, link: Link, transport: asyncio.BaseTransport) -> None:
        """Queue a connection that can be spoken over, if its peer may connect."""
        why = ""
        if isinstance(transport, TlsTransport):
            why = transport.denial
            if why:
                self._refused(link.peer_name, why)
        elif self.closed:
            link.abort()
            return
        elif not self.admits(transport):
            why = "your address may not connect here"
        if why:
            self._refuse(link, why)
            return
        try:
            self._links.put_nowait(link)
        except asyncio.QueueFull:
            logger.debug("%s has to go: %d connections wait", link.peer_name, MAX_WAITING)
            link.abort()

    def _refuse(self, link: Link, why: str) -> None:
        if len(self._refusals) >= MAX_REFUSALS:
            link.abort()
            return
        task = asyncio.get_running_loop().create_task(_give_refusal(link, why))
        self._refusals.add(task)
        task.add_done_callback(self._refusals.discard)


async def _give_refusal(link: Link, why: str) -> None:
    """Tell a peer why it may not connect, and close the connection."""
    try:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(REFUSAL_SECONDS):
                await link.first_type()
        await link.give_reason(ErrorCode.DENIED, why)
        await link.close()
    finally:
        link.abort()


class _IncomingLink(Link):
    """Tells the listener when it is connected."""

    def __init__(
        self, peer_timeout: float, connected: Callable[[Link, asyncio.BaseTransport], None]
    ) -> None:
        super().__init__(Role.DESTINATION, peer_timeout)
        self._connected = connected

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connected(self, transport)


class _IncomingTls(TlsTransport):
    """Waits in the listener's queue of handshakes until its own has ended."""

    def __init__(self, credentials: tls.Credentials, link: Link, listener: Listener) -> None:
        super().__init__(
            credentials, link, done=lambda fault: listener.handshake_ended(self, fault)
        )
        self._listener = listener

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._listener.handshakes.add(self, transport.get_extra_info("peername"))
        if self._listener.closed or self._listener.admits(transport):
            super().connection_made(transport)
            if self._listener.closed:
                self.abort()
        else:
            self.refuse_address(transport)

    def first_bytes_received(self) -> None:
        self._listener.handshakes.promote(self, SPEAKS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.handshakes.discard(self)
        super().connection_lost(exc)


async def listen(
    address: Address, *, peer_timeout: float = PEER_TIMEOUT,
    credentials: tls.Credentials | None = None, allow: Sequence[networks.Network] = (),
    refused: Refused = lambda _name, _why: None,
) -> Listener:  # fmt: skip
    """Listen as a destination.

    credentials -- speak TLS with these; None: plain
    allow       -- only addresses in these networks may connect; empty: all may
    refused     -- called with the name of each peer that is refused before it has sent a frame, and
                   why

    Raise ConnectError if the address cannot be listened on, TlsError if TLS is required
    (MIGRATE_REQUIRE_TLS), there are no credentials, and other hosts could connect.
    """
    loop = asyncio.get_running_loop()
    required = tls.required()
    listener = Listener(address.path, peer_timeout, credentials, allow, refused)
    try:
        if address.path:
            listener.file = SocketFile(address.path, "cannot listen on", BACKLOG)
            listener.servers = [
                await loop.create_unix_server(
                    listener.protocol, sock=listener.file.socket, backlog=BACKLOG
                )
            ]
        else:
            listener.listens_on(await _sockets(address))
            if required and credentials is None and not networks.only_local(listener.sockets):
                raise tls.plain_refused()
            for one in listener.sockets:
                listener.servers.append(
                    await loop.create_server(listener.protocol, sock=one, backlog=BACKLOG)
                )
    except BaseException as error:
        await listener.close()
        if isinstance(error, OSError):
            raise ConnectError(f"cannot listen on {address}: {_why_not(error)}") from None
        if isinstance(error, UsageError):
            raise ConnectError(str(error)) from None
        raise
    logger.debug("listening on %s%s", listener, ", TLS" if credentials is not None else "")
    return listener


async def _sockets(address: Address) -> list[socket.socket]:
    try:
        return await listening_sockets(address, BACKLOG)
    except ConnectError as error:
        raise ConnectError(f"cannot listen on {address}: {error}") from None


def _why_not(error: OSError) -> str:
    if error.errno == errno.EAFNOSUPPORT:
        return "IPv6 is off here: a bare PORT listens without it"
    return system_reason(error)
