"""The TLS layer without a network, with a peer that sends requests and does not read."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest

from migrate.transport.tls import Credentials
from migrate.transport.tls_transport import TlsTransport
from proto.wire.ownership import Role
from tests.authority import Authority
from tests.tls_peer import TlsClient

# The write limit of the transport, and what it gives in one read.
HIGH, PIECE = 16 << 10, 8 << 10
# A KeyUpdate is a record of this size, and so is the answer.
UPDATE_BYTES = 27


class StalledTransport(asyncio.Transport):
    """A transport that keeps all that is written until the test takes it."""

    def __init__(self, protocol: asyncio.BufferedProtocol) -> None:
        super().__init__()
        self.written = bytearray()
        self.reading = True
        self._protocol = protocol

    def write(self, data: bytes | bytearray | memoryview) -> None:
        before = len(self.written)
        self.written += data
        if before <= HIGH < len(self.written):
            self._protocol.pause_writing()

    def take(self) -> bytes:
        """Return all that was written, as the peer would read it."""
        data, self.written = bytes(self.written), bytearray()
        if len(data) > HIGH:
            self._protocol.resume_writing()
        return data

    def give(self, data: bytes) -> bytes:
        """Have the protocol read until it pauses; return the unread rest."""
        while data and self.reading:
            room = self._protocol.get_buffer(-1)
            count = min(len(room), len(data), PIECE)
            room[:count] = data[:count]
            self._protocol.buffer_updated(count)
            data = data[count:]
        return data

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        self._protocol.connection_lost(None)


class Recorder(asyncio.BufferedProtocol):
    """A protocol above TLS that records its callbacks."""

    def __init__(self) -> None:
        self.received = b""
        self._buffer = bytearray(1 << 16)

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._buffer)

    def buffer_updated(self, nbytes: int) -> None:
        self.received += self._buffer[:nbytes]


class Connection:
    """Our TLS layer as the destination, and a client in memory that has shaken hands with it."""

    def __init__(self, directory: Path) -> None:
        there, here = directory / "there", directory / "here"
        authority = Authority()
        for place, party in ((there, "server"), (here, "client")):
            authority.trust(place)
            authority.issue(place, party)
        context = ssl.create_default_context(cafile=str(here / "ca-cert.pem"))
        context.load_cert_chain(here / "client-cert.pem", here / "client-key.pem")
        self.client = TlsClient(context, directory / "secrets")
        self.inner = Recorder()
        self.layer = TlsTransport(Credentials(str(there), Role.DESTINATION), self.inner)
        self.transport = StalledTransport(self.layer)
        self.layer.connection_made(self.transport)
        while words := self.client.shake():
            self.transport.give(words)
            self.client.incoming.write(self.transport.take())


@pytest.mark.asyncio
async def test_no_key_update_is_read_while_answers_wait(tmp_path: Path) -> None:
    """Each KeyUpdate is answered (RFC 8446, 4.6.3): a peer that asks and never reads fills no
    queue beyond one read over the limit; once it reads, it is read again."""
    connection = Connection(tmp_path)
    transport = connection.transport
    records = connection.client.key_updates(4 * HIGH // UPDATE_BYTES)
    rest = transport.give(records)
    assert len(transport.written) <= HIGH + PIECE
    assert not transport.reading
    while rest:
        transport.take()
        await asyncio.sleep(0)
        assert transport.reading
        rest = transport.give(rest)
    connection.layer.abort()


@pytest.mark.asyncio
async def test_data_is_read_while_our_own_writes_wait(tmp_path: Path) -> None:
    """A full write buffer alone is no reason not to read: a source on a slow path must hear."""
    connection = Connection(tmp_path)
    connection.layer.write(bytes(2 * HIGH))
    connection.client.tls.write(b"acknowledged")
    assert not connection.transport.give(connection.client.outgoing.read())
    assert connection.inner.received == b"acknowledged"
    assert connection.transport.reading
    connection.layer.abort()


@pytest.mark.asyncio
@pytest.mark.parametrize("first", ["reader", "writer"])
async def test_reading_resumes_when_neither_reader_nor_answers_wait(
    tmp_path: Path, first: str
) -> None:
    connection = Connection(tmp_path)
    layer, transport = connection.layer, connection.transport
    transport.give(connection.client.key_updates(2 * HIGH // UPDATE_BYTES))
    layer.pause_reading()
    for event in (first, "writer" if first == "reader" else "reader"):
        assert not transport.reading
        if event == "reader":
            layer.resume_reading()
        else:
            transport.take()
        await asyncio.sleep(0)
    assert transport.reading
    layer.abort()
