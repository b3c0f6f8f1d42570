"""TLS between two sides: each fault of a certificate or a connection is named at both ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest

import migrate
from migrate.cli.control import Control
from migrate.destination.acceptor import Acceptor
from migrate.destination.destination import Destination
from migrate.destination.greeting import NoPlaceError
from migrate.destination.options import DestinationOptions
from migrate.errors import ConnectError, MigrationError, TlsError, UsageError
from migrate.ownership.records import Records
from migrate.transport import networks, tls, tls_transport
from migrate.transport.address import Address
from migrate.transport.connect import connect
from migrate.transport.listen import Listener, listen
from migrate.transport.networks import parse_networks
from proto import ErrorCode
from proto.wire import capabilities
from proto.wire.messages import MAX_TEXT, Error, GuestInfo
from proto.wire.ownership import Role
from tests.authority import Authority
from tests.network import FAR
from tests.network import Link as Network
from tests.programs import (
    Program,
    breaks_are_final,
    destination,
    end_guest,
    guest_pid,
    look_at,
)
from tests.relay import Relay
from tests.requirements import need

LOCAL = Address("127.0.0.1", 0)
S, D = Role.SOURCE, Role.DESTINATION


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def good(authority: Authority, tmp_path: Path) -> SimpleNamespace:
    """Return the directories of valid credentials of a source and a destination."""
    there, here = tmp_path / "there", tmp_path / "here"
    for directory, party in ((there, "server"), (here, "client")):
        authority.trust(directory)
        authority.issue(directory, party, organization="Ours, Ltd")
    return SimpleNamespace(there=there, here=here)


def both(good: SimpleNamespace, **options) -> tuple[tls.Credentials, tls.Credentials]:
    """Return the credentials of the destination and of the source."""
    return (
        tls.Credentials(str(good.there), D, authz=options.get("authz", ())),
        tls.Credentials(str(good.here), S, hostname=options.get("hostname", "")),
    )


class ListeningDestination:
    """A destination that listens, and records each peer that it refuses."""

    def __init__(self) -> None:
        self.refused: list[str] = []
        self.who: list[str] = []
        self.acceptor: Acceptor
        self.listener: Listener

    def note(self, who: str, why: str) -> None:
        self.who.append(who)
        self.refused.append(why)

    async def said(self) -> str:
        """Return why the only connection was refused."""
        while not self.refused:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        assert len(self.refused) == 1, self.refused
        return self.refused[0]


@contextlib.asynccontextmanager
async def listening(
    credentials: tls.Credentials | None, **options
) -> AsyncIterator[ListeningDestination]:
    """Run a destination. A socket left open is a ResourceWarning, and so an error."""
    step = ListeningDestination()

    def placer(_info: GuestInfo):
        raise NoPlaceError("no guest comes here")

    async with asyncio.timeout(60):
        step.listener = await listen(
            options.pop("address", LOCAL), credentials=credentials, refused=step.note, **options
        )
        acceptor = Acceptor(
            step.listener,
            Records(),
            lambda source: Destination(source, DestinationOptions(placer)),
            refused=step.note,
        )
        async with acceptor as step.acceptor:
            yield step
        await asyncio.sleep(0.02)
        gc.collect()


async def fault_of(address: Address, credentials: tls.Credentials | None) -> MigrationError:
    """Return the error that a source gets from a destination that refuses it."""
    peer = None
    try:
        peer = await connect(address, timeout=10, credentials=credentials)
        await peer.send(capabilities.offer(frozenset()))
        message = await peer.receive_message()
        assert isinstance(message, Error), message
        return migrate.errors.peer_error(message)
    except MigrationError as error:
        return error
    finally:
        if peer is not None:
            await peer.close()


# ---------------------------------------------------------------- what is wrong with a certificate


def stranger(authority: Authority, good: SimpleNamespace, party: str, directory: Path) -> None:
    other = Authority("another")
    other.issue(directory, party)


def namesake(authority: Authority, good: SimpleNamespace, party: str, directory: Path) -> None:
    """Issue credentials from another authority with the same name as ours."""
    Authority().issue(directory, party)


def expired(authority: Authority, good: SimpleNamespace, party: str, directory: Path) -> None:
    authority.issue(directory, party, begins=-3, ends=-0.001)


def early(authority: Authority, good: SimpleNamespace, party: str, directory: Path) -> None:
    authority.issue(directory, party, begins=0.01, ends=3)


def other_party(authority: Authority, good: SimpleNamespace, party: str, directory: Path) -> None:
    authority.issue(directory, party, purpose="server" if party == "client" else "client")


def revoked(authority: Authority, good: SimpleNamespace, party: str, directory: Path) -> None:
    certificate = authority.issue(directory, party)
    authority.revoke(good.here if party == "server" else good.there, certificate)


def old_list(authority: Authority, good: SimpleNamespace, party: str, directory: Path) -> None:
    authority.revoke(good.here if party == "server" else good.there, ends=-0.1)


FAULTS = {
    stranger: (
        "authority that signed it is not the one in our ca-cert.pem", "signed it is not the one in"
    ),
    namesake: (
        "authority that signed it is not the one in our ca-cert.pem", "signed it is not the one in"
    ),
    expired: ("it has expired", "-cert.pem: expired"),
    early: ("it is not valid yet", "-cert.pem: not valid yet, or not for the host name"),
    other_party: ("it is not made for a {party}", "-cert.pem: made for another purpose"),
    revoked: ("it was revoked", "-cert.pem: revoked"),
    old_list: ("our ca-crl.pem cannot tell whether it is revoked: it has expired", "expired"),
}  # fmt: skip


@pytest.mark.programs
@pytest.mark.asyncio
@pytest.mark.parametrize("party", ["server", "client"])
@pytest.mark.parametrize("spoil", FAULTS, ids=lambda spoil: spoil.__name__)
async def test_bad_certificate_is_refused_and_both_sides_say_why(
    authority: Authority, good: SimpleNamespace, spoil, party: str
) -> None:
    spoil(authority, good, party, good.there if party == "server" else good.here)
    verdict, heard = FAULTS[spoil]
    verdict = verdict.format(party=party)
    there, here = both(good)
    async with listening(there) as step:
        fault = await fault_of(step.listener.address, here)
        said = await step.said()
    assert isinstance(fault, TlsError)
    assert fault.exit_code == 5
    if party == "server":
        assert "certificate of the destination is refused" in str(fault)
        assert verdict in str(fault)
        assert "the source refused" in said
        assert heard in said
    else:
        assert "certificate of the source is refused" in said
        assert verdict in said
        assert f"the destination refused {good.here}/client-cert.pem" in str(fault)
        assert heard in str(fault)


@pytest.mark.asyncio
@pytest.mark.parametrize("host", ["elsewhere.example", "127.0.0.2"])
async def test_certificate_for_another_host_is_refused(
    authority: Authority, good: SimpleNamespace, host: str
) -> None:
    authority.issue(good.there, "server", host=host)
    there, here = both(good)
    async with listening(there) as step:
        fault = await fault_of(step.listener.address, here)
        said = await step.said()
    assert isinstance(fault, TlsError)
    assert "it is not for 127.0.0.1" in str(fault)
    assert "--tls-hostname" in str(fault)
    assert "or not for the host name it was asked under" in said


@pytest.mark.asyncio
async def test_tls_hostname_names_the_certificate(
    authority: Authority, good: SimpleNamespace, tmp_path: Path
) -> None:
    authority.issue(good.there, "server", host="elsewhere.example")
    there, here = both(good, hostname="elsewhere.example")
    async with listening(there) as step:
        (await connect(step.listener.address, credentials=here)).abort()
    local = Address(path=str(tmp_path / "socket"))
    async with listening(there, address=local) as step:
        (await connect(local, credentials=here)).abort()
    _, here = both(good)
    async with listening(there, address=local) as step:
        assert "it is not for localhost" in str(await fault_of(local, here))


# ---------------------------------------------------------------- our own files


@pytest.mark.parametrize("role", [S, D])
def test_missing_file_is_named_with_how_to_make_it(good: SimpleNamespace, role: Role) -> None:
    directory = good.here if role is S else good.there
    party = "client" if role is S else "server"
    for name in ("ca-cert.pem", f"{party}-cert.pem", f"{party}-key.pem"):
        hidden = (directory / name).rename(directory / "hidden")
        with pytest.raises(
            TlsError, match=re.escape(f"there is no {directory / name}: the README")
        ):
            tls.Credentials(str(directory), role)
        hidden.rename(directory / name)
    with pytest.raises(TlsError, match="there is no .*nowhere/ca-cert.pem"):
        tls.Credentials(str(directory / "nowhere"), role)


def test_wrong_file_is_named(authority: Authority, good: SimpleNamespace) -> None:
    here = good.here
    key = (here / "client-key.pem").read_bytes()
    authority.issue(here, "client")
    (here / "client-key.pem").write_bytes(key)
    with pytest.raises(TlsError, match=r"client-key\.pem: the key is not that of the certificate"):
        tls.Credentials(str(here), S)
    (here / "client-key.pem").write_bytes(b"nonsense")
    with pytest.raises(TlsError, match=r"client-key\.pem: they cannot be read"):
        tls.Credentials(str(here), S)
    authority.issue(here, "client")
    (here / "ca-crl.pem").write_bytes(b"nonsense")
    with pytest.raises(TlsError, match=r"ca-crl\.pem is no list of revoked"):
        tls.Credentials(str(here), S)
    (here / "ca-cert.pem").write_bytes(b"nonsense")
    with pytest.raises(TlsError, match=r"ca-cert\.pem holds no certificate"):
        tls.Credentials(str(here), S)
    (here / "ca-cert.pem").unlink()
    (here / "ca-cert.pem").mkdir()
    with pytest.raises(TlsError, match=r"ca-cert\.pem cannot be read: Is a directory"):
        tls.Credentials(str(here), S)


def test_encrypted_key_is_refused_without_a_prompt(good: SimpleNamespace) -> None:
    key = good.here / "client-key.pem"
    clear = key.rename(good.here / "clear")
    subprocess.run(
        ["openssl", "pkey", "-in", clear, "-aes128", "-passout", "pass:secret", "-out", key],
        check=True,
    )
    with pytest.raises(TlsError, match="the key is encrypted"):
        tls.Credentials(str(good.here), S)


@pytest.mark.parametrize("wrong", [".", "ca-cert.pem", "ca-crl.pem", "client-key.pem"])
def test_files_that_others_can_write_are_refused(
    authority: Authority, good: SimpleNamespace, wrong: str
) -> None:
    """Another user who can write there could choose which authority is trusted."""
    if wrong == "ca-crl.pem":
        authority.revoke(good.here)
    (good.here / wrong).chmod(0o775 if wrong == "." else 0o664)
    path = good.here / wrong
    with pytest.raises(TlsError, match=re.escape(f"chmod go-w {path}` mends that")):
        tls.Credentials(str(good.here), S)
    path.chmod(0o755 if wrong == "." else 0o600)
    tls.Credentials(str(good.here), S)
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
        with pytest.raises(
            TlsError, match=f"{path} is not trusted, because it belongs to user 65534"
        ):
            tls.Credentials(str(good.here), S)


def test_fifo_is_refused_at_once(good: SimpleNamespace) -> None:
    for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem", "ca-crl.pem"):
        with contextlib.suppress(FileNotFoundError):
            (good.here / name).rename(good.here / "hidden")
        os.mkfifo(good.here / name)
        with pytest.raises(TlsError, match=f"{name} cannot be read: it is not a regular file"):
            tls.Credentials(str(good.here), S)
        (good.here / name).unlink()
        with contextlib.suppress(FileNotFoundError):
            (good.here / "hidden").rename(good.here / name)


def test_files_may_be_links_in_a_sticky_directory(good: SimpleNamespace) -> None:
    """Kubernetes mounts secrets like this."""
    (good.here / "..2026").mkdir(0o755)
    (good.here / "..data").symlink_to("..2026")
    for file in list(good.here.glob("*.pem")):
        file.rename(good.here / "..2026" / file.name)
        file.symlink_to(f"..data/{file.name}")
    good.here.chmod(0o1777)
    tls.Credentials(str(good.here), S)


def test_key_that_others_can_read_is_reported(good: SimpleNamespace) -> None:
    assert tls.Credentials(str(good.here), S).notices == []
    (good.here / "client-key.pem").chmod(0o644)
    (said,) = tls.Credentials(str(good.here), S).notices
    assert said.endswith(f"chmod 600 {good.here}/client-key.pem")


# ---------------------------------------------------------------- who may


DN = "CN=client,O=Ours\\, Ltd"


@pytest.mark.programs
@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("authz", "may"),
    [
        ((DN,), True),
        (("client",), True),
        (("127.0.0.1", "somebody", DN), True),
        (("DNS:laptop.example",), True),
        (("DNS:Laptop.Example",), True),
        (("laptop.example",), False),
        (("DNS:client",), False),
        (("O=Ours\\, Ltd,CN=client",), False),
        (("clien",), False),
        (("",), False),
    ],
)
async def test_tls_authz_admits_only_named_clients(
    authority: Authority, good: SimpleNamespace, authz: tuple[str, ...], may: bool
) -> None:
    authority.issue(good.here, "client", organization="Ours, Ltd", host="laptop.example")
    there, here = both(good, authz=authz)
    async with listening(there) as step:
        if may:
            peer = await connect(step.listener.address, credentials=here)
            await peer.send(capabilities.offer(frozenset()))
            assert not isinstance(await peer.receive_message(), Error)
            await peer.close()
            return
        fault = await fault_of(step.listener.address, here)
        said = await step.said()
    assert isinstance(fault, TlsError)
    assert DN in str(fault)
    assert DN in said
    assert "--tls-authz" in said


@pytest.mark.asyncio
@pytest.mark.parametrize("authz", [(), ("client",)])
async def test_certificate_with_undecodable_name_is_refused(
    authority: Authority, good: SimpleNamespace, authz: tuple[str, ...]
) -> None:
    """The certificate is validly signed, but its name is not UTF-8."""
    authority.issue(good.here, "client", alternative=b"\xff\xfe")
    there, here = both(good, authz=authz)
    async with listening(there) as step:
        fault = await fault_of(step.listener.address, here)
        said = await step.said()
    assert isinstance(fault, TlsError)
    for sentence in (str(fault), said):
        assert "its certificate cannot be read: 'utf-8' codec can't decode byte 0xff" in sentence


def test_refused_name_is_truncated(good: SimpleNamespace) -> None:
    there, _ = both(good, authz=("client",))

    def denial(*values: str | None) -> str:
        return there.denial({"subject": tuple(((("commonName", one),)) for one in values)})

    assert denial("client") == ""
    assert len(denial("a" * 60_000)) < MAX_TEXT
    assert denial("a" * 60_000).endswith("... is none of those who may (--tls-authz)")
    assert denial("client", None) == "its certificate has a name that is no text"
    assert denial().startswith("who has no name is none")


@pytest.mark.asyncio
async def test_allow_admits_only_named_networks(good: SimpleNamespace) -> None:
    there, here = both(good)
    far, near = parse_networks(["10.0.0.0/8", "::1"]), parse_networks(["127.0.0.0/8"])
    for credentials in ((None, None), (there, here)):
        async with listening(credentials[0], allow=near) as step:
            (await connect(step.listener.address, credentials=credentials[1])).abort()
        async with listening(credentials[0], allow=far) as step:
            fault = await fault_of(step.listener.address, credentials[1])
            assert "(--allow)" in await step.said()
        assert isinstance(fault, TlsError)
        says = (
            "may not connect here" if credentials[0] is None else "refused to let this address in"
        )
        assert says in str(fault)


# ---------------------------------------------------------------- one speaks TLS, the other not


@pytest.mark.asyncio
async def test_plain_source_learns_that_the_destination_requires_tls(
    good: SimpleNamespace,
) -> None:
    there, _ = both(good)
    async with listening(there) as step:
        fault = await fault_of(step.listener.address, None)
        assert "the source speaks no TLS" in await step.said()
    assert isinstance(fault, TlsError)
    assert "the destination speaks TLS, and this side does not" in str(fault)


@pytest.mark.asyncio
async def test_tls_source_learns_that_the_destination_is_plain(
    good: SimpleNamespace,
) -> None:
    _, here = both(good)
    async with listening(None) as step:
        fault = await fault_of(step.listener.address, here)
        assert "the source speaks TLS, and this side does not" in await step.said()
    assert isinstance(fault, TlsError)
    assert "the destination speaks no TLS" in str(fault)


def bare_context(good: SimpleNamespace, certificate: bool = True) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(good.there / "ca-cert.pem"))
    if certificate:
        context.load_cert_chain(good.here / "client-cert.pem", good.here / "client-key.pem")
    return context


def bare_client(address: Address, context: ssl.SSLContext) -> str:
    """Return the error that a plain OpenSSL client gets."""
    with socket.create_connection((address.host, address.port), 10) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as sock:
                sock.recv(1)
        except ssl.SSLError as error:
            return error.reason or str(error)
    return ""


@pytest.mark.asyncio
async def test_source_with_tls_1_2_is_refused(good: SimpleNamespace) -> None:
    there, _ = both(good)
    context = bare_context(good)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with listening(there) as step:
        heard = await asyncio.to_thread(bare_client, step.listener.address, context)
        assert "the source does not speak TLS 1.3" in await step.said()
    assert "PROTOCOL_VERSION" in heard


@pytest.mark.asyncio
async def test_destination_with_tls_1_2_is_refused(good: SimpleNamespace) -> None:
    _, here = both(good)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(good.there / "server-cert.pem", good.there / "server-key.pem")

    def serve() -> None:
        with server.accept()[0] as plain, contextlib.suppress(OSError):
            context.wrap_socket(plain, server_side=True)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(TlsError, match=r"TLS 1\.3"):
            await connect(Address("127.0.0.1", server.getsockname()[1]), credentials=here)
        await asyncio.to_thread(thread.join)
    gc.collect()


@pytest.mark.asyncio
async def test_client_without_certificate_is_refused(good: SimpleNamespace) -> None:
    there, _ = both(good)
    async with listening(there) as step:
        context = bare_context(good, certificate=False)
        heard = await asyncio.to_thread(bare_client, step.listener.address, context)
        assert "the source gave no certificate" in await step.said()
    assert "CERTIFICATE_REQUIRED" in heard


# ---------------------------------------------------------------- who stalls


@pytest.mark.asyncio
async def test_stalled_handshakes_do_not_keep_out_a_source(
    good: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = both(good)
    monkeypatch.setattr(tls_transport, "TLS_HANDSHAKE_SECONDS", 0.8)
    hello, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    half = bare_context(good).wrap_bio(hello, outgoing, server_hostname="127.0.0.1")
    with pytest.raises(ssl.SSLWantReadError):
        half.do_handshake()
    words = outgoing.read()
    loop = asyncio.get_running_loop()
    stalled = []
    async with listening(there) as step:
        address = step.listener.address
        most = step.listener.handshakes.limit = 128
        for number in range(2 * most):
            sock = socket.socket()
            sock.setblocking(False)
            stalled.append(sock)
            await loop.sock_connect(sock, (address.host, address.port))
            await loop.sock_sendall(sock, (b"", words[:-1], words)[number % 3])
            assert len(step.listener.handshakes) <= most
        peer = await connect(address, timeout=30, credentials=here)
        peer.abort()
        while step.listener.handshakes:
            await asyncio.sleep(0.05)
        assert any("did not finish the TLS handshake in 0.8 s" in why for why in step.refused)
        for sock in stalled:
            sock.close()


@pytest.mark.asyncio
async def test_stalled_handshake_takes_little_memory_and_returns_it(
    good: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = both(good)
    seen: list[weakref.ref] = []
    made = Listener.protocol
    monkeypatch.setattr(
        Listener, "protocol", lambda self: seen.append(weakref.ref(one := made(self))) or one
    )
    async with listening(there) as step:
        gc.collect()
        gc.disable()
        try:
            address = step.listener.address
            _, stranger = await asyncio.open_connection(address.host, address.port)
            while not seen or seen[0]() not in step.listener.handshakes:
                await asyncio.sleep(0.01)
            assert len(seen[0]()._buffer) <= 16 << 10
            stranger.close()
            while seen[0]() is not None:
                await asyncio.sleep(0.01)
        finally:
            gc.enable()
        peer = await connect(address, timeout=30, credentials=here)
        assert len(seen[-1]()._buffer) == tls_transport.READ_BYTES
        await peer.close()


@pytest.mark.asyncio
async def test_stalled_destination_times_out(good: SimpleNamespace) -> None:
    _, here = both(good)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address("127.0.0.1", server.getsockname()[1])
        with pytest.raises(ConnectError, match=r"no answer from .* within 0\.3 s"):
            await connect(address, timeout=0.3, credentials=here)
    gc.collect()


@pytest.mark.asyncio
async def test_destination_that_hangs_up_in_the_handshake_is_tried_again(
    good: SimpleNamespace,
) -> None:
    """A broken handshake is no refusal: the destination may have too many connections."""
    there, here = both(good)
    for reset in (False, True):
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = Address("127.0.0.1", server.getsockname()[1])

            def serve(server=server, reset=reset) -> None:
                sock = server.accept()[0]
                if not reset:
                    sock.recv(1 << 16)
                sock.close()

            thread = threading.Thread(target=serve)
            thread.start()
            with pytest.raises(ConnectError, match="TLS handshake"):
                await connect(address, timeout=0.1, credentials=here)
            await asyncio.to_thread(thread.join)
            thread = threading.Thread(target=serve)
            thread.start()
            connecting = asyncio.create_task(connect(address, credentials=here))
            await asyncio.to_thread(thread.join)
        async with listening(there, address=address):
            await (await connecting).close()
        gc.collect()


@pytest.mark.asyncio
async def test_listener_closes_refused_connections(
    good: SimpleNamespace,
) -> None:
    there, _ = both(good)
    async with listening(there) as step:
        address = step.listener.address
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await step.said()
        await step.listener.close()
        while step.listener.handshakes:
            await asyncio.sleep(0.01)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.asyncio
async def test_acceptor_cancelled_while_closing_leaves_nothing_open() -> None:
    """The destination fails, the source is told, and a program that runs both cancels the rest."""
    closing = asyncio.Event()

    async def serve() -> None:
        async with listening(None):
            closing.set()

    task = asyncio.create_task(serve())
    await closing.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.02)
    gc.collect()


# ---------------------------------------------------------------- the connection


@pytest.mark.asyncio
async def test_socket_options_are_set_under_tls(good: SimpleNamespace) -> None:
    there, here = both(good)
    async with listening(there) as step:
        peer = await connect(
            step.listener.address, credentials=here, congestion="cubic", peer_timeout=8
        )
        assert peer._transport is not None
        sock = peer._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 8000
        name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        assert name.rstrip(b"\0") == b"cubic"
        assert peer.peer_name == f"127.0.0.1:{step.listener.address.port}"
        assert not peer.exposed
        peer.abort()


@pytest.mark.asyncio
async def test_changed_record_is_a_broken_connection(good: SimpleNamespace) -> None:
    """An attacker who can change bytes gains no more than one who cuts the connection."""
    there, here = both(good)
    listener = await listen(LOCAL, credentials=there)
    near = await connect(listener.address, credentials=here)
    far = await listener.accept()
    assert isinstance(far._transport, tls_transport.TlsTransport)
    forged = b"\x17\x03\x03\x00\x20" + bytes(32)
    far._transport.get_buffer(-1)[: len(forged)] = forged
    far._transport.buffer_updated(len(forged))
    with pytest.raises(migrate.errors.PeerLost, match="TLS connection broke"):
        await far.receive()
    with pytest.raises(migrate.errors.PeerLost):
        await near.receive()
    for one in (near, far):
        await one.close()
    await listener.close()
    gc.collect()


async def move(
    good: SimpleNamespace, array: numpy.ndarray, *, breaks: tuple[int, ...] = (),
    secret: bool = True, keep: bool = False, channels: int = 1, flips: bool = False,
) -> tuple[migrate.Statistics, migrate.Received, Relay]:  # fmt: skip
    """Migrate an array through a relay, within this process."""
    there, here = both(good) if secret else (None, None)
    address = asyncio.get_running_loop().create_future()
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        receiver = group.create_task(
            migrate.receive("127.0.0.1:0", listening=address.set_result, credentials=there)
        )
        async with Relay(str(await address), breaks, flips=flips, keep=keep) as relay:
            statistics = await migrate.send(
                migrate.BufferGuest(array), relay.address,
                migrate.Parameters(channels=channels), credentials=here,
            )  # fmt: skip
            received = await receiver
    gc.collect()
    return statistics, received, relay


@pytest.mark.asyncio
@pytest.mark.parametrize("channels", [1, 4])
async def test_guest_moves_over_tls(good: SimpleNamespace, channels: int) -> None:
    array = numpy.random.default_rng(1).integers(0, 256, 24_000_001, dtype="u1")
    statistics, received, _ = await move(good, array, channels=channels)
    assert statistics.channels == channels
    assert statistics.status == "completed"
    assert numpy.array_equal(numpy.frombuffer(received.memory, dtype="u1"), array)


@pytest.mark.programs
@pytest.mark.asyncio
@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("channels", [1, 4])
async def test_broken_tls_connection_is_resumed(
    good: SimpleNamespace, channels: int, flips: bool
) -> None:
    """A changed bit causes an alert that does not mean that the source is refused."""
    array = numpy.random.default_rng(2).integers(0, 256, 24_000_000, dtype="u1")
    breaks = (6_000_000, 15_000_000)
    statistics, received, relay = await move(
        good, array, breaks=breaks, channels=channels, flips=flips
    )
    assert relay.broken
    assert statistics.reconnects == 2
    # what is still queued when the alert comes is counted, and lost
    assert statistics.transferred < (2.8 if flips else 1.9) * len(array)
    assert numpy.array_equal(numpy.frombuffer(received.memory, dtype="u1"), array)


@pytest.mark.asyncio
async def test_untrusted_source_does_not_connect_again(good: SimpleNamespace) -> None:
    """Trying again would not help: the migration ends at once, not after --retry."""
    array = numpy.random.default_rng(3).integers(0, 256, 24_000_000, dtype="u1")
    there, here = both(good)
    address = asyncio.get_running_loop().create_future()

    def observe(event: str, _statistics: migrate.Statistics) -> None:
        if "connecting again" in event:
            Authority("another").issue(good.here, "client")
            here.context.load_cert_chain(
                good.here / "client-cert.pem", good.here / "client-key.pem"
            )

    async with asyncio.timeout(60):
        receiver = asyncio.create_task(
            migrate.receive("127.0.0.1:0", listening=address.set_result, credentials=there)
        )
        async with Relay(str(await address), (6_000_000,)) as relay:
            with pytest.raises(TlsError, match="signed it is not the one in its ca-cert"):
                await migrate.send(
                    migrate.BufferGuest(array), relay.address, observer=observe, credentials=here,
                    retry=1000,
                )  # fmt: skip
            receiver.cancel()
            with pytest.raises(asyncio.CancelledError):
                await receiver
    gc.collect()


@pytest.mark.asyncio
async def test_nothing_of_the_guest_can_be_read_on_the_path(good: SimpleNamespace) -> None:
    array = numpy.frombuffer(b"a secret word" * 100_000, dtype="u1").copy()
    for secret in (False, True):
        _, _, relay = await move(good, array.copy(), secret=secret, keep=True)
        seen = bytes(relay.seen)
        # Shorter words turn up in ciphertext by chance.
        for word in (b"a secret word", b"buffer", b"page-hash", b"Ours, Ltd"):
            plain = word != b"Ours, Ltd"  # certificates are encrypted, too
            assert (word in seen) == (plain and not secret), word


# ---------------------------------------------------------------- plain, to another host


@pytest.mark.asyncio
async def test_tls_can_be_required_by_the_environment(
    good: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MIGRATE_REQUIRE_TLS", "1")
    there, here = both(good)
    with pytest.raises(TlsError, match="plain TCP to another host"):
        await listen(Address("", 0))
    await (await listen(Address("", 0), credentials=there)).close()
    async with listening(None, address=Address(path=str(tmp_path / "socket"))):
        pass
    async with listening(None) as step:
        (await connect(step.listener.address)).abort()
        monkeypatch.setattr(networks, "leaves_host", lambda _near, _far: True)
        with pytest.raises(TlsError, match="MIGRATE_REQUIRE_TLS is set: give --tls-creds"):
            await connect(step.listener.address)
        monkeypatch.setenv("MIGRATE_REQUIRE_TLS", "perhaps")
        with pytest.raises(UsageError, match="MIGRATE_REQUIRE_TLS='perhaps': it is 1 or 0"):
            await connect(step.listener.address)
    monkeypatch.setenv("MIGRATE_REQUIRE_TLS", "1")
    async with listening(there) as step:
        (await connect(step.listener.address, credentials=here)).abort()
    gc.collect()


@pytest.mark.asyncio
async def test_python_program_is_warned_of_plain_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "leaves_host", lambda _near, _far: True)
    array = numpy.ones(10_000)
    with pytest.warns(RuntimeWarning, match=r"unencrypted.*credentials="):
        await move(SimpleNamespace(), array, secret=False)


# ---------------------------------------------------------------- the programs


@pytest.mark.programs
def test_documented_openssl_commands_make_working_credentials(tmp_path: Path) -> None:
    page = Path(__file__).parent.parent.joinpath("docs/tls.md").read_text()
    commands = re.findall(r"(?m)^    (openssl .*)$", page)
    assert len(commands) == 3
    for command in commands:
        subprocess.run(shlex.split(command), cwd=tmp_path, check=True, capture_output=True)
    for directory, party in (("there", "server"), ("here", "client")):
        (tmp_path / directory).mkdir()
        for name in (f"{party}-cert.pem", f"{party}-key.pem"):
            (tmp_path / name).rename(tmp_path / directory / name)
        (tmp_path / directory / "ca-cert.pem").write_bytes((tmp_path / "ca-cert.pem").read_bytes())
    authz = re.findall(r"--tls-authz (\w+)", page)
    receiver, address = destination(
        "--tls-creds", str(tmp_path / "there"), "--tls-authz", authz[0], "--allow", "127.0.0.1"
    )
    sender = Program(
        "migrate-src", "--tls-creds", str(tmp_path / "here"), "--tls-hostname", "host",
        "--guest", "demo:8m,hot=1m", "--channels", "2", address,
    )  # fmt: skip
    assert sender.wait() == 0, sender.err
    assert receiver.wait() == 0, receiver.err
    pid = guest_pid(receiver.out)
    assert look_at(pid)[2] < 0
    end_guest(pid)
    assert "warning" not in sender.err + receiver.err


@pytest.mark.programs
def test_refused_source_exits_with_5_and_the_destination_waits_on(
    authority: Authority, good: SimpleNamespace
) -> None:
    receiver, address = destination("--tls-creds", str(good.there), "--tls-authz", DN)
    words = ["migrate-src", "--guest", "demo:8m", "--progress", "never"]
    try:
        plain = Program(*words, address)
        assert plain.wait() == 5
        assert "the destination speaks TLS" in plain.err
        end_guest(guest_pid(plain.err))
        authority.issue(good.here, "client", begins=-3, ends=-1)
        refused = Program(*words, "--tls-creds", str(good.here), address)
        assert refused.wait() == 5
        assert "client-cert.pem: expired" in refused.err
        assert "process" not in refused.err  # no guest was begun
        authority.issue(good.here, "client", organization="Theirs")
        denied = Program(*words, "--tls-creds", str(good.here), address)
        assert denied.wait() == 5
        assert "CN=client,O=Theirs is none of those who may" in denied.err
        end_guest(guest_pid(denied.err))
        authority.issue(good.here, "client", organization="Ours, Ltd")
        (good.here / "client-key.pem").chmod(0o640)
        resolve = Program("migrate-src", "resolve", "--tls-creds", str(good.here))
        assert resolve.wait() == 0
        welcome = Program(*words, "--tls-creds", str(good.here), address)
        assert welcome.wait() == 0, welcome.err
        assert "client-key.pem can be read by others" in welcome.err
        assert receiver.wait() == 0
        end_guest(guest_pid(receiver.out))
        for why in ("speaks no TLS", "it has expired", "CN=client,O=Theirs is none"):
            assert re.search(rf"refused 127\.0\.0\.1:\d+: .*{why}", receiver.err), receiver.err
    finally:
        receiver.kill()


def test_monitor_shows_the_tls_options(good: SimpleNamespace, tmp_path: Path) -> None:
    creds = str(good.there)
    receiver, _ = destination(
        "--tls-creds", creds, "--tls-authz", DN, "--tls-authz", "b", "--qmp", f"unix:{tmp_path}/dst"
    )
    source = Program(
        "migrate-src", "--guest", "demo:8m", "--tls-creds", str(good.here), "--tls-hostname",
        "there", "--qmp", f"unix:{tmp_path}/src",
    )  # fmt: skip
    try:
        with Control(f"{tmp_path}/dst", 20) as control:
            told = control.execute("query-migrate-parameters")
            assert told.items() >= {"tls-creds": creds, "tls-authz": f"{DN}; b"}.items()
            control.execute("quit")
        with Control(f"{tmp_path}/src", 20) as control:
            said = control.say("info migrate_parameters")
            assert f"tls-creds: '{good.here}'\ntls-hostname: 'there'\ntls-authz: ''\n" in said
            control.execute("quit")
        for program in (receiver, source):
            program.wait(20)
    finally:
        receiver.kill()
        source.kill()


@pytest.mark.programs
def test_resolve_asks_over_tls(good: SimpleNamespace, tmp_path: Path) -> None:
    """The source is killed after GO; `resolve` presents its certificate, or says why it fails."""
    journal = ["--journal", str(tmp_path)]
    receiver, address = destination(
        *journal, "--tls-creds", str(good.there), "--resolve-timeout", "30s"
    )
    words = breaks_are_final(
        "migrate-src", [*journal, "--tls-creds", str(good.here), "--guest", "demo:8m", address]
    )
    source = subprocess.run(
        [sys.executable, "-m", "tests.crash", "before", "3", "migrate-src", *words],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    try:
        assert source.returncode == -signal.SIGKILL
        plain = Program("migrate-src", "resolve", *journal)
        assert plain.wait() != 0
        assert "speaks TLS" in plain.err
        known = Program("migrate-src", "resolve", *journal, "--tls-creds", str(good.here))
        assert known.wait() == 0, known.err
        assert "the guest runs at the destination" in known.out
        assert receiver.wait() == 0, receiver.err
    finally:
        receiver.kill()
        receiver.wait()
        end_guest(guest_pid(source.stderr))
        if receiver.out:
            end_guest(guest_pid(receiver.out))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--tls-authz", "x"], 2, "need --tls-creds"),
        (["--allow", "nonsense"], 2, "--allow"),
        (["--tls-creds", "/nowhere"], 5, "there is no /nowhere/ca-cert.pem"),
    ],
)
def test_wrong_options_are_refused_at_once(words: list[str], code: int, said: str) -> None:
    program = Program("migrate-dst", "--listen", "127.0.0.1:0", *words)
    assert program.wait() == code
    assert said in program.err


@pytest.mark.programs
def test_plain_tcp_to_another_host_warns_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    need(os.geteuid() == 0 and shutil.which("ip"), "network namespaces: root and iproute2")
    with Network() as net:
        receiver, address = destination(listen=f"{FAR}:0", namespace=net.far)
        words = ["migrate-src", "--guest", "demo:8m", "--channels", "3", "--progress", "never"]
        try:
            with monkeypatch.context() as patch:
                patch.setenv("MIGRATE_REQUIRE_TLS", "1")
                refused = Program(*words, address, namespace=net.near)
                assert refused.wait() == 5
                assert "plain TCP to another host" in refused.err
                other = Program("migrate-dst", "--listen", f"{FAR}:0", namespace=net.far)
                assert other.wait() == 5
            sender = Program(*words, address, namespace=net.near)
            assert sender.wait() == 0, sender.err
            assert receiver.wait() == 0
            end_guest(guest_pid(receiver.out))
            assert sender.err.count("unencrypted") == 1
            assert receiver.err.count("unencrypted") == 1
        finally:
            receiver.kill()


def test_denied_error_exits_with_5() -> None:
    fault = migrate.errors.peer_error(Error(ErrorCode.DENIED, "you may not"))
    assert (type(fault), fault.exit_code) == (TlsError, 5)
