"""Makes listening sockets: on all addresses of a host, and all on one port.

PORT, [::]:PORT     one socket for both families; IPv4 alone if IPv6 is off
HOST:PORT           one for each address that the name has, all with the same number
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Sequence

from migrate.transport.address import Address
from migrate.transport.name_lookup import LOOKUP_SECONDS, Endpoint, look_up, unanswered

ANY = Endpoint(socket.AF_INET6, ("::", 0, 0, 0))
ANY_IPV4 = Endpoint(socket.AF_INET, ("0.0.0.0", 0))
# Attempts to find a port that is free on several addresses.
PORT_TRIES = 20
# The errors of an address family, or an address, that is switched off here.
OFF = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


async def listening_sockets(address: Address, backlog: int) -> list[socket.socket]:
    """Listen on a TCP address. May be cancelled at any time.

    Raise OSError if that fails, ConnectError if the name server does not answer.
    """
    if not address.host:
        return anywhere(address.port, backlog)
    try:
        async with asyncio.timeout(LOOKUP_SECONDS):
            found = await look_up(address.host, address.port, listens=True)
    except TimeoutError:
        raise unanswered(address.host, LOOKUP_SECONDS) from None
    return listen_on(found, backlog)


def anywhere(port: int, backlog: int) -> list[socket.socket]:
    """Listen on all interfaces, for both families. Raise OSError."""
    try:
        return [_listening(ANY, port, backlog)]
    except OSError as error:
        if error.errno not in OFF:
            raise
        return [_listening(ANY_IPV4, port, backlog)]


def listen_on(endpoints: Sequence[Endpoint], backlog: int) -> list[socket.socket]:
    """Listen on each address, all on the port of the first; 0 finds one that is free on all.

    Addresses that are off here are left out if there are others. Raise OSError.
    """
    tries = PORT_TRIES if endpoints[0].port == 0 else 1
    for left in reversed(range(tries)):
        try:
            return _all_listening(endpoints, backlog)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not left:
                raise
    raise AssertionError


def _all_listening(endpoints: Sequence[Endpoint], backlog: int) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    port, off = endpoints[0].port, OSError()
    with contextlib.ExitStack() as undo:
        for one in endpoints:
            try:
                made = _listening(one, port, backlog)
            except OSError as error:
                if error.errno not in OFF:
                    raise
                off = error
                continue
            undo.enter_context(made)
            sockets.append(made)
            port = made.getsockname()[1]
        if not sockets:
            raise off
        undo.pop_all()
    return sockets


def _listening(endpoint: Endpoint, port: int, backlog: int) -> socket.socket:
    """Listen on one address; IPv6 also takes IPv4 clients, as QEMU's listeners do.

    Raise OSError.
    """
    made = socket.socket(endpoint.family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if endpoint.family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        host, _, *rest = endpoint.name
        made.bind((host, port, *rest))
        made.listen(backlog)
        return made
    except BaseException:
        made.close()
        raise


def takes_both(one: socket.socket) -> bool:
    """Return whether IPv4 clients and IPv6 clients can both connect."""
    return (
        one.family == socket.AF_INET6
        and one.getsockname()[0] == "::"
        and not one.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    )
