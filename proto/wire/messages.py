"""The typed bodies of frames (proto/README.md, "Messages").

All but PAGES are MessagePack maps with exactly the fields of these classes. Each field is bounded
here, where it is declared, and checked while it is read: a message that parses is within its
limits. `pack` and `unpack` mirror each other.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated

import msgspec

from proto.wire.errors import ErrorCode, MessageError
from proto.wire.ownership import ANSWERS, Claim

# Limits that both sides must keep (proto/README.md, "Limits").
PROTOCOL_VERSION = 1
MAX_PAGES = 1 << 32
MIN_PAGE_SIZE = 1 << 10
MAX_SIZE = MAX_PAGES * MIN_PAGE_SIZE
MAX_PAGE_SIZE = 1 << 14
MAX_STATE = 1 << 20
MAX_CAPABILITIES = 64
MAX_CHANNELS = 64
DIGEST_BYTES = 16
SEED_BYTES = 16
TOKEN_BYTES = 16
BATCH_BYTES = (2 << 20) + (1 << 15)  # 2 MiB of raw pages, and room for their records
LEAST_BATCH = 256 << 10
BATCH_SLACK = 1 << 16
MAX_BODY = BATCH_BYTES + BATCH_SLACK
MAX_CONTROL = 64 << 10
HELD_PAGES = 8000
PROBE_BYTES = 64_000
PIECE_BYTES = 64_000
MAX_RETURNED = 1024
MAX_BLOCKS = 1024
MAX_BLOCK_LIST = 288 << 10
MAX_PROBE = 1 << 30
MAX_SECONDS = 1e9
MAX_TEXT = 1000

Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=MAX_SECONDS)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[a-z][a-z0-9-]*\Z")]
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Names = Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_CAPABILITIES)]


class MessageType(IntEnum):
    """The type byte of a frame. A number never changes its meaning."""

    HELLO = 1
    GUEST = 2
    ACCEPT = 3
    CACHE_SIZE = 4
    PAGES = 5
    ROUND = 6
    ROUND_ACK = 7
    COMPLETE = 8
    READY = 9
    GO = 10
    RUNNING = 11
    PING = 12
    PONG = 13
    ERROR = 14
    JOIN = 15
    JOINED = 16
    QUERY = 17
    OWNERSHIP = 18
    DONE = 19
    HELD = 20
    PROBE = 21
    PROBED = 22
    BLOCKS = 23
    BYTES = 24
    TAKEN = 25


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all messages."""


class Hello(_Message, frozen=True):
    """The first message of the source, and the destination's answer (proto.wire.capabilities).

    required  -- capabilities without which the sender does not go on
    optional  -- capabilities that it can use; the answer names those that will be used
    max_body  -- bytes of the longest PAGES body that the sender accepts
    max_pages -- pages of the largest guest that the sender accepts
    """

    version: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    required: Names
    optional: Names
    max_body: Annotated[int, msgspec.Meta(ge=MAX_CONTROL, le=1 << 30)] = MAX_BODY
    max_pages: Annotated[int, msgspec.Meta(ge=1, le=1 << 62)] = MAX_PAGES


class GuestInfo(_Message, frozen=True):
    """The guest that the source wants to move.

    kind        -- decides which place the destination gives it
    size        -- bytes of memory
    page_size   -- bytes
    hash_seed   -- random; both sides derive the key of the page hashes from it
    channels    -- connections that carry its pages, this one among them
    description -- for people
    resume      -- token of an attempt that broke off, whose pages may still be there; or empty
    round       -- number of the first round that will be sent
    """

    kind: Name
    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_SIZE)]
    page_size: Annotated[int, msgspec.Meta(ge=MIN_PAGE_SIZE, le=MAX_PAGE_SIZE)]
    hash_seed: Annotated[bytes, msgspec.Meta(min_length=SEED_BYTES, max_length=SEED_BYTES)]
    channels: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHANNELS)] = 1
    description: Text = ""
    resume: Annotated[bytes, msgspec.Meta(max_length=TOKEN_BYTES)] = b""
    round: Annotated[int, msgspec.Meta(ge=1, le=(1 << 32) - 1)] = 1

    @property
    def pages(self) -> int:
        return -(-self.size // self.page_size)


class Accept(_Message, frozen=True):
    """The destination has a place for this guest.

    token -- random, the name of this migration: JOIN says it for a further channel, and QUERY to
             ask what became of the guest
    held  -- pages of the attempt to be resumed are still here: HELD describes them
    """

    token: Annotated[bytes, msgspec.Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
    held: bool = False


class Held(_Message, frozen=True):
    """What the destination holds: the hashes of the pages from `first` on, 8 bytes each."""

    first: Annotated[int, msgspec.Meta(ge=0, lt=MAX_PAGES)]
    hashes: Annotated[bytes, msgspec.Meta(min_length=8, max_length=8 * HELD_PAGES)]


class Probe(_Message, frozen=True):
    """Padding without a meaning, to measure the path. Before GUEST, MAX_PROBE bytes in all."""

    padding: Annotated[bytes, msgspec.Meta(min_length=1, max_length=PROBE_BYTES)]


class Probed(_Message, frozen=True):
    """The destination's answer to each PROBE: the bytes of padding that it received so far."""

    received: Annotated[int, msgspec.Meta(ge=1, le=MAX_PROBE)]


class Join(_Message, frozen=True):
    """First on a further connection: it becomes a channel of the migration of this token."""

    token: Annotated[bytes, msgspec.Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
    channel: Annotated[int, msgspec.Meta(ge=1, lt=MAX_CHANNELS)]


class Joined(_Message, frozen=True):
    """The destination's answer to JOIN: the channel carries pages from here on."""


class CacheSize(_Message, frozen=True):
    """From the source: the size in force. From the destination: the size its operator wants."""

    size: Count


class Round(_Message, frozen=True):
    """The end of a round on this channel.

    pages       -- pages that were dirty in the round
    transferred -- bytes that the source sent in the round, on all channels
    last        -- the guest is paused, and no round follows
    """

    number: Annotated[int, msgspec.Meta(ge=1, le=(1 << 32) - 1)]
    pages: Count
    transferred: Count
    last: bool = False


class RoundAck(_Message, frozen=True):
    """The destination has applied all batches of a round.

    apply_seconds  -- spent on decoding batches into memory
    settle_seconds -- spent on hashing pages that deltas had changed, and on writing back
    stale_pages    -- pages whose present content has no hash yet
    settled_pages  -- pages hashed in `settle_seconds`
    """

    number: Annotated[int, msgspec.Meta(ge=1, le=(1 << 32) - 1)]
    apply_seconds: Seconds
    settle_seconds: Seconds
    stale_pages: Count
    settled_pages: Count


class Complete(_Message, frozen=True):
    """After the last round: the digest of the whole memory, and the guest's other state, opaque."""

    digest: Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
    state: Annotated[bytes, msgspec.Meta(max_length=MAX_STATE)]


class Ready(_Message, frozen=True):
    """The destination has verified the digest and can start the guest. It must not start it yet."""

    verify_seconds: Seconds


class Go(_Message, frozen=True):
    """The guest belongs to the destination. The source never runs it again by itself."""


class Running(_Message, frozen=True):
    """The guest runs at the destination."""


class Done(_Message, frozen=True):
    """The source has heard that the guest runs at the destination, which may drop its record."""


class Query(_Message, frozen=True):
    """First on a connection after a break: who owns the guest of the migration of this token?"""

    token: Annotated[bytes, msgspec.Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]


class Ownership(_Message, frozen=True):
    """The destination's answer to QUERY: what it has recorded of that migration."""

    claim: Claim


class Blocks(_Message, frozen=True):
    """The RAM blocks through which the pages of a stream are numbered: (name, pages) of each."""

    blocks: Annotated[
        tuple[
            tuple[
                Annotated[bytes, msgspec.Meta(min_length=1, max_length=255)],
                Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGES)],
            ],
            ...,
        ],
        msgspec.Meta(min_length=1, max_length=MAX_BLOCKS),
    ]


class Bytes(_Message, frozen=True):
    """A piece of a stream that is not a page.

    held -- from the source: the destination must not pass it on before GO
    """

    data: Annotated[bytes, msgspec.Meta(min_length=1, max_length=PIECE_BYTES)]
    held: bool = False


class Taken(_Message, frozen=True):
    """How many items of a stream were received in all, and need not be sent again.

    From the destination it counts PAGES and BYTES of the source, and the other way round BYTES.
    """

    items: Count


class Ping(_Message, frozen=True):
    token: Count


class Pong(_Message, frozen=True):
    token: Count


class Error(_Message, frozen=True):
    """Why the sender closes the connection."""

    code: ErrorCode
    reason: Text


class Pages:
    """A batch of pages. The kernels read it, not this module (proto/README.md, "PAGES")."""


Message = (
    Hello | GuestInfo | Accept | Join | Joined | CacheSize | Pages | Round | RoundAck | Complete
    | Ready | Go | Running | Ping | Pong | Error | Query | Ownership | Done | Held | Probe | Probed
    | Blocks | Bytes | Taken
)  # fmt: skip

_TYPES: dict[MessageType, type[_Message]] = {
    MessageType.HELLO: Hello,
    MessageType.GUEST: GuestInfo,
    MessageType.ACCEPT: Accept,
    MessageType.CACHE_SIZE: CacheSize,
    MessageType.ROUND: Round,
    MessageType.ROUND_ACK: RoundAck,
    MessageType.COMPLETE: Complete,
    MessageType.READY: Ready,
    MessageType.GO: Go,
    MessageType.RUNNING: Running,
    MessageType.PING: Ping,
    MessageType.PONG: Pong,
    MessageType.ERROR: Error,
    MessageType.JOIN: Join,
    MessageType.JOINED: Joined,
    MessageType.QUERY: Query,
    MessageType.OWNERSHIP: Ownership,
    MessageType.DONE: Done,
    MessageType.HELD: Held,
    MessageType.PROBE: Probe,
    MessageType.PROBED: Probed,
    MessageType.BLOCKS: Blocks,
    MessageType.BYTES: Bytes,
    MessageType.TAKEN: Taken,
}
TYPE_OF: dict[type, MessageType] = {cls: kind for kind, cls in _TYPES.items()} | {
    Pages: MessageType.PAGES
}
BODY_LIMITS: dict[MessageType, int] = {
    **dict.fromkeys(MessageType, MAX_CONTROL),
    MessageType.PAGES: MAX_BODY,
    MessageType.COMPLETE: MAX_STATE + 1024,
    MessageType.BLOCKS: MAX_BLOCK_LIST,
}


def batch_bytes(channels: int) -> int:
    """Return the most bytes that this source puts into one PAGES body.

    Channels share the memory that one takes.
    """
    return max(BATCH_BYTES // channels, LEAST_BATCH)


def body_limits(channels: int, channel: int) -> dict[MessageType, int]:
    """Return the most bytes of a body, by its type, on one of several channels."""
    limits = {
        **BODY_LIMITS,
        MessageType.PAGES: max(MAX_BODY // channels, LEAST_BATCH + BATCH_SLACK),
    }
    if channel:  # these come on channel 0 alone
        limits[MessageType.COMPLETE] = limits[MessageType.BLOCKS] = MAX_CONTROL
    return limits


_DECODERS = {kind: msgspec.msgpack.Decoder(cls) for kind, cls in _TYPES.items()}
_ENCODER = msgspec.msgpack.Encoder()


def pack(message: Message, headroom: int = 0) -> bytearray:
    """Return the body of a message, behind `headroom` free bytes for the frame header."""
    return bytearray(headroom) + _ENCODER.encode(message)


def unpack(kind: MessageType, body: memoryview | bytes) -> Message:
    """Return the message of a body. Raises MessageError, which names the field and the rule."""
    if kind is MessageType.PAGES:
        return Pages()
    try:
        message = _DECODERS[kind].decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MessageError(f"{kind.name}: {error}") from None
    if isinstance(message, GuestInfo) and message.page_size & (message.page_size - 1):
        raise MessageError(f"GUEST: a page of {message.page_size} bytes is no power of two")
    if isinstance(message, GuestInfo) and len(message.resume) not in (0, TOKEN_BYTES):
        raise MessageError(f"GUEST: `resume` has {len(message.resume)} bytes, no token has")
    if isinstance(message, Held) and len(message.hashes) % 8:
        raise MessageError(f"HELD: {len(message.hashes)} bytes are no hashes of 8 bytes each")
    if isinstance(message, Ownership) and message.claim not in ANSWERS:
        raise MessageError(f"OWNERSHIP: no destination claims {message.claim.name}")
    return message  # type: ignore[return-value]
