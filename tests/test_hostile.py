"""A destination among hostile peers reports errors, stays small, and serves the true source.

These tests run real programs over loopback. Fields and lengths at their bounds are covered by
test_frames, test_messages, test_session, test_pages and test_channels.
"""

from __future__ import annotations

import json
import random
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.cli.log_limit import LINES
from migrate.ownership.records import MAX_QUESTIONS
from proto.wire.errors import ErrorCode
from proto.wire.frames import HEADER_BYTES, seal
from proto.wire.messages import (
    Accept,
    Complete,
    Error,
    Go,
    Hello,
    Join,
    MessageType,
    Ownership,
    Ping,
    Probe,
    Probed,
    Query,
    Round,
)  # fmt: skip
from proto.wire.ownership import Claim
from tests.bench.processes import private_memory
from tests.hostile_peer import GUEST, HELLO, MIB, Peer, framed
from tests.programs import Program, destination, end_guest, guest_pid, look_at

WIRE = json.loads((Path(__file__).parent / "vectors/wire.json").read_text())


@pytest.fixture
def there() -> Iterator[tuple[Program, str]]:
    program, address = destination()
    yield program, address
    if program.process.returncode is None:
        program.kill()
        program.wait()


def assert_serves(program: Program, address: str) -> None:
    """Assert that the true source still migrates its guest, intact."""
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
    """Return a header without a body; its check does not matter."""
    return struct.pack(
        ">4sBBHIIQ", b"XBM1", kind, 0, channel, length, length if head is None else head, 0
    )


# The first bytes of an unknown peer, and the reason that it gets in ERROR.
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


@pytest.mark.programs
@pytest.mark.parametrize("first", FIRST_WORDS)
def test_invalid_first_bytes_are_refused(there, first: str) -> None:
    program, address = there
    said, answer = FIRST_WORDS[first]
    peer = Peer(address)
    peer.send(said)
    assert answer in peer.reason()
    peer.close()
    assert_serves(program, address)
    assert answer in program.err


# Frames of a source that was accepted, after HELLO, GUEST and ACCEPT.
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


@pytest.mark.programs
@pytest.mark.parametrize("breach", BREACHES)
def test_protocol_violation_is_refused(there, breach: str) -> None:
    """The peer gets ERROR, its pages are discarded, and the true source is served."""
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


def test_truncated_handshake_is_refused(there) -> None:
    """Cut the specification's exchange within each frame up to GUEST."""
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


def test_random_bytes_are_refused(there) -> None:
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


@pytest.mark.programs
def test_thousand_silent_and_hundred_partial_connections(there) -> None:
    """The destination's memory stays about the same, and the true source does not wait for them."""
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
    # At most 128 connections stay, each with up to 64 KiB of a first message, and its objects.
    assert private_memory(program.process.pid) - before < 128 * (64 << 10) + 16 * MIB
    assert_serves(program, address)
    for peer in crowd:
        peer.close()


def test_slow_peer_does_not_block_the_true_source(there) -> None:
    program, address = there
    slow = [Peer(address) for _ in range(3)]
    for byte in framed(HELLO)[:20]:
        for peer in slow:
            peer.send(bytes([byte]))
        time.sleep(0.01)
    assert_serves(program, address)
    for peer in slow:
        peer.close()


@pytest.mark.programs
def test_query_of_unknown_token_is_answered(there) -> None:
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


def test_endless_queries_are_disconnected(there) -> None:
    program, address = there
    peer = Peer(address)
    for _ in range(MAX_QUESTIONS):
        peer.send(Query(bytes(16)))
        assert isinstance(peer.receive(), Ownership)
    assert "it was asked 64 times" in peer.reason()
    peer.close()
    assert_serves(program, address)


PROBING = Hello(1, ("page-hash-nh", "probe"), ("xbzrle",))


@pytest.mark.programs
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
def test_protocol_violation_in_a_probe_is_refused(there, hello, said, answer) -> None:
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


@pytest.mark.programs
@pytest.mark.parametrize("goes", ["at once", "after some", "in the middle", "and brings a guest"])
def test_probe_is_not_counted_as_failed_migration(there, goes: str) -> None:
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
    assert "measured the path to here: nothing was moved" in program.err
    assert "refused" not in program.err


def test_probe_is_refused_during_a_migration(there) -> None:
    program, address = there
    first = Peer(address)
    first.describe()
    second = Peer(address)
    second.send(PROBING)
    assert "another guest is being received" in second.reason()
    second.close()
    first.close()
    assert program.wait() == 1


@pytest.mark.programs
def test_second_guest_is_refused_during_a_migration(there) -> None:
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


@pytest.mark.programs
def test_repeated_failed_guests_do_not_fill_the_log() -> None:
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
    assert "more lines about guests" in program.err


@pytest.mark.parametrize("moment", [0.0, 0.02, 0.1])
def test_sigterm_counts_while_a_peer_is_refused(there, moment: float) -> None:
    """It comes as the destination cleans up after a peer that broke the protocol."""
    program, address = there
    peer = Peer(address)
    peer.describe()
    peer.send(Go())
    assert peer.reason()
    time.sleep(moment)
    program.process.send_signal(signal.SIGTERM)
    assert program.wait() in (3, 128 + signal.SIGTERM), program.err
    peer.close()
