"""Networks: hosts that may connect (--allow), and whether a connection leaves this host."""

from __future__ import annotations

import functools
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from migrate.errors import UsageError
from migrate.transport.address import ip_of

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
# RFC 4291, 2.5.5.2: ::ffff:0:0/96
MAPPED_BITS = 96
NONLOCAL_BIND = "/proc/sys/net/ipv{}/ip_nonlocal_bind"


def parse_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Read the values of --allow, ADDRESS or ADDRESS/BITS. Raise UsageError."""
    result = []
    for text in texts:
        try:
            result.append(_unmapped(ipaddress.ip_network(text)))
        except ValueError as error:
            raise UsageError(f"--allow {text!r}: {error}: write ADDRESS or ADDRESS/BITS") from None
    return tuple(result)


def _unmapped(network: Network) -> Network:
    """Return IPv4 that is written as IPv6 (::ffff:10.0.0.0/104) as IPv4; so are peers compared."""
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= MAPPED_BITS:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((mapped, network.prefixlen - MAPPED_BITS))
    return network


def is_allowed(peer: Any, allow: Sequence[Network]) -> bool:
    """Return whether a peer may connect: from one of the networks, if there are any.

    peer -- as `getpeername` gives it; the peer of a unix socket always may
    """
    return not allow or not isinstance(peer, tuple) or any(ip_of(peer[0]) in one for one in allow)


def leaves_host(near: Any, far: Any) -> bool:
    """Return whether a connection between these names, as a socket gives them, leaves this host."""
    if not isinstance(near, tuple) or not isinstance(far, tuple):
        return False
    return not ip_of(far[0]).is_loopback and ip_of(near[0]) != ip_of(far[0])


def is_own(ip: ipaddress.IPv4Address | ipaddress.IPv6Address, scope: int = 0) -> bool:
    """Return whether an address is one of this host: a socket can be bound to those alone.

    scope -- the interface of a link-local address, as a socket gives it

    With net.ipv4.ip_nonlocal_bind (or ipv6) a socket can be bound to any address, and only loopback
    addresses are known to be ours. The look takes three system calls.
    """
    if ip.is_loopback:
        return True
    family, where = (
        (socket.AF_INET, (str(ip), 0)) if ip.version == 4
        else (socket.AF_INET6, (str(ip), 0, 0, scope))
    )  # fmt: skip
    if _binds_anywhere(ip.version):
        return False
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(where)
    except OSError:
        return False
    return True


@functools.cache
def _binds_anywhere(version: int) -> bool:
    """Return whether a socket can be bound to addresses of other hosts; read once."""
    try:
        return Path(NONLOCAL_BIND.format(version)).read_text().strip() != "0"
    except OSError:
        return True


def only_local(sockets: Iterable[socket.socket]) -> bool:
    """Return whether no other host can connect to these sockets."""
    return all(
        one.family not in (socket.AF_INET, socket.AF_INET6)
        or ip_of(one.getsockname()[0]).is_loopback
        for one in sockets
    )
