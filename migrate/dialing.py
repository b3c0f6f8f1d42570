"""Connects to a destination, as the source."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

from migrate import tls
from migrate.address import Address
from migrate.errors import ConnectError, TlsError, UsageError, system_reason
from migrate.link import SOCKET_TIMEOUT, Link
from migrate.secure import HungUp, Secured
from proto.session import Role


def check_congestion(name: str) -> None:
    """Raises UsageError where TCP cannot find its pace that way here."""
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
    address: Address, *, timeout: float = 10.0, peer_timeout: float = SOCKET_TIMEOUT,
    congestion: str = "", credentials: tls.Credentials | None = None,
) -> Link:  # fmt: skip
    """Connects as the source. A refused connection is tried again until `timeout` seconds.

    credentials -- speak TLS with these; None: plain

    Raises ConnectError, and TlsError where one side does not trust the other, or where TLS is
    required and there are no credentials.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout

    while True:
        link = Link(Role.SOURCE, peer_timeout)
        link.congestion = congestion
        try:
            async with asyncio.timeout_at(end):
                await _connect(address, link, credentials)
                return link
        except TimeoutError:
            raise ConnectError(f"no answer from {address} within {timeout:g} s") from None
        except HungUp as error:
            if loop.time() + 0.2 > end:
                raise ConnectError(f"cannot connect to {address}: {error}") from None
            await asyncio.sleep(0.1)
        except (ConnectionRefusedError, FileNotFoundError) as error:
            if loop.time() + 0.2 > end:
                raise ConnectError(
                    f"cannot connect to {address}: {system_reason(error)}: is migrate-dst "
                    "listening there?"
                ) from None
            await asyncio.sleep(0.1)
        except OSError as error:
            # Several addresses that all refuse come as one error without a number.
            several = error.errno is None and not isinstance(error, socket.gaierror)
            if several and loop.time() + 0.2 <= end:
                await asyncio.sleep(0.1)
                continue
            raise ConnectError(f"cannot connect to {address}: {system_reason(error)}") from None


async def _connect(address: Address, link: Link, credentials: tls.Credentials | None) -> None:
    """Once. The link is ready to speak then, or nothing is left of it."""
    loop = asyncio.get_running_loop()
    protocol: Link | Secured = link
    if credentials is not None:
        protocol = Secured(credentials, link, credentials.name_of(address))
    required = tls.required()
    if address.path:
        await loop.create_unix_connection(lambda: protocol, address.path)
    else:
        await loop.create_connection(lambda: protocol, address.host, address.port)
    if isinstance(protocol, Secured):
        try:
            await protocol.ready()
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
