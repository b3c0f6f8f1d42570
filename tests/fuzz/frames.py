"""A peer's bytes through Session, unpack and what the handshake makes of messages.

Control: which side hears it and what it says itself; the sizes of the pieces it comes in; the
channel; how long frames are kept, and how large arenas are. A piece is a frame with a
right header and check, or bytes as they are.
"""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import xxhash

from migrate.errors import peer_error
from proto.wire.capabilities import OPTIONAL, agree, answer, offer
from proto.wire.errors import RemoteError
from proto.wire.frames import ARENAS_KEPT, HEADER, HEADER_BYTES, LEAST_READ, Frame
from proto.wire.messages import (
    MAX_BODY,
    MAX_CHANNELS,
    Error,
    GuestInfo,
    Hello,
    Join,
    Message,
    MessageType,
    Pages,
    Ping,
    Pong,
    body_limits,
    pack,
    unpack,
)
from proto.wire.ownership import Role
from proto.wire.session import TABLE, Session, State
from tests.fuzz.pieces import Piece, split
from tests.fuzz.sides import PATTERN

VECTORS = Path(__file__).parent.parent / "vectors/wire.json"
WIRE = json.loads(VECTORS.read_text())
GOLDEN = [*WIRE["exchange"]["frames"], *WIRE["others"]]
AT_ONCE = 100_000  # a reader whose frames are not taken holds no more than an arena
MOST_PIECES = 400
HANDSHAKE = {MessageType.PING, MessageType.PONG, MessageType.ERROR}
SHARED = 8  # of the control: a small arena, which is soon full

# of a piece's kind
TYPE = 0x1F
LONG = 0x20  # the data of PAGES is long
LONGEST = 0x40  # a header whose length is the limit, more or less, and not all that it announces
ODD = 0x80  # the channel is not that of the connection


def _message(vector: dict[str, str]) -> Message:
    frame = bytes.fromhex(vector["frame"])
    return unpack(MessageType(frame[4]), frame[HEADER_BYTES:])


SAMPLES = {MessageType[vector["type"]]: _message(vector) for vector in GOLDEN
           if vector["type"] != "PAGES"}  # fmt: skip


def frames(data: bytes) -> None:
    control, pieces = split(data)
    stream = b"".join(_wire(pieces, control[2], shared=bool(control[3] & SHARED)))
    whole = _Talk(control).hear(stream, [AT_ONCE], ask_always=True)
    sizes = {
        "even": [1 + control[1] * (1 + len(stream) // 20_000)],
        "uneven": [1, 1 + control[1] % 23, 24, 1 + control[1] * 7],
        "byte by byte": [1],
    }
    for name, plan in sizes.items():
        if len(stream) * len(plan) <= MOST_PIECES * sum(plan):
            assert _Talk(control).hear(stream, plan) == whole, name


def _wire(pieces: list[Piece], channel: int, *, shared: bool) -> Iterator[bytes]:
    """The bytes of the peer: whoever may lie about a check can also tell it right."""
    now = 0
    for kind, content in pieces:
        number = kind & TYPE
        if number not in MessageType.__members__.values():
            yield content
            continue
        head, extra = content, b""
        if number == MessageType.PAGES:
            amount, head = int.from_bytes(content[:2], "big"), content[2:]
            amount = amount * 8 if kind & LONG else amount % 256
            extra = (PATTERN * (amount // len(PATTERN) + 1))[:amount]
        named = channel if kind & ODD else now
        if kind & LONGEST:
            more = int.from_bytes(head[:1], "big", signed=True)
            length = body_limits(MAX_CHANNELS if shared else 1, named)[MessageType(number)] + more
            announced = 100 if number == MessageType.PAGES else length
            yield (
                struct.pack(">4sBBHIIQ", b"XBM1", number, 0, named, length, announced, 0) + head[1:]
            )
            continue
        middle = struct.pack(">BBHI", number, 0, named, len(head) + len(extra))
        check = xxhash.xxh3_64_intdigest(head, int.from_bytes(middle, "big"))
        yield b"XBM1" + middle + struct.pack(">IQ", len(head), check) + head + extra
        if number == MessageType.JOIN and now == 0:
            try:
                now = unpack(MessageType.JOIN, head).channel
            except RemoteError:
                pass


class _Talk:
    """One side of a connection, as far as it has no memory, time or socket."""

    def __init__(self, control: bytes) -> None:
        self.role = Role.DESTINATION if control[0] & 1 else Role.SOURCE
        self.choice = control[0] >> 1 & 7
        self.patience = control[3] & 15
        self.keep = control[3] >> 4
        self.session = Session(self.role)
        self.channels = 1
        if control[3] & SHARED:
            self._share(MAX_CHANNELS)
        self.heard: list[object] = []
        self.kept: deque[tuple[Frame, bytes, bytes]] = deque()

    def hear(self, stream: bytes, sizes: list[int], *, ask_always: bool = False) -> list[object]:
        """Everything that was heard, up to the fault or the end."""
        session = self.session
        at, plan = 0, cycle(sizes)
        self._speak()
        try:
            while at < len(stream):
                size = next(plan)
                session.reader.feed(stream[at : at + size])
                at += size
                if ask_always or session.reader.has_news:
                    while (frame := session.next_frame()) is not None:
                        self._take(frame)
                self._assert_small()
            self.heard.append(session.reader.partial)
            session.end()
        except RemoteError as error:
            text = str(error)
            if text.startswith("not an xbmigrate stream"):
                text = "not an xbmigrate stream"  # it shows what came by then
            self.heard.append((type(error), error.code, text))
        self.heard.append((session.state, session.channel))
        while self.kept:
            self._let_go()
        return self.heard

    def _take(self, frame: Frame) -> None:
        head, data = bytes(frame.head), bytes(frame.data)
        assert frame.size == len(head) + len(data)
        self.kept.append((frame, head, data))
        message = unpack(frame.type, frame.head)
        said = None if isinstance(message, Pages) else message
        self.heard.append((frame.type, head, data, said))
        if len(self.kept) > self.keep:
            self._let_go()
        if not isinstance(message, Pages):
            body = bytes(pack(message))
            assert unpack(frame.type, body) == message
            assert pack(unpack(frame.type, body)) == body
        self._act_on(message)
        self._speak()

    def _let_go(self) -> None:
        frame, head, data = self.kept.popleft()
        assert (frame.head, frame.data) == (head, data), "changed while it was kept"
        frame.release()

    def _act_on(self, message: Message) -> None:
        if isinstance(message, Hello):
            ours = offer(OPTIONAL)
            if self.role is Role.SOURCE:
                agree(ours, message)
            else:
                reply, used = answer(message, OPTIONAL)
                assert agree(Hello(message.version, message.required, message.optional), reply)
                assert used.used <= set(message.required) | set(message.optional)
        elif isinstance(message, GuestInfo):
            assert 0 < message.pages <= 1 << 32
            if self.channels == 1:
                self._share(message.channels)
        elif isinstance(message, Join):
            self.session.channel = message.channel
        elif isinstance(message, Error):
            assert str(peer_error(message)).isprintable()
        elif isinstance(message, Ping):
            self.session.send(Pong(message.token))

    def _share(self, channels: int) -> None:
        self.channels = channels
        self.session.reader.limit_bodies(channels)

    def _speak(self) -> None:
        """Says what leads on, where nothing that the peer could say does."""
        for _ in range(4):
            state = self.session.state
            moves = TABLE[state].items()
            ours = [kind for (role, kind), after in moves
                    if role is self.role and kind in SAMPLES and kind not in HANDSHAKE
                    and after is not state]  # fmt: skip
            if not ours or (state is State.STREAM and len(self.heard) <= self.patience):
                return
            message = SAMPLES[ours[self.choice % len(ours)]]
            self.session.send(message)
            if isinstance(message, Join):
                self.session.channel = message.channel

    def _assert_small(self) -> None:
        """No memory, and no waiting, for more than the limits allow."""
        reader = self.session.reader
        arenas = [reader._arena, *reader._kept]
        assert len(arenas) <= 1 + ARENAS_KEPT
        assert all(len(arena.buffer) <= 2 * MAX_BODY + LEAST_READ for arena in arenas)
        assert reader.partial <= len(reader._arena.buffer)
        if reader.partial >= HEADER_BYTES:
            header = bytes(reader._arena.buffer[reader._start :][:HEADER_BYTES])
            _, kind, _, channel, length, head, _ = HEADER.unpack(header)
            assert head <= length <= body_limits(self.channels, channel)[MessageType(kind)]
