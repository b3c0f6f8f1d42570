"""The destination's end of a stream: a connection to what loads it.

    StreamReceiver --send--> Loader ====== stream ======> a QEMU that waits (-incoming), or a
            <--on_return, lost-- <======= return path === thread of ours that saves a snapshot

An incoming QEMU does not run its guest before it has the last bytes of the stream, so these are
withheld until GO.
"""

from __future__ import annotations

import asyncio
import select
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol

from migrate.errors import MigrationError
from migrate.qemu.stream.return_path import LOAD_SECONDS, data_of, split
from migrate.runtime.threads import in_thread
from proto.qemu.parts import CommandCode, Reply, pack_command

# An incoming QEMU answers OPEN_RETURN_PATH and PING as soon as it reads them. One that has said
# nothing for this long does not read: with multifd it waits for its other connections.
SILENT_SECONDS = 20.0
# The source's OPEN_RETURN_PATH is among the first commands, right behind the header.
FIRST_BYTES = 4096
# Bounds what is withheld until GO: the last byte of the stream, and the description of the devices,
# which has some 100 KiB.
MAX_WITHHELD = 80 << 20
# The number of our own PING, which asks whether all was loaded. QEMU itself counts from 1.
PROOF = 0x58424D31
# While the socket is full, the sending thread looks this often whether the guest is still wanted.
SEND_POLL_SECONDS = 0.1
ENDED = (
    "has ended before the guest was there (most often it was started with other memory, another "
    "machine type or other devices)"
)


class Fault(Protocol):
    """Makes the error to raise. `reason` says what the loader does or has done: "is gone"."""

    def __call__(self, reason: str, advice: str = ...) -> MigrationError: ...


class Loader:
    """A connection to what loads the stream, made within a running loop.

    fault     -- makes the error to raise; its default advice is where to find out more

    on_return -- called with each message of the return path that is meant for the source
    lost      -- fails when the loader is of no use any more
    failure   -- the value of its SHUT; 0: it has loaded the guest; None: it has not said so yet
    ended     -- set when SHUT has come, or the connection has ended
    """

    def __init__(self, connection: socket.socket, fault: Fault) -> None:
        """connection -- does not block"""
        self.on_return: Callable[[bytes], None] = lambda _message: None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.failure: int | None = None
        self.ended = asyncio.Event()
        self._connection = connection
        self._fault = fault
        self._poll = select.poll()
        self._poll.register(connection, select.POLLOUT)
        self._withheld = bytearray()
        self._first = True
        self._opened_at: float | None = None  # when the return path was asked for
        self._heard = False
        self._proven = asyncio.Event()
        self._closed = False
        self._listening = asyncio.create_task(self._listen())

    # -- to the loader, in a worker thread

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send a piece of the stream. Raises MigrationError if it is not taken, or not wanted."""
        view = memoryview(data)
        if self._first:
            self._first = False
            if pack_command(CommandCode.OPEN_RETURN_PATH) in bytes(view[:FIRST_BYTES]):
                self._opened_at = time.monotonic()
        while view:
            self._check_reads()
            if self._closed:
                raise MigrationError("the guest is not wanted here any more")
            try:
                view = view[self._connection.send(view) :]
            except BlockingIOError:
                self._poll.poll(SEND_POLL_SECONDS * 1e3)
            except OSError as error:
                raise self._fault(f"does not take the guest ({error.strerror})") from None

    def _check_reads(self) -> None:
        """Raise MigrationError if the loader reads nothing: the guest must not wait for that."""
        opened = self._opened_at
        if opened is None or self._heard or time.monotonic() - opened < SILENT_SECONDS:
            return
        raise self._fault(
            "does not read what it is sent",
            "does it wait for further connections? Switch the capabilities multifd and "
            "postcopy-preempt off there",
        )

    def withhold(self, data: bytes) -> None:
        """Keep the end of the stream until `finish`. Raises MigrationError if it is too long."""
        if len(self._withheld) + len(data) > MAX_WITHHELD:
            raise MigrationError(f"the end of the stream is longer than {MAX_WITHHELD} bytes")
        self._withheld += data

    # -- from the loader

    async def _listen(self) -> None:
        loop, rest = asyncio.get_running_loop(), b""
        try:
            while data := await loop.sock_recv(self._connection, 1 << 16):
                messages, rest = split(rest + data)
                for kind, message in messages:
                    self._hear(kind, message)
            reason = ENDED
        except OSError as error:
            reason = f"is gone ({error.strerror})"
        self.ended.set()
        self.fail(reason)

    def fail(self, reason: str) -> None:
        """Fail `lost`. No task has to wait for it: its exception counts as retrieved."""
        if not self.lost.done():
            self.lost.set_exception(self._fault(reason))
            self.lost.exception()

    def _hear(self, kind: int, message: bytes) -> None:
        self._heard = True
        if kind == Reply.PONG and data_of(message) == PROOF.to_bytes(4, "big"):
            self._proven.set()
        elif kind == Reply.SHUT:
            self.failure = int.from_bytes(data_of(message), "big")
            self.ended.set()
        else:
            self.on_return(message)

    async def prove(self, *, return_path: bool) -> None:
        """Return when the loader has loaded all that was sent.

        It obeys commands in their place in the stream: when it answers a PING at the end, it has
        loaded what came before.

        return_path -- whether the stream itself has opened the return path

        Raises MigrationError if it fails, or takes too long.
        """
        commands = b"" if return_path else pack_command(CommandCode.OPEN_RETURN_PATH)
        commands += pack_command(CommandCode.PING, PROOF.to_bytes(4, "big"))
        await in_thread(self.send, commands)
        if self._opened_at is not None and not self._heard:
            await self._proven_within(SILENT_SECONDS)
            self._check_reads()
        await self._proven_within(LOAD_SECONDS)
        if not self._proven.is_set():
            if self.lost.done():
                self.lost.result()
            raise self._fault(f"has not loaded the guest in {LOAD_SECONDS:g} s", "")

    async def _proven_within(self, seconds: float) -> None:
        """Wait until the loader has proven itself or is lost, for `seconds` at most."""
        proven = asyncio.ensure_future(self._proven.wait())
        either: set[asyncio.Future[Any]] = {proven, self.lost}
        try:
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            proven.cancel()

    async def finish(self) -> None:
        """Send what was withheld: the loader may run the guest now. Raises MigrationError."""
        await in_thread(self.send, self._withheld)

    def end_stream(self) -> None:
        """Tell the loader that no more comes."""
        self._connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection. A loader that has not got all of the stream fails."""
        self._closed = True
        self._listening.cancel()
        self._connection.close()
