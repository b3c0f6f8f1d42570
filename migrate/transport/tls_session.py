"""One TLS session, sans I/O: records in, clear text out, and the reverse.

    received(records) --> [incoming BIO] --> SSLObject --> decrypt(room)
    take_output()    <-- [outgoing BIO] <--           <-- encrypt(data), close_notify, answers

TlsTransport moves the bytes, and decides what a fault means at that point of the connection.
"""

from __future__ import annotations

import contextlib
import ssl
from typing import cast

from migrate.errors import MigrationError
from migrate.output import printable
from migrate.transport.tls import Credentials
from proto.wire.messages import MAX_TEXT
from proto.wire.ownership import Role


class TlsSession:
    """The session of one connection. All methods may raise ssl.SSLError, if not said otherwise.

    name -- that the server's certificate must have; "" for a server
    """

    def __init__(self, credentials: Credentials, name: str) -> None:
        self._credentials = credentials
        self._name = name
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.ssl_object = credentials.context.wrap_bio(
            self._incoming, self._outgoing,
            server_side=credentials.role is Role.DESTINATION, server_hostname=name or None,
        )  # fmt: skip

    @property
    def has_output(self) -> bool:
        """Whether there are records to send."""
        return bool(self._outgoing.pending)

    @property
    def has_ticket(self) -> bool:
        """Whether the server has sent a session ticket: it accepts us (RFC 8446, 4.6.1)."""
        session = self.ssl_object.session
        return session is not None and session.has_ticket

    @property
    def denial(self) -> str:
        """Why the peer, whose certificate is valid, may not bring a guest; "" if it may."""
        try:
            certificate = self.ssl_object.getpeercert() or {}
        except Exception as error:
            # ssl decodes names as UTF-8, and raises UnicodeDecodeError in the middle of it.
            return f"its certificate cannot be read: {printable(str(error), MAX_TEXT // 2)}"
        return self._credentials.denial(certificate)

    def received(self, records: memoryview) -> None:
        """Take bytes that the peer has sent."""
        self._incoming.write(records)

    def take_output(self) -> bytes:
        """Return the records to send, and forget them. Raise nothing."""
        return self._outgoing.read()

    def shake(self) -> bool:
        """Go on with the handshake; return whether it is done."""
        try:
            self.ssl_object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def encrypt(self, data: bytes | bytearray | memoryview) -> None:
        """Make records of the data, which may change as soon as this returns."""
        rest = memoryview(data)
        while rest:
            rest = rest[self.ssl_object.write(rest) :]

    def decrypt(self, room: memoryview) -> tuple[int, bool, ssl.SSLError | None]:
        """Fill `room`. Return how many bytes, whether the peer has said that no more come, and the
        fault that came behind them. Raise nothing: what came before a fault counts."""
        tls, filled, size = self.ssl_object, 0, len(room)
        try:
            while filled < size:
                count = tls.read(size - filled, room[filled:])
                if not count:
                    return filled, True, None
                filled += cast(int, count)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            return filled, True, None
        except ssl.SSLError as error:
            return filled, False, error
        return filled, False, None

    def close_notify(self) -> None:
        """Make the record that says that nothing more will come. Raise nothing."""
        # unwrap raises because it also wants to read the peer's answer, which we do not wait for.
        with contextlib.suppress(ssl.SSLError, ValueError):
            self.ssl_object.unwrap()

    def fault(self, error: ssl.SSLError) -> MigrationError:
        """Return what the user is told of an error. Raise nothing."""
        return self._credentials.fault(error, self._name)
