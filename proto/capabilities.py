"""Capabilities, and how two sides agree on them.

    source   HELLO {required, optional}  ->
                                         <-  HELLO {required, optional} or ERROR  destination

Required: both sides must know it and have it on, or there is no migration. Optional: used where
both have it on; otherwise dropped, and the side that wanted it says so to its user. The answer
names exactly what will be used, so neither side guesses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from proto.errors import CapabilityError, LocalError
from proto.messages import BATCH_BYTES, PROTOCOL_VERSION, Hello

REQUIRED = frozenset({"page-hash-nh"})
OPTIONAL = frozenset({"xbzrle", "xbzrle-merge"})
# Required by a source that only wants to know the way; every destination here has it.
PROBE = "probe"
# Required by a source whose guest comes as a stream; every destination here can take it.
STREAM = "stream"
# Used wherever both sides know it: pages of zeros cost neither the digest nor HELD anything.
SPARSE = "sparse"


@dataclass(frozen=True)
class Agreement:
    """What both sides will use, and what the source offered in vain."""

    used: frozenset[str]
    dropped: frozenset[str] = frozenset()

    @property
    def xbzrle(self) -> bool:
        return "xbzrle" in self.used

    @property
    def probe(self) -> bool:
        """The source may send PROBE, and need not bring a guest."""
        return PROBE in self.used

    @property
    def stream(self) -> bool:
        """The guest is QEMU's stream: its pages, and what stands between them, in order."""
        return STREAM in self.used

    @property
    def sparse(self) -> bool:
        """The digest is the sum that leaves out zeros, and HELD may leave them out."""
        return SPARSE in self.used

    @property
    def merge(self) -> bool:
        """Deltas close short gaps; it means nothing without xbzrle."""
        return self.xbzrle and "xbzrle-merge" in self.used


def switched_on(switches: Mapping[str, bool]) -> frozenset[str]:
    """All optional capabilities but those switched off. Raises LocalError for unknown names."""
    for name in switches:
        if name not in OPTIONAL:
            known = ", ".join(sorted(OPTIONAL))
            raise LocalError(f"there is no capability {name!r}: known are {known}")
    return frozenset(name for name in OPTIONAL if switches.get(name, True))


def offer(optional: frozenset[str], required: frozenset[str] = frozenset()) -> Hello:
    """The source's HELLO; `required` beside what every migration requires: PROBE, STREAM."""
    required |= REQUIRED
    return Hello(PROTOCOL_VERSION, tuple(sorted(required)), tuple(sorted(optional)))


def answer(theirs: Hello, optional: frozenset[str]) -> tuple[Hello, Agreement]:
    """The destination's HELLO. Raises CapabilityError for what it must refuse."""
    _same_version(theirs)
    known = REQUIRED | optional | {PROBE, STREAM}
    for name in theirs.required:
        if name not in known:
            raise CapabilityError(f"the source requires capability {name!r}: it is not known here")
    for name in REQUIRED - set(theirs.required) - set(theirs.optional):
        raise CapabilityError(f"the source lacks capability {name!r}, which is required here")
    wanted = frozenset(theirs.required) | frozenset(theirs.optional)
    used = wanted & known
    hello = Hello(PROTOCOL_VERSION, tuple(sorted(REQUIRED)), tuple(sorted(used - REQUIRED)))
    return hello, Agreement(used, wanted - used)


def agree(ours: Hello, theirs: Hello) -> Agreement:
    """What the source makes of the answer. Raises CapabilityError where it cannot go on."""
    _same_version(theirs)
    wanted = frozenset(ours.required) | frozenset(ours.optional)
    used = frozenset(theirs.required) | frozenset(theirs.optional)
    for name in sorted(set(ours.required) - used):
        raise CapabilityError(f"the destination lacks capability {name!r}, which is required")
    for name in sorted(used - wanted):
        raise CapabilityError(f"the destination wants capability {name!r}, which was not offered")
    if theirs.max_body < BATCH_BYTES:
        raise CapabilityError(
            f"the destination takes batches of {theirs.max_body} bytes: those here have up to "
            f"{BATCH_BYTES}"
        )
    return Agreement(used, wanted - used)


def _same_version(theirs: Hello) -> None:
    if theirs.version != PROTOCOL_VERSION:
        raise CapabilityError(
            f"protocol version {theirs.version}, here {PROTOCOL_VERSION}: use the same release "
            "of xbmigrate on both sides"
        )
