"""The table of the protocol: every (state, role, type), and two ends that never disagree."""

import itertools
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.errors import ErrorCode, FrameError, LocalError, MessageError
from proto.frames import HEADER_BYTES, seal
from proto.messages import (
    BODY_LIMITS,
    Accept,
    CacheSize,
    Complete,
    Error,
    Go,
    GuestInfo,
    Hello,
    MessageType,
    Pages,
    Ping,
    Pong,
    Ready,
    Round,
    RoundAck,
    Running,
    pack,
)
from proto.session import TABLE, Role, Session, State

M = MessageType
S, D = Role.SOURCE, Role.DESTINATION

MESSAGES = {
    M.HELLO: Hello(1, (), ()),
    M.GUEST: GuestInfo("demo", 4096, 4096),
    M.ACCEPT: Accept(),
    M.CACHE_SIZE: CacheSize(0),
    M.PAGES: Pages(bytes(14)),
    M.ROUND: Round(1, 0, 0),
    M.ROUND_ACK: RoundAck(1, 0.0, 0.0, 0, 0),
    M.COMPLETE: Complete(bytes(16), b""),
    M.READY: Ready(0.0),
    M.GO: Go(),
    M.RUNNING: Running(),
    M.PING: Ping(0),
    M.PONG: Pong(0),
    M.ERROR: Error(ErrorCode.INTERNAL, ""),
}

# The table of proto/README.md ("States"), written a second time by hand: "type>state" where the
# state changes.
STATES = {
    State.START: ("HELLO>GREETED", ""),
    State.GREETED: ("", "HELLO>OPEN"),
    State.OPEN: ("GUEST>DESCRIBED", ""),
    State.DESCRIBED: ("", "ACCEPT>STREAM"),
    State.STREAM: ("PAGES ROUND CACHE_SIZE COMPLETE>COMPLETED", "ROUND_ACK CACHE_SIZE"),
    State.COMPLETED: ("", "ROUND_ACK CACHE_SIZE READY>PREPARED"),
    State.PREPARED: ("GO>COMMITTED", ""),
    State.COMMITTED: ("", "RUNNING>DONE"),
    State.DONE: ("", ""),
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


def frame_of(kind):
    return bytes(seal(pack(MESSAGES[kind], HEADER_BYTES), kind))


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
        frame = self.ends[role].send(MESSAGES[kind])
        self.wire[role.peer].append((kind, bytes(frame)))

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
    receiver.reader.feed(bytes(sender.send(MESSAGES[kind])))
    assert receiver.next_frame().type is kind
    assert sender.state is receiver.state is LEGAL[state, role, kind]


@pytest.mark.parametrize(("state", "role", "kind"), ILLEGAL, ids=name_of)
def test_any_other_is_not_sent(state, role, kind):
    session = session_in(state, role)
    for send in (
        lambda: session.send(MESSAGES[kind]),
        lambda: session.send_sealed(kind, bytearray(frame_of(kind))),
    ):
        with pytest.raises(LocalError, match=f"{kind.name} cannot be sent in state {state.name}"):
            send()
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


def test_a_sealed_frame_counts_like_a_message():
    session = session_in(State.STREAM, S)
    frame = bytearray(frame_of(M.PAGES))
    assert session.send_sealed(M.PAGES, frame) is frame
    assert session.state is State.STREAM


def test_nothing_but_go_gives_the_guest_away():
    """From no state before COMMITTED is there another way there, or to DONE."""
    ways = {
        (state, role, kind)
        for (state, role, kind), following in LEGAL.items()
        if following in (State.COMMITTED, State.DONE) and state is not following
    }
    assert ways == {(State.PREPARED, S, M.GO), (State.COMMITTED, D, M.RUNNING)}


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
    session.reader.feed(data[:20])
    assert session.next_frame() is None
    with pytest.raises(FrameError, match=r"ended inside a frame \(20 bytes\)"):
        session.end()
    session.reader.feed(data[20:])
    session.next_frame()
    session.end()


# ---------------------------------------------------------------- two ends

STRAIGHT = [
    (S, M.HELLO), (D, M.HELLO), (S, M.GUEST), (D, M.ACCEPT), (S, M.CACHE_SIZE), (S, M.PAGES),
    (S, M.ROUND), (D, M.ROUND_ACK), (D, M.CACHE_SIZE), (S, M.CACHE_SIZE), (S, M.PAGES),
    (S, M.ROUND), (S, M.COMPLETE), (D, M.ROUND_ACK), (D, M.READY), (S, M.GO), (D, M.RUNNING),
]  # fmt: skip


def test_a_migration():
    pair = Pair()
    for role, kind in STRAIGHT:
        pair.send(role, kind)
        pair.deliver(role.peer)
        assert len(pair.states) == 1
    assert pair.states == {State.DONE}


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


# Most walks would stay for long where anything may be repeated: they prefer what leads on.
ONWARD = {M.HELLO, M.GUEST, M.ACCEPT, M.COMPLETE, M.READY, M.GO, M.RUNNING}


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


@given(st.integers(0, len(STRAIGHT)), st.sampled_from(Role))
def test_an_error_ends_both(steps, role):
    pair = Pair()
    for sender, kind in STRAIGHT[:steps]:
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
