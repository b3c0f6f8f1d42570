"""Several addresses of one name: try them side by side, and stay with the one that answers."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from migrate.cli import source_resolve
from migrate.cli.resolve import resolve_parser
from migrate.errors import ConnectError
from migrate.ownership import ask as questions
from migrate.ownership.journal import Journal
from migrate.transport import happy_eyeballs
from migrate.transport.address import Address
from migrate.transport.connect import connect, dial, open_tcp
from migrate.transport.happy_eyeballs import MAX_NAMED, Race, interleaved
from migrate.transport.listen import listen
from migrate.transport.name_lookup import Endpoint
from migrate.transport.tls_transport import HungUp
from proto.wire.ownership import Claim, Role

NAME = Address("several.invalid", 4444)


def endpoint(sock: socket.socket) -> Endpoint:
    return Endpoint(sock.family, sock.getsockname())


@pytest.fixture
def silent() -> Iterator[Endpoint]:
    """An address that drops SYN packets, since its queue is full."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            filling = stack.enter_context(socket.socket())
            filling.setblocking(False)
            filling.connect_ex(full.getsockname())
        yield endpoint(full)


@pytest.fixture
def refusing() -> Iterator[Endpoint]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield endpoint(bound)


@pytest.fixture
def serving() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch):
    """Return a function that gives NAME these addresses. They may change at any time."""
    there: list[Endpoint] = []

    async def look_up(_host: str, _port: int) -> list[Endpoint]:
        return list(there)

    monkeypatch.setattr("migrate.transport.connect.look_up", look_up)

    def say(*endpoints: Endpoint) -> None:
        there[:] = endpoints

    return say


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.asyncio
async def test_next_address_is_tried_while_one_is_silent(has, silent) -> None:
    listener = await listen(Address("127.0.0.1", 0))
    has(silent, endpoint(listener.sockets[0]))
    link = await connect(NAME, timeout=60)
    assert link.endpoint == endpoint(listener.sockets[0])
    assert link.peer_name == f"127.0.0.1:{listener.address.port}"
    await link.close()
    await listener.close()


@pytest.mark.asyncio
async def test_third_address_is_used_when_two_are_silent(silent, refusing, serving) -> None:
    before = descriptors()
    found, connection = await Race([refusing, silent, endpoint(serving)]).run()
    assert found == endpoint(serving)
    assert connection.getpeername() == serving.getsockname()
    connection.close()
    assert descriptors() == before, "the others are closed"


@pytest.mark.asyncio
async def test_connect_over_ipv6_only(has) -> None:
    listener = await listen(Address("::1", 0))
    has(endpoint(listener.sockets[0]))
    link = await connect(NAME, timeout=60)
    assert link.peer_name == f"[::1]:{listener.address.port}"
    await link.close()
    await listener.close()


@pytest.mark.asyncio
async def test_timeout_names_every_silent_address(has, silent) -> None:
    other = Endpoint(socket.AF_INET, ("127.0.0.2", silent.port))
    has(silent, silent)
    with pytest.raises(ConnectError) as error:
        await connect(NAME, timeout=0.01)
    assert str(error.value) == f"no answer from {NAME} within 0.01 s"
    both = Race([silent, other])
    both.faults = {silent: "", other: "No route to host"}
    assert both.reasons() == "127.0.0.1: no answer; 127.0.0.2: No route to host"
    assert both.silent


@pytest.mark.asyncio
async def test_error_names_what_each_address_answered(has, silent, refusing, monkeypatch) -> None:
    monkeypatch.setattr(happy_eyeballs, "STAGGER_SECONDS", 0.001)
    other = Endpoint(socket.AF_INET, ("127.0.0.2", refusing.port))
    has(silent, other)
    with pytest.raises(ConnectError, match=r"127\.0\.0\.1: no answer; 127\.0\.0\.2: Connection re"):
        await connect(NAME, timeout=0.5)
    has(refusing, other)
    with pytest.raises(
        ConnectError,
        match=r"^cannot connect to tcp:several\.invalid:4444: 127\.0\.0\.1: Connection refused; "
        r"127\.0\.0\.2: Connection refused: is migrate-dst listening there\?$",
    ):
        await connect(NAME, timeout=0.5)


def test_error_names_a_bounded_number_of_addresses() -> None:
    many = Race([])
    many.faults = {Endpoint(socket.AF_INET, (f"10.0.0.{n}", 1)): "x" for n in range(MAX_NAMED + 3)}
    assert many.reasons().endswith("10.0.0.3: x; and 3 more")


@pytest.mark.asyncio
async def test_unreachable_addresses_fail_at_once() -> None:
    """255.255.255.255 can never be connected to."""
    nowhere = [Endpoint(socket.AF_INET, ("255.255.255.255", port)) for port in (1, 2)]
    with pytest.raises(ConnectError, match=r"255\.255\.255\.255: "):
        await Race(nowhere).run()


@pytest.mark.asyncio
async def test_refusing_address_is_retried_while_another_is_silent(silent) -> None:
    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        going = Race([silent, endpoint(late)])
        racing = asyncio.create_task(going.run())
        while "refused" not in going.faults.get(endpoint(late), ""):
            await asyncio.sleep(0.01)
        late.listen()
        async with asyncio.timeout(60):
            found, connection = await racing
        assert found == endpoint(late)
        connection.close()


@pytest.mark.asyncio
async def test_open_tcp_fails_at_once_when_refused(refusing) -> None:
    with pytest.raises(ConnectError, match="Connection refused"):
        await open_tcp(Address("127.0.0.1", refusing.port), 3600)


@pytest.mark.asyncio
async def test_simultaneous_answers_leave_one_connection(monkeypatch, serving) -> None:
    monkeypatch.setattr(happy_eyeballs, "STAGGER_SECONDS", 0.0)
    before = descriptors()
    with socket.create_server(("127.0.0.1", 0)) as other:
        both = [endpoint(serving), endpoint(other)]
        for _ in range(20):
            found, connection = await Race(both).run()
            assert found in both
            connection.close()
    assert descriptors() == before


@pytest.mark.asyncio
@pytest.mark.parametrize("turns", range(6))
async def test_cancelled_connect_leaves_no_socket(silent, refusing, serving, turns) -> None:
    before = descriptors()
    racing = asyncio.create_task(Race([silent, refusing, endpoint(serving)]).run())
    for _ in range(turns):
        await asyncio.sleep(0)
    racing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        (await racing)[1].close()
    await asyncio.sleep(0)
    assert descriptors() == before
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.asyncio
async def test_tcp_nodelay_is_set(has, serving) -> None:
    has(endpoint(serving))
    link = await connect(NAME, timeout=60)
    assert link._transport is not None
    sock = link._transport.get_extra_info("socket")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    link.abort()
    await link.close()


def test_address_families_alternate() -> None:
    v6 = [Endpoint(socket.AF_INET6, (f"::{n}", 1, 0, 0)) for n in range(3)]
    v4 = [Endpoint(socket.AF_INET, (f"10.0.0.{n}", 1)) for n in range(2)]
    assert interleaved([*v6, *v4]) == [v6[0], v4[0], v6[1], v4[1], v6[2]]
    assert interleaved([v4[0], *v6, v4[1]]) == [v4[0], v6[0], v4[1], v6[1], v6[2]]
    assert interleaved([]) == []


def test_link_local_address_without_interface_is_explained() -> None:
    fault = OSError(errno.EINVAL, "Invalid argument")
    bare = Endpoint(socket.AF_INET6, ("fe80::1", 1, 0, 0))
    assert happy_eyeballs._reason(bare, fault).endswith("needs its interface: [fe80::1%eth0]")
    scoped = Endpoint(socket.AF_INET6, ("fe80::1", 1, 0, 2))
    assert happy_eyeballs._reason(scoped, fault) == "Invalid argument"


# ---------------------------------------------------------------- who has the guest


@pytest.mark.asyncio
async def test_redial_uses_the_address_of_the_link(has, serving) -> None:
    """The name may lead to another machine, which knows nothing of the guest."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        has(endpoint(serving), endpoint(other))
        first = await dial(NAME, timeout=60)()
        assert first.endpoint == endpoint(serving)
        has(endpoint(other))
        assert first.redial is not None
        second = await first.redial()
        assert second.endpoint == endpoint(serving)
        assert second.redial is not None
        third = await dial(NAME, timeout=60)()
        assert third.endpoint == endpoint(other)
        for link in (first, second, third):
            link.abort()
            await link.close()


@pytest.mark.asyncio
async def test_address_of_an_earlier_attempt_is_tried_first(has, serving) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        has(endpoint(other), endpoint(serving))
        host, port = serving.getsockname()
        link = await connect(NAME, timeout=60, first=f"{host}:{port}")
        assert link.endpoint == endpoint(serving)
        link.abort()
        await link.close()
        link = await connect(NAME, timeout=60, first="127.0.0.9:1")
        assert link.endpoint == endpoint(other)
        link.abort()
        await link.close()


@pytest.mark.asyncio
async def test_address_that_hung_up_in_the_handshake_is_tried_last(
    has, serving, monkeypatch
) -> None:
    """The first address is a proxy whose backend is dead; the next one has a destination."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        has(endpoint(other), endpoint(serving))
        create, loop = [0], asyncio.get_running_loop()
        real = loop.create_connection

        async def create_connection(factory, *, sock):
            create[0] += 1
            if create[0] == 1:
                sock.close()
                raise HungUp("the connection was closed in the TLS handshake")
            return await real(factory, sock=sock)

        monkeypatch.setattr(loop, "create_connection", create_connection, raising=False)
        link = await connect(NAME, timeout=60)
        assert link.endpoint == endpoint(serving)
        link.abort()
        await link.close()


class Dialed:
    """A connection to `where`."""

    def __init__(self, where: str) -> None:
        self.where = where

    async def close(self) -> None:
        pass


@pytest.mark.asyncio
@pytest.mark.parametrize("first", ["refuses", "knows nothing", "knows"])
async def test_ownership_query_tries_the_receiving_machine_first(monkeypatch, first) -> None:
    asked: list[str] = []

    async def home() -> Dialed:
        asked.append("home")
        if first == "refuses":
            raise ConnectError("Connection refused")
        return Dialed("home")

    async def name() -> Dialed:
        asked.append("name")
        return Dialed("name")

    async def ask(link, journal):
        knows = (link.where, first) != ("home", "knows nothing")
        return Claim.DONE if knows else Claim.COMMITTED

    monkeypatch.setattr(questions, "ask", ask)
    journal = Journal(Role.SOURCE, bytes(16))
    assert await questions.ask_until_known([home, name], journal, 60) == ""
    assert asked == (["home"] if first == "knows" else ["home", "name"])


@pytest.mark.asyncio
async def test_unanswered_ownership_query_says_why(refusing) -> None:
    journal = Journal(Role.SOURCE, bytes(16))
    here = Address("127.0.0.1", refusing.port)
    said = await questions.ask_until_known([lambda: connect(here, timeout=0.1)], journal, 0.5)
    assert said.startswith("asked for 0.5 s: cannot connect to tcp:127.0.0.1:")
    said = await questions.ask_until_known([], journal, 0.01)
    assert said == "asked for 0.01 s: nobody has answered"


@pytest.mark.asyncio
async def test_resolve_asks_the_receiving_address_first(monkeypatch) -> None:
    facts = {"address": "tcp:two:4501", "peer": "[fe80::1%lo]:4501"}
    asked: list[object] = []
    claims = [Claim.COMMITTED, Claim.DONE]

    async def connected(address, *, at, **_options):
        asked.append((str(address), str(at)))
        return Dialed("")

    async def ask(_link, _journal):
        return claims[len(asked) - 1]

    monkeypatch.setattr(source_resolve, "connect", connected)
    monkeypatch.setattr(source_resolve, "ask", ask)
    journal, parser = SimpleNamespace(facts=facts), resolve_parser("migrate-src")
    await source_resolve._ask(parser.parse_args([]), journal)
    assert asked == [("tcp:two:4501", "fe80::1%lo"), ("tcp:two:4501", "None")]
    asked.clear()
    await source_resolve._ask(parser.parse_args(["", "tcp:other:1"]), journal)
    assert asked == [("tcp:other:1", "None")]
    for peer in ("", "a local process", "two:4501"):
        assert source_resolve._peer_of(SimpleNamespace(facts=facts | {"peer": peer})) is None
