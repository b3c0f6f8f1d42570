"""TLS over a connection: between the transport and the protocol that speaks frames.

    Link  <-- clear -->  Secured  <-- records -->  the loop's transport

asyncio has such a layer, and uvloop another. Neither does here: a failed handshake of asyncio 3.11
says nothing to the peer (no alert leaves), both print what they cannot tell, and both queue what is
written twice. This one encrypts what is written at once, so its bound is the transport's.

A handshake ends in one of two ways. `Secured.ready` returns when the peer has accepted us: in TLS
1.3 the client is through before the server has looked at its certificate, so it waits for what a
server says next, a session ticket. Or it raises what is wrong, after the peer was told: the alert
leaves, and what the peer still sends is read, for a connection that is closed over unread bytes
is reset, and a reset may overtake the alert.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import Any, cast

from migrate.errors import ConnectError, MigrationError, PeerLost, TlsError
from migrate.output import printable
from migrate.tls import Credentials, is_verdict, no_tls
from proto.messages import MAX_TEXT
from proto.ownership import Role

HANDSHAKE_SECONDS = 10.0
# So long the peer may take to hear why, and a server may take to say that it accepts us: one that
# gives no tickets is taken at its silence.
LINGER_SECONDS = 1.0
WELCOME_SECONDS = 2.0
READ_BYTES = 256 << 10
# In a handshake the peer may be anybody, and says little.
SHAKE_BYTES = 16 << 10
# The first byte of a record: change_cipher_spec, alert, handshake, application_data
RECORD_TYPES = range(20, 24)
# For who speaks no TLS and may know this for what it is: a fatal alert, unexpected_message.
UNEXPECTED = bytes.fromhex("15 0303 0002 02 0a")
# For who may not connect at all: a fatal alert, access_denied.
DENIED = bytes.fromhex("15 0303 0002 02 31")


# In place of a protocol that was told that its connection is lost.
_GONE = asyncio.BufferedProtocol()


def _told(_fault: MigrationError | None) -> None:
    """In place of who was told how the handshake ended."""


class HungUp(ConnectError):  # noqa: N818 - what the peer did, not a kind of exception
    """The connection ended in the handshake, and nobody said why: trying again may help."""


class Secured(asyncio.BufferedProtocol, asyncio.Transport):
    """A protocol to the loop's transport, and a transport to `inner`.

    `inner` is told of the connection when the handshake is through and the peer is accepted; where
    it fails, never.

    name -- that the server's certificate must have; nothing for a server
    done -- called with None, or with what is wrong, when the handshake ends
    """

    def __init__(
        self, credentials: Credentials, inner: asyncio.BufferedProtocol, name: str = "",
        done: Callable[[MigrationError | None], object] = lambda _fault: None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.inner = inner
        self._credentials = credentials
        self._name = name
        self._done = done
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = credentials.context.wrap_bio(
            self._incoming, self._outgoing,
            server_side=credentials.role is Role.DESTINATION, server_hostname=name or None,
        )  # fmt: skip
        self._raw: asyncio.Transport | None = None
        self._buffer = memoryview(bytearray(SHAKE_BYTES))
        self._timer: asyncio.TimerHandle | None = None
        self._shaken = self._open = self._closing = self._paused = False
        self._heard = False
        self._fault: MigrationError | None = None
        self._settled = asyncio.Event()
        self._lost = asyncio.Event()

    # -- what the loop's transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = cast(asyncio.Transport, transport)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(HANDSHAKE_SECONDS, self._give_up)
        self._shake()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._fault is not None or self._raw is None:
            return  # read so that it is not left unread
        if not self._heard:
            self._heard = True
            self.first_heard()
            if self._buffer[0] not in RECORD_TYPES:
                self._fail(no_tls(self._credentials.role), UNEXPECTED)
                return
        self._incoming.write(self._buffer[:nbytes])
        if not self._shaken:
            self._shake()
        if self._shaken:
            self._read()

    def first_heard(self) -> None:
        """The peer has said something, whatever it is."""

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
        if self._open:
            fault = self._fault or exc
            self._open = False
            self.inner.connection_lost(fault)
        elif not self._settled.is_set():
            self._settle(HungUp(f"the connection broke in the TLS handshake: {exc}"))
        self._lost.set()
        # These refer to this transport: all would stay until the cycle collector comes.
        self.inner, self._done, self._buffer = _GONE, _told, memoryview(b"")

    def pause_writing(self) -> None:
        self.inner.pause_writing()

    def resume_writing(self) -> None:
        self.inner.resume_writing()

    # -- the handshake

    def _shake(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except ssl.SSLError as error:
            self._fail(self._credentials.fault(error, self._name))
            return
        self._shaken = True
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._flush()
        if self._credentials.role is Role.DESTINATION:
            self._welcome()
        else:
            self._stop_timer()
            self._timer = asyncio.get_running_loop().call_later(WELCOME_SECONDS, self._welcome)

    def _welcome(self) -> None:
        """The peer is accepted, and we are."""
        if not self._settled.is_set():
            self._stop_timer()
            self._open = True
            self._settle(None)
            self.inner.connection_made(self)

    def _settle(self, fault: MigrationError | None) -> None:
        self._fault = fault
        self._settled.set()
        self._done(fault)

    def turn_away(self, transport: asyncio.BaseTransport) -> None:
        """Instead of `connection_made`: nothing is said but that."""
        self._raw = cast(asyncio.Transport, transport)
        self._fault = TlsError("its address may not connect (--allow)")
        self._settled.set()
        self._leave(DENIED)

    def _give_up(self) -> None:
        if not self._settled.is_set():
            text = f"the other side did not finish the TLS handshake in {HANDSHAKE_SECONDS:g} s"
            self._settle(ConnectError(text))
        self.abort()

    def _fail(self, fault: MigrationError, alert: bytes = b"") -> None:
        """Tells the peer, and closes once it has heard; `inner` never hears of it."""
        self._stop_timer()
        self._settle(fault)
        self._leave(alert)

    def _leave(self, alert: bytes = b"") -> None:
        assert self._raw is not None
        self._closing = True
        if not self._raw.is_closing():
            if alert:
                self._raw.write(alert)
            else:
                self._flush()
            if self._raw.can_write_eof():
                self._raw.write_eof()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(LINGER_SECONDS, self.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def ready(self) -> None:
        """Returns when both sides have accepted each other.

        Raises TlsError, naming the fault, or ConnectError where the connection broke; the
        connection is closed then.
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
        """Why the peer, who has proved who it is, may not bring a guest; or ""."""
        try:
            certificate = self._tls.getpeercert() or {}
        except Exception as error:
            return f"its certificate cannot be read: {printable(str(error), MAX_TEXT // 2)}"
        return self._credentials.denial(certificate)

    # -- records

    def _flush(self) -> None:
        if self._outgoing.pending and self._raw is not None and not self._raw.is_closing():
            self._raw.write(self._outgoing.read())

    def _read(self) -> None:
        """Gives on what has come, as long as it is wanted."""
        while not self._paused and not self._closing:
            room = cast(memoryview, self.inner.get_buffer(-1))
            filled, ended = self._decrypt(room)
            if not self._settled.is_set() and (filled or self._ticket_came()):
                self._welcome()
            if filled and self._open:
                self.inner.buffer_updated(filled)  # also what came before a fault
            if self._fault is not None:
                return
            if ended:
                self._close_inner()
            if filled < len(room):
                break
        self._flush()  # what TLS itself has to answer

    def _decrypt(self, room: memoryview) -> tuple[int, bool]:
        """Fills `room`: how far, and whether the peer has said that nothing more will come."""
        filled, size = 0, len(room)
        try:
            while filled < size:
                count = self._tls.read(size - filled, room[filled:])
                if not count:
                    return filled, True
                filled += cast(int, count)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            return filled, True
        except ssl.SSLError as error:
            self._broken(error)
        return filled, False

    def _ticket_came(self) -> bool:
        session = self._tls.session
        return session is not None and session.has_ticket

    def _broken(self, error: ssl.SSLError) -> None:
        """An alert, or a record that is none: nothing after it can be understood."""
        fault: MigrationError = self._credentials.fault(error, self._name)
        if not self._settled.is_set():
            self._fail(fault)
            return
        if not is_verdict(error):
            # A record that was damaged on its way is alert enough: the migration may be resumed.
            fault = PeerLost(f"the TLS connection broke: {error.reason or error}")
        self._fault = fault
        self._flush()
        self.abort()

    def _close_inner(self) -> None:
        self.inner.eof_received()
        self.close()

    # -- what `inner` calls

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "peercert":
            return self._tls.getpeercert()
        if name == "ssl_object":
            return self._tls
        return self._raw.get_extra_info(name, default) if self._raw is not None else default

    def is_closing(self) -> bool:
        return self._closing or self._raw is None or self._raw.is_closing()

    def is_reading(self) -> bool:
        return not self._paused

    def pause_reading(self) -> None:
        self._paused = True
        if self._raw is not None and not self._raw.is_closing():
            self._raw.pause_reading()

    def resume_reading(self) -> None:
        """What was decrypted no further than the pause comes first, but not at once: this is
        called by who takes what came before."""
        self._paused = False
        asyncio.get_running_loop().call_soon(self._resume)

    def _resume(self) -> None:
        if self._paused or self._raw is None or self._raw.is_closing():
            return
        self._read()
        if not self._paused and not self._raw.is_closing():
            self._raw.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if self._raw is not None:
            self._raw.set_write_buffer_limits(high=high, low=low)

    def get_write_buffer_size(self) -> int:
        return self._raw.get_write_buffer_size() if self._raw is not None else 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypts at once: the data may change afterwards."""
        if self.is_closing():
            return
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._tls.write(rest) :]
        except ssl.SSLError as error:
            self._broken(error)
            return
        self._flush()

    def close(self) -> None:
        """Says that nothing more will come, and closes when that is sent."""
        if self._raw is None or self._closing:
            return
        self._closing = True
        # It wants to read the peer's answer, for which nobody waits.
        with contextlib.suppress(ssl.SSLError, ValueError):
            self._tls.unwrap()
        self._flush()
        self._raw.close()

    def abort(self) -> None:
        self._closing = True
        if self._raw is not None:
            self._raw.abort()
