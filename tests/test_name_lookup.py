"""Name lookups run in threads that nothing waits for; peers are shown as people write them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.errors import ConnectError
from migrate.transport import name_lookup
from migrate.transport.address import Address
from migrate.transport.connect import connect, open_tcp
from migrate.transport.listen import listen
from migrate.transport.name_lookup import endpoint_of, host_text, look_up, look_up_now, name_of
from tests.programs import Program, destination

SILENT = "silent.invalid"


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A name server that answers no query during the test. Yields the queries it received."""
    over, asked, real = threading.Event(), [], socket.getaddrinfo

    def getaddrinfo(host, port, family=0, type=0, proto=0, flags=0):  # noqa: A002
        if flags & socket.AI_NUMERICHOST:
            return real(host, port, family, type, proto, flags)
        asked.append(host)
        over.wait()
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield asked
    over.set()
    while name_lookup._under_way:  # else the next test's question would be this one
        time.sleep(0.001)


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment in which SILENT and two.invalid can be looked up."""
    library = tmp_path_factory.mktemp("silent") / "silent.so"
    source = Path(__file__).with_name("silent_resolver.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


# ---------------------------------------------------------------- real programs


def test_silent_name_server_ends_with_connect_timeout(preload, tmp_path) -> None:
    (tmp_path / "guest").write_bytes(bytes(4096))
    source = Program(
        "migrate-src", "--guest", f"file:{tmp_path}/guest", "--connect-timeout", "300ms",
        "--journal", str(tmp_path), f"tcp:{SILENT}:4444", environment=preload,
    )  # fmt: skip
    assert source.wait() == 3
    assert source.err.splitlines() == [
        f"migrate-src: connecting to tcp:{SILENT}:4444",
        "asked",
        f"migrate-src: no answer from the name server for {SILENT} within 0.3 s: give an address "
        "instead, or mend the resolver (/etc/resolv.conf)",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_source_during_lookup(preload, tmp_path, number) -> None:
    (tmp_path / "guest").write_bytes(bytes(4096))
    source = Program(
        "migrate-src", "--guest", f"file:{tmp_path}/guest", "--connect-timeout", "1h",
        "--journal", str(tmp_path), f"tcp:{SILENT}:4444", environment=preload,
    )  # fmt: skip
    source.read_line("^asked")
    source.kill(number)
    assert source.wait() == 128 + number
    assert source.err.splitlines()[2:] == [
        "migrate-src: cancelled while connecting: nothing was moved"
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("what", ["--listen", "--metrics"])
def test_signal_ends_destination_during_lookup(preload, tmp_path, what, number) -> None:
    words = {"--listen": "127.0.0.1:0"} | {what: f"{SILENT}:4444"}
    receiver = Program(
        "migrate-dst", *[word for pair in words.items() for word in pair], "--journal",
        str(tmp_path), environment=preload,
    )  # fmt: skip
    receiver.read_line("^asked")
    receiver.kill(number)
    code = receiver.wait()
    assert code == 128 + number or (what, code) == ("--metrics", -number)
    assert "never retrieved" not in receiver.err
    assert "destroyed" not in receiver.err
    assert "Traceback" not in receiver.err


def test_name_with_unresponsive_first_address_connects(preload, tmp_path) -> None:
    """The destination is at the second address, which then gets all channels."""
    (tmp_path / "guest").write_bytes(random.Random(1).randbytes(1 << 20))
    receiver, address = destination(
        "--output", str(tmp_path / "there"), "--journal", str(tmp_path / "journal")
    )
    port = int(address.rpartition(":")[2])
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.2", port))
        full.listen(0)
        for _ in range(4):
            filling = stack.enter_context(socket.socket())
            filling.setblocking(False)
            filling.connect_ex(full.getsockname())
        source = Program(
            "migrate-src", "--guest", f"file:{tmp_path}/guest", "--channels", "3", "--journal",
            str(tmp_path / "journal"), f"tcp:two.invalid:{port}", environment=preload,
        )  # fmt: skip
        assert source.wait() == 0, source.err
    assert receiver.wait() == 0
    assert (tmp_path / "there").read_bytes() == (tmp_path / "guest").read_bytes()


# ---------------------------------------------------------------- in a program


@pytest.mark.asyncio
async def test_cancelled_lookup_returns_at_once(silence) -> None:
    for what in (
        connect(Address(SILENT, 1), timeout=3600), listen(Address(SILENT, 2)),
        open_tcp(Address(SILENT, 3), 3600), look_up(SILENT, 4),
    ):  # fmt: skip
        asking = asyncio.create_task(what)
        while not silence:
            await asyncio.sleep(0.001)
        silence.clear()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking


@pytest.mark.asyncio
async def test_concurrent_lookups_of_a_name_are_shared(silence) -> None:
    """Attempts to connect may be cancelled; their lookup threads must not accumulate."""
    for _ in range(20):
        with pytest.raises(ConnectError, match=f"name server for {SILENT} within 0.001 s"):
            await connect(Address(SILENT, 7), timeout=0.001)
    assert silence.count(SILENT) <= 1


@pytest.mark.asyncio
async def test_lookup_timeout_is_explained(silence, monkeypatch) -> None:
    monkeypatch.setattr("migrate.transport.listening_sockets.LOOKUP_SECONDS", 0.05)
    monkeypatch.setattr(name_lookup, "LOOKUP_SECONDS", 0.05)
    with pytest.raises(ConnectError, match=rf"cannot listen on tcp:{SILENT}:5: no answer from"):
        await listen(Address(SILENT, 5))
    with pytest.raises(ConnectError, match=rf"no answer from the name server for {SILENT}"):
        await open_tcp(Address(SILENT, 5), 0.05)
    with pytest.raises(ConnectError, match=r"within 0\.05 s"):
        look_up_now(SILENT, 5)


@pytest.mark.asyncio
async def test_blocked_lookup_does_not_delay_cancellation(silence) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        look_up_now(SILENT, 6)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.sleep(0)
    task.uncancel()


def test_answer_after_loop_is_closed_is_dropped(monkeypatch, capfd) -> None:
    over, answered = threading.Event(), threading.Event()

    def getaddrinfo(_host, _port, type=0, flags=0):  # noqa: A002
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "a name")
        over.wait()
        answered.set()
        raise socket.gaierror(socket.EAI_AGAIN, "later")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await look_up("late.invalid", 1)

    asyncio.run(give_up())
    over.set()
    assert answered.wait(60)
    for thread in threading.enumerate():
        if thread.name == "look up late.invalid":
            thread.join()
    assert capfd.readouterr().err == ""


@pytest.mark.asyncio
async def test_numeric_address_is_not_looked_up(silence) -> None:
    assert [str(one) for one in await look_up("10.0.0.1", 1)] == ["10.0.0.1"]
    assert [str(one) for one in look_up_now("::1", 1)] == ["::1"]
    with pytest.raises(OSError, match="there is no interface nope0 here"):
        await look_up("fe80::1%nope0", 1)
    assert not silence


def test_name_without_address_has_no_endpoint() -> None:
    found = endpoint_of(Address("127.0.0.1", 9))
    assert found is not None
    assert (found.port, found.name) == (9, ("127.0.0.1", 9))
    assert endpoint_of(Address("localhost", 9)) is None
    assert endpoint_of(Address(path="/x")) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (("127.0.0.1", 5), "127.0.0.1:5"),
        (("::1", 5, 0, 0), "[::1]:5"),
        (("::ffff:10.0.0.1", 5, 0, 0), "10.0.0.1:5"),
        (("fe80::1", 5, 0, 1), "[fe80::1%lo]:5"),
        (("fe80::1%lo", 5, 0, 1), "[fe80::1%lo]:5"),
        (("fe80::1", 5, 0, 99999), "[fe80::1%99999]:5"),
        ("", "a local process"),
    ],
)
def test_peer_is_shown_as_host_and_port(name, text) -> None:
    assert name_of(name) == text


def test_ipv4_mapped_address_is_shown_as_ipv4() -> None:
    assert host_text(("::ffff:127.0.0.1", 1, 0, 0)) == "127.0.0.1"
