"""The protocol's state table, for every (state, role, type), and the agreement of both ends."""

import gc
import itertools
import weakref
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.wire.errors import ErrorCode, FrameError, LocalError, MessageError
from proto.wire.frames import HEADER_BYTES, seal
from proto.wire.messages import (
    BODY_LIMITS,
    MAX_BODY,
    MAX_CONTROL,
    Accept,
    Blocks,
    Bytes,
    CacheSize,
    Complete,
    Done,
    Error,
    Go,
    GuestInfo,
    Held,
    Hello,
    Join,
    Joined,
    MessageType,
    Ownership,
    Pages,
    Ping,
    Pong,
    Probe,
    Probed,
    Query,
    Ready,
    Round,
    RoundAck,
    Running,
    Taken,
    pack,
)
from proto.wire.ownership import Claim
from proto.wire.session import TABLE, Role, Session, State
from tests.cells import check_each

M = MessageType
S, D = Role.SOURCE, Role.DESTINATION

MESSAGES = {
    M.HELLO: Hello(1, (), ()),
    M.GUEST: GuestInfo("demo", 4096, 4096, bytes(16), 2),
    M.ACCEPT: Accept(bytes(16)),
    M.CACHE_SIZE: CacheSize(0),
    M.PAGES: Pages(),
    M.ROUND: Round(1, 0, 0),
    M.ROUND_ACK: RoundAck(1, 0.0, 0.0, 0, 0),
    M.COMPLETE: Complete(bytes(16), b""),
    M.READY: Ready(0.0),
    M.GO: Go(),
    M.RUNNING: Running(),
    M.PING: Ping(0),
    M.PONG: Pong(0),
    M.ERROR: Error(ErrorCode.INTERNAL, ""),
    M.JOIN: Join(bytes(16), 1),
    M.JOINED: Joined(),
    M.QUERY: Query(bytes(16)),
    M.OWNERSHIP: Ownership(Claim.PREPARED),
    M.DONE: Done(),
    M.HELD: Held(0, bytes(8)),
    M.PROBE: Probe(b"x"),
    M.PROBED: Probed(1),
    M.BLOCKS: Blocks(((b"pc.ram", 1),)),
    M.BYTES: Bytes(b"x"),
    M.TAKEN: Taken(0),
}

# The table of proto/README.md ("States"), written a second time by hand: "type>state" where the
# state changes.
STATES = {
    State.START: ("HELLO>GREETED JOIN>JOINING QUERY>ASKED", ""),
    State.ASKED: ("", "OWNERSHIP>ANSWERED"),
    State.ANSWERED: ("QUERY>ASKED GO>COMMITTED DONE>DONE", ""),
    State.JOINING: ("", "JOINED>CHANNEL"),
    State.CHANNEL: ("PAGES ROUND BYTES", ""),
    State.GREETED: ("", "HELLO>OPEN"),
    State.OPEN: ("PROBE GUEST>DESCRIBED", "PROBED"),
    State.DESCRIBED: ("", "PROBED ACCEPT>STREAM"),
    State.STREAM: (
        "PAGES ROUND CACHE_SIZE BLOCKS BYTES TAKEN COMPLETE>COMPLETED",
        "ROUND_ACK CACHE_SIZE HELD BYTES TAKEN",
    ),
    State.COMPLETED: ("TAKEN", "ROUND_ACK CACHE_SIZE HELD BYTES TAKEN READY>PREPARED"),
    State.PREPARED: ("GO>COMMITTED TAKEN", ""),
    State.COMMITTED: ("", "RUNNING>DONE"),
    State.DONE: ("DONE", ""),
    State.FAILED: ("", ""),
}


def legal_moves():
    moves = {}
    for state, sides in STATES.items():
        for role, text in zip((S, D), sides, strict=True):
            for word in text.split():
                name, _, following = word.partition(">")
                moves[state, role, M[name]] = State[following] if following else state
            if state not in (State.START, State.FAILED):
                moves[state, role, M.PING] = moves[state, role, M.PONG] = state
            if state not in (State.DONE, State.FAILED):
                moves[state, role, M.ERROR] = State.FAILED
    return moves


LEGAL = legal_moves()
EVERYTHING = list(itertools.product(State, Role, M))
ILLEGAL = [case for case in EVERYTHING if case not in LEGAL]


def frame_of(kind, channel=0):
    if kind is M.PAGES:
        frame = bytearray(HEADER_BYTES + 21)
        seal(frame, kind, channel, 1024)
        return bytes(frame) + bytes(1024)
    frame = pack(MESSAGES[kind], HEADER_BYTES)
    seal(frame, kind, channel)
    return bytes(frame)


def send(session, kind):
    """Send a message; return its bytes on the wire."""
    if kind is M.PAGES:
        session.send_pages()
        return frame_of(kind, session.channel)
    return bytes(session.send(MESSAGES[kind]))


def session_in(state, role):
    session = Session(role)
    session.state = state
    return session


class Pair:
    """Two sessions and the bytes on the wire between them, without sockets or clocks."""

    def __init__(self):
        self.ends = {role: Session(role) for role in Role}
        self.wire = {role: deque() for role in Role}  # towards the role

    def legal(self, role):
        session = self.ends[role]
        return [kind for kind in M if (session.state, role, kind) in LEGAL]

    def send(self, role, kind):
        self.wire[role.peer].append((kind, send(self.ends[role], kind)))

    def deliver(self, role):
        kind, data = self.wire[role].popleft()
        session = self.ends[role]
        session.reader.feed(data)
        frame = session.next_frame()
        assert frame.type is kind
        frame.release()

    def settle(self):
        while self.wire[S] or self.wire[D]:
            for role in Role:
                if self.wire[role]:
                    self.deliver(role)

    @property
    def states(self):
        return {session.state for session in self.ends.values()}


# ---------------------------------------------------------------- the table, exhaustively


def test_state_table_matches_the_specification():
    table = {
        (state, role, kind): following
        for state, moves in TABLE.items()
        for (role, kind), following in moves.items()
    }
    assert table == LEGAL
    assert set(TABLE) == set(State)


def test_legal_messages_are_sent_and_received():
    def check(state, role, kind):
        sender, receiver = session_in(state, role), session_in(state, role.peer)
        receiver.reader.feed(send(sender, kind))
        assert receiver.next_frame().type is kind
        assert sender.state is receiver.state is LEGAL[state, role, kind]

    check_each(check, LEGAL)


def test_illegal_messages_are_not_sent():
    def check(state, role, kind):
        session = session_in(state, role)
        with pytest.raises(LocalError, match=f"{kind.name} cannot be sent in state {state.name}"):
            send(session, kind)
        assert session.state is state

    check_each(check, ILLEGAL)


def test_illegal_messages_are_refused():
    def check(state, role, kind):
        session = session_in(state, role.peer)
        session.reader.feed(frame_of(kind))
        text = f"the {role.value} sent {kind.name} in state {state.name}"
        with pytest.raises(MessageError, match=text) as info:
            session.next_frame()
        assert info.value.code is ErrorCode.PROTOCOL
        assert session.state is state

    check_each(check, ILLEGAL)


def test_failed_send_changes_no_state():
    session = session_in(State.STREAM, S)
    with pytest.raises(LocalError):
        session.send(Complete(bytes(16), bytes(BODY_LIMITS[M.COMPLETE])))
    assert session.state is State.STREAM


def test_message_carries_the_channel_of_its_connection():
    session = session_in(State.CHANNEL, S)
    assert session.send(MESSAGES[M.ROUND])[6:8] == b"\0\0"
    session.channel = 0x0123
    assert session.channel == session.reader.channel == 0x0123
    assert session.send(MESSAGES[M.ROUND])[6:8] == b"\x01\x23"


def test_only_go_commits_the_guest():
    """No other message leads to COMMITTED or DONE from a state before them."""
    ways = {
        (state, role, kind)
        for (state, role, kind), following in LEGAL.items()
        if following in (State.COMMITTED, State.DONE) and state is not following
    }
    assert ways == {
        (State.PREPARED, S, M.GO),
        (State.ANSWERED, S, M.GO),
        (State.COMMITTED, D, M.RUNNING),
        (State.ANSWERED, S, M.DONE),
    }


# ---------------------------------------------------------------- reading


def test_byte_by_byte_and_with_bytes_to_spare():
    session = Session(D)
    data = frame_of(M.HELLO)
    for byte in data[:-1]:
        session.reader.feed(bytes([byte]))
        assert session.next_frame() is None
        assert session.state is State.START
    session.reader.feed(data[-1:] + frame_of(M.PING)[:7])
    assert session.next_frame().type is M.HELLO
    assert session.state is State.GREETED
    assert session.next_frame() is None


def test_connection_may_end_only_between_frames():
    session = Session(D)
    session.end()
    data = frame_of(M.HELLO)
    session.reader.feed(data[:30])
    assert session.next_frame() is None
    with pytest.raises(FrameError, match=r"ended inside a frame \(30 bytes\)"):
        session.end()
    session.reader.feed(data[30:])
    session.next_frame()
    session.end()


# ---------------------------------------------------------------- two ends

STRAIGHT = [
    (S, M.HELLO), (D, M.HELLO), (S, M.GUEST), (D, M.ACCEPT), (S, M.CACHE_SIZE), (S, M.PAGES),
    (S, M.ROUND), (D, M.ROUND_ACK), (D, M.CACHE_SIZE), (S, M.CACHE_SIZE), (S, M.PAGES),
    (S, M.ROUND), (S, M.COMPLETE), (D, M.ROUND_ACK), (D, M.READY), (S, M.GO), (D, M.RUNNING),
]  # fmt: skip


STREAMED = [
    (S, M.HELLO), (D, M.HELLO), (S, M.GUEST), (D, M.ACCEPT), (S, M.BLOCKS), (S, M.CACHE_SIZE),
    (S, M.BYTES), (D, M.TAKEN), (S, M.PAGES), (D, M.TAKEN), (D, M.BYTES), (S, M.TAKEN),
    (S, M.BYTES), (S, M.COMPLETE), (D, M.TAKEN), (D, M.BYTES), (S, M.TAKEN), (D, M.READY),
    (S, M.GO), (D, M.RUNNING),
]  # fmt: skip


@pytest.mark.parametrize("way", [STRAIGHT, STREAMED], ids=["pages", "stream"])
def test_whole_migration_through_two_sessions(way):
    pair = Pair()
    for role, kind in way:
        pair.send(role, kind)
        pair.deliver(role.peer)
        assert len(pair.states) == 1
    assert pair.states == {State.DONE}


CHANNEL = [(S, M.JOIN), (D, M.JOINED), (S, M.PAGES), (S, M.ROUND), (S, M.PAGES), (S, M.ROUND)]


def joined(channel):
    """Return the two sessions of a further channel after JOIN and JOINED."""
    pair = Pair()
    pair.send(S, M.JOIN)
    pair.ends[S].channel = channel
    pair.deliver(D)
    pair.ends[D].channel = channel
    pair.send(D, M.JOINED)
    pair.deliver(S)
    return pair


@pytest.mark.parametrize("channel", [1, 2, 63])
def test_frames_after_join_carry_the_channel_number(channel):
    pair = joined(channel)
    assert pair.states == {State.CHANNEL}
    for role, kind in CHANNEL[2:]:
        pair.send(role, kind)
        frame = pair.wire[role.peer][-1][1]
        assert int.from_bytes(frame[6:8], "big") == channel
        pair.deliver(role.peer)
        assert pair.states == {State.CHANNEL}


def test_further_channel_carries_only_pages_rounds_and_bytes():
    sides = STATES[State.CHANNEL]
    assert set(sides[0].split()) == {"PAGES", "ROUND", "BYTES"}
    assert sides[1] == "", "the destination confirms on the first channel"
    ways = {
        (role, kind) for (state, role, kind), following in LEGAL.items()
        if following is State.CHANNEL and state is not State.CHANNEL
    }  # fmt: skip
    assert ways == {(D, M.JOINED)}


@pytest.mark.parametrize("names", [0, 2])
@pytest.mark.parametrize("kind", [M.PAGES, M.ROUND, M.PING])
def test_frame_of_another_channel_is_refused(kind, names):
    """A batch on a connection that it was not made for is noticed."""
    end = joined(1).ends[D]
    end.reader.feed(frame_of(kind, names))
    text = f"{kind.name}: channel {names} on the connection of 1"
    with pytest.raises(FrameError, match=text):
        end.next_frame()


def test_pages_before_the_answer_to_join_are_refused():
    end = Session(D)
    end.reader.feed(frame_of(M.JOIN) + frame_of(M.PAGES))
    assert end.next_frame().type is M.JOIN
    with pytest.raises(MessageError, match="the source sent PAGES in state JOINING"):
        end.next_frame()


def test_round_ack_and_cache_size_may_cross_with_complete():
    pair = Pair()
    for role, kind in STRAIGHT[:7]:
        pair.send(role, kind)
        pair.settle()
    pair.send(D, M.CACHE_SIZE)
    pair.send(D, M.ROUND_ACK)
    pair.send(S, M.COMPLETE)
    pair.settle()
    assert pair.states == {State.COMPLETED}


def test_taken_may_cross_with_ready():
    pair = Pair()
    for role, kind in STREAMED[:16]:
        pair.send(role, kind)
        pair.settle()
    pair.send(S, M.TAKEN)
    pair.send(D, M.READY)
    pair.settle()
    assert pair.states == {State.PREPARED}


# Most walks would stay for long where anything may be repeated: they prefer what leads on.
ONWARD = {
    M.HELLO,
    M.GUEST,
    M.ACCEPT,
    M.COMPLETE,
    M.READY,
    M.GO,
    M.RUNNING,
    M.JOIN,
    M.JOINED,
    M.QUERY,
    M.OWNERSHIP,
}


@pytest.mark.exhaustive
@settings(max_examples=300)
@given(st.data())
def test_two_ends_never_disagree(data):
    """In any legal exchange, with any delay, each message is legal when it arrives."""
    pair = Pair()
    for _ in range(data.draw(st.integers(0, 50))):
        moves = [("deliver", role, None) for role in Role if pair.wire[role]]
        for role in Role:
            legal = [kind for kind in pair.legal(role) if kind is not M.ERROR]
            moves += [("send", role, kind) for kind in legal]
            moves += [("send", role, kind) for kind in legal if kind in ONWARD] * 4
        if not moves:
            pair.settle()
            continue
        action, role, kind = data.draw(st.sampled_from(moves))
        if action == "deliver":
            pair.deliver(role)
        else:
            pair.send(role, kind)
    pair.settle()
    assert len(pair.states) == 1


@given(st.sampled_from([STRAIGHT, CHANNEL]), st.integers(0, len(STRAIGHT)), st.sampled_from(Role))
def test_error_ends_both_sessions(way, steps, role):
    pair = Pair()
    for sender, kind in way[:steps]:
        pair.send(sender, kind)
        pair.settle()
    if pair.states == {State.DONE}:
        with pytest.raises(LocalError):
            pair.send(role, M.ERROR)
        return
    pair.send(role, M.ERROR)
    pair.settle()
    assert pair.states == {State.FAILED}
    for end in Role:
        assert pair.legal(end) == []


def test_two_errors_may_cross_and_both_ends_have_failed():
    pair = Pair()
    pair.send(S, M.ERROR)
    pair.send(D, M.ERROR)
    for role in Role:
        with pytest.raises(MessageError, match="in state FAILED"):
            pair.deliver(role)
    assert pair.states == {State.FAILED}


def test_error_crossing_running_does_not_undo_it():
    """The source may give up waiting, but the destination owns the guest."""
    pair = Pair()
    for role, kind in STRAIGHT[:-1]:
        pair.send(role, kind)
        pair.settle()
    pair.send(S, M.ERROR)
    pair.send(D, M.RUNNING)
    with pytest.raises(MessageError, match="sent ERROR in state DONE"):
        pair.deliver(D)
    assert pair.ends[D].state is State.DONE
    assert pair.ends[S].state is State.FAILED


# ---------------------------------------------------------------- memory


@pytest.fixture
def without_collector():
    """Disable the garbage collector, so that only reference counts free memory."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_session_frees_its_memory(without_collector):
    session = Session(D)
    arena = weakref.ref(session.reader._arena)
    del session
    assert arena() is None


def test_unaccepted_peer_has_room_for_small_frames_only():
    session = Session(D)
    session.reader.feed(frame_of(M.HELLO))
    session.next_frame()
    assert len(session.reader._arena.buffer) <= 3 * MAX_CONTROL
    session.reader.feed(frame_of(M.PAGES)[:-1])
    with pytest.raises(MessageError):
        session.next_frame()
    assert len(session.reader.get_buffer()) <= 3 * MAX_CONTROL
    session.reader.discard()
    assert session.reader.partial == len(session.reader._arena.buffer) == 0
    session.reader.limit_bodies(1)
    assert len(session.reader.get_buffer()) > 2 * MAX_BODY
