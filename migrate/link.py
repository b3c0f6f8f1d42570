"""The connection: the only file that sees a transport.

What it guarantees: `send` returns when the frame is queued and the queue is below its bound; a
frame is private memory that nobody changes after it was given here (a transport keeps a reference
to what it is given). `receive` gives frames in order; reading stops while RECEIVE_AHEAD frames
(or bytes) wait. A peer that says nothing for `peer_timeout` seconds is lost; both sides send PINGs,
so a living peer never is. The kernel watches too (keepalive, TCP_USER_TIMEOUT): it sees a dead peer
where we do not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import socket
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar, cast

from migrate import tls
from migrate.errors import (
    MigrationError,
    PeerError,
    PeerLost,
    peer_error,
)
from migrate.lookup import Endpoint, name_of
from migrate.output import printable
from migrate.secure import RECORD_TYPES, Secured
from proto import ErrorCode, ProtoError
from proto.errors import MessageError
from proto.frames import Frame
from proto.messages import MAX_CONTROL, MAX_TEXT, Error, Message, MessageType, Ping, Pong, unpack
from proto.session import Role, Session, State

# Both loops get explicit limits: uvloop's own high-water mark is 64 KiB with a low one of 16
# bytes, a bubble per frame on any real round-trip time.
SEND_HIGH = 4 << 20
SEND_LOW_SHARE = 4
# Reading stops while so many bytes, or so many frames, wait to be received.
RECEIVE_AHEAD_BYTES = 3 << 20
RECEIVE_AHEAD = 16
# Until the peer is let in, or where it is the destination: of these many may wait at once.
EARLY_AHEAD_BYTES = 4 * MAX_CONTROL
SOCKET_TIMEOUT = 30.0
# Inside a frame a peer sends so many bytes per second at least: who sends one now and then is not
# silent, and would be listened to for ever.
LEAST_RATE = 256
# In each `peer_timeout` a silent peer is asked so often, by us and by the kernel.
BEATS = 4
# What is heard aside, and costs as much as a frame of pages, is said by hand or now and then. Who
# says more of it in a second wants to keep us from all else.
ASIDE = (MessageType.PING, MessageType.PONG, MessageType.CACHE_SIZE)
MAX_ASIDE = 1000
# What comes when nobody wants to hear it any more is read in pieces of this size.
DROPPED_BYTES = 64 << 10
# TCP_USER_TIMEOUT is an int of milliseconds: 24 days
MAX_USER_TIMEOUT = (1 << 31) - 1
MAX_KEEPALIVE = 32767
# Linux 6.15 has it, Python 3.14 not yet by name; milliseconds between these bounds.
TCP_RTO_MAX_MS = 44
RTO_BOUNDS = 1000, 120_000


# States in which nothing but the handshake is said.
QUIET = (State.START, State.GREETED, State.JOINING, State.FAILED)


T = TypeVar("T")


class RateLimit:
    """Spreads bytes evenly: `rate` bytes per second, 0 for no limit.

    The rate may change at any time, and holds at once, for those who wait already too.
    """

    BURST_SECONDS = 0.02

    def __init__(self, rate: int = 0) -> None:
        self._rate = rate
        self._asked = 0.0  # bytes that somebody wanted to send
        self._gone = 0.0  # bytes that might have gone by `_seen_at`
        self._seen_at = 0.0
        self._changed = asyncio.Event()

    @property
    def rate(self) -> int:
        return self._rate

    @rate.setter
    def rate(self, rate: int) -> None:
        self._look()
        if not rate:
            self._gone = self._asked  # who waits is let go
        self._rate = rate
        self._changed.set()
        self._changed = asyncio.Event()

    def _look(self) -> None:
        """Lets go what has had its time since the last look; a pause saves up no more than a
        burst."""
        now = time.monotonic()
        gone = self._gone + self._rate * (now - self._seen_at)
        self._gone = min(gone, self._asked + self._rate * self.BURST_SECONDS)
        self._seen_at = now

    async def take(self, count: int) -> None:
        """Returns when `count` bytes may go."""
        if not self._rate:
            return
        self._look()
        self._asked += count
        mine = self._asked
        while self._rate and mine - self._gone >= 1:
            await self._wait((mine - self._gone) / self._rate)
            self._look()

    async def _wait(self, seconds: float) -> None:
        """For so long, or until the rate changes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()


class Link(asyncio.BufferedProtocol):
    """One connection to the peer, speaking frames."""

    def __init__(self, role: Role, peer_timeout: float = SOCKET_TIMEOUT) -> None:
        self.session = Session(role)
        self.limit = RateLimit()
        self.congestion = ""
        """How TCP finds its pace; "" leaves it to the system."""
        self.peer_timeout = peer_timeout
        self.sent_bytes = 0
        self.received_bytes = 0
        self.peer_name = ""
        self.far: object = None
        """The peer's address, as a socket has it."""
        self.proved = False
        """It has shown a certificate."""
        self.endpoint: Endpoint | None = None
        """The address that was connected to."""
        self.beside: Callable[[], Awaitable[Link]] | None = None
        """Connects to that very address once more; None: as this link was made."""
        self.exposed = False
        """It leaves this host, and everybody on the way can read it."""
        self._transport: asyncio.Transport | None = None
        self._frames: deque[Frame] = deque()
        self._ahead = 0
        self._ahead_bytes = EARLY_AHEAD_BYTES
        self._fault: Exception | None = None
        self._news = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._closed = asyncio.Event()
        self._reading = True
        self._heard_at = time.monotonic()
        self._frame_began: tuple[float, int] | None = None
        self._aside = 0
        self._aside_since = time.monotonic()
        self._tokens = itertools.count(1)
        self._pings: dict[int, asyncio.Future[float]] = {}
        self._heart: asyncio.TimerHandle | None = None
        self._buffer = memoryview(b"")
        self._deaf: memoryview | None = None
        """Where what nobody wants to hear any more goes."""

    # -- what the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.bound_sending(SEND_HIGH)
        sock = transport.get_extra_info("socket")
        far = transport.get_extra_info("peername")
        self.peer_name, self.far = name_of(far), far
        self.proved = isinstance(transport, Secured)
        self.exposed = not self.proved and tls.another_host(
            transport.get_extra_info("sockname"), far
        )
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            _have_watched(sock, self.peer_timeout)
            if self.congestion:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, self.congestion.encode())
        self._ping_at = time.monotonic() + self.peer_timeout / BEATS
        self._wait_for_beat()

    def bound_sending(self, most: int) -> None:
        """`send` waits while more than so many bytes are queued."""
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.set_write_buffer_limits(high=most, low=most // SEND_LOW_SHARE)

    def share_receiving(self, channels: int) -> None:
        """The peer is let in, over so many connections: all of them together receive ahead what
        one would."""
        self.session.reader.share(channels)
        self._ahead_bytes = RECEIVE_AHEAD_BYTES // channels

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._deaf is not None:
            return self._deaf
        self._buffer = self.session.reader.get_buffer()
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._deaf is not None:
            return
        if not self.received_bytes and self._buffer[0] in RECORD_TYPES:
            self._fail(tls.tls_there(self.session.role))
        self.session.reader.received(nbytes)
        self.received_bytes += nbytes
        self._heard_at = time.monotonic()
        if self.session.reader.has_news:
            self._parse()
        if not self.session.reader.partial or not self._reading:
            self._frame_began = None
        elif self._frame_began is None:
            self._frame_began = self._heard_at, self.received_bytes

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        fault: Exception = PeerLost(f"the connection to {self.peer_name} broke: {exc}")
        if isinstance(exc, MigrationError):
            fault = exc
        elif exc is None:
            fault = PeerLost(f"{self.peer_name} closed the connection")
            with contextlib.suppress(ProtoError):
                self._parse()
        self._fail(fault)
        self._closed.set()
        self._stop_heart()
        self.session.reader.drop()  # after a fault no frame is cut any more
        self._buffer = memoryview(b"")

    def _stop_heart(self) -> None:
        if self._heart is not None:
            self._heart.cancel()
            self._heart = None

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # -- frames

    def _parse(self) -> None:
        """Cuts frames as long as there is room to keep them."""
        try:
            while not self._full and self._fault is None:
                frame = self.session.next_frame()
                if frame is None:
                    break
                self._count(frame.type)
                if frame.type in (MessageType.PING, MessageType.PONG):
                    self._ping_pong(frame)
                    continue
                self._frames.append(frame)
                self._ahead += frame.size
                self._news.set()
        except ProtoError as error:
            self._fail(error)
        self._throttle()

    def _count(self, kind: MessageType) -> None:
        """Raises MessageError where too much is said that moves nothing."""
        if kind not in ASIDE:
            return
        self._aside += 1
        if self._aside > MAX_ASIDE:
            now = time.monotonic()
            if now - self._aside_since < 1:
                raise MessageError(f"{kind.name}, one of more than {MAX_ASIDE} in a second")
            self._aside, self._aside_since = 0, now

    @property
    def _full(self) -> bool:
        return self._ahead >= self._ahead_bytes or len(self._frames) >= RECEIVE_AHEAD

    def _throttle(self) -> None:
        # After a fault nobody takes what still comes: reading on would fill the reader's arena.
        full = self._full or self._fault is not None
        if self._transport is None or self._transport.is_closing() or full != self._reading:
            return
        self._reading = not full
        if full:
            self._frame_began = None
            self._transport.pause_reading()
        else:
            self._heard_at = time.monotonic()
            self._transport.resume_reading()

    def fail_with(self, work: asyncio.Future[Any]) -> None:
        """A done callback: what work on a frame has raised ends the waiting for the next one."""
        if not work.cancelled() and isinstance(error := work.exception(), Exception):
            self._fail(error)

    def _fail(self, fault: Exception) -> None:
        if self._fault is None:
            self._fault = fault
        self._news.set()
        self._writable.set()
        for waiter in self._pings.values():
            if not waiter.done():
                waiter.set_exception(fault)

    async def receive(self) -> Frame:
        """The next frame; release it when its body is no longer needed.

        Raises PeerLost where the connection ended, RemoteError where the peer broke the protocol.
        """
        await self.first_type()
        frame = self._frames.popleft()
        self._ahead -= frame.size
        self._parse()
        return frame

    async def first_type(self) -> MessageType:
        """The type of the next frame, which is left to be received. Raises as `receive` does."""
        while not self._frames:
            if self._fault is not None:
                raise self._fault
            self._news.clear()
            await self._news.wait()
        return self._frames[0].type

    async def ended(self) -> None:
        """Returns when nothing more will come; what came before can still be received.

        For who does not receive meanwhile: it sees no end behind RECEIVE_AHEAD frames.
        """
        while self._fault is None:
            self._news.clear()
            await self._news.wait()

    async def receive_message(self) -> Message:
        """The next message that is no batch of pages, read and released."""
        frame = await self.receive()
        try:
            return unpack(frame.type, frame.head)
        finally:
            frame.release()

    async def expect(self, kind: type[T]) -> T:
        """The next message, which is of this kind. Raises PeerError, or what an ERROR says."""
        message = await self.receive_message()
        if isinstance(message, Error):
            raise peer_error(message)
        if not isinstance(message, kind):
            raise PeerError(f"{type(message).__name__} came where {kind.__name__} was due")
        return message

    async def send(self, message: Message) -> None:
        """Sends a message now, past the rate limit: it is small."""
        self._write_now(self.session.send(message))
        await self._drain()

    async def send_batch(self, head: memoryview, data: memoryview) -> None:
        """Sends a sealed PAGES frame and its raw pages, at the pace of the rate limit."""
        if self.limit.rate:
            await self.limit.take(len(head) + len(data))
        self.session.send_pages()
        self._write_now(head)
        if data:
            self._write_now(data)
        await self._drain()

    async def give_reason(self, code: ErrorCode, reason: str) -> None:
        """Tells the peer why we hang up, if it can still hear; never raises for that."""
        with contextlib.suppress(ProtoError, PeerLost, TimeoutError):
            async with asyncio.timeout(1):
                await self.send(Error(code, printable(reason, MAX_TEXT)))

    async def _drain(self) -> None:
        if not self._writable.is_set():
            await self._writable.wait()
        if self._fault is not None and isinstance(self._fault, PeerLost):
            raise self._fault

    def _write_now(self, frame: bytearray | memoryview) -> None:
        if self._transport is None or self._transport.is_closing():
            raise self._fault or PeerLost("the connection is closed")
        self.sent_bytes += len(frame)
        self._transport.write(frame)

    # -- liveness

    def _wait_for_beat(self) -> None:
        """It comes when something is due, so that a silence is seen as it becomes too long."""
        if self._fault is not None or self._closed.is_set():
            return
        lost_at = self._heard_at + self.peer_timeout if self._reading else math.inf
        due = min(self._ping_at, lost_at)
        left = max(due - time.monotonic(), 0)
        self._heart = asyncio.get_running_loop().call_later(left, self._beat, due)

    def _beat(self, due: float) -> None:
        """Says that we live, and ends a link on which nothing came for `peer_timeout` seconds.

        While we do not read, the peer's silence is ours; but it must go on hearing of us.
        """
        interval = self.peer_timeout / BEATS
        now = time.monotonic()
        if now - due > interval:
            # We were stopped ourselves: what the peer said meanwhile is still unread.
            self._heard_at, self._frame_began = now, None
        silence = now - self._heard_at
        if self._trickles(now):
            self._lose(f"{self.peer_name} sends less than {LEAST_RATE} bytes a second")
        elif self._reading and silence >= self.peer_timeout:
            self._lose(f"{self.peer_name} has said nothing for {silence:.3g} s")
        elif now >= self._ping_at:
            self._ping_at = now + interval
            self._ping()
        self._wait_for_beat()

    def _lose(self, why: str) -> None:
        self._fail(PeerLost(why))
        self.abort()

    def _trickles(self, now: float) -> bool:
        """Whether a frame that was begun comes so slowly that it is never meant to be whole."""
        if self._frame_began is None or not self._reading:
            return False
        began, had = self._frame_began
        seconds = now - began
        return seconds > self.peer_timeout and self.received_bytes - had < LEAST_RATE * seconds

    def _ping(self) -> None:
        # What waits to be sent will say as much, and a peer that takes nothing gets no queue.
        if self.session.state not in QUIET and self._writable.is_set():
            with contextlib.suppress(ProtoError, PeerLost):
                self._write_now(self.session.send(Ping(next(self._tokens))))

    def _ping_pong(self, frame: Frame) -> None:
        message = unpack(frame.type, frame.head)
        frame.release()
        if isinstance(message, Ping):
            if not self._writable.is_set():
                return  # a peer that asks and does not read gets no queue of answers
            with contextlib.suppress(ProtoError, PeerLost):
                self._write_now(self.session.send(Pong(message.token)))
        elif isinstance(message, Pong):
            waiter = self._pings.pop(message.token, None)
            if waiter is not None and not waiter.done():
                waiter.set_result(time.monotonic())

    async def round_trip(self) -> float:
        """Seconds from a PING to its PONG."""
        token = next(self._tokens)
        waiter = asyncio.get_running_loop().create_future()
        self._pings[token] = waiter
        began = time.monotonic()
        try:
            await self.send(Ping(token))
            answered: float = await waiter
            return answered - began
        finally:
            self._pings.pop(token, None)
            if waiter.done() and not waiter.cancelled():
                waiter.exception()  # nobody may have waited for it
            del waiter

    # -- the end

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def hung_up(self, seconds: float) -> None:
        """Waits until the peer has closed the connection, for so long; what comes is dropped."""
        if self._transport is None:
            return
        self._deaf = memoryview(bytearray(DROPPED_BYTES))
        if not self._transport.is_closing():
            self._transport.resume_reading()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closed.wait()

    async def close(self) -> None:
        """Sends what is queued (for a second at most) and closes; a lost peer is not waited for."""
        self._stop_heart()
        if self._transport is None:
            return
        if isinstance(self._fault, PeerLost):
            self._transport.abort()
        self._transport.close()
        try:
            async with asyncio.timeout(1):
                await self._closed.wait()
        except TimeoutError:
            self._transport.abort()
        # It refers to frames that refer to this link, and to all that waited for it.
        self._fault = PeerLost("the connection is closed")
        self._frames.clear()


async def give_reason_on(links: Iterable[Link], code: ErrorCode, reason: str) -> None:
    """`Link.give_reason` on all channels: nobody knows which of them the peer reads first."""
    await asyncio.gather(*(link.give_reason(code, reason) for link in links))


async def close_all(links: Iterable[Link]) -> None:
    """Closes all channels at once: each may take a second where the peer takes nothing."""
    await asyncio.gather(*(link.close() for link in links), return_exceptions=True)


def _have_watched(sock: socket.socket, timeout: float) -> None:
    """Lets the kernel, too, find that a TCP peer is gone, after so many seconds.

    TCP_USER_TIMEOUT ends what is not acknowledged, or not taken, for so long. Keepalive asks where
    nothing is under way. A link that was down is tried again within a beat of its return, where
    the kernel, left alone, doubles its pauses: down for less than half of the timeout (a beat went
    by before, another may after) it is found again in time. Systems that lack one of these have the
    others, and our own PINGs.
    """
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
