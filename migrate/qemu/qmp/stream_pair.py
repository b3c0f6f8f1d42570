"""The pair of sockets over which a QEMU on this host sends or receives its stream."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Awaitable, Callable

# The kernel's default is 208 KiB. With 1 MiB, as far as the system allows it, QEMU and we wait less
# often for each other: the last 767 MiB of a guest took 0.33 s instead of 0.37 s.
STREAM_BYTES = 1 << 20


def stream_pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets for a stream: ours, which does not block, and the other end."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with contextlib.suppress(OSError):
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, STREAM_BYTES)
    return ours, theirs


async def our_end(give: Callable[[socket.socket], Awaitable[None]]) -> socket.socket:
    """Return our end of a pair of sockets once `give` has passed the other end to QEMU.

    give -- Machine.migrate or Machine.incoming; its exceptions are raised
    """
    ours, theirs = stream_pair()
    with theirs:
        try:
            await give(theirs)
        except BaseException:
            ours.close()
            raise
    return ours
