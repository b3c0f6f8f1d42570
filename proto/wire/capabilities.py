"""Capabilities, and how the two sides agree on them (proto/README.md, "Capabilities").

    source   HELLO {required, optional}  ->
                                         <-  HELLO {required, optional} or ERROR  destination

A required capability must be known and switched on at both sides, or there is no migration. An
optional one is used if both sides have it on. Otherwise it is dropped, and the side that wanted it
tells its user. The answer names exactly what will be used, so neither side has to guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from proto.wire.errors import CapabilityError, LocalError
from proto.wire.messages import BATCH_BYTES, PROTOCOL_VERSION, Hello

REQUIRED = frozenset({"page-hash-nh"})
# PAGES may be compressed (proto.wire.compressed).
ZSTD = "zstd"
OPTIONAL = frozenset({"xbzrle", "xbzrle-merge", ZSTD})
# Required by a source that only measures the path; every destination here has it.
PROBE = "probe"
# Required by a source whose guest comes as QEMU's stream; every destination here can receive it.
STREAM = "stream"
# Used if both sides know it: pages of zeros then cost neither the digest nor HELD anything.
SPARSE = "sparse"


@dataclass(frozen=True)
class Agreement:
    """What both sides will use, and what the source offered that they will not use."""

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
        """The guest is QEMU's stream: its pages, and the bytes between them, in order."""
        return STREAM in self.used

    @property
    def sparse(self) -> bool:
        """The digest is the sum that leaves out zeros, and HELD may leave them out."""
        return SPARSE in self.used

    @property
    def zstd(self) -> bool:
        """PAGES may be compressed."""
        return ZSTD in self.used

    @property
    def reported(self) -> dict[str, bool]:
        """What a source tells its user."""
        return {"xbzrle": self.xbzrle, ZSTD: self.zstd}

    @property
    def merge(self) -> bool:
        """Deltas close short gaps. Means nothing without xbzrle."""
        return self.xbzrle and "xbzrle-merge" in self.used


def switched_on(switches: Mapping[str, bool]) -> frozenset[str]:
    """Return all optional capabilities but those switched off.

    Raises LocalError for an unknown name.
    """
    for name in switches:
        if name not in OPTIONAL:
            known = ", ".join(sorted(OPTIONAL))
            raise LocalError(f"there is no capability {name!r}: known are {known}")
    return frozenset(name for name in OPTIONAL if switches.get(name, True))


def offer(optional: frozenset[str], required: frozenset[str] = frozenset()) -> Hello:
    """Return the source's HELLO.

    required -- PROBE or STREAM, besides what every migration requires
    """
    required |= REQUIRED
    return Hello(PROTOCOL_VERSION, tuple(sorted(required)), tuple(sorted(optional)))


def answer(theirs: Hello, optional: frozenset[str]) -> tuple[Hello, Agreement]:
    """Return the destination's HELLO, and what will be used.

    Raises CapabilityError for a HELLO that it must refuse.
    """
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
    """Return what will be used, by the destination's answer `theirs`.

    Raises CapabilityError if the source cannot go on.
    """
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
