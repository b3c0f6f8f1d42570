"""A destination at the other end of a connection that a test has made, without an acceptor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from migrate.destination.destination import Destination
from migrate.destination.greeting import greet
from migrate.destination.options import DestinationOptions, Placer
from migrate.destination.receiver import Arrival
from migrate.errors import MigrationError, PeerLost, code_of, failure_of
from migrate.transport.link import Link
from proto import ProtoError


async def receive(
    link: Link, placer: Placer, started: Callable[[Destination], object] = lambda _made: None,
    **options: Any,
) -> Arrival:  # fmt: skip
    """Greet the source at the other end of `link`, and receive its guest.

    started -- called with the Destination once the guest is described
    options -- of DestinationOptions
    """
    try:
        introduction = await greet(link, {})
        if introduction is None:
            raise PeerLost("the source only measured the path")
    except (MigrationError, ProtoError) as error:
        failure = failure_of(error, "")
        await link.give_reason(code_of(error, failure), str(error))
        await link.close()
        raise failure or error from error
    except BaseException:
        link.abort()
        await link.close()
        raise
    destination = Destination(introduction, DestinationOptions(placer, **options))
    started(destination)
    return await destination.run()
