"""The table of the protocol: every (state, role, type), and two ends that never disagree."""

import gc
import itertools
import weakref
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.errors import ErrorCode, FrameError, LocalError, MessageError
from proto.frames import HEADER_BYTES, seal
from proto.messages import (
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
from proto.ownership import Claim
from proto.session import TABLE, Role, Session, State

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
    State.JOINING: ("", "JOINED>LANE"),
    State.LANE: ("PAGES ROUND BYTES", ""),
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


def name_of(value):
    return value.name


def frame_of(kind, channel=0):
    if kind is M.PAGES:
        frame = bytearray(HEADER_BYTES + 21)
        seal(frame, kind, channel, 1024)
        return bytes(frame) + bytes(1024)
    frame = pack(MESSAGES[kind], HEADER_BYTES)
    seal(frame, kind, channel)
    return bytes(frame)


def send(session, kind):
    """What goes on the wire when a session sends a message."""
    if kind is M.PAGES:
        session.send_pages()
        return frame_of(kind, session.channel)
    return bytes(session.send(MESSAGES[kind]))


def session_in(state, role):
    session = Session(role)
    session.state = state
    return session


class Pair:
    """Two ends and what is on the wire between them; no socket, no clock."""

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


def test_the_table_is_the_one_of_the_specification():
    table = {
        (state, role, kind): following
        for state, moves in TABLE.items()
        for (role, kind), following in moves.items()
    }
    assert table == LEGAL
    assert set(TABLE) == set(State)


@pytest.mark.parametrize(("state", "role", "kind"), LEGAL, ids=name_of)
def test_a_legal_move_is_sent_and_received(state, role, kind):
    sender, receiver = session_in(state, role), session_in(state, role.peer)
    receiver.reader.feed(send(sender, kind))
    assert receiver.next_frame().type is kind
    assert sender.state is receiver.state is LEGAL[state, role, kind]


@pytest.mark.parametrize(("state", "role", "kind"), ILLEGAL, ids=name_of)
def test_any_other_is_not_sent(state, role, kind):
    session = session_in(state, role)
    with pytest.raises(LocalError, match=f"{kind.name} cannot be sent in state {state.name}"):
        send(session, kind)
    assert session.state is state


@pytest.mark.parametrize(("state", "role", "kind"), ILLEGAL, ids=name_of)
def test_any_other_is_refused_when_it_comes(state, role, kind):
    session = session_in(state, role.peer)
    session.reader.feed(frame_of(kind))
    text = f"the {role.value} sent {kind.name} in state {state.name}"
    with pytest.raises(MessageError, match=text) as info:
        session.next_frame()
    assert info.value.code is ErrorCode.PROTOCOL
    assert session.state is state


def test_what_cannot_be_sealed_changes_no_state():
    session = session_in(State.STREAM, S)
    with pytest.raises(LocalError):
        session.send(Complete(bytes(16), bytes(BODY_LIMITS[M.COMPLETE])))
    assert session.state is State.STREAM


def test_a_message_carries_the_channel_of_its_connection():
    session = session_in(State.LANE, S)
    assert session.send(MESSAGES[M.ROUND])[6:8] == b"\0\0"
    session.channel = 0x0123
    assert session.channel == session.reader.channel == 0x0123
    assert session.send(MESSAGES[M.ROUND])[6:8] == b"\x01\x23"


def test_nothing_but_go_gives_the_guest_away():
    """From no state before COMMITTED is there another way there, or to DONE."""
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


def test_the_connection_may_end_between_frames_only():
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
def test_a_migration(way):
    pair = Pair()
    for role, kind in way:
        pair.send(role, kind)
        pair.deliver(role.peer)
        assert len(pair.states) == 1
    assert pair.states == {State.DONE}


CHANNEL = [(S, M.JOIN), (D, M.JOINED), (S, M.PAGES), (S, M.ROUND), (S, M.PAGES), (S, M.ROUND)]


def joined(channel):
    """Two ends of a further channel, as both bring it about."""
    pair = Pair()
    pair.send(S, M.JOIN)
    pair.ends[S].channel = channel
    pair.deliver(D)
    pair.ends[D].channel = channel
    pair.send(D, M.JOINED)
    pair.deliver(S)
    return pair


@pytest.mark.parametrize("channel", [1, 2, 63])
def test_a_further_channel_is_named_by_every_frame_after_join(channel):
    pair = joined(channel)
    assert pair.states == {State.LANE}
    for role, kind in CHANNEL[2:]:
        pair.send(role, kind)
        frame = pair.wire[role.peer][-1][1]
        assert int.from_bytes(frame[6:8], "big") == channel
        pair.deliver(role.peer)
        assert pair.states == {State.LANE}


def test_a_further_channel_carries_nothing_but_pages_rounds_and_bytes():
    sides = STATES[State.LANE]
    assert set(sides[0].split()) == {"PAGES", "ROUND", "BYTES"}
    assert sides[1] == "", "the destination confirms on the first channel"
    ways = {
        (role, kind) for (state, role, kind), following in LEGAL.items()
        if following is State.LANE and state is not State.LANE
    }  # fmt: skip
    assert ways == {(D, M.JOINED)}


@pytest.mark.parametrize("names", [0, 2])
@pytest.mark.parametrize("kind", [M.PAGES, M.ROUND, M.PING])
def test_a_frame_that_names_another_channel_is_refused(kind, names):
    """Batches cannot come to another connection than the one they were made for unnoticed."""
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


def test_acks_and_wishes_may_cross_with_complete():
    pair = Pair()
    for role, kind in STRAIGHT[:7]:
        pair.send(role, kind)
        pair.settle()
    pair.send(D, M.CACHE_SIZE)
    pair.send(D, M.ROUND_ACK)
    pair.send(S, M.COMPLETE)
    pair.settle()
    assert pair.states == {State.COMPLETED}


def test_what_was_taken_of_a_return_path_may_cross_with_ready():
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


@settings(max_examples=300)
@given(st.data())
def test_two_ends_never_disagree(data):
    """Any legal walk, with any delay on the wire: all that is sent is legal when it comes."""
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
def test_an_error_ends_both(way, steps, role):
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


def test_an_error_that_crosses_with_running_does_not_undo_it():
    """The source may give up waiting; the destination has the guest all the same."""
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
    """Memory comes back when the last reference goes, or not at all."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_session_takes_its_memory_with_it(without_collector):
    session = Session(D)
    arena = weakref.ref(session.reader._arena)
    del session
    assert arena() is None


def test_before_it_is_let_in_a_peer_has_room_for_small_frames_alone():
    session = Session(D)
    session.reader.feed(frame_of(M.HELLO))
    session.next_frame()
    assert len(session.reader._arena.buffer) <= 3 * MAX_CONTROL
    session.reader.feed(frame_of(M.PAGES)[:-1])
    with pytest.raises(MessageError):
        session.next_frame()
    assert len(session.reader.get_buffer()) <= 3 * MAX_CONTROL
    session.reader.drop()
    assert session.reader.partial == len(session.reader._arena.buffer) == 0
    session.reader.share(1)
    assert len(session.reader.get_buffer()) > 2 * MAX_BODY
