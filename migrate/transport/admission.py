"""Bounds the connections that wait to be admitted, so that strangers cannot push out a source.

A stranger's connection costs us a descriptor until we know what it is for. So their number is
bounded, and a new one displaces an old one. Which one, is decided by rank and by address:

    SILENT  has sent nothing yet
    SPEAKS  has sent something; a source speaks as soon as it is connected
    SHOWN   has shown a certificate

1. Connections with a certificate are displaced only by others with one.
2. Among those without, the address with the most connections, silent or not, loses one. An address
   is an IPv4 address, also of a host behind a translator, an IPv6 network of NETWORK_BITS, or this
   host: unix sockets and all addresses of its own, of which 127.0.0.0/8 alone has 16 million, and
   any local user may connect from each.
3. Among addresses with equally many, it is the one whose connection has waited longest.
4. Of that address, a silent connection goes before one that speaks, and the longest waiting first.

So a stranger with one address takes places from himself alone, whatever he sends. That is why rank
SPEAKS counts only within an address: it costs nothing to speak, and if all silent connections went
before all that speak, a stranger who speaks would displace each source before its first message.
"""

from __future__ import annotations

import ipaddress
import resource
from collections.abc import Callable
from typing import Generic, TypeVar

from migrate.transport.address import ip_of
from migrate.transport.networks import is_own

T = TypeVar("T")

# More are of no use: a destination admits one source with up to 64 channels.
MAX_QUEUED = 1024
# Each of the two queues of a destination (TLS handshakes, first messages) may have a quarter of the
# descriptors of the program: the guest, its channels and its files need the rest.
DESCRIPTOR_SHARE = 4
SILENT, SPEAKS, SHOWN = RANKS = range(3)
# The part of IPv6 that one customer is given: within it, a host may choose its addresses at will.
NETWORK_BITS = 64
# IPv4 hosts behind a translator: with the IPv4 address in the last 32 bits (RFC 6052), and where
# the translator's owner has put it (RFC 8215).
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")


class AdmissionQueue(Generic[T]):
    """Connections that wait at one place, in the order in which they came or last rose in rank.

    drop  -- called with a connection that has been displaced, after it has left the queue
    limit -- how many may wait; 0: MAX_QUEUED, or a share of the descriptors if those are few
    """

    def __init__(self, drop: Callable[[T], object], limit: int = 0) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        share = soft // DESCRIPTOR_SHARE if soft > 0 else MAX_QUEUED
        self.limit = limit or max(1, min(MAX_QUEUED, share))
        self._drop = drop
        self._ranks: list[dict[str, dict[T, None]]] = [{} for _ in RANKS]
        """For each rank, the connections of each address, oldest first."""
        self._queued: dict[T, tuple[int, str]] = {}
        """The rank and address of each connection."""

    def __len__(self) -> int:
        return len(self._queued)

    def __contains__(self, connection: T) -> bool:
        return connection in self._queued

    def members(self) -> list[T]:
        return [*self._queued]

    def add(self, connection: T, far: object, rank: int = SILENT) -> None:
        """Add a new connection; displace another one if there are too many.

        far -- the peer's address, as a socket gives it
        """
        while len(self._queued) >= self.limit:
            self._displace_one()
        self._put(connection, rank, _origin(far))

    def promote(self, connection: T, rank: int) -> None:
        """Raise the rank of a connection, unless it has left the queue meanwhile."""
        if connection in self._queued and self._queued[connection][0] < rank:
            origin = self._queued[connection][1]
            self.discard(connection)
            self._put(connection, rank, origin)

    def discard(self, connection: T) -> None:
        """Remove a connection if it is in the queue."""
        rank, origin = self._queued.pop(connection, (-1, ""))
        if rank >= 0:
            there = self._ranks[rank][origin]
            del there[connection]
            if not there:
                del self._ranks[rank][origin]

    def _put(self, connection: T, rank: int, origin: str) -> None:
        self._queued[connection] = rank, origin
        self._ranks[rank].setdefault(origin, {})[connection] = None

    def _displace_one(self) -> None:
        *unproved, proved = self._ranks
        ranks = unproved if any(unproved) else [proved]
        counts: dict[str, int] = {}
        for rank in ranks:
            for origin, there in rank.items():
                counts[origin] = counts.get(origin, 0) + len(there)
        most = max(counts.values())
        # _queued is in order of waiting, so the first address found is the one of rule 3.
        crowded = next(origin for _, origin in self._queued.values() if counts.get(origin) == most)
        oldest = next(iter(next(rank[crowded] for rank in ranks if crowded in rank)))
        self.discard(oldest)
        self._drop(oldest)


def _origin(far: object) -> str:
    """Return what counts as one stranger: an IPv4 host, an IPv6 network, or "" for this host."""
    if not isinstance(far, tuple) or not far:
        return ""
    try:
        found = ip_of(str(far[0]))
    except ValueError:
        return ""
    if is_own(found, *far[3:4]):
        return ""
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if (carried := _carried(found)) is not None:
        return str(carried)
    bits = found.max_prefixlen if found in LOCAL_NAT64 else NETWORK_BITS
    return str(ipaddress.ip_network((found, bits), strict=False))


def _carried(found: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 host whose packets come from this address of NAT64, 6to4 or Teredo, if any.

    All hosts behind one translator, or one Teredo server, share a network of NETWORK_BITS; and a
    single 6to4 host has 65536 of those.
    """
    if found in NAT64:
        return ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
    if found.teredo is not None:
        return found.teredo[1]
    return found.sixtofour
