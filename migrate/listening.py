"""Listens for sources and their further channels, as a destination."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Sequence

from migrate import tls
from migrate.address import Address
from migrate.crowd import SPEAKS, Crowd
from migrate.errors import ConnectError, MigrationError, UsageError, system_reason
from migrate.link import SOCKET_TIMEOUT, Link
from migrate.lookup import host_text, name_of
from migrate.secure import Secured
from migrate.socket_file import SocketFile
from migrate.sockets import listening_sockets, takes_both
from proto import ErrorCode
from proto.session import Role

# The kernel holds so many connections until they are taken, and so many wait for `accept`: a loop
# takes all there are at once, and those that come meanwhile, before anybody else has his turn.
BACKLOG = 64
MAX_WAITING = 4 * BACKLOG
# So many are told why they are sent away, at the same time.
MAX_LEAVING = 2 * BACKLOG
# Who is sent away is told so when it has said something, or after so long.
FIRST_WORD_SECONDS = 5.0

Refused = Callable[[str, str], object]


class Listener:
    """Waits for sources and their further channels; `addresses` says where, with the real port.

    refused -- told of whoever is sent away here: its name, and why
    """

    def __init__(
        self, path: str, peer_timeout: float, credentials: tls.Credentials | None,
        allow: Sequence[tls.Network], refused: Refused,
    ) -> None:  # fmt: skip
        self.servers: list[asyncio.Server] = []
        self.sockets: list[socket.socket] = []
        self.file: SocketFile | None = None
        self.addresses = [Address(path=path)]
        """A name may have several."""
        self._text = str(self.address)
        self._peer_timeout = peer_timeout
        self._credentials = credentials
        self._allow = allow
        self._refused = refused
        self._links: asyncio.Queue[Link] = asyncio.Queue(MAX_WAITING)
        self._shaking: Crowd[Secured] = Crowd(Secured.abort)
        self._leaving: set[asyncio.Task[None]] = set()
        self.closed = False

    @property
    def address(self) -> Address:
        return self.addresses[0]

    def __str__(self) -> str:
        """Where it listens, for people."""
        return self._text

    def listens_on(self, sockets: list[socket.socket]) -> None:
        """These are its sockets: for `addresses`, also when they are closed."""
        self.sockets = sockets
        names = [one.getsockname() for one in sockets]
        self.addresses = [Address(host=host_text(name), port=name[1]) for name in names]
        self._text = " and ".join(
            f"{where} (IPv4 and IPv6)" if takes_both(one) else f"{where}"
            for where, one in zip(self.addresses, sockets, strict=True)
        )

    async def accept(self) -> Link:
        """The next connection."""
        return await self._links.get()

    async def close(self) -> None:
        """Who is connected already, and has not been heard of yet, is hung up on."""
        self.closed = True
        await self._accept_no_more()
        for server in self.servers:
            server.close()
        for one in self.sockets:
            one.close()
        for secured in self._shaking.members():
            secured.abort()
        for task in [*self._leaving]:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        while not self._links.empty():
            self._links.get_nowait().abort()
        if self.file is not None:
            self.file.close()

    async def _accept_no_more(self) -> None:
        """asyncio forgets a connection that it has accepted, and leaves it open, where its server
        is closed in the turn after: so that turn comes first."""
        listening = [*self.sockets, *([self.file.socket] if self.file is not None else [])]
        for one in listening:
            with contextlib.suppress(ValueError, OSError):  # it is closed
                asyncio.get_running_loop().remove_reader(one)
        await asyncio.sleep(0)

    def protocol(self) -> asyncio.BufferedProtocol:
        """For the next connection."""
        link = _Incoming(self._peer_timeout, self._come)
        if self._credentials is None:
            return link
        return _Shaking(self._credentials, link, self)

    # -- what a connection tells

    def admits(self, transport: asyncio.BaseTransport) -> bool:
        """Whether its address may connect; where not, that is said here."""
        far = transport.get_extra_info("peername")
        if tls.allowed(far, self._allow):
            return True
        self._refused(name_of(far), "its address may not connect (--allow)")
        return False

    def shakes(self, secured: Secured, transport: asyncio.BaseTransport) -> None:
        self._shaking.come(secured, transport.get_extra_info("peername"))

    def speaks(self, secured: Secured) -> None:
        self._shaking.rise(secured, SPEAKS)

    def shaken(self, secured: Secured, fault: MigrationError | None) -> None:
        if fault is not None:
            self._refused(name_of(secured.get_extra_info("peername")), str(fault))
        else:
            self.gone(secured)

    def gone(self, secured: Secured) -> None:
        self._shaking.go(secured)

    def _come(self, link: Link, transport: asyncio.BaseTransport) -> None:
        why = ""
        if isinstance(transport, Secured):
            why = transport.denial
        elif self.closed:
            link.abort()
            return
        elif not self.admits(transport):
            why = "your address may not connect here"
        if why:
            if isinstance(transport, Secured):
                self._refused(link.peer_name, why)
            self._send_away(link, why)
            return
        try:
            self._links.put_nowait(link)
        except asyncio.QueueFull:
            link.abort()

    def _send_away(self, link: Link, why: str) -> None:
        async def say() -> None:
            try:
                # Who has not said anything yet may not expect an answer.
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(FIRST_WORD_SECONDS):
                        await link.first_type()
                await link.give_reason(ErrorCode.DENIED, why)
                await link.close()
            finally:
                link.abort()

        if len(self._leaving) >= MAX_LEAVING:
            link.abort()
            return
        task = asyncio.get_running_loop().create_task(say())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)


class _Incoming(Link):
    """Tells the listener when it can be spoken over."""

    def __init__(
        self, peer_timeout: float, come: Callable[[Link, asyncio.BaseTransport], None]
    ) -> None:
        super().__init__(Role.DESTINATION, peer_timeout)
        self._come = come

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._come(self, transport)


class _Shaking(Secured):
    """Tells the listener of its handshake."""

    def __init__(self, credentials: tls.Credentials, link: Link, listener: Listener) -> None:
        super().__init__(credentials, link, done=lambda fault: listener.shaken(self, fault))
        self._listener = listener

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._listener.shakes(self, transport)
        if self._listener.closed or self._listener.admits(transport):
            super().connection_made(transport)
            if self._listener.closed:
                self.abort()
        else:
            self.turn_away(transport)

    def first_heard(self) -> None:
        self._listener.speaks(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.gone(self)
        super().connection_lost(exc)


async def listen(
    address: Address, *, peer_timeout: float = SOCKET_TIMEOUT,
    credentials: tls.Credentials | None = None, allow: Sequence[tls.Network] = (),
    refused: Refused = lambda _who, _why: None,
) -> Listener:  # fmt: skip
    """Listens as a destination.

    credentials -- speak TLS with these; None: plain
    allow       -- only these may connect; none: everybody
    refused     -- told of whoever is sent away before it has said anything: its name, and why

    Raises ConnectError where the address is not to be had, TlsError where TLS is required, there
    are no credentials, and other hosts could connect.
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
            if required and credentials is None and not tls.only_local(listener.sockets):
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
