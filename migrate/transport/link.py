"""One connection to the peer, speaking frames: the only module that sees a transport.

    send, send_batch -> write buffer -> transport (plain, or TlsTransport) -> the peer
    receive  <- frames that wait <- FrameReader's arena <- transport       <- the peer

What a Link guarantees:

- **Order.** Frames arrive whole and in order, or the link ends with a fault. What came before the
  fault can still be received: the peer's last message is often the reason why it hangs up.
- **Back-pressure, both ways.** `send` returns once the frame is in the write buffer and the buffer
  is below its limit, so a slow peer stops its sender, at 4 MiB. Reading stops while RECEIVE_AHEAD
  frames or RECEIVE_AHEAD_BYTES wait to be received, so a slow receiver fills the kernel's buffers,
  closes the TCP window, and stops the peer's sender.
- **Liveness.** A peer that sends nothing for `peer_timeout` seconds is lost. Both sides send PINGs,
  so one that is there never is (see migrate.transport.liveness).
- **Legal messages only.** The Session refuses a message that its state does not allow, in either
  direction, before it is sent or handed out. A sender whose peer has given up meanwhile gets the
  peer's reason, though no one has received it yet.

Who owns memory:

- A frame that is given to `send_batch` belongs to the link: it must not change afterwards. A
  transport keeps a reference to what it is given, not a copy, and a guest goes on writing. So
  guest memory itself is never sent, but a private copy that the encoder has made.
- A frame that `receive` returns is a view of the reader's arena. It stays valid until it is
  released, by Frame.release; until then its arena is not reused.

The rate limit is applied here to batches alone: what is said beside them is small, and must not
wait behind a limit that the user has set for the guest's memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar, cast

from migrate.errors import MigrationError, PeerError, PeerLost, peer_error
from migrate.output import printable
from migrate.transport import keepalive, networks, tls
from migrate.transport.liveness import Liveness
from migrate.transport.name_lookup import Endpoint, name_of
from migrate.transport.pings import Pings
from migrate.transport.rate_limit import RateLimit
from migrate.transport.receive_queue import RECEIVE_AHEAD_BYTES, AsideLimit, ReceiveQueue
from migrate.transport.tls_transport import RECORD_TYPES, TlsTransport
from proto import ErrorCode, ProtoError
from proto.wire.frames import HEADER_BYTES, Frame
from proto.wire.messages import (
    MAX_TEXT,
    TYPE_OF,
    Error,
    Message,
    MessageType,
    Ping,
    Pong,
    unpack,
)
from proto.wire.session import Role, Session, State

# The default of --peer-timeout, in seconds.
PEER_TIMEOUT = 30.0
# The write buffer's limit, about four batches, and the share of it below which sending goes on.
# Both loops get explicit limits: uvloop's own are 64 KiB and 16 bytes, so the socket would run dry
# for a moment after each frame of 1 MiB.
SEND_HIGH = 4 << 20
SEND_LOW_SHARE = 4
# Input that we discard is read in pieces of this size.
DISCARD_BYTES = 64 << 10
# Time for a last message to leave: the reason why we hang up, or what is still buffered.
FAREWELL_SECONDS = 1.0
# States in which nothing but the handshake may be sent.
QUIET = (State.START, State.GREETED, State.JOINING, State.FAILED)

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Link(asyncio.BufferedProtocol):
    """One connection to the peer.

    role         -- of this side
    peer_timeout -- seconds of silence after which the peer is lost
    congestion   -- the TCP congestion control to use; "" leaves it to the system
    """

    def __init__(
        self, role: Role, peer_timeout: float = PEER_TIMEOUT, congestion: str = ""
    ) -> None:
        self.session = Session(role)
        self.limit = RateLimit()
        """Shared by all channels of a migration."""
        self.sent_bytes = 0
        self.received_bytes = 0
        self.peer_name = ""
        """HOST:PORT, for people."""
        self.peer_address: object = None
        """The peer's address, as a socket gives it."""
        self.authenticated = False
        """The peer has proved who it is, with a certificate."""
        self.exposed = False
        """The connection leaves this host unencrypted."""
        self.endpoint: Endpoint | None = None
        """The address that we have connected to."""
        self.redial: Callable[[], Awaitable[Link]] | None = None
        """Connects to `endpoint` once more: another address of the same name may be another
        machine. None if only the caller knows how this link was made."""
        self._peer_timeout = peer_timeout
        self._congestion = congestion
        self._transport: asyncio.Transport | None = None
        self._frames = ReceiveQueue()
        """Frames that wait to be received."""
        self._fault: Exception | None = None
        """Why the link has ended; None while it goes on."""
        self._changed = asyncio.Event()
        """A frame or a fault has come."""
        self._writable = asyncio.Event()
        self._writable.set()
        self._closed = asyncio.Event()
        self._reading = True
        self._aside = AsideLimit(time.monotonic())
        self._traced = logger.isEnabledFor(logging.DEBUG)
        self._pings = Pings()
        self._liveness = Liveness(peer_timeout, time.monotonic())
        self._timer: asyncio.TimerHandle | None = None
        """The next beat of `_liveness`."""
        self._buffer = memoryview(b"")
        """The memory that the transport was given last to receive into."""
        self._discard_buffer: memoryview | None = None
        """Scratch buffer for input that we discard."""

    @property
    def is_reading(self) -> bool:
        """Whether we take what the peer sends; False while too much waits to be received."""
        return self._reading

    @property
    def is_writable(self) -> bool:
        """Whether the write buffer is below its limit; else `send` waits."""
        return self._writable.is_set()

    @property
    def waiting_bytes(self) -> int:
        """Bytes of frames that wait to be received."""
        return self._frames.bytes

    @property
    def write_buffer_size(self) -> int:
        """Bytes that were sent and have not left this process."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    # -- called by the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.limit_write_buffer(SEND_HIGH)
        self.peer_address = transport.get_extra_info("peername")
        self.peer_name = name_of(self.peer_address)
        self.authenticated = isinstance(transport, TlsTransport)
        self.exposed = not self.authenticated and networks.leaves_host(
            transport.get_extra_info("sockname"), self.peer_address
        )
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            keepalive.watch(sock, self._peer_timeout)
            if self._congestion:
                name = self._congestion.encode()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
        logger.debug("connected to %s%s", self.peer_name, ", TLS" * self.authenticated)
        self._liveness.begin(time.monotonic())
        self._schedule_beat()

    def limit_write_buffer(self, high: int) -> None:
        """Have `send` wait while more than `high` bytes are in the write buffer."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.set_write_buffer_limits(high=high, low=high // SEND_LOW_SHARE)

    def share_receiving(self, channels: int, *, compressed: bool = False) -> None:
        """Let pages come: the peer is admitted, over `channels` channels.

        All channels together receive ahead, and hold in arenas, what a single one would.

        compressed -- batches may be compressed
        """
        self.session.reader.compressed = compressed
        self.session.reader.limit_bodies(channels)
        self._frames.limit = RECEIVE_AHEAD_BYTES // channels

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._discard_buffer is not None:
            return self._discard_buffer
        self._buffer = self.session.reader.get_buffer()
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._discard_buffer is not None:
            return
        if not self.received_bytes and self._buffer[0] in RECORD_TYPES:
            self._fail(tls.tls_there(self.session.role))
        reader = self.session.reader
        reader.received(nbytes)
        self.received_bytes += nbytes
        now = time.monotonic()
        if reader.has_news:
            self._parse()
        self._liveness.heard(now, self.received_bytes, in_frame=bool(reader.partial))

    def eof_received(self) -> bool:
        return False  # close: neither side ever half-closes

    def connection_lost(self, exc: Exception | None) -> None:
        fault: Exception = PeerLost(f"the connection to {self.peer_name} broke: {exc}")
        if isinstance(exc, MigrationError):
            fault = exc
        elif exc is None:
            fault = PeerLost(f"{self.peer_name} closed the connection")
            with contextlib.suppress(ProtoError):
                self._parse()
        logger.debug("disconnected: %s", fault)
        self._fail(fault)
        self._closed.set()
        self._stop_timer()
        self.session.reader.discard()  # after a fault no frame is cut any more
        self._buffer = memoryview(b"")

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # -- frames

    def _parse(self) -> None:
        """Cut the received bytes into frames, until too many wait to be received."""
        try:
            while not self._frames.is_full and self._fault is None:
                frame = self.session.next_frame()
                if frame is None:
                    break
                if self._traced:
                    self._trace("<", frame.type, frame.size)
                self._aside.count(frame.type, time.monotonic())
                if frame.type in (MessageType.PING, MessageType.PONG):
                    self._answer_ping(frame)
                    continue
                self._frames.put(frame)
                self._changed.set()
        except ProtoError as error:
            self._fail(error)
        self._pause_or_resume_reading()

    def _pause_or_resume_reading(self) -> None:
        """Read only while there is room for what comes.

        After a fault nothing is received any more: reading on would only fill the arena.
        """
        stop = self._frames.is_full or self._fault is not None
        if self._transport is None or self._transport.is_closing() or stop != self._reading:
            return
        self._reading = not stop
        if stop:
            self._liveness.pause()
            self._transport.pause_reading()
        else:
            self._liveness.resume(time.monotonic())
            self._transport.resume_reading()

    def fail_with(self, work: asyncio.Future[Any]) -> None:
        """End the link with what `work` on one of its frames has raised. For add_done_callback."""
        if not work.cancelled() and isinstance(error := work.exception(), Exception):
            self._fail(error)

    def _fail(self, fault: Exception) -> None:
        """End the link. Receivers, senders and waiters for a PONG get the first fault."""
        if self._fault is None:
            self._fault = fault
        self._changed.set()
        self._writable.set()
        self._pings.fail(fault)

    async def receive(self) -> Frame:
        """Return the next frame. The caller releases it when its body is no longer needed.

        Raise PeerLost if the connection has ended, RemoteError if the peer broke the protocol.
        """
        await self.first_type()
        frame = self._frames.take()
        self._parse()
        return frame

    async def first_type(self) -> MessageType:
        """Return the type of the next frame, which is left to be received. Raise as `receive`."""
        while not self._frames:
            if self._fault is not None:
                raise self._fault
            self._changed.clear()
            await self._changed.wait()
        return self._frames.first_type

    async def ended(self) -> None:
        """Wait until nothing more will come. What came before can still be received.

        For callers that are not receiving. The end is not seen behind RECEIVE_AHEAD frames.
        """
        while self._fault is None:
            self._changed.clear()
            await self._changed.wait()

    async def receive_message(self) -> Message:
        """Return the next message; it must not be a batch of pages. Raise as `receive`."""
        frame = await self.receive()
        try:
            return unpack(frame.type, frame.head)
        finally:
            frame.release()

    async def expect(self, kind: type[T]) -> T:
        """Return the next message, which must be of this kind. Raise as `receive` and `expect`."""
        return expect(await self.receive_message(), kind)

    async def send(self, message: Message) -> None:
        """Send a message, without regard to the rate limit; wait while the write buffer is full.

        Raise PeerLost if the connection has ended, what the peer's ERROR says if it has given up,
        LocalError if the state forbids the message.
        """
        self._send_now(message)
        await self._drain()

    async def send_batch(self, head: memoryview, data: memoryview) -> None:
        """Send a sealed PAGES frame and its raw pages, at the pace of the rate limit.

        Both belong to the link from here on. Raise as `send`.
        """
        if self.limit.rate:
            await self.limit.take(len(head) + len(data))
        self._check_peer()
        self.session.send_pages()
        if self._traced:
            self._trace(">", MessageType.PAGES, len(head) + len(data) - HEADER_BYTES)
        self._write_now(head)
        if data:
            self._write_now(data)
        await self._drain()

    async def give_reason(self, code: ErrorCode, reason: str) -> None:
        """Tell the peer why we hang up, if it can still hear; never raise for that."""
        with contextlib.suppress(ProtoError, MigrationError, TimeoutError):
            async with asyncio.timeout(FAREWELL_SECONDS):
                await self.send(Error(code, printable(reason, MAX_TEXT)))

    async def _drain(self) -> None:
        """Wait until the write buffer is below its limit. Raise PeerLost."""
        if not self._writable.is_set():
            await self._writable.wait()
        if self._fault is not None and isinstance(self._fault, PeerLost):
            raise self._fault

    def _check_peer(self) -> None:
        """Raise what the peer's ERROR says, if one has come: nothing can be sent any more."""
        if (frame := self._frames.error) is not None:
            raise peer_error(cast(Error, unpack(frame.type, frame.head)))

    def _send_now(self, message: Message) -> None:
        self._check_peer()
        frame = self.session.send(message)
        if self._traced:
            self._trace(">", TYPE_OF[type(message)], len(frame) - HEADER_BYTES)
        self._write_now(frame)

    def _write_now(self, frame: bytearray | memoryview) -> None:
        """Hand bytes to the transport, whatever waits there already. Raise PeerLost."""
        if self._transport is None or self._transport.is_closing():
            raise self._fault or PeerLost("the connection is closed")
        self.sent_bytes += len(frame)
        self._transport.write(frame)

    def _trace(self, direction: str, kind: MessageType, size: int) -> None:
        """Log a frame's type and the size of its body, never its contents: they have the token."""
        logger.debug("%s %s %s %d bytes", direction, self.peer_name, kind.name, size)

    # -- liveness

    def _schedule_beat(self) -> None:
        if self._fault is not None or self._closed.is_set():
            return
        due = self._liveness.next_beat()
        left = max(due - time.monotonic(), 0)
        self._timer = asyncio.get_running_loop().call_later(left, self._beat, due)

    def _beat(self, due: float) -> None:
        """End a link whose peer is lost; else send a PING if one is due."""
        now = time.monotonic()
        if why := self._liveness.judge(due, now, self.received_bytes):
            self._fail(PeerLost(f"{self.peer_name} {why}"))
            self.abort()
        elif self._liveness.take_ping(now):
            self._ping()
        self._schedule_beat()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ping(self) -> None:
        """Send a PING, unless the write buffer is full: what is in it shows as well that we live,
        and a peer that reads nothing gets no queue of PINGs."""
        if self.session.state not in QUIET and self._writable.is_set():
            with contextlib.suppress(ProtoError, MigrationError):
                self._send_now(Ping(self._pings.next_token()))

    def _answer_ping(self, frame: Frame) -> None:
        """Answer a PING; tell the waiter of a PONG."""
        message = unpack(frame.type, frame.head)
        frame.release()
        if isinstance(message, Ping):
            if not self._writable.is_set():
                return  # a peer that asks and does not read gets no queue of answers
            with contextlib.suppress(ProtoError, MigrationError):
                self._send_now(Pong(message.token))
        elif isinstance(message, Pong):
            self._pings.answered(message.token, time.monotonic())

    async def round_trip(self) -> float:
        """Return the seconds from a PING to its PONG. Raise as `receive` and `send`.

        Raises PeerLost if no PONG comes for as long as the peer may be silent.
        """
        token = self._pings.next_token()
        waiter = self._pings.expect(token)
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._peer_timeout):
                await self.send(Ping(token))
                return await waiter - began
        except TimeoutError:
            raise PeerLost(
                f"{self.peer_name} has not answered a PING in {self._peer_timeout:g} s"
            ) from None
        finally:
            self._pings.forget(token)
            if waiter.done() and not waiter.cancelled():
                waiter.exception()  # `send` may have raised: nothing else retrieves it
            del waiter

    # -- the end

    def abort(self) -> None:
        """Close the connection at once; what is buffered is lost."""
        if self._transport is not None:
            self._transport.abort()

    async def until_peer_closes(self, seconds: float) -> None:
        """Wait until the peer has closed the connection, or for that long; discard what comes.

        The kernel answers data that comes after `close`, or is unread by then, with a reset, and
        the reset would overtake the reason that we have just sent.
        """
        if self._transport is None:
            return
        self._discard_buffer = memoryview(bytearray(DISCARD_BYTES))
        if not self._transport.is_closing():
            self._transport.resume_reading()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closed.wait()

    async def close(self) -> None:
        """Send what is buffered, for FAREWELL_SECONDS at most, and close.

        A lost peer is not waited for. Frames that were not received are gone afterwards.
        """
        self._stop_timer()
        if self._transport is None:
            return
        if isinstance(self._fault, PeerLost):
            self._transport.abort()
        self._transport.close()
        try:
            async with asyncio.timeout(FAREWELL_SECONDS):
                await self._closed.wait()
        except TimeoutError:
            self._transport.abort()
        # The fault's traceback refers to frames that refer to this link, and to all its callers.
        self._fault = PeerLost("the connection is closed")
        self._frames.clear()


def expect(message: Message, kind: type[T]) -> T:
    """Return the message if it is of this kind.

    Raise what an ERROR says, or PeerError for any other message.
    """
    if isinstance(message, Error):
        raise peer_error(message)
    if not isinstance(message, kind):
        raise PeerError(f"unexpected {type(message).__name__}; expected {kind.__name__}")
    return message


async def give_reason_on(links: Iterable[Link], code: ErrorCode, reason: str) -> None:
    """Tell the peer why we hang up, on all channels: it may read any of them first."""
    await asyncio.gather(*(link.give_reason(code, reason) for link in links))


async def close_all(links: Iterable[Link]) -> None:
    """Close all channels at once: each may take a second if the peer reads nothing."""
    await asyncio.gather(*(link.close() for link in links), return_exceptions=True)
