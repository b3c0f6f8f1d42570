"""Who waits to be let in: so many, and a crowd does not push out the one who is expected.

    SILENT  has said nothing yet
    SPEAKS  has said something: a source speaks at once, as soon as it is connected
    SHOWN   has shown a certificate

Of too many, one without a certificate goes: of the address that has most of those, silent or not,
a silent one before one that speaks, and the one that has waited longest. Among addresses that have
as many, it is that of who has waited longest. So a stranger with one address, or one network of
IPv6, takes his own places, whatever he says. What an address says counts only against itself, for
anybody can say it: were all silent ones to go before all that speak, a stranger who speaks would
push out each source before its first word.
"""

from __future__ import annotations

import ipaddress
import resource
from collections.abc import Callable
from typing import Generic, TypeVar

from migrate.address import ip_of

T = TypeVar("T")

MOST = 1024
# Of the descriptors that a program may have, the strangers at one place get this share.
SHARE = 4
SILENT, SPEAKS, SHOWN = RANKS = range(3)
# What an IPv6 host may be given to choose its addresses from.
NETWORK_BITS = 64


class Crowd(Generic[T]):
    """Those who wait at one place. Each is told by its address, as a socket has it.

    drop -- ends one that has to go; it is not in the crowd any more
    """

    def __init__(self, drop: Callable[[T], object], most: int = 0) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.most = most or max(1, min(MOST, soft // SHARE if soft > 0 else MOST))
        self._drop = drop
        self._ranks: list[dict[str, dict[T, None]]] = [{} for _ in RANKS]
        self._found: dict[T, tuple[int, str]] = {}

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, one: T) -> bool:
        return one in self._found

    def members(self) -> list[T]:
        return [*self._found]

    def come(self, one: T, far: object, rank: int = 0) -> None:
        """Another one is here; there is room for it then."""
        while len(self._found) >= self.most:
            self._make_room()
        self._put(one, rank, _address(far))

    def rise(self, one: T, rank: int) -> None:
        """It has shown more of itself. One that has gone meanwhile stays away."""
        if one in self._found and self._found[one][0] < rank:
            address = self._found[one][1]
            self.go(one)
            self._put(one, rank, address)

    def go(self, one: T) -> None:
        """It waits no longer. May be called again."""
        rank, address = self._found.pop(one, (-1, ""))
        if rank >= 0:
            there = self._ranks[rank][address]
            del there[one]
            if not there:
                del self._ranks[rank][address]

    def _put(self, one: T, rank: int, address: str) -> None:
        self._found[one] = rank, address
        self._ranks[rank].setdefault(address, {})[one] = None

    def _make_room(self) -> None:
        *bare, shown = self._ranks
        ranks = bare if any(bare) else [shown]
        places: dict[str, int] = {}
        for rank in ranks:
            for address, there in rank.items():
                places[address] = places.get(address, 0) + len(there)
        most = max(places.values())
        # Of several such addresses, the one of who is here, or has last said something, longest.
        largest = next(
            address for _, address in self._found.values() if places.get(address) == most
        )
        oldest = next(iter(next(rank[largest] for rank in ranks if largest in rank)))
        self.go(oldest)
        self._drop(oldest)


def _address(far: object) -> str:
    """What is taken for one stranger: an IPv4 address, an IPv6 network, or this host."""
    if not isinstance(far, tuple) or not far:
        return ""
    try:
        found = ip_of(str(far[0]))
    except ValueError:
        return ""
    if isinstance(found, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((found, NETWORK_BITS), strict=False))
    return str(found)
