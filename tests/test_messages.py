"""Each field of each message at and past its bounds; anything else raises MessageError."""

import itertools
import math

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proto.wire import messages
from proto.wire.errors import ErrorCode, MessageError
from proto.wire.messages import (
    BATCH_BYTES,
    HELD_PAGES,
    MAX_BLOCK_LIST,
    MAX_BLOCKS,
    MAX_BODY,
    MAX_CAPABILITIES,
    MAX_CHANNELS,
    MAX_CONTROL,
    MAX_PAGE_SIZE,
    MAX_PAGES,
    MAX_PROBE,
    MAX_SECONDS,
    MAX_STATE,
    PIECE_BYTES,
    PROBE_BYTES,
    TYPE_OF,
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
    body_limits,
    pack,
    unpack,
)
from proto.wire.ownership import Claim
from tests.cells import check_each

M = MessageType
encode = msgspec.msgpack.encode
MAPS = [kind for kind in M if kind is not M.PAGES]
EXAMPLES = {
    M.HELLO: Hello(1, ("page-hash-nh",), ("xbzrle", "xbzrle-merge")),
    M.GUEST: GuestInfo("buffer", 1 << 20, 4096, b"seed" * 4, 3, "a guest"),
    M.ACCEPT: Accept(b"\xa5" * 16),
    M.CACHE_SIZE: CacheSize(1 << 26),
    M.ROUND: Round(3, 100, 2000, True),
    M.ROUND_ACK: RoundAck(3, 0.5, 0.25, 7, 9),
    M.COMPLETE: Complete(bytes(16), b"state"),
    M.READY: Ready(0.125),
    M.GO: Go(),
    M.RUNNING: Running(),
    M.PING: Ping(1),
    M.PONG: Pong(2),
    M.ERROR: Error(ErrorCode.LIMIT, "too large"),
    M.JOIN: Join(b"\xa5" * 16, 2),
    M.JOINED: Joined(),
    M.QUERY: Query(b"\xa5" * 16),
    M.OWNERSHIP: Ownership(Claim.OWNER),
    M.DONE: Done(),
    M.HELD: Held(8000, bytes(16)),
    M.PROBE: Probe(b"padding"),
    M.PROBED: Probed(64_000),
    M.BLOCKS: Blocks(((b"pc.ram", 8192), (b"/rom@etc/acpi/tables", 32))),
    M.BYTES: Bytes(b"\x01\0\0\0\2\3ram", True),
    M.TAKEN: Taken(70_000),
}

COUNT = ([0, 1, (1 << 63) - 1], [-1, 1 << 63, (1 << 64) - 1, 1.0, True, "1", None, b"1", [1]])
SECONDS = (
    [0.0, 0, -0.0, 5e-324, MAX_SECONDS],
    [-5e-324, math.nextafter(MAX_SECONDS, math.inf), math.nan, math.inf, -math.inf, "1", None],
)
NUMBER = ([1, (1 << 32) - 1], [0, -1, 1 << 32, 1.0, False, "1", None])
NAME = (
    ["a", "a" * 64, "page-hash-nh", "a-", "z9"],
    ["", "a" * 65, "A", "9a", "-a", "a_b", "a b", "a\n", "\na", "a\0", "ä", 1, None, b"a"],
)
TEXT = (
    ["", "x" * 1000, "ä" * 1000, "\x1b[2J"],
    ["x" * 1001, "ä" * 1001, b"x", 1, None],
)
NAMES = (
    [[], ["a"] * MAX_CAPABILITIES, *([name] for name in NAME[0])],
    [["a"] * (MAX_CAPABILITIES + 1), "a", None, {"a": 1}, *([name] for name in NAME[1])],
)
SIXTEEN = ([bytes(16), b"\xff" * 16], [b"", bytes(15), bytes(17), "x" * 16, [0] * 16, None])
# (type, field): (legal values, illegal ones)
FIELDS = {
    (M.HELLO, "version"): ([1, 2, 65535], [0, 65536, -1, 1.0, True, "1", None]),
    (M.HELLO, "required"): NAMES,
    (M.HELLO, "optional"): NAMES,
    (M.HELLO, "max_body"): (
        [MAX_CONTROL, MAX_BODY, 1 << 30],
        [MAX_CONTROL - 1, (1 << 30) + 1, 0, -1, 1e6, None],
    ),
    (M.HELLO, "max_pages"): ([1, MAX_PAGES, 1 << 62], [0, -1, (1 << 62) + 1, 1.0, None]),
    (M.GUEST, "kind"): NAME,
    (M.GUEST, "size"): ([1, 4095, 1 << 42], [0, -1, (1 << 42) + 1, 1 << 63, 1.0, None]),
    (M.GUEST, "page_size"): (
        [1024, 2048, 4096, 8192, 16384],
        [0, 1, 512, 1023, 1025, 3072, 4095, 12288, 16383, 16385, 32768, -4096, 4096.0, None],
    ),
    (M.GUEST, "hash_seed"): SIXTEEN,
    (M.GUEST, "channels"): (
        [1, 2, MAX_CHANNELS], [0, -1, MAX_CHANNELS + 1, 1 << 32, 1.0, True, "1", None],
    ),
    (M.GUEST, "description"): TEXT,
    (M.GUEST, "resume"): (
        [b"", bytes(16)], [bytes(1), bytes(8), bytes(15), bytes(17), "x" * 16, 0, None],
    ),
    (M.GUEST, "round"): NUMBER,
    (M.ACCEPT, "held"): ([True, False], [0, 1, "true", None]),
    (M.PROBE, "padding"): (
        [b"x", bytes(PROBE_BYTES)],
        [b"", bytes(PROBE_BYTES + 1), "x", 1, [0], None],
    ),
    (M.BLOCKS, "blocks"): (
        [
            [[b"a", 1]], [[b"\0" * 255, MAX_PAGES]] * MAX_BLOCKS, [[b"a", 1], [b"a", 2]],
        ],
        [
            [], [[b"a", 1]] * (MAX_BLOCKS + 1), [[b"", 1]], [[b"a" * 256, 1]], [["a", 1]],
            [[b"a", 0]], [[b"a", -1]], [[b"a", MAX_PAGES + 1]], [[b"a", 1.0]], [[b"a", True]],
            [[b"a"]], [[b"a", 1, 2]], [[1, b"a"]], [None], [b"a", 1], b"a", 1, {}, None,
        ],
    ),
    (M.BYTES, "data"): (
        [b"x", bytes(PIECE_BYTES)], [b"", bytes(PIECE_BYTES + 1), "x", 1, [0], None],
    ),
    (M.BYTES, "held"): ([True, False], [0, 1, "true", None]),
    (M.TAKEN, "items"): COUNT,
    (M.PROBED, "received"): ([1, MAX_PROBE], [0, -1, MAX_PROBE + 1, 1.0, True, "1", None]),
    (M.HELD, "first"): ([0, 1, (1 << 32) - 1], [-1, 1 << 32, 1.0, True, "1", None]),
    (M.HELD, "hashes"): (
        [bytes(8), bytes(8 * HELD_PAGES)],
        [b"", bytes(7), bytes(9), bytes(8 * HELD_PAGES + 8), "x" * 8, 0, None],
    ),
    (M.ACCEPT, "token"): SIXTEEN,
    (M.JOIN, "token"): SIXTEEN,
    (M.QUERY, "token"): SIXTEEN,
    # 2 and 4 are claims of a source
    (M.OWNERSHIP, "claim"): ([0, 1, 3, 5], [2, 4, 6, -1, 255, 1.0, "1", None]),
    (M.JOIN, "channel"): (
        [1, 2, MAX_CHANNELS - 1], [0, -1, MAX_CHANNELS, 1 << 16, 1.0, True, "1", None],
    ),
    (M.CACHE_SIZE, "size"): COUNT,
    (M.ROUND, "number"): NUMBER,
    (M.ROUND, "pages"): COUNT,
    (M.ROUND, "transferred"): COUNT,
    (M.ROUND, "last"): ([True, False], [0, 1, "true", None]),
    (M.ROUND_ACK, "number"): NUMBER,
    (M.ROUND_ACK, "apply_seconds"): SECONDS,
    (M.ROUND_ACK, "settle_seconds"): SECONDS,
    (M.ROUND_ACK, "stale_pages"): COUNT,
    (M.ROUND_ACK, "settled_pages"): COUNT,
    (M.COMPLETE, "digest"): SIXTEEN,
    (M.COMPLETE, "state"): ([b"", bytes(MAX_STATE)], [bytes(MAX_STATE + 1), "x", 1, None]),
    (M.READY, "verify_seconds"): SECONDS,
    (M.PING, "token"): COUNT,
    (M.PONG, "token"): COUNT,
    (M.ERROR, "code"): ([int(code) for code in ErrorCode], [0, -1, 11, 255, 1.0, "1", None]),
    (M.ERROR, "reason"): TEXT,
}  # fmt: skip
DEFAULTS = {
    (M.HELLO, "max_body"): MAX_BODY,
    (M.HELLO, "max_pages"): MAX_PAGES,
    (M.GUEST, "channels"): 1,
    (M.GUEST, "description"): "",
    (M.GUEST, "resume"): b"",
    (M.GUEST, "round"): 1,
    (M.ACCEPT, "held"): False,
    (M.ROUND, "last"): False,
    (M.BYTES, "held"): False,
}


LEGAL, ILLEGAL = (
    [(kind, field, value) for (kind, field), values in FIELDS.items() for value in values[which]]
    for which in (0, 1)
)


def plain(value):
    """Return a value as MessagePack decodes it: arrays are lists, codes are numbers."""
    return msgspec.msgpack.decode(encode(value))


def fields_of(kind):
    return plain(EXAMPLES[kind])


def test_tables_cover_all_messages_and_fields():
    assert set(EXAMPLES) == set(MAPS)
    declared = {(k, name) for k, m in EXAMPLES.items() for name in m.__struct_fields__}
    assert set(FIELDS) == declared


@pytest.mark.parametrize("kind", MAPS)
def test_pack_and_unpack_mirror_each_other(kind):
    message = EXAMPLES[kind]
    body = pack(message)
    assert unpack(kind, body) == message
    assert unpack(kind, memoryview(body)) == message
    assert TYPE_OF[type(message)] is kind


def test_headroom_is_left_before_the_body():
    assert pack(Ping(1), 16) == bytes(16) + pack(Ping(1))


@pytest.mark.parametrize("body", [b"", b"abc", bytes(MAX_BODY)])
def test_batch_body_is_not_unpacked(body):
    message = unpack(M.PAGES, memoryview(body))
    assert isinstance(message, Pages)


def test_values_at_their_bounds_are_accepted():
    def check(kind, field, value):
        message = unpack(kind, encode(fields_of(kind) | {field: value}))
        assert plain(getattr(message, field)) == value
        assert len(pack(message)) <= messages.BODY_LIMITS[kind]

    check_each(check, LEGAL)


def test_values_past_their_bounds_are_refused():
    def check(kind, field, value):
        with pytest.raises(MessageError, match=f"^{kind.name}: ") as info:
            unpack(kind, encode(fields_of(kind) | {field: value}))
        assert info.value.code is ErrorCode.PROTOCOL
        assert str(info.value).isprintable()

    check_each(check, ILLEGAL)


def test_missing_field_is_refused_or_has_its_default():
    def check(kind, field):
        fields = fields_of(kind)
        del fields[field]
        if (kind, field) in DEFAULTS:
            assert getattr(unpack(kind, encode(fields)), field) == DEFAULTS[kind, field]
        else:
            with pytest.raises(MessageError, match=f"{kind.name}: .*missing.*`{field}`"):
                unpack(kind, encode(fields))

    check_each(check, FIELDS)


@pytest.mark.parametrize("kind", MAPS)
def test_unknown_fields_are_refused(kind):
    with pytest.raises(MessageError, match=f"{kind.name}: .*unknown field `surprise`"):
        unpack(kind, encode(fields_of(kind) | {"surprise": 1}))


@pytest.mark.parametrize("kind", MAPS)
def test_truncated_or_extended_bodies_are_refused(kind):
    body = bytes(pack(EXAMPLES[kind]))
    for length in range(len(body)):
        with pytest.raises(MessageError):
            unpack(kind, body[:length])
    with pytest.raises(MessageError, match="trailing"):
        unpack(kind, body + b"\xc0")


def test_anything_but_a_map_is_refused():
    def check(kind, value):
        with pytest.raises(MessageError):
            unpack(kind, encode(value))

    others = [None, 1, "text", b"bin", [], [1], [{}], 1.5]
    check_each(check, itertools.product(MAPS, others))


def test_fields_may_come_in_any_order():
    fields = fields_of(M.ROUND_ACK)
    assert unpack(M.ROUND_ACK, encode(dict(reversed(fields.items())))) == EXAMPLES[M.ROUND_ACK]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        pytest.param(M.PING, b"\x91" * MAX_CONTROL, id="nested arrays"),
        pytest.param(M.PING, b"\x81\xa5token" + b"\x91" * 60000, id="nested in a field"),
        pytest.param(M.GO, b"\xdf\xff\xff\xff\xff", id="a map of 2^32-1"),
        pytest.param(
            M.ERROR, b"\x82\xa4code\x01\xa6reason\xdb\xff\xff\xff\xff", id="text of 4 GiB"
        ),
        pytest.param(M.COMPLETE, b"\x81\xa6digest\xc6\xff\xff\xff\xff", id="bin of 4 GiB"),
        pytest.param(M.HELLO, b"\x81\xa8required\xdd\xff\xff\xff\xff", id="array of 2^32-1"),
        pytest.param(M.ERROR, b"\x82\xa4code\x01\xa6reason\xa1\xff", id="not UTF-8"),
        pytest.param(M.ERROR, b"\x82\xa4code\x01\xa6reason\xa3\xed\xa0\x80", id="a surrogate"),
        pytest.param(M.ERROR, b"\x82\xa4code\x01\xa1\xff\x01", id="a name that is not UTF-8"),
        pytest.param(M.PING, b"\x81\x01\x01", id="a name that is a number"),
        pytest.param(M.PING, b"\x81\xa5token\xd6\xff\0\0\0\0", id="an extension"),
        pytest.param(M.PING, b"\x81\xa5token\xc1", id="a byte that MessagePack has not"),
    ],
)
def test_hostile_bodies(kind, body):
    with pytest.raises(MessageError):
        unpack(kind, body)


# Whatever MessagePack can say, most of all under the right names.
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats()
    | st.text(max_size=70) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)  # fmt: skip


@st.composite
def nearly_messages(draw):
    kind = draw(st.sampled_from(MAPS))
    fields = fields_of(kind)
    for name in draw(st.sets(st.sampled_from([*fields, "other"]), max_size=2)):
        fields[name] = draw(VALUES)
    body = bytearray(encode(fields))
    if draw(st.booleans()):
        body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    return kind, bytes(body)


@pytest.mark.exhaustive
@settings(max_examples=500)
@given(st.one_of(st.tuples(st.sampled_from(MAPS), st.binary(max_size=200)), nearly_messages()))
@example((M.GO, b"\x80"))
def test_arbitrary_bytes_are_a_message_or_a_message_error(case):
    kind, body = case
    try:
        message = unpack(kind, body)
    except MessageError:
        return
    assert unpack(kind, pack(message)) == message


@given(st.sampled_from([1 << n for n in range(10, 15)]), st.integers(1, 1 << 42), st.integers(0, 1))
@example(1024, 1 << 42, 0)
def test_page_count_of_a_guest(page_size, size, whole):
    size = max(size // page_size, 1) * page_size if whole else size
    info = unpack(M.GUEST, pack(GuestInfo("demo", size, page_size, bytes(16))))
    assert (info.pages - 1) * page_size < size <= info.pages * page_size
    assert info.pages <= MAX_PAGES


def test_complete_and_blocks_are_long_on_channel_0_only():
    for channels in (1, 2, 64):
        assert body_limits(channels, 0)[M.BLOCKS] == MAX_BLOCK_LIST
        for kind in (M.BLOCKS, M.COMPLETE, M.BYTES):
            assert body_limits(channels, 1)[kind] == MAX_CONTROL


def test_shortest_batch_holds_a_page():
    assert BATCH_BYTES <= MAX_BODY
    assert MAX_BODY >= MAX_CONTROL, "HELLO may say less than is always taken"
    assert BATCH_BYTES >= 2 * MAX_PAGE_SIZE
