"""Several addresses of one name: tried side by side, and the one that answers is kept to."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from migrate import handover, race
from migrate.address import Address
from migrate.cli import resolve
from migrate.dialing import connect, dial, open_tcp
from migrate.errors import ConnectError
from migrate.journal import Journal
from migrate.listening import listen
from migrate.lookup import Endpoint
from migrate.race import MAX_NAMED, Race, interleaved
from migrate.secure import HungUp
from proto.ownership import Claim, Role

NAME = Address("several.invalid", 4444)


def endpoint(sock: socket.socket) -> Endpoint:
    return Endpoint(sock.family, sock.getsockname())


@pytest.fixture
def silent() -> Iterator[Endpoint]:
    """An address that swallows packets: its queue is full, and SYNs are dropped."""
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
    """Gives NAME these addresses; what stands there may be changed at any time."""
    there: list[Endpoint] = []

    async def look_up(_host: str, _port: int) -> list[Endpoint]:
        return list(there)

    monkeypatch.setattr("migrate.dialing.look_up", look_up)

    def say(*endpoints: Endpoint) -> None:
        there[:] = endpoints

    return say


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.asyncio
async def test_a_silent_address_does_not_keep_from_the_next(has, silent) -> None:
    listener = await listen(Address("127.0.0.1", 0))
    has(silent, endpoint(listener.sockets[0]))
    link = await connect(NAME, timeout=60)
    assert link.endpoint == endpoint(listener.sockets[0])
    assert link.peer_name == f"127.0.0.1:{listener.address.port}"
    await link.close()
    await listener.close()


@pytest.mark.asyncio
async def test_the_third_of_three_answers(silent, refusing, serving) -> None:
    before = descriptors()
    found, connection = await Race([refusing, silent, endpoint(serving)]).run()
    assert found == endpoint(serving)
    assert connection.getpeername() == serving.getsockname()
    connection.close()
    assert descriptors() == before, "the others are closed"


@pytest.mark.asyncio
async def test_ipv6_alone(has) -> None:
    listener = await listen(Address("::1", 0))
    has(endpoint(listener.sockets[0]))
    link = await connect(NAME, timeout=60)
    assert link.peer_name == f"[::1]:{listener.address.port}"
    await link.close()
    await listener.close()


@pytest.mark.asyncio
async def test_silence_everywhere_is_said_of_each(has, silent) -> None:
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
async def test_what_each_address_says_is_told(has, silent, refusing, monkeypatch) -> None:
    monkeypatch.setattr(race, "STAGGER_SECONDS", 0.001)
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


def test_no_more_addresses_are_named_than_people_read() -> None:
    many = Race([])
    many.faults = {Endpoint(socket.AF_INET, (f"10.0.0.{n}", 1)): "x" for n in range(MAX_NAMED + 3)}
    assert many.reasons().endswith("10.0.0.3: x; and 3 more")


@pytest.mark.asyncio
async def test_addresses_that_cannot_be_reached_end_it_at_once() -> None:
    """255.255.255.255 is no place to connect to; nothing would change that."""
    nowhere = [Endpoint(socket.AF_INET, ("255.255.255.255", port)) for port in (1, 2)]
    with pytest.raises(ConnectError, match=r"255\.255\.255\.255: "):
        await Race(nowhere).run()


@pytest.mark.asyncio
async def test_one_that_refuses_is_asked_again_beside_one_that_is_silent(silent) -> None:
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
async def test_where_nobody_waits_a_refusal_is_final(refusing) -> None:
    with pytest.raises(ConnectError, match="Connection refused"):
        await open_tcp(Address("127.0.0.1", refusing.port), 3600)


@pytest.mark.asyncio
async def test_two_that_answer_at_once_leave_one_connection(monkeypatch, serving) -> None:
    monkeypatch.setattr(race, "STAGGER_SECONDS", 0.0)
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
async def test_one_that_is_given_up_leaves_nothing(silent, refusing, serving, turns) -> None:
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
async def test_small_frames_are_not_held_back(has, serving) -> None:
    has(endpoint(serving))
    link = await connect(NAME, timeout=60)
    assert link._transport is not None
    sock = link._transport.get_extra_info("socket")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    link.abort()
    await link.close()


def test_the_families_take_turns() -> None:
    v6 = [Endpoint(socket.AF_INET6, (f"::{n}", 1, 0, 0)) for n in range(3)]
    v4 = [Endpoint(socket.AF_INET, (f"10.0.0.{n}", 1)) for n in range(2)]
    assert interleaved([*v6, *v4]) == [v6[0], v4[0], v6[1], v4[1], v6[2]]
    assert interleaved([v4[0], *v6, v4[1]]) == [v4[0], v6[0], v4[1], v6[1], v6[2]]
    assert interleaved([]) == []


def test_a_link_local_address_without_its_interface_is_explained() -> None:
    fault = OSError(errno.EINVAL, "Invalid argument")
    bare = Endpoint(socket.AF_INET6, ("fe80::1", 1, 0, 0))
    assert race._reason(bare, fault).endswith("needs its interface: [fe80::1%eth0]")
    scoped = Endpoint(socket.AF_INET6, ("fe80::1", 1, 0, 2))
    assert race._reason(scoped, fault) == "Invalid argument"


# ---------------------------------------------------------------- who has the guest


@pytest.mark.asyncio
async def test_what_goes_beside_a_link_goes_to_its_address(has, serving) -> None:
    """The name has another machine too, which would know nothing of the guest."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        has(endpoint(serving), endpoint(other))
        first = await dial(NAME, timeout=60)()
        assert first.endpoint == endpoint(serving)
        has(endpoint(other))
        assert first.beside is not None
        second = await first.beside()
        assert second.endpoint == endpoint(serving)
        assert second.beside is not None
        third = await dial(NAME, timeout=60)()
        assert third.endpoint == endpoint(other)
        for link in (first, second, third):
            link.abort()
            await link.close()


@pytest.mark.asyncio
async def test_the_address_of_an_earlier_attempt_goes_first(has, serving) -> None:
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
async def test_an_address_that_hung_up_in_the_handshake_is_tried_last(
    has, serving, monkeypatch
) -> None:
    """A proxy whose other end is dead; the next address of the name has a destination."""
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


@pytest.mark.asyncio
@pytest.mark.parametrize("first", ["refuses", "knows nothing", "knows"])
async def test_the_machine_that_got_the_guest_is_asked_first(monkeypatch, first) -> None:
    asked: list[str] = []

    async def ask_over(dial, journal):
        where = await dial()
        asked.append(where)
        if (where, first) == ("home", "refuses"):
            raise ConnectError("Connection refused")
        return Claim.COMMITTED if (where, first) == ("home", "knows nothing") else Claim.DONE

    async def home() -> str:
        return "home"

    async def name() -> str:
        return "name"

    monkeypatch.setattr(handover, "_ask_over", ask_over)
    journal = Journal(Role.SOURCE, bytes(16))
    assert await handover.ask_until_known([home, name], journal, 60) == ""
    assert asked == (["home"] if first == "knows" else ["home", "name"])


@pytest.mark.asyncio
async def test_why_it_is_not_known_is_said(refusing) -> None:
    journal = Journal(Role.SOURCE, bytes(16))
    here = Address("127.0.0.1", refusing.port)
    said = await handover.ask_until_known([lambda: connect(here, timeout=0.1)], journal, 0.5)
    assert said.startswith("it was asked for 0.5 s: cannot connect to tcp:127.0.0.1:")
    said = await handover.ask_until_known([], journal, 0.01)
    assert said == "it was asked for 0.01 s: nobody has answered"


@pytest.mark.asyncio
async def test_resolve_asks_at_the_address_that_got_the_guest(monkeypatch) -> None:
    facts = {"address": "tcp:two:4501", "peer": "[fe80::1%lo]:4501"}
    asked: list[object] = []
    claims = [Claim.COMMITTED, Claim.DONE]

    async def ask_at(_args, _journal, address, at):
        asked.append((str(address), str(at)))
        return claims[len(asked) - 1]

    monkeypatch.setattr(resolve, "_ask_at", ask_at)
    journal = SimpleNamespace(facts=facts)
    await resolve._ask(SimpleNamespace(uri=""), journal)
    assert asked == [("tcp:two:4501", "fe80::1%lo"), ("tcp:two:4501", "None")]
    asked.clear()
    await resolve._ask(SimpleNamespace(uri="tcp:other:1"), journal)
    assert asked == [("tcp:other:1", "None")]
    for peer in ("", "a local process", "two:4501"):
        assert resolve._peer_of(SimpleNamespace(facts=facts | {"peer": peer})) is None
