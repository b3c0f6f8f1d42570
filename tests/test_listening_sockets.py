"""Listening addresses of a destination: both families, one port, and how they are reported."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import re
import socket
import stat
import urllib.request

import pytest

from migrate.errors import ConnectError, TlsError, UsageError
from migrate.files import socket_file
from migrate.qemu.guest import QemuGuest
from migrate.statistics import Statistics
from migrate.transport import listening_sockets, tls
from migrate.transport.address import Address
from migrate.transport.connect import connect
from migrate.transport.listen import listen
from migrate.transport.name_lookup import Endpoint
from migrate.transport.networks import leaves_host, parse_networks
from migrate.views.metrics import Metrics, source_families
from tests.programs import Program, destination
from tests.requirements import need

ANYWHERE = [Address("::", 0), Address("", 0)]


@pytest.mark.asyncio
@pytest.mark.parametrize("where", ANYWHERE)
async def test_one_port_takes_both_families(where) -> None:
    listener = await listen(where)
    port = listener.address.port
    assert str(listener) == f"tcp:[::]:{port} (IPv4 and IPv6)"
    for host in ("127.0.0.1", "::1"):
        near = await connect(Address(host, port), timeout=60)
        far = await listener.accept()
        own = near._transport.get_extra_info("sockname")[1]
        assert far.peer_name == (f"[::1]:{own}" if ":" in host else f"127.0.0.1:{own}")
        assert not far.exposed, "it does not leave this host"
        assert not near.exposed
        await near.close()
        await far.close()
    await listener.close()


@pytest.mark.programs
@pytest.mark.parametrize("where", ["[::]:0", "0"])
def test_listening_on_both_families_is_reported_and_accepts_ipv4(where, tmp_path) -> None:
    (tmp_path / "guest").write_bytes(bytes(4096))
    receiver = Program(
        "migrate-dst", "--listen", where, "--output", str(tmp_path / "there"), "--journal",
        str(tmp_path),
    )  # fmt: skip
    port = receiver.read_line(r"listening on tcp:\[::\]:(\d+) \(IPv4 and IPv6\)$")[1]
    source = Program(
        "migrate-src", "--guest", f"file:{tmp_path}/guest", "--journal", str(tmp_path),
        f"tcp:127.0.0.1:{port}",
    )  # fmt: skip
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0
    assert re.search(r"receiving a file guest of 4\.0 KiB from 127\.0\.0\.1:\d+", receiver.err)


@pytest.mark.asyncio
@pytest.mark.parametrize("allow", ["127.0.0.0/8", "::ffff:127.0.0.1", "::ffff:127.0.0.0/104"])
async def test_ipv4_allow_rules_apply_on_a_dual_stack_port(allow) -> None:
    listener = await listen(Address("::", 0), allow=parse_networks([allow]))
    near = await connect(Address("127.0.0.1", listener.address.port), timeout=60)
    far = await listener.accept()
    await near.close()
    await far.close()
    await listener.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("allow", ["10.0.0.0/8", "::/0", "::1", "::ffff:10.0.0.0/104"])
async def test_refused_ipv4_client_is_named_as_ipv4(allow) -> None:
    refused: asyncio.Queue[str] = asyncio.Queue()
    listener = await listen(
        Address("::", 0), allow=parse_networks([allow]),
        refused=lambda who, _why: refused.put_nowait(who),
    )  # fmt: skip
    near = await connect(Address("127.0.0.1", listener.address.port), timeout=60)
    assert (await refused.get()).startswith("127.0.0.1:")
    await near.close()
    await listener.close()


def test_ipv4_mapped_address_is_ipv4() -> None:
    assert parse_networks(["::ffff:10.0.0.0/104", "::ffff:0:0/96", "::/0"]) == (
        ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("0.0.0.0/0"),
        ipaddress.ip_network("::/0"),
    )  # fmt: skip
    mapped = ("::ffff:127.0.0.1", 1, 0, 0)
    assert not leaves_host(mapped, mapped)
    assert not leaves_host(("::ffff:10.0.0.1", 1, 0, 0), ("10.0.0.1", 2))
    assert leaves_host(("::ffff:10.0.0.1", 1, 0, 0), ("::ffff:10.0.0.2", 2, 0, 0))


@pytest.mark.asyncio
async def test_plain_tcp_is_refused_except_on_loopback(monkeypatch) -> None:
    monkeypatch.setenv(tls.REQUIRE, "1")
    for where in ANYWHERE:
        with pytest.raises(TlsError):
            await listen(where)
    listener = await listen(Address("::ffff:127.0.0.1", 0))
    assert str(listener) == f"tcp:127.0.0.1:{listener.address.port}"
    (await connect(listener.address, timeout=60)).abort()
    await listener.close()


# ---------------------------------------------------------------- names


LOOPBACKS = [
    Endpoint(socket.AF_INET, ("127.0.0.1", 0)), Endpoint(socket.AF_INET6, ("::1", 0, 0, 0)),
]  # fmt: skip


@pytest.fixture
def two(monkeypatch):
    async def look_up(_host, _port, *, listens):
        assert listens
        return list(LOOPBACKS)

    monkeypatch.setattr(listening_sockets, "look_up", look_up)


@pytest.mark.asyncio
async def test_name_with_two_addresses_has_one_port(two) -> None:
    listener = await listen(Address("two.invalid", 0))
    port = listener.address.port
    assert str(listener) == f"tcp:127.0.0.1:{port} and tcp:[::1]:{port}"
    for where in listener.addresses:
        near = await connect(where, timeout=60)
        await (await listener.accept()).close()
        await near.close()
    await listener.close()


def test_free_port_is_free_on_all_addresses(monkeypatch) -> None:
    """Three times, the number chosen on the first address is taken on the second one."""
    real, taken = socket.socket.bind, []

    def bind(made, name):
        if len(taken) < 3 and made.family == socket.AF_INET6:
            taken.append(socket.socket(made.family))
            real(taken[-1], name)
            taken[-1].listen()
        real(made, name)

    monkeypatch.setattr(socket.socket, "bind", bind)
    made = listening_sockets.listen_on(LOOPBACKS, 1)
    assert len(taken) == 3
    assert len({one.getsockname()[1] for one in made}) == 1
    for one in (*made, *taken):
        one.close()


def test_port_taken_on_one_address_is_refused() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        both = [Endpoint(one.family, (one.name[0], port, *one.name[2:])) for one in LOOPBACKS]
        with pytest.raises(OSError, match="Address already in use"):
            listening_sockets.listen_on(both, 1)
        with socket.create_server(("127.0.0.1", port)):
            pass  # nothing is left there


def test_unavailable_address_is_skipped() -> None:
    none_here = Endpoint(socket.AF_INET6, ("2001:db8::1", 0, 0, 0))
    made = listening_sockets.listen_on([none_here, LOOPBACKS[0]], 1)
    assert [one.getsockname()[0] for one in made] == ["127.0.0.1"]
    made[0].close()
    with pytest.raises(OSError, match="Cannot assign"):
        listening_sockets.listen_on([none_here], 1)


# ---------------------------------------------------------------- without IPv6


@pytest.fixture
def no_ipv6(monkeypatch):
    real = socket.socket

    def made(family=socket.AF_INET, *args):
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, *args)

    monkeypatch.setattr("migrate.transport.listening_sockets.socket.socket", made)


@pytest.mark.asyncio
async def test_bare_port_works_without_ipv6(no_ipv6) -> None:
    listener = await listen(Address("", 0))
    assert str(listener) == f"tcp:0.0.0.0:{listener.address.port}"
    await listener.close()


@pytest.mark.asyncio
async def test_disabled_ipv6_is_reported(no_ipv6) -> None:
    with pytest.raises(ConnectError, match=r"cannot listen on tcp:\[::\]:0: IPv6 is off here"):
        await listen(Address("::", 0))


# ---------------------------------------------------------------- others that listen


def test_metrics_on_all_interfaces_accept_ipv4() -> None:
    metrics = Metrics(lambda: source_families(Statistics()), "[::]:0")
    port = re.fullmatch(r"http://\[::\]:(\d+)/metrics", metrics.address)
    assert port
    for host in ("127.0.0.1", "[::1]"):
        with urllib.request.urlopen(f"http://{host}:{port[1]}/metrics") as answer:
            assert b"migrate_pass" in answer.read()
    metrics.close()


def test_metrics_do_no_reverse_lookup(monkeypatch) -> None:
    """A silent name server would delay the start of the program."""

    def nobody(*_):
        raise AssertionError("it was asked")

    for name in ("getfqdn", "gethostbyaddr", "getnameinfo"):
        monkeypatch.setattr(socket, name, nobody)
    Metrics(lambda: source_families(Statistics()), "0.0.0.0:0").close()


@pytest.mark.asyncio
@pytest.mark.parametrize("host", ["", "::", "127.0.0.1", "::1", "localhost"])
async def test_incoming_stream_is_accepted_over_ipv4_and_ipv6(host) -> None:
    guest = QemuGuest(Address(host, 0))
    where = await guest.listen()
    assert where.host == host
    near = "::1" if host == "::1" else "127.0.0.1"
    _, writer = await asyncio.open_connection(near, where.port)
    writer.close()
    await writer.wait_closed()
    await guest.close()


def test_link_local_address_is_shown_with_its_interface(tmp_path) -> None:
    receiver, address = destination("--output", str(tmp_path / "x"), listen="[::1]:0")
    assert re.fullmatch(r"tcp:\[::1\]:\d+", address)
    receiver.kill(15)
    assert receiver.wait() == 143


def test_dead_socket_is_removed_in_the_directory_that_was_checked(tmp_path, monkeypatch) -> None:
    """The owner of the directory may replace it with a link at any time."""
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
    path, precious = tmp_path / "theirs/s", tmp_path / "ours/s"
    precious.write_text("precious")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    connect = socket.socket.connect_ex

    def swapped(self: socket.socket, where: str) -> int:
        number = connect(self, where)
        (tmp_path / "theirs").rename(tmp_path / "old")
        (tmp_path / "theirs").symlink_to("ours")
        return number

    monkeypatch.setattr(socket.socket, "connect_ex", swapped)
    with pytest.raises(UsageError):
        socket_file.SocketFile(str(path), "--qmp")
    assert precious.read_text() == "precious"


def test_socket_is_made_in_the_directory_that_was_checked(tmp_path, monkeypatch) -> None:
    """The owner of the directory may replace it with a link at any time."""
    need(os.geteuid() == 0, "root, to give a directory away")
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
    os.chown(tmp_path / "theirs", 65534, 65534)
    bind = socket.socket.bind

    def swapped(self: socket.socket, where: str) -> None:
        (tmp_path / "theirs").rename(tmp_path / "old")
        (tmp_path / "theirs").symlink_to("ours")
        bind(self, where)

    monkeypatch.setattr(socket.socket, "bind", swapped)
    made = socket_file.SocketFile(str(tmp_path / "theirs/s"), "--qmp")
    assert os.listdir(tmp_path / "ours") == []
    assert stat.S_IMODE(os.stat(tmp_path / "old/s").st_mode) == 0o600
    made.close()
    made.close()
    assert os.listdir(tmp_path / "old") == []


def test_socket_shows_its_path_in_a_trusted_directory(tmp_path) -> None:
    """ss(8) and lsof(8) show that path."""
    made = socket_file.SocketFile(str(tmp_path / "s"), "--qmp")
    assert made.socket.getsockname() == str(tmp_path / "s")
    made.close()


def test_socket_replaced_by_another_is_not_removed(tmp_path) -> None:
    path = tmp_path / "s"
    ours = socket_file.SocketFile(str(path), "--qmp")
    path.rename(tmp_path / "moved")
    path.write_text("another")
    ours.close()
    assert path.read_text() == "another"
