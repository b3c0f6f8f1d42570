"""Connects to QEMU's control socket, and says why that is not possible."""

from __future__ import annotations

import asyncio
import errno
import socket

from migrate.errors import ConnectError, UsageError
from migrate.transport.address import parse_address
from migrate.transport.connect import check_listener

RETRY_SECONDS = 0.05
# What to do if a stranger may listen.
OWN_PLACE = "have QEMU make its socket in a directory that belongs to its user, or to root alone"
# QEMU is still starting, or its queue of connections is full.
PASSING_ERRORS = (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN)


class ConnectAttempt:
    """The attempt to connect and be greeted; it knows what to say if that takes too long."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fault: OSError | None = None

    async def connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Try to connect until that succeeds or this is cancelled.

        A unix socket connects at once or not at all, so a plain connect(2) does not block. If the
        queue of connections is full, asyncio would take the socket for connected, and uvloop
        would give up; connect(2) says EAGAIN.

        Raises ConnectError if another try would be no use.
        """
        while True:
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            try:
                sock.connect(self._path)
                check_listener(sock, self._path, OWN_PLACE)
                self._fault = None
                return await asyncio.open_unix_connection(sock=sock)
            except OSError as error:
                sock.close()
                self._fault = error
                if error.errno not in PASSING_ERRORS:
                    raise ConnectError(self.failure()) from None
            except (asyncio.CancelledError, ConnectError):
                sock.close()
                raise
            await asyncio.sleep(RETRY_SECONDS)

    def failure(self) -> str:
        """Return a sentence for the user: why there is no connection, or no greeting on it."""
        if self._fault is None or self._fault.errno == errno.EAGAIN:
            return (
                f"no QEMU greets on {self._path}: it serves one client at a time, and another one "
                "is connected (libvirt, a shell, another migration?), or QEMU is stopped: close "
                "that connection, or give QEMU one more -qmp socket for this"
            )
        if self._fault.errno == errno.EACCES:
            return (
                f"the control socket {self._path} is not ours to use: {self._fault.strerror}: do "
                "this as the user that its QEMU runs as, or let this one write to the socket"
            )
        return (
            f"no answer on {self._path}: {self._fault.strerror or self._fault}: does a QEMU "
            "with -qmp unix:PATH,server=on,wait=off run there?"
        )


def control_path(address: str) -> str:
    """Return the path of a QMP socket that is given as PATH or unix:PATH. Raises UsageError."""
    if not address or address.startswith("tcp:"):
        raise UsageError(f"QEMU's control socket {address!r} is not understood: write unix:PATH")
    return parse_address(address if address.startswith("unix:") else f"unix:{address}").path
