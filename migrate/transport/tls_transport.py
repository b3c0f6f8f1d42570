"""TLS over a connection: between the transport and the protocol that speaks frames.

    Link  <-- clear -->  TlsTransport  <-- records -->  the loop's transport

Why a layer of our own, when asyncio has one and uvloop another:

- A failed handshake of asyncio 3.11 sends no alert, so the peer does not hear what is wrong with
  its certificate. Both layers print faults that they cannot deliver.
- Both queue what is written a second time, before it is encrypted. Here it is encrypted at once, so
  there is one write buffer, the transport's, and its limit is the whole of back-pressure.
- Neither lets us stop reading while TLS itself answers what we read (see `_answer`).

The states:

    SHAKING --handshake done--> [source: VERDICT --ticket, data or time-->] OPEN --> CLOSING
       |                             |                                                  |
       +------------ fault ----------+--> FAILED (the alert leaves) ----> CLOSED <------+

VERDICT is there because in TLS 1.3 a client has finished its handshake before the server has looked
at the client's certificate. The server of ours sends a session ticket when it has accepted it
(RFC 8446, 4.6.1); so the source waits for what the server says first, the ticket or an alert, and
takes a server that sends neither at its silence. Without that, a source would describe its guest to
a destination that has already refused it, and read "connection reset" instead of the reason.

FAILED lasts until the peer has heard why. The alert leaves, and what the peer still sends is read:
the kernel resets a connection that is closed over unread bytes, and a reset may overtake the alert.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, cast

from migrate.errors import ConnectError, MigrationError, PeerLost, TlsError
from migrate.transport.tls import Credentials, is_verdict, no_tls
from migrate.transport.tls_session import TlsSession
from proto.wire.ownership import Role

logger = logging.getLogger(__name__)

# Two round trips, and a signature at each end: as long as a source has for a connection.
TLS_HANDSHAKE_SECONDS = 10.0
# Time for the peer to read why we refuse it.
LINGER_SECONDS = 1.0
# Time for a server to say that it accepts us; one that sends no tickets never does.
VERDICT_SECONDS = 2.0
# One read of the socket, and of clear text at the most.
READ_BYTES = 256 << 10
# In a handshake the peer may be any program, and its messages are small: a chain of certificates.
HANDSHAKE_READ_BYTES = 16 << 10
# The first byte of a record: change_cipher_spec, alert, handshake, application_data
RECORD_TYPES = range(20, 24)
# For a peer that speaks no TLS, and may know this alert: fatal, unexpected_message.
UNEXPECTED_ALERT = bytes.fromhex("15 0303 0002 02 0a")
# For a peer whose address may not connect: fatal, access_denied.
DENIED_ALERT = bytes.fromhex("15 0303 0002 02 31")


class HungUp(ConnectError):  # noqa: N818 - what the peer did, not a kind of exception
    """The connection ended in the handshake, and no reason was given: trying again may help."""


class TlsState(Enum):
    """See the module's docstring."""

    SHAKING = auto()
    VERDICT = auto()
    OPEN = auto()
    CLOSING = auto()
    FAILED = auto()
    CLOSED = auto()


# Takes the place of a protocol that was told that its connection is lost.
_NO_PROTOCOL = asyncio.BufferedProtocol()


def _ignore(_fault: MigrationError | None) -> None:
    """Do nothing: replaces the callback for the end of the handshake."""


class TlsTransport(asyncio.BufferedProtocol, asyncio.Transport):
    """A protocol to the loop's transport, and a transport to `inner`.

    inner -- is connected when the peer is accepted and accepts us; never if that fails
    name  -- that the server's certificate must have; "" for a server
    done  -- called when the handshake ends: with None, or with what is wrong
    """

    def __init__(
        self, credentials: Credentials, inner: asyncio.BufferedProtocol, name: str = "",
        done: Callable[[MigrationError | None], object] = _ignore,
    ) -> None:  # fmt: skip
        super().__init__()
        self.inner = inner
        self._role = credentials.role
        self._done = done
        self._tls = TlsSession(credentials, name)
        self._state = TlsState.SHAKING
        self._raw: asyncio.Transport | None = None
        """The loop's transport; None before there is a connection."""
        self._buffer = memoryview(bytearray(HANDSHAKE_READ_BYTES))
        """Records are received into it."""
        self._heard = False
        """The peer has sent something."""
        self._read_paused = False
        """`inner` wants no more data for now."""
        self._write_paused = False
        """The loop's transport has more to write than its limit."""
        self._answers_wait = False
        """We do not read: TLS answers what we read, and the peer does not take the answers."""
        self._timer: asyncio.TimerHandle | None = None
        """Ends SHAKING, VERDICT or FAILED."""
        self._fault: MigrationError | None = None
        self._settled = asyncio.Event()
        """The handshake has ended, well or with `_fault`."""
        self._lost = asyncio.Event()

    # -- called by the loop's transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = cast(asyncio.Transport, transport)
        self._start_timer(TLS_HANDSHAKE_SECONDS, self._time_out)
        self._shake()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._fault is not None or self._raw is None:
            return  # we read only so that nothing is left unread
        if not self._heard:
            self._heard = True
            self.first_bytes_received()
            if self._buffer[0] not in RECORD_TYPES:
                self._fail(no_tls(self._role), UNEXPECTED_ALERT)
                return
        self._tls.received(self._buffer[:nbytes])
        if self._state is TlsState.SHAKING:
            self._shake()
        if self._state is not TlsState.SHAKING:
            self._read()

    def first_bytes_received(self) -> None:
        """Note that the peer has sent something, whatever it is. For subclasses."""

    def eof_received(self) -> bool:
        if not self._settled.is_set():
            self._fail(
                HungUp(
                    "the connection was closed in the TLS handshake: the other side may have too "
                    "many, or not speak TLS"
                )
            )
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        state, self._state = self._state, TlsState.CLOSED
        if state in (TlsState.OPEN, TlsState.CLOSING):
            self.inner.connection_lost(self._fault or exc)
        elif not self._settled.is_set():
            self._settle(HungUp(f"the connection broke in the TLS handshake: {exc}"))
        self._lost.set()
        # These refer to this transport: all would stay until the garbage collector comes.
        self.inner, self._done, self._buffer = _NO_PROTOCOL, _ignore, memoryview(b"")

    def pause_writing(self) -> None:
        self._write_paused = True
        self.inner.pause_writing()

    def resume_writing(self) -> None:
        self._write_paused = False
        self.inner.resume_writing()
        if self._answers_wait:
            self._answers_wait = False
            asyncio.get_running_loop().call_soon(self._read_on)

    # -- the handshake

    def _shake(self) -> None:
        """Go on with the handshake, as far as what has come allows."""
        try:
            done = self._tls.shake()
        except ssl.SSLError as error:
            self._fail(self._tls.fault(error))
            return
        if not done:
            self._flush()
            return
        self._state = TlsState.VERDICT
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._flush()
        if self._role is Role.DESTINATION:
            self._open()  # it has judged the source's certificate itself
        else:
            self._start_timer(VERDICT_SECONDS, self._open)

    def _open(self) -> None:
        """Connect `inner`: both sides have accepted each other."""
        if self._state is not TlsState.VERDICT:
            return  # the connection was aborted as the timer ended
        self._stop_timer()
        self._state = TlsState.OPEN
        logger.debug("%s with %s", self._tls.ssl_object.version(), self._raw_info("peername"))
        self._settle(None)
        self.inner.connection_made(self)

    def _settle(self, fault: MigrationError | None) -> None:
        self._fault = fault
        self._settled.set()
        self._done(fault)

    def refuse_address(self, transport: asyncio.BaseTransport) -> None:
        """Tell a peer that its address may not connect, and nothing else; instead of
        `connection_made`."""
        self._raw = cast(asyncio.Transport, transport)
        self._fault = TlsError("its address may not connect (--allow)")
        self._settled.set()
        self._hang_up(DENIED_ALERT)

    def _time_out(self) -> None:
        if not self._settled.is_set():
            text = f"the other side did not finish the TLS handshake in {TLS_HANDSHAKE_SECONDS:g} s"
            self._settle(ConnectError(text))
        self.abort()

    def _fail(self, fault: MigrationError, alert: bytes = b"") -> None:
        """End the handshake, and tell the peer; `inner` is never connected.

        alert -- to send; b"": OpenSSL has written one
        """
        logger.debug("TLS with %s failed: %s", self._raw_info("peername"), fault)
        self._settle(fault)
        self._hang_up(alert)

    def _hang_up(self, alert: bytes = b"") -> None:
        """Send the alert, and close once the peer has closed or LINGER_SECONDS are over."""
        self._stop_timer()
        self._state = TlsState.FAILED
        if self._raw is None or self._raw.is_closing():
            return
        if alert:
            self._raw.write(alert)
        else:
            self._flush()
        if self._raw.can_write_eof():
            self._raw.write_eof()
        self._start_timer(LINGER_SECONDS, self.abort)

    def _start_timer(self, seconds: float, call: Callable[[], None]) -> None:
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(seconds, call)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def ready(self) -> None:
        """Wait until both sides have accepted each other.

        Raise TlsError, naming the fault, or ConnectError if the connection broke; it is closed
        then.
        """
        try:
            await self._settled.wait()
            if self._fault is not None:
                await self._lost.wait()
                raise self._fault
        except BaseException:
            self.abort()
            raise

    @property
    def denial(self) -> str:
        """Why the peer, whose certificate is valid, may not bring a guest; "" if it may."""
        return self._tls.denial

    # -- records

    def _flush(self) -> None:
        """Write the records that TLS has made."""
        if self._tls.has_output and self._raw is not None and not self._raw.is_closing():
            self._raw.write(self._tls.take_output())

    def _read(self) -> None:
        """Give `inner` the data that has come, while it wants it."""
        while self.is_reading() and self._state in (TlsState.VERDICT, TlsState.OPEN):
            room = cast(memoryview, self.inner.get_buffer(-1))
            filled, ended, error = self._tls.decrypt(room)
            if error is not None:
                self._break(error)
            if self._state is TlsState.VERDICT and (filled or self._tls.has_ticket):
                self._open()
            if filled and self._state in (TlsState.OPEN, TlsState.CLOSING):
                self.inner.buffer_updated(filled)  # also what came before a fault
            if self._fault is not None:
                return
            if ended:
                self.inner.eof_received()
                self.close()
            self._answer()
            if filled < len(room):
                break

    def _answer(self) -> None:
        """Send what TLS itself has to say, and read on only if the peer takes it.

        RFC 8446, 4.6.3: each KeyUpdate that says update_requested is answered by another, 27 bytes
        for 27 bytes. A peer that asks and hardly reads would fill our write buffer with no bound
        (13 MiB in 150 s, measured). So if TLS answers while the write buffer is above its limit, we
        read no more until the buffer has drained. One read (READ_BYTES) bounds what goes over it.

        Our own pages fill the buffer as a matter of course, and are no reason to stop: a source
        that does not read until they are sent would take a slow path for a lost peer.
        """
        if not self._tls.has_output:
            return
        self._flush()
        if self._write_paused and self._raw is not None and not self._raw.is_closing():
            logger.debug("TLS answers, and %s does not read", self._raw_info("peername"))
            self._answers_wait = True
            self._raw.pause_reading()

    def _break(self, error: ssl.SSLError) -> None:
        """End the connection after an alert, or a record that is none: nothing that comes after it
        can be decrypted."""
        fault: MigrationError = self._tls.fault(error)
        if not self._settled.is_set():
            self._fail(fault)
            return
        if not is_verdict(error):
            # A record was damaged on its way: no fault of the peer, and the migration may resume.
            fault = PeerLost(f"the TLS connection broke: {error.reason or error}")
        self._fault = fault
        self._flush()
        self.abort()

    # -- called by `inner`

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "peercert":
            return self._tls.ssl_object.getpeercert()
        if name == "ssl_object":
            return self._tls.ssl_object
        return self._raw_info(name, default)

    def _raw_info(self, name: str, default: Any = None) -> Any:
        return self._raw.get_extra_info(name, default) if self._raw is not None else default

    def is_closing(self) -> bool:
        over = self._state in (TlsState.CLOSING, TlsState.FAILED, TlsState.CLOSED)
        return over or self._raw is None or self._raw.is_closing()

    def is_reading(self) -> bool:
        return not self._read_paused and not self._answers_wait

    def pause_reading(self) -> None:
        self._read_paused = True
        if self._raw is not None and not self._raw.is_closing():
            self._raw.pause_reading()

    def resume_reading(self) -> None:
        """Give `inner` what is left of the data before the pause, then read on.

        Not at once: `inner` calls this while it is handling data itself.
        """
        self._read_paused = False
        asyncio.get_running_loop().call_soon(self._read_on)

    def _read_on(self) -> None:
        if not self.is_reading() or self._raw is None or self._raw.is_closing():
            return
        self._read()
        if self.is_reading() and not self._raw.is_closing():
            self._raw.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if self._raw is not None:
            self._raw.set_write_buffer_limits(high=high, low=low)

    def get_write_buffer_size(self) -> int:
        return self._raw.get_write_buffer_size() if self._raw is not None else 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send. The data may change as soon as this returns."""
        if self.is_closing():
            return
        try:
            self._tls.encrypt(data)
        except ssl.SSLError as error:
            self._break(error)
            return
        self._flush()

    def close(self) -> None:
        """Tell the peer that nothing more will come, and close when all is sent."""
        if self._raw is None or self.is_closing():
            return
        if self._state is not TlsState.OPEN:
            self.abort()
            return
        self._state = TlsState.CLOSING
        self._tls.close_notify()
        self._flush()
        self._raw.close()

    def abort(self) -> None:
        if self._state is TlsState.OPEN:
            self._state = TlsState.CLOSING
        elif self._state in (TlsState.SHAKING, TlsState.VERDICT):
            self._state = TlsState.FAILED
        if self._raw is not None:
            self._raw.abort()
