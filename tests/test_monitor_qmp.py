"""The control socket: QMP as QEMU's own client speaks it, and malformed input."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import qemu.qmp
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import ConnectError, UsageError
from migrate.monitor.monitored import CommandError
from migrate.monitor.qmp import MAX_REQUEST_BYTES, Conversation, JsonStream, version_of
from migrate.monitor.server import MAX_CLIENTS, MAX_WAITING, Server, parse_path

VERSION = {"qemu": {"major": 1, "minor": 2, "micro": 3}, "package": "test 1.2.3"}
HELLO = b'{"execute": "qmp_capabilities"}'

scalars = st.none() | st.booleans() | st.integers() | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)
objects = st.dictionaries(st.text(), values)


# ---------------------------------------------------------------- texts out of a stream


@given(
    st.lists(st.tuples(objects, st.sampled_from(["", " ", "\r\n", "\n\t "]))),
    st.lists(st.integers(1, 9)),
)
def test_json_stream_split_anywhere(sent: list[tuple[Any, str]], cuts: list[int]) -> None:
    """There need be no line ends between them, and a piece may end anywhere, inside a character
    too."""
    data = "".join(
        json.dumps(one, ensure_ascii=False) + between for one, between in sent
    ).encode()  # fmt: skip
    stream, found = JsonStream(), []
    for cut in [*cuts, len(data) + 1]:
        found += [json.loads(text) for text in stream.feed(data[:cut])]
        data = data[cut:]
    assert found == [one for one, _ in sent]


def test_0xff_discards_unfinished_text() -> None:
    assert list(JsonStream().feed(b'{"execute": "half\xff{}')) == [b"{}"]


def test_endless_request_is_bounded() -> None:
    stream = JsonStream()
    assert not list(stream.feed(b"[" * MAX_REQUEST_BYTES))
    with pytest.raises(CommandError, match="no more than 65536 bytes"):
        list(stream.feed(b"["))


@given(st.binary())
def test_json_stream_of_any_bytes(data: bytes) -> None:
    assert sum(map(len, JsonStream().feed(data))) <= len(data)


# ---------------------------------------------------------------- one client


def talk(*requests: bytes) -> list[dict[str, Any]]:
    def refuse(arguments: dict[str, Any]) -> None:
        raise CommandError("not today")

    commands = {"echo": lambda arguments: arguments, "refuse": refuse}
    conversation = Conversation(commands, VERSION)
    return [answer for request in requests for answer in conversation.answers(request)]


def test_answer_repeats_id() -> None:
    for identity in (7, "x", None, [1, {"a": 2}]):
        request = {"execute": "echo", "arguments": {"n": 1}, "id": identity}
        _, answer = talk(HELLO, json.dumps(request).encode())
        assert answer == {"return": {"n": 1}, "id": identity}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (b"'x'", "x"),
        (b"''", ""),
        (
            rb"""['a "word" \\"', 'it\'s', "it's", "it\'s", "\"'\u0027" ]""",
            ['a "word" \\"', "it's", "it's", "it's", "\"''"],
        ),
        (rb"""{'a}': "'", "b'": ']', 'c\n': '\\'}""", {"a}": "'", "b'": "]", "c\n": "\\"}),
    ],
)
def test_single_quoted_strings(written: bytes, meant: object) -> None:
    _, answer = talk(b"{'execute': 'qmp_capabilities'}", b"{'execute':'echo','id':%b}" % written)
    assert answer == {"return": {}, "id": meant}


def test_long_text_of_quotes_is_read_in_linear_time() -> None:
    text = b"{'execute':'echo','arguments':{'a':[%b'']}}" % (b"'',\"\"," * 9_000)
    assert len(talk(HELLO, text)[1]["return"]["a"]) == 18_001


def test_any_accepted_id_can_be_sent_back() -> None:
    """At any depth of Python's stack: a client must not be dropped because of its id."""
    for depth in range(800, 1000):
        identity = b"[" * depth + b"]" * depth
        said = talk(HELLO, b'{"execute": "echo", "id": ' + identity + b"}")
        json.dumps(said[1])
        assert said[1].keys() in ({"return", "id"}, {"error"})


@pytest.mark.parametrize(
    ("request_", "kind", "says"),
    [
        (b"nonsense ", "GenericError", "JSON parse error, expecting value"),
        (b"{'execute': 'echo\\x'}", "GenericError", "JSON parse error"),
        (b'{"execute": ]', "GenericError", "JSON parse error"),
        # Python 3.14 reads lists this deep; earlier ones give up.
        (b"[" * 20_000 + b"]" * 20_000, "GenericError", "JSON"),
        (b"[1]", "GenericError", "QMP input must be a JSON object"),
        (b"{}", "GenericError", "lacks member 'execute'"),
        (b'{"execute": 3}', "GenericError", "lacks member 'execute'"),
        (b'{"execute": "echo", "arguments": 3}', "GenericError", "must be an object"),
        (b'{"execute": "echo", "foo": 3}', "GenericError", "member 'foo' is unexpected"),
        (b'{"execute": "fly"}', "CommandNotFound", "The command fly has not been found"),
        (b'{"execute": "refuse"}', "GenericError", "not today"),
        (HELLO, "CommandNotFound", "Capabilities negotiation is already complete"),
    ],
)
def test_error_does_not_end_conversation(request_: bytes, kind: str, says: str) -> None:
    _, error, after = talk(HELLO, request_, b'{"execute": "echo"}')
    assert error["error"]["class"] == kind
    assert says in error["error"]["desc"]
    assert after == {"return": {}}


def test_commands_need_negotiation() -> None:
    refused, greeted, version, commands = talk(
        b'{"execute": "echo"}', HELLO, b'{"execute": "query-version"}',
        b'{"execute": "query-commands"}',
    )  # fmt: skip
    assert "Expecting capabilities negotiation" in refused["error"]["desc"]
    assert greeted == {"return": {}}
    assert version["return"] == VERSION
    names = {entry["name"] for entry in commands["return"]}
    assert names == {"qmp_capabilities", "query-commands", "query-version", "echo", "refuse"}


def test_unknown_qmp_capability() -> None:
    refused, _ = talk(
        b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}', HELLO
    )  # fmt: skip
    assert "no QMP capabilities" in refused["error"]["desc"]


# ---------------------------------------------------------------- the socket


def machine(path: str) -> Server:
    known = {"echo": lambda arguments: arguments}
    return Server(path, lambda: Conversation(known, version_of("1.2.3")), "--qmp")


@asynccontextmanager
async def serving(path: str) -> AsyncIterator[Server]:
    server = machine(path)
    await server.open()
    try:
        yield server
    finally:
        await server.close()


@pytest.mark.asyncio
async def test_many_qemu_qmp_clients_at_once(tmp_path) -> None:
    path = str(tmp_path / "socket")
    async with serving(path):
        clients = [qemu.qmp.QMPClient(f"test-{number}") for number in range(3)]
        for client in clients:
            await client.connect(path)
        for number, client in enumerate(clients):
            assert await client.execute("echo", {"n": number}) == {"n": number}
            with pytest.raises(qemu.qmp.ExecuteError, match="fly has not been found"):
                await client.execute("fly")
        for client in clients:
            await client.disconnect()
    assert not os.path.exists(path)


@pytest.mark.asyncio
async def test_socket_is_private_to_its_owner(tmp_path) -> None:
    async with serving(str(tmp_path / "socket")):
        assert stat.S_IMODE(os.stat(tmp_path / "socket").st_mode) == 0o600


@pytest.mark.asyncio
async def test_stale_socket_is_replaced(
    tmp_path,
) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    async with serving(path):
        with pytest.raises(ConnectError, match="another program listens there"):
            await machine(path).open()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("file", "the file there is not a socket, and is left as it is"),
        ("dir", "the file there is not a socket"),
        ("link", "the file there is not a socket"),
        ("no/socket", "no socket can be made in .*/no: No such file or directory"),
        ("file/socket", "no socket can be made in .*/file: Not a directory"),
        ("x" * 200, "too long"),
    ],
)
async def test_wrong_socket_path_is_a_usage_error(tmp_path, name: str, says: str) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match=says):
        await machine(str(tmp_path / name)).open()
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["dir", "file", "link"]


@pytest.mark.asyncio
async def test_close_leaves_foreign_file_at_path(tmp_path) -> None:
    path = tmp_path / "socket"
    async with serving(str(path)):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_nan_id_is_refused(number: str) -> None:
    [said] = Conversation({}, VERSION).answers(f'{{"execute": "x", "id": {number}}}'.encode())
    assert said["error"]["desc"].startswith("JSON parse error")
    assert "id" not in said


@pytest.mark.asyncio
async def test_endless_sender_is_dropped_with_a_reason(tmp_path) -> None:
    path = str(tmp_path / "socket")
    async with serving(path):
        reader, writer = await asyncio.open_unix_connection(path)
        await reader.readline()
        writer.write(b"[" * (MAX_REQUEST_BYTES + 1))
        assert b"no more than 65536 bytes" in await reader.readline()
        assert await reader.read() == b""
        writer.close()


@pytest.mark.asyncio
async def test_silent_client_makes_room_for_a_new_one(tmp_path) -> None:
    """Forgotten clients must not keep out the one that cancels."""
    path = str(tmp_path / "socket")
    async with serving(path) as server:
        clients = [await asyncio.open_unix_connection(path) for _ in range(MAX_CLIENTS)]
        for number, (reader, writer) in enumerate(clients):
            assert b"QMP" in await reader.readline()
            if number != 3:
                writer.write(HELLO)
                assert await reader.readline() == b'{"return": {}}\r\n'
        order = [3, 0, 1]  # the one that never asked, and then who asked first
        for number in order:
            clients.append(await asyncio.open_unix_connection(path))
            assert b"QMP" in await clients[-1][0].readline()
            clients[-1][1].write(HELLO)
            assert await clients[-1][0].readline() == b'{"return": {}}\r\n'
            assert b"32 clients are connected" in await clients[number][0].readline()
            assert await clients[number][0].read() == b""
            assert len(server._clients) == MAX_CLIENTS
        clients[2][1].write(b'{"execute": "echo"}')
        assert await clients[2][0].readline() == b'{"return": {}}\r\n'
        for _, writer in clients:
            writer.close()


@pytest.mark.asyncio
async def test_client_that_never_reads_is_dropped(tmp_path, monkeypatch) -> None:
    """Its answers are not kept without bound."""
    monkeypatch.setattr("migrate.monitor.server.SEND_SECONDS", 0.2)
    path = str(tmp_path / "socket")
    request = json.dumps({"execute": "echo", "arguments": {"x": "y" * 4000}}).encode()
    async with serving(path) as server:
        _, writer = await asyncio.open_unix_connection(path, limit=1)
        writer.write(HELLO + request * 2000)
        async with asyncio.timeout(60):
            while not server._clients:
                await asyncio.sleep(0.01)
            while server._clients:
                await asyncio.sleep(0.01)
        writer.close()


def test_parse_socket_address() -> None:
    assert parse_path("unix:/run/x.sock") == "/run/x.sock"
    for wrong in ("", "unix:", "/run/x.sock", "tcp:localhost:1"):
        with pytest.raises(UsageError, match="write unix:PATH"):
            parse_path(wrong)


@pytest.mark.asyncio
async def test_events_reach_negotiated_clients(
    tmp_path,
) -> None:
    path = str(tmp_path / "socket")
    event = {"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}
    async with serving(path) as server:
        clients = [await asyncio.open_unix_connection(path) for _ in range(3)]
        for reader, writer in clients[:2]:
            await reader.readline()
            writer.write(HELLO)
            assert json.loads(await reader.readline()) == {"return": {}}
        await clients[2][0].readline()
        server.tell(event)
        for reader, _ in clients[:2]:
            assert json.loads(await reader.readline()) == event
        clients[2][1].write(HELLO)  # the first thing it hears is the answer to this
        assert json.loads(await clients[2][0].readline()) == {"return": {}}

        clients[0][0]._transport.pause_reading()
        big = {"event": "BIG", "data": "x" * (MAX_WAITING // 8)}
        for _ in range(64):
            server.tell(big)
            await asyncio.sleep(0)
        async with asyncio.timeout(60):
            while len(server._clients) == 3:
                server.tell(big)
                await asyncio.sleep(0.01)
        for _, writer in clients:
            writer.close()
