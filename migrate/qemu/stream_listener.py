"""A socket that a QEMU connects to, to send its migration stream."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket

from migrate.errors import ConnectError, QemuError, UsageError, system_reason
from migrate.files.socket_file import BACKLOG, SocketFile
from migrate.qemu.qmp.machine import POLL_SECONDS, Machine
from migrate.qemu.qmp.stream_pair import STREAM_BYTES
from migrate.transport.address import Address
from migrate.transport.listening_sockets import listening_sockets

# QEMU has noticed by then that its stream was shut down.
NOTICE_SECONDS = 0.5


class StreamListener:
    """Listens for the one connection that QEMU makes for its stream.

    address -- where QEMU connects: with the port that the system chose, if 0 was asked for
    """

    def __init__(self, address: Address, sock: socket.socket, file: SocketFile | None) -> None:
        """file -- of a unix socket; it is removed by `close`, if it is still ours"""
        self.address = address
        self._socket = sock
        self._file = file
        sock.setblocking(False)

    @classmethod
    async def open(cls, where: Address) -> StreamListener:
        """Listen. Raises UsageError, ConnectError if that is not possible."""
        try:
            if where.path:
                file = SocketFile(where.path, "--guest")
                return cls(where, file.socket, file)
            sock = await _one_listening(where)
            return cls(Address(where.host, sock.getsockname()[1]), sock, None)
        except OSError as error:
            raise UsageError(
                f"QEMU cannot be waited for at {where}: {system_reason(error)}"
            ) from None

    async def accept(self, machine: Machine | None) -> socket.socket:
        """Return the connection that QEMU makes.

        machine -- the QEMU that was told to connect; QemuError is raised if it gives up
        """
        coming = asyncio.ensure_future(asyncio.get_running_loop().sock_accept(self._socket))
        try:
            while machine is not None:
                done, _ = await asyncio.wait({coming}, timeout=POLL_SECONDS)
                if done:
                    break
                status = await machine.status()
                if not status.going_on:
                    raise QemuError(f"QEMU does not begin to migrate: {status.error}")
            connection = (await coming)[0]
        finally:
            coming.cancel()
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, STREAM_BYTES)
        return connection

    async def refuse_more(self, stream: socket.socket) -> None:
        """Raise UsageError if QEMU opens more connections than its stream.

        With multifd and postcopy-preempt it sends pages over connections of their own, and opens
        them before it lists its RAM blocks. Its stream is shut down first: QEMU 7.2 may crash, and
        its guest with it, if one of the other connections breaks before the stream does.
        """
        more = select.poll()
        more.register(self._socket, select.POLLIN)
        if more.poll(0):
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
            await asyncio.sleep(NOTICE_SECONDS)
            raise UsageError(
                "QEMU opens more connections than one, which cannot be carried: switch the "
                "capability multifd off, or postcopy-preempt"
            )

    def close(self) -> None:
        """Stop listening. May be called again."""
        self._socket.close()
        if self._file is not None:
            self._file.close()


async def _one_listening(where: Address) -> socket.socket:
    """Return a socket that listens at one address of a host: of IPv4 if there is a choice.

    QEMU makes one connection, to any address that the name has.
    """
    try:
        sockets = await listening_sockets(where, BACKLOG)
    except ConnectError as error:
        raise ConnectError(f"QEMU cannot be waited for at {where}: {error}") from None
    sockets.sort(key=lambda one: one.family != socket.AF_INET)
    for one in sockets[1:]:
        one.close()
    return sockets[0]
