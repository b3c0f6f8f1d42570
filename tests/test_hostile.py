"""A destination among hostile peers says what is wrong, stays small, and serves the true source.

Real programs over loopback. The stream itself, every field and every length at its bounds, has
tests of its own (test_frames, test_messages, test_session, test_pages, test_channels).
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.handover import MAX_QUESTIONS
from migrate.rationed import LINES
from proto.errors import ErrorCode
from proto.frames import HEADER_BYTES, FrameReader, seal
from proto.messages import (
    TYPE_OF,
    Accept,
    Complete,
    Error,
    Go,
    GuestInfo,
    Hello,
    Join,
    Message,
    MessageType,
    Ownership,
    Ping,
    Probe,
    Probed,
    Query,
    Round,
    pack,
    unpack,
)  # fmt: skip
from proto.ownership import Claim
from tests.bench.processes import private_memory
from tests.programs import Program, destination, end_guest, guest_pid, look_at

MIB = 1 << 20
WIRE = json.loads((Path(__file__).parent / "vectors/wire.json").read_text())
SEED = bytes(range(16))
HELLO = Hello(1, ("page-hash-nh",), ("xbzrle",))
GUEST = GuestInfo("demo", MIB, 4096, SEED)


def framed(message: Message, channel: int = 0) -> bytes:
    frame = pack(message, HEADER_BYTES)
    seal(frame, TYPE_OF[type(message)], channel)
    return bytes(frame)


class Peer:
    """A hostile source, by hand."""

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("tcp:").rsplit(":", 1)
        self.sock = socket.create_connection((host, int(port)), timeout=20)
        self.reader = FrameReader()

    def send(self, *pieces: Message | bytes) -> None:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                self.sock.sendall(piece if isinstance(piece, bytes) else framed(piece))

    def receive(self) -> Message | None:
        """The next message; None at the end of the connection."""
        while True:
            frame = self.reader.next_frame()
            if frame is not None:
                return unpack(frame.type, frame.head)
            try:
                data = self.sock.recv(1 << 16)
            except ConnectionError:
                return None
            if not data:
                return None
            self.reader.feed(data)

    def reason(self) -> str:
        """What it is told before the other side hangs up; "" for nothing."""
        while (message := self.receive()) is not None:
            if isinstance(message, Error):
                return message.reason
        return ""

    def describe(self) -> None:
        """Goes as far as a source whose guest was accepted."""
        self.send(HELLO)
        assert isinstance(self.receive(), Hello)
        self.send(GUEST)
        assert isinstance(self.receive(), Accept)

    def hang_up(self) -> None:
        """Says nothing more, in order; the other side may have had enough before."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
def there() -> Iterator[tuple[Program, str]]:
    program, address = destination()
    yield program, address
    if program.process.returncode is None:
        program.kill()
        program.wait()


def assert_serves(program: Program, address: str) -> None:
    """The true source still comes through, and all is right."""
    source = Program("migrate-src", "--guest", "demo:1m", address)
    assert source.wait() == 0, source.err
    assert program.wait() == 0, program.err
    assert "Traceback" not in program.err
    pid = guest_pid(program.out)
    try:
        assert look_at(pid)[2] == -1
    finally:
        end_guest(pid)


def batch(head: bytes, data: bytes = b"") -> bytes:
    frame = bytearray(HEADER_BYTES) + head
    seal(frame, MessageType.PAGES, 0, len(data))
    return bytes(frame) + data


def header(kind: int, length: int, head: int | None = None, channel: int = 0) -> bytes:
    """A header alone, with a check that does not matter."""
    return struct.pack(
        ">4sBBHIIQ", b"XBM1", kind, 0, channel, length, length if head is None else head, 0
    )


# What a stranger says first, and what it is told.
FIRST_WORDS = {
    "http": (b"GET / HTTP/1.1\r\n\r\n", "not an xbmigrate stream"),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), "the source speaks TLS"),
    "zeros": (bytes(4096), "not an xbmigrate stream"),
    "an unknown type": (header(99, 0), "unknown frame type 99"),
    "pages": (header(5, 2 * MIB, 28), "sent PAGES in state START"),
    "a state of a megabyte": (header(8, MIB), "sent COMPLETE in state START"),
    "too long a hello": (header(1, 65537), "65537 bytes are over 65536"),
    "a hello of all that is allowed": (header(1, 65536) + bytes(65536), "does not match"),
    "go": (framed(Go()), "sent GO in state START"),
    "an answer": (framed(Ownership(Claim.OWNER)), "sent OWNERSHIP in state START"),
    "a ping": (framed(Ping(1)), "sent PING in state START"),
    "another version": (framed(Hello(2, ("page-hash-nh",), ())), "version"),
    "what is not there": (framed(Hello(1, ("page-hash-nh", "rdma"), ())), "rdma"),
    "a channel of nothing": (framed(Join(bytes(16), 1)), "no migration waits for a channel"),
    "a guest before a hello": (framed(GUEST), "sent GUEST in state START"),
}


@pytest.mark.parametrize("first", FIRST_WORDS)
def test_a_strangers_first_words(there, first: str) -> None:
    program, address = there
    said, answer = FIRST_WORDS[first]
    peer = Peer(address)
    peer.send(said)
    assert answer in peer.reason()
    peer.close()
    assert_serves(program, address)
    assert answer in program.err


# What a source says that was let in: after HELLO, GUEST and ACCEPT.
BREACHES = {
    "a page outside the guest": batch(struct.pack(">IQQ", 1, 256, 0) + b"\x00\x01"),
    "a run over the end": batch(struct.pack(">IQQ", 1, 255, 0) + b"\x00\x02"),
    "a count of nothing": batch(struct.pack(">IQQ", 1, 0, 0) + b"\x00\x00"),
    "an endless count": batch(struct.pack(">IQQ", 1, 0, 0) + b"\x00" + b"\xff" * 9),
    "raw pages that never come": batch(struct.pack(">IQQ", 1, 0, 0) + b"\x40\x00\x01"),
    "raw pages that do not fit their check": batch(
        struct.pack(">IQQ", 1, 0, 0) + b"\x40\x00\x01", bytes(4096)
    ),
    "a delta of nothing": batch(struct.pack(">IQQ", 1, 0, 0) + b"\x80\x03\x00\x01x"),
    "an empty batch": batch(struct.pack(">IQQ", 1, 0, 0)),
    "half a batch": batch(b"\x00\x00"),
    "a record that is not in use": batch(struct.pack(">IQQ", 1, 0, 0) + b"\xc0\x01"),
    "another round": batch(struct.pack(">IQQ", 7, 0, 0) + b"\x00\x01"),
    "the end of another round": framed(Round(2, 0, 0)),
    "go": framed(Go()),
    "another hello": framed(HELLO),
    "a question": framed(Query(bytes(16))),
    "the wrong channel": framed(Round(1, 0, 0), channel=3),
    "complete, with nothing sent": framed(Round(1, 0, 0, True)) + framed(Complete(bytes(16), b"")),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_source_that_breaks_the_protocol(there, breach: str) -> None:
    """It is told so, what it brought is thrown away, and the true source is served."""
    program, address = there
    peer = Peer(address)
    peer.describe()
    peer.send(BREACHES[breach])
    assert peer.reason() != ""
    peer.close()
    if breach == "complete, with nothing sent":
        assert program.wait() == 6  # a source that lacks pages is a source that failed
        return
    assert_serves(program, address)
    assert "refused" in program.err


def test_every_truncation_of_a_migration(there) -> None:
    """The exchange of the specification, cut off within each frame up to the description."""
    program, address = there
    frames = [bytes.fromhex(one["frame"]) for one in WIRE["exchange"]["frames"]
              if one["from"] == "source"][:2]  # fmt: skip
    whole = b"".join(frames)
    for cut in range(0, len(whole) - 1, 3):
        peer = Peer(address)
        peer.send(whole[:cut])
        peer.hang_up()
        peer.close()
    assert_serves(program, address)


def test_random_bytes(there) -> None:
    program, address = there
    chance = random.Random(5)
    for turn in range(60):
        peer = Peer(address)
        prefix = (b"", b"XBM1", framed(HELLO))[turn % 3]
        peer.send(prefix + chance.randbytes(chance.choice([1, 24, 4096])))
        if turn % 2:
            peer.hang_up()
        peer.close()
    assert_serves(program, address)


def test_a_thousand_that_say_nothing_and_a_hundred_that_say_half(there) -> None:
    """Its memory stays where it was, give or take, and the true source need not wait for them."""
    program, address = there
    before = private_memory(program.process.pid)
    crowd = []
    for _ in range(1000):
        crowd.append(Peer(address))
    for _ in range(100):
        crowd.append(Peer(address))
        crowd[-1].send(header(1, 65536) + bytes(65000))
    for _ in range(20):
        crowd.append(Peer(address))
        crowd[-1].send(HELLO)  # and never describes a guest
    time.sleep(0.5)
    # 128 stand at most, each with 64 KiB of a first word at most, and what an object costs.
    assert private_memory(program.process.pid) - before < 128 * (64 << 10) + 16 * MIB
    assert_serves(program, address)
    for peer in crowd:
        peer.close()


def test_one_who_speaks_a_byte_at_a_time_does_not_keep_the_door(there) -> None:
    program, address = there
    slow = [Peer(address) for _ in range(3)]
    for byte in framed(HELLO)[:20]:
        for peer in slow:
            peer.send(bytes([byte]))
        time.sleep(0.01)
    assert_serves(program, address)
    for peer in slow:
        peer.close()


def test_who_asks_for_what_is_not_there_is_told_so(there) -> None:
    program, address = there
    peer = Peer(address)
    peer.send(Query(bytes(16)))
    answer = peer.receive()
    assert isinstance(answer, Ownership)
    assert answer.claim is Claim.NONE
    peer.send(Go())
    assert "there is no record of that migration here" in peer.reason()
    peer.close()
    assert_serves(program, address)


def test_who_asks_for_ever_is_hung_up_on(there) -> None:
    program, address = there
    peer = Peer(address)
    for _ in range(MAX_QUESTIONS):
        peer.send(Query(bytes(16)))
        assert isinstance(peer.receive(), Ownership)
    assert "it was asked 64 times" in peer.reason()
    peer.close()
    assert_serves(program, address)


PROBING = Hello(1, ("page-hash-nh", "probe"), ("xbzrle",))


@pytest.mark.parametrize(
    ("hello", "said", "answer"),
    [
        (HELLO, Probe(b"x"), "probe was not agreed on"),
        (PROBING, Probed(1), "sent PROBED in state OPEN"),
        (PROBING, Accept(bytes(16)), "sent ACCEPT in state OPEN"),
        (PROBING, header(21, 65_537), "PROBE"),
        (PROBING, framed(Probe(b"x"))[:-1] + b"y", "check"),
        (PROBING, Error(ErrorCode.INTERNAL, "no more"), "no more"),
    ],
    ids=["not agreed on", "an answer", "an acceptance", "too long", "damaged", "a reason"],
)
def test_one_who_wants_to_know_the_way_and_breaks_the_protocol(there, hello, said, answer) -> None:
    program, address = there
    peer = Peer(address)
    peer.send(hello)
    assert isinstance(peer.receive(), Hello)
    peer.send(said)
    peer.hang_up()
    reason = peer.reason()
    peer.close()
    assert_serves(program, address)
    assert answer in reason + program.err


@pytest.mark.parametrize("goes", ["at once", "after some", "in the middle", "and brings a guest"])
def test_who_wanted_to_know_the_way_is_no_failure(there, goes: str) -> None:
    program, address = there
    peer = Peer(address)
    peer.send(PROBING)
    assert isinstance(hello := peer.receive(), Hello)
    assert "probe" in hello.required + hello.optional
    if goes != "at once":
        peer.send(*[Probe(bytes(1000))] * 3)
        assert [peer.receive() for _ in range(3)] == [Probed(1000), Probed(2000), Probed(3000)]
    if goes == "in the middle":
        peer.send(framed(Probe(bytes(1000)))[:500])
    if goes == "and brings a guest":
        peer.send(GUEST)
        assert isinstance(peer.receive(), Accept)
    peer.close()
    if goes == "and brings a guest":
        assert program.wait() == 1
        return
    assert_serves(program, address)
    assert "measured the way here: nothing was moved" in program.err
    assert "refused" not in program.err


def test_nobody_measures_the_way_while_a_guest_comes(there) -> None:
    program, address = there
    first = Peer(address)
    first.describe()
    second = Peer(address)
    second.send(PROBING)
    assert "another guest is being received" in second.reason()
    second.close()
    first.close()
    assert program.wait() == 1


def test_a_second_guest_is_told_that_another_one_is_being_received(there) -> None:
    program, address = there
    first = Peer(address)
    first.describe()
    second = Program("migrate-src", "--guest", "demo:1m", address)
    assert second.wait() == 4
    assert "another guest is being received here just now" in second.err
    end_guest(guest_pid(second.err))
    first.send(b"nonsense")
    first.reason()
    first.close()
    assert_serves(program, address)


def test_guests_that_come_and_go_do_not_fill_the_log() -> None:
    program, address = destination("--retry", "10s")
    for _ in range(8 * LINES):
        peer = Peer(address)
        for word in (HELLO, GUEST):
            peer.send(word)
            peer.receive()
        peer.close()
    program.process.terminate()
    program.wait()
    assert program.err.count("receiving a demo guest") <= 2 * LINES
    assert "more lines on guests that came" in program.err
