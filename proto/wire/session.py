"""The protocol as a table: which side may send what in which state, and what state follows.

    START --HELLO--> GREETED ==HELLO==> OPEN --GUEST--> DESCRIBED ==ACCEPT==> STREAM
    OPEN: --PROBE-->, ==PROBED==>
    STREAM: --PAGES-->, --ROUND-->, ==ROUND_ACK==>, CACHE_SIZE either way; ==HELD==>
    STREAM of a QEMU: --BLOCKS-->, --PAGES-->, --BYTES-->, ==BYTES==>, TAKEN either way
    STREAM --COMPLETE--> COMPLETED ==READY==> PREPARED --GO--> COMMITTED ==RUNNING==> DONE
    DONE: --DONE-->
    a further channel: START --JOIN--> JOINING ==JOINED==> CHANNEL; CHANNEL: --PAGES-->, --ROUND-->,
                       --BYTES-->
    after a break: START --QUERY--> ASKED ==OWNERSHIP==> ANSWERED --GO--> COMMITTED
    (-- from the source, == from the destination; PING and PONG in any state but START
     and FAILED; ERROR at any time before DONE leads to FAILED)

Both sides have the same table, and move along it by what they send and what they receive. The table
knows nothing of the bytes: frames.py cuts them, messages.py gives them types.
"""

from __future__ import annotations

from enum import Enum, auto

from proto.wire.errors import FrameError, LocalError, MessageError
from proto.wire.frames import HEADER_BYTES, Frame, FrameReader, seal
from proto.wire.messages import MAX_CONTROL, TYPE_OF, Message, MessageType, pack, unpack
from proto.wire.ownership import Role

M = MessageType


class State(Enum):
    START = auto()
    GREETED = auto()
    OPEN = auto()
    DESCRIBED = auto()
    STREAM = auto()
    JOINING = auto()
    CHANNEL = auto()
    ASKED = auto()
    ANSWERED = auto()
    COMPLETED = auto()
    PREPARED = auto()
    COMMITTED = auto()
    DONE = auto()
    FAILED = auto()


S, D = Role.SOURCE, Role.DESTINATION

TABLE: dict[State, dict[tuple[Role, MessageType], State]] = {
    State.START: {
        (S, M.HELLO): State.GREETED,
        (S, M.JOIN): State.JOINING,
        (S, M.QUERY): State.ASKED,
    },
    State.ASKED: {(D, M.OWNERSHIP): State.ANSWERED},
    State.ANSWERED: {
        (S, M.QUERY): State.ASKED,
        (S, M.GO): State.COMMITTED,
        (S, M.DONE): State.DONE,
    },
    State.JOINING: {(D, M.JOINED): State.CHANNEL},
    State.CHANNEL: {
        (S, M.PAGES): State.CHANNEL,
        (S, M.ROUND): State.CHANNEL,
        (S, M.BYTES): State.CHANNEL,
    },
    State.GREETED: {(D, M.HELLO): State.OPEN},
    State.OPEN: {
        (S, M.PROBE): State.OPEN,
        (D, M.PROBED): State.OPEN,
        (S, M.GUEST): State.DESCRIBED,
    },
    # The table allows an answer to cross with GUEST; proto/README.md ("PROBE") does not.
    State.DESCRIBED: {(D, M.PROBED): State.DESCRIBED, (D, M.ACCEPT): State.STREAM},
    State.STREAM: {
        (S, M.PAGES): State.STREAM,
        (S, M.ROUND): State.STREAM,
        (D, M.ROUND_ACK): State.STREAM,
        (D, M.HELD): State.STREAM,
        (S, M.CACHE_SIZE): State.STREAM,
        (D, M.CACHE_SIZE): State.STREAM,
        (S, M.BLOCKS): State.STREAM,
        (S, M.BYTES): State.STREAM,
        (D, M.BYTES): State.STREAM,
        (S, M.TAKEN): State.STREAM,
        (D, M.TAKEN): State.STREAM,
        (S, M.COMPLETE): State.COMPLETED,
    },
    # COMPLETE follows the last ROUND at once, while the destination still applies and hashes: its
    # ROUND_ACK, and a CACHE_SIZE, may cross with it. (The table allows HELD to cross too.) The
    # return path of a stream stays open until GO.
    State.COMPLETED: {
        (D, M.READY): State.PREPARED,
        (D, M.ROUND_ACK): State.COMPLETED,
        (D, M.HELD): State.COMPLETED,
        (D, M.CACHE_SIZE): State.COMPLETED,
        (D, M.BYTES): State.COMPLETED,
        (D, M.TAKEN): State.COMPLETED,
        (S, M.TAKEN): State.COMPLETED,
    },
    State.PREPARED: {(S, M.GO): State.COMMITTED, (S, M.TAKEN): State.PREPARED},
    State.COMMITTED: {(D, M.RUNNING): State.DONE},
    State.DONE: {(S, M.DONE): State.DONE},
    State.FAILED: {},
}
for _state, _moves in TABLE.items():
    for _role in Role:
        if _state is not State.START and _state is not State.FAILED:
            _moves[_role, M.PING] = _moves[_role, M.PONG] = _state
        if _state not in (State.DONE, State.FAILED):
            _moves[_role, M.ERROR] = State.FAILED


class Session:
    """One side of one connection: bytes in, messages out, and messages in, bytes out."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.state = State.START
        # Until the peer is accepted it may be anyone: it gets memory for small frames only.
        self.reader = FrameReader(MAX_CONTROL)

    @property
    def channel(self) -> int:
        """The number of this connection, which every frame carries: 0, or what JOIN named."""
        return self.reader.channel

    @channel.setter
    def channel(self, channel: int) -> None:
        self.reader.channel = channel

    def send(self, message: Message) -> bytearray:
        """Return the frame of a message. Raises LocalError if it must not be sent now."""
        kind = TYPE_OF[type(message)]
        following = self._after(kind)
        frame = pack(message, HEADER_BYTES)
        seal(frame, kind, self.channel)
        self.state = following
        return frame

    def send_pages(self) -> None:
        """Note that a PAGES frame is sent that was sealed elsewhere, say in a worker thread.

        Raises LocalError if it must not be sent now.
        """
        self.state = self._after(MessageType.PAGES)

    def _after(self, kind: MessageType) -> State:
        following = TABLE[self.state].get((self.role, kind))
        if following is None:
            raise LocalError(f"{kind.name} cannot be sent in state {self.state.name}")
        return following

    def next_frame(self) -> Frame | None:
        """Return the next frame, or None if it is not whole. Raises RemoteError."""
        frame = self.reader.next_frame(self._after_theirs)
        if frame is None:
            return None
        self.state = self._after_theirs(frame.type)
        return frame

    def _after_theirs(self, kind: MessageType) -> State:
        """Return the state that follows a message of the peer. Raises MessageError."""
        following = TABLE[self.state].get((self.role.peer, kind))
        if following is None:
            raise MessageError(
                f"the {self.role.peer.value} sent {kind.name} in state {self.state.name}"
            )
        return following

    def end(self) -> None:
        """Note that the peer closed the connection. Raises FrameError if that cut a frame."""
        if self.reader.partial:
            raise FrameError(f"the connection ended inside a frame ({self.reader.partial} bytes)")


__all__ = ["TABLE", "Role", "Session", "State", "unpack"]
