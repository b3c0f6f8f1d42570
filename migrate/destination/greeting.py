"""The first words with a source, up to the guest that it describes.

    source                          destination
    HELLO             -->                        greet()
                      <--           HELLO        with the capabilities that both sides have on
    PROBE ...         -->                        of a source that measures the path first
                      <--           PROBED ...
    GUEST             -->                        -> Introduction

No place has been looked for yet. What comes next is ACCEPT, or ERROR with a reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from migrate.errors import MigrationError, PeerError, PeerLost
from migrate.transport.link import Link
from proto import ErrorCode
from proto.wire import capabilities as caps
from proto.wire.messages import MAX_PROBE, GuestInfo, Hello, MessageType, Probe, Probed

# From the connection to GUEST, and from ACCEPT to the last JOIN. A source needs a few round trips
# for either. It is the SYN of a further channel that may take long: one that is lost three times in
# a row costs 7 s (RFC 6298: 1 + 2 + 4 s).
HANDSHAKE_SECONDS = 15.0


class NoPlaceError(MigrationError):
    """This guest can be put nowhere here."""

    exit_code = 2
    code = ErrorCode.NO_PLACE


@dataclass(frozen=True)
class Introduction:
    """A source that has described its guest, and waits for ACCEPT.

    link      -- the connection to the source; the first channel
    info      -- the guest
    agreement -- the capabilities that both sides use
    """

    link: Link
    info: GuestInfo
    agreement: caps.Agreement


async def greet(
    link: Link, switches: Mapping[str, bool], *, busy: bool = False
) -> Introduction | None:
    """Exchange HELLO, answer a source that measures the path, and return the guest it describes.

    Return None if the source only measured the path: it has closed the connection.

    switches -- optional capabilities by name; those that are not named are on
    busy     -- a guest is being received: refuse to be measured, which would slow it down

    Raise MigrationError or ProtoError. The source has not been told: the caller does that.
    """
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            hello = await link.expect(Hello)
            answer, agreement = caps.answer(hello, caps.switched_on(switches) | {caps.SPARSE})
            if agreement.probe and busy:
                raise NoPlaceError("another guest is being received here just now")
            await link.send(answer)
            if not await _answer_probes(link, agreement):
                return None
            return Introduction(link, await link.expect(GuestInfo), agreement)
    except TimeoutError:
        raise PeerLost(
            f"{link.peer_name} did not describe a guest in {HANDSHAKE_SECONDS:g} s"
        ) from None


async def _answer_probes(link: Link, agreement: caps.Agreement) -> bool:
    """Answer each PROBE with the number of bytes so far. Return whether a guest follows."""
    received = 0
    while True:
        try:
            if await link.first_type() is not MessageType.PROBE:
                return True
            if not agreement.probe:
                raise PeerError("PROBE came, though probe was not agreed on")
            received += len((await link.expect(Probe)).padding)
            if received > MAX_PROBE:
                raise PeerError(f"more than {MAX_PROBE} bytes of PROBE came")
            await link.send(Probed(received))
        except PeerLost:
            if not agreement.probe:
                raise
            return False  # it knows what it wanted to know
