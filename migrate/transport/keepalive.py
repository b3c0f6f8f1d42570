"""Has the kernel, too, find that a TCP peer is gone.

It sees what we cannot: that our bytes are not acknowledged while we are busy, and that a peer is
gone while we do not read. tcp(7) describes the options.

    TCP_USER_TIMEOUT  how long sent bytes may stay unacknowledged, or a window closed
    TCP_KEEPIDLE      after this much idle time, the kernel probes the peer ...
    TCP_KEEPINTVL     ... and again after this, ...
    TCP_KEEPCNT       ... and gives up after so many probes without an answer
    TCP_RTO_MAX_MS    the longest pause between two retransmissions

The last one is for a link that was down and returns. The kernel doubles its pauses up to 2 min, and
so may notice the return much later than the peer timeout. With pauses of at most a beat, a link
that was down for less than half of the timeout is found again in time: a beat had gone by before
the failure, and one more may go by after the return.

A system that lacks an option has the others, and our own PINGs (migrate.transport.liveness).
"""

from __future__ import annotations

import contextlib
import socket
import sys

from migrate.transport.liveness import BEATS

# TCP_USER_TIMEOUT is an int of milliseconds: 24 days.
MAX_USER_TIMEOUT = (1 << 31) - 1
# Linux: MAX_TCP_KEEPIDLE and MAX_TCP_KEEPINTVL, in seconds
MAX_KEEPALIVE = 32767
# Linux 6.15 has it, Python 3.14 not yet by name.
TCP_RTO_MAX_MS = 44
# What Linux takes for it, in milliseconds
RTO_BOUNDS = 1000, 120_000


def watch(sock: socket.socket, timeout: float) -> None:
    """Have the kernel end a TCP connection whose peer is gone for `timeout` seconds."""
    beat = max(1, min(int(timeout / BEATS), MAX_KEEPALIVE))
    options = {
        "TCP_USER_TIMEOUT": int(min(timeout * 1000, MAX_USER_TIMEOUT)),
        "TCP_KEEPIDLE": beat,
        "TCP_KEEPINTVL": beat,
        "TCP_KEEPCNT": BEATS - 1,
    }
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        with contextlib.suppress(OSError, AttributeError):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if sys.platform == "linux":
        least, most = RTO_BOUNDS
        with contextlib.suppress(OSError):
            sock.setsockopt(
                socket.IPPROTO_TCP, TCP_RTO_MAX_MS,
                int(max(least, min(timeout * 1000 / BEATS, most))),
            )  # fmt: skip
