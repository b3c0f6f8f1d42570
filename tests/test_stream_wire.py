"""A stream by hand: a source made from proto/README.md alone, and something that answers as QEMU.

The items are those of the golden vectors. The destination is the real program.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proto.wire.compressed import BatchCompressor
from proto.wire.errors import ErrorCode
from proto.wire.frames import HEADER_BYTES, seal
from proto.wire.messages import (
    Accept,
    Blocks,
    Bytes,
    CacheSize,
    Complete,
    Done,
    Error,
    Go,
    GuestInfo,
    Hello,
    Join,
    Joined,
    MessageType,
    Ready,
    Running,
    Taken,
)
from tests.hostile_peer import Peer, framed
from tests.programs import Program, destination

STREAM = json.loads((Path(__file__).parent / "vectors/wire.json").read_text())["stream"]
BLOCKS = Blocks(tuple((bytes.fromhex(name), pages) for name, pages in STREAM["blocks"]))
HELLO = Hello(1, ("page-hash-nh", "stream"), ("xbzrle", "zstd"))
SEED = bytes.fromhex(STREAM["hash_seed"])
COMPLETE = Complete(bytes.fromhex(STREAM["digest"]), bytes.fromhex(STREAM["state"]))
PASSED_ON = b"".join(bytes.fromhex(item["passed_on"]) for item in STREAM["items"])
HELD = b"".join(
    bytes.fromhex(item["fields"]["data"]) for item in STREAM["items"] if item["fields"].get("held")
)
PING = bytes.fromhex("08 0002 0004 58424d31")
PONG = bytes.fromhex("0002 0004 58424d31")
FIRST_PONG = bytes.fromhex("0002 0004 00000001")
SHUT = bytes.fromhex("0001 0004 00000000")


class Qemu:
    """An incoming QEMU: records the stream, and sends the answers it is given."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp:127.0.0.1:{self.server.getsockname()[1]}"
        self.came = b""
        self.ended = False
        self.sock: socket.socket | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            self.sock, _ = self.server.accept()
            while data := self.sock.recv(1 << 16):
                self.came += data
        self.ended = True

    def until(self, end: bytes) -> None:
        """Returns when this is the last that came."""
        deadline = time.monotonic() + 60
        while not self.came.endswith(end):
            assert time.monotonic() < deadline, self.came[-100:].hex()
            time.sleep(0.005)

    def say(self, data: bytes) -> None:
        assert self.sock is not None
        self.sock.sendall(data)

    def close(self) -> None:
        for one in (self.sock, self.server):
            if one is not None:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
        self.thread.join()


class Source:
    """Several connections of one attempt, by hand."""

    def __init__(self, address: str, channels: int) -> None:
        self.address = address
        self.channels = channels
        self.main = Peer(address)
        self.links = {0: self.main}
        self.sent = 0
        self.taken = 0
        self.returned = b""

    def greet(self, **more: object) -> Accept:
        self.main.send(HELLO)
        answer = self.main.receive()
        assert isinstance(answer, Hello)
        assert "stream" in answer.required + answer.optional
        size = STREAM["pages"] * STREAM["page_size"]
        guest = GuestInfo("qemu", size, STREAM["page_size"], SEED, self.channels, **more)
        self.main.send(guest)
        accept = self.main.receive()
        assert isinstance(accept, Accept), accept
        for channel in reversed(range(1, self.channels)):  # in any order
            link = self.links[channel] = Peer(self.address)
            link.send(Join(accept.token, channel))
            link.reader.channel = channel
            assert isinstance(link.receive(), Joined)
        return accept

    def item(self, fields: dict[str, object], first: int = 0, *, compressed: bool = False) -> None:
        channel = (self.sent - first) % self.channels
        self.sent += 1
        data = bytes.fromhex(str(fields["data"]))
        if "head" not in fields:
            frame = framed(Bytes(data, bool(fields["held"])), channel)
        else:
            made = bytearray(HEADER_BYTES) + bytes.fromhex(str(fields["head"]))
            if compressed:
                made = BatchCompressor(1).compress(memoryview(made), memoryview(data))
                data = b""
            seal(made, MessageType.PAGES, channel, len(data), compressed=compressed)
            frame = bytes(made) + data
        self.links[channel].send(frame)

    def hear(self, kind: type, until: int = 1) -> object:
        """The next message of this kind; TAKEN and the return path beside it are noted."""
        while True:
            message = self.main.receive()
            if isinstance(message, Taken):
                assert self.taken < message.items <= self.sent
                self.taken = message.items
            elif isinstance(message, Bytes):
                assert not message.held
                self.returned += message.data
            if isinstance(message, kind) and (kind is not Taken or self.taken >= until):
                return message
            assert isinstance(message, Taken | Bytes), message

    def close(self) -> None:
        for link in self.links.values():
            link.close()


@pytest.fixture
def qemu() -> Iterator[Qemu]:
    made = Qemu()
    yield made
    made.close()


@pytest.fixture
def there(qemu: Qemu, tmp_path: Path) -> Iterator[tuple[Program, str]]:
    program, address = destination(
        "--guest", f"qemu:{qemu.address}", "--journal", str(tmp_path), "--retry", "20"
    )
    yield program, address
    if program.process.returncode is None:
        program.kill()
        program.wait()


@pytest.mark.parametrize(("channels", "compressed"), [(1, False), (2, True), (4, False)])
def test_stream_is_carried_and_handed_over(qemu, there, channels, compressed):
    """Over channels that joined in reverse order. Held bytes wait for GO."""
    program, address = there
    source = Source(address, channels)
    source.greet()
    source.main.send(BLOCKS, CacheSize(1 << 16))
    for item in STREAM["items"]:
        source.item(item["fields"], compressed=compressed)
    source.hear(Taken, len(STREAM["items"]))
    qemu.until(PASSED_ON)
    assert qemu.came == PASSED_ON
    qemu.say(FIRST_PONG)
    source.hear(Bytes)
    assert source.returned == FIRST_PONG
    source.main.send(COMPLETE)
    qemu.until(PING)
    qemu.say(PONG)
    source.hear(Ready)
    assert source.returned == FIRST_PONG, "the answer to its own question stays there"
    assert qemu.came == PASSED_ON + PING
    # what was said on the return path is confirmed late: that is no fault
    source.main.send(Taken(1), Go())
    qemu.until(HELD)
    assert qemu.came == PASSED_ON + PING + HELD
    qemu.say(SHUT)
    assert isinstance(source.main.receive(), Running)
    source.main.send(Done())
    assert program.wait() == 0, program.err
    source.close()


def test_stream_resumes_where_it_broke(qemu, there):
    """Items that were not taken are sent again, as are answers on the return path; nothing
    reaches QEMU twice."""
    program, address = there
    first = Source(address, 2)
    token = first.greet().token
    first.main.send(BLOCKS, CacheSize(1 << 16))
    for item in STREAM["items"][:3]:
        first.item(item["fields"])
    first.hear(Taken, 3)
    qemu.say(FIRST_PONG)
    first.hear(Bytes)
    first.close()
    again = Source(address, 2)
    assert again.greet(resume=token).held
    again.sent = len(STREAM["items"])
    again.hear(Taken)
    assert again.taken == 3
    assert again.returned == b"", "not before it is said what has come of it"
    again.main.send(Taken(0), CacheSize(1 << 16))
    again.sent = 3
    for item in STREAM["items"][3:]:
        again.item(item["fields"], first=3)
    if not again.returned:
        again.hear(Bytes)
    assert again.returned == FIRST_PONG
    again.main.send(Taken(1), COMPLETE)
    qemu.until(PING)
    qemu.say(PONG)
    again.hear(Ready)
    assert qemu.came == PASSED_ON + PING
    again.main.send(Go())
    qemu.until(HELD)
    qemu.say(SHUT)
    assert isinstance(again.main.receive(), Running)
    again.main.send(Done())
    assert program.wait() == 0, program.err
    again.close()


BAD_BATCH = {"head": "0000000100000000000000000000000000000000" + "0002" + "800300017a", "data": ""}
SPOILED = STREAM["items"][1]["fields"]


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (BAD_BATCH, "a delta for a page that was never sent"),
        ({**SPOILED, "data": "00" + SPOILED["data"][2:]}, "does not match their check"),
    ],
    ids=["no base", "other bytes"],
)
def test_bad_batch_does_not_reach_qemu(qemu, there, item, text):
    program, address = there
    source = Source(address, 1)
    source.greet()
    source.main.send(BLOCKS)
    source.item(STREAM["items"][0]["fields"])
    source.hear(Taken)
    source.item(item)
    error = source.hear(Error)
    assert isinstance(error, Error)
    assert (error.code, text in error.reason) == (ErrorCode.PROTOCOL, True), error.reason
    source.close()
    qemu.thread.join(20)
    assert qemu.ended, "it is of no use to it, and it should know"
    program.kill()
    program.wait()
    assert "Traceback" not in program.err
    assert qemu.came.hex() == STREAM["items"][0]["passed_on"]


@pytest.mark.parametrize(
    ("complete", "code", "text"),
    [
        (Complete(bytes(16), COMPLETE.state), ErrorCode.MISMATCH, "is not what was sent"),
        (Complete(COMPLETE.digest, b""), ErrorCode.PROTOCOL, "does not say how many items"),
        (Complete(COMPLETE.digest, bytes(9)), ErrorCode.PROTOCOL, "but COMPLETE says 0"),
    ],
    ids=["digest", "no state", "fewer items"],
)
def test_wrong_complete_of_a_stream_is_refused(qemu, there, complete, code, text):
    _, address = there
    source = Source(address, 1)
    source.greet()
    source.main.send(BLOCKS)
    for item in STREAM["items"]:
        source.item(item["fields"])
    source.hear(Taken, len(STREAM["items"]))
    source.main.send(complete)
    error = source.hear(Error)
    assert isinstance(error, Error)
    assert (error.code, text in error.reason) == (code, True), error.reason
    assert HELD not in qemu.came[len(PASSED_ON) :]
    source.close()
