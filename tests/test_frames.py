"""Reading frames from a stream: any split, hostile headers, and the lifetime of bodies."""

import struct
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proto.wire.errors import ErrorCode, FrameError, LocalError
from proto.wire.frames import ARENAS_KEPT, HEADER_BYTES, LEAST_READ, MAGIC, FrameReader, seal
from proto.wire.messages import (
    BATCH_SLACK,
    BODY_LIMITS,
    LEAST_BATCH,
    MAX_BODY,
    MAX_CONTROL,
    MAX_STATE,
    MessageType,
)
from tests.cells import check_each

M = MessageType


def framed(kind, body=b"", channel=0, data=b""):
    frame = bytearray(HEADER_BYTES) + body
    seal(frame, kind, channel, len(data))
    return bytes(frame) + data


def header(kind=M.PING, flags=0, channel=0, length=0, head=None, body=b""):
    """Return a header with any values, and the right check for `body` as the head."""
    middle = struct.pack(">BBHI", kind, flags, channel, length)
    check = xxhash.xxh3_64_intdigest(body, int.from_bytes(middle, "big"))
    return MAGIC + middle + struct.pack(">IQ", length if head is None else head, check)


def frames_of(reader):
    """Return all complete frames as (type, body), released."""
    found = []
    while (frame := reader.next_frame()) is not None:
        found.append((frame.type, bytes(frame.head) + bytes(frame.data)))
        frame.release()
    return found


def arenas(reader):
    return 1 + len(reader._kept)


SOME = [(M.PING, b"\x81"), (M.PAGES, bytes(range(256)) * 40), (M.GO, b""), (M.ERROR, b"xyz")]
STREAM = b"".join(framed(*frame) for frame in SOME)


# ---------------------------------------------------------------- splits


def test_header_is_twenty_four_bytes():
    assert HEADER_BYTES == 24
    assert framed(M.GO, b"ab") == header(M.GO, length=2, body=b"ab") + b"ab"
    pages = header(M.PAGES, channel=7, length=5, head=2, body=b"ab") + b"abcde"
    assert framed(M.PAGES, b"ab", 7, b"cde") == pages


@pytest.mark.parametrize("channel", [0, 1, 63, 0xFFFF])
def test_head_and_data_of_a_batch_are_separate_views(channel):
    reader = FrameReader()
    reader.channel = channel
    reader.feed(framed(M.PAGES, b"records", channel, b"raw pages" * 1000))
    frame = reader.next_frame()
    assert (frame.type, bytes(frame.head)) == (M.PAGES, b"records")
    assert frame.data == b"raw pages" * 1000
    frame.release()


def test_frame_arrives_whole():
    reader = FrameReader()
    reader.feed(STREAM)
    assert frames_of(reader) == SOME
    assert reader.partial == 0


def test_byte_by_byte():
    """A frame is complete with its last byte, not before."""
    reader, found, ends, at = FrameReader(), [], [], 0
    for at, byte in enumerate(STREAM, 1):
        reader.feed(bytes([byte]))
        new = frames_of(reader)
        ends += [at] * len(new)
        found += new
    assert found == SOME
    sizes = [HEADER_BYTES + len(body) for _, body in SOME]
    assert ends == [sum(sizes[: i + 1]) for i in range(len(sizes))]


@pytest.mark.parametrize("spare", [1, 4, 16, 23, 24, 25])
def test_frames_with_bytes_to_spare(spare):
    more = framed(M.PONG, b"rest")
    reader = FrameReader()
    reader.feed(STREAM + more[:spare])
    assert frames_of(reader) == SOME
    assert reader.partial == spare
    reader.feed(more[spare:])
    assert frames_of(reader) == [(M.PONG, b"rest")]
    assert reader.partial == 0


bodies = st.tuples(st.sampled_from(list(M)), st.binary(max_size=300))


@given(st.lists(bodies, max_size=8), st.data())
def test_arbitrary_splits(frames, data):
    stream = b"".join(framed(*frame) for frame in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    reader, found = FrameReader(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        reader.feed(stream[start:end])
        found += frames_of(reader)
    assert found == frames
    assert reader.partial == 0


def test_largest_body_in_small_reads():
    body = bytes(range(251)) * (MAX_BODY // 251 + 1)
    batch = framed(M.PAGES, body[:300_000], data=body[300_000:MAX_BODY])
    stream = framed(M.PING, b"first") + batch + framed(M.GO)
    reader, found, at = FrameReader(), [], 0
    while at < len(stream):
        buffer = reader.get_buffer()
        count = min(len(buffer), 65537, len(stream) - at)
        buffer[:count] = stream[at : at + count]
        reader.received(count)
        at += count
        found += frames_of(reader)
    assert found == [(M.PING, b"first"), (M.PAGES, body[:MAX_BODY]), (M.GO, b"")]


# ---------------------------------------------------------------- refusals


def refused(data, match):
    reader = FrameReader()
    reader.feed(data)
    with pytest.raises(FrameError, match=match) as info:
        reader.next_frame()
    assert info.value.code is ErrorCode.PROTOCOL


@pytest.mark.parametrize("at", range(4))
def test_wrong_magic_at_its_first_wrong_byte(at):
    reader = FrameReader()
    reader.feed(MAGIC[:at])
    assert reader.next_frame() is None
    reader.feed(bytes([MAGIC[at] ^ 1]))
    with pytest.raises(FrameError, match="not an xbmigrate stream"):
        reader.next_frame()


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"SSH-2.0-OpenSSH", b"\x16\x03\x01"])
def test_other_protocols_are_refused(data):
    refused(data, "not an xbmigrate stream")


@pytest.mark.parametrize("kind", [0, max(M) + 1, 128, 255])
def test_unknown_type(kind):
    refused(header(kind), f"unknown frame type {kind}$")


@pytest.mark.parametrize("flags", [1, 128, 255])
def test_flags_are_not_in_use(flags):
    refused(header(M.PING, flags=flags), f"PING: flags {flags:#x} are not in use")


@pytest.mark.parametrize(("ours", "theirs"), [(0, 1), (0, 256), (1, 0), (1, 2), (63, 0xFFFF)])
def test_frame_of_another_channel_is_refused(ours, theirs):
    reader = FrameReader()
    reader.channel = ours
    reader.feed(framed(M.PING, b"", ours) + header(M.PING, channel=theirs))
    reader.next_frame().release()
    with pytest.raises(FrameError, match=f"PING: channel {theirs} on the connection of {ours}"):
        reader.next_frame()


@pytest.mark.parametrize("channel", [0, 1, 0xFFFF])
def test_error_frame_may_name_any_channel(channel):
    """A peer that hangs up may not know yet which channel the connection is."""
    reader = FrameReader()
    reader.channel = 5
    reader.feed(framed(M.ERROR, b"why", channel))
    assert frames_of(reader) == [(M.ERROR, b"why")]


def test_channel_changes_between_two_frames():
    reader = FrameReader()
    reader.feed(framed(M.JOIN, b"") + framed(M.PAGES, b"abc", 9))
    assert reader.next_frame().type is M.JOIN
    reader.channel = 9
    assert reader.next_frame().type is M.PAGES


@pytest.mark.parametrize("kind", M)
def test_only_a_batch_has_data_behind_its_head(kind):
    data = header(kind, length=5, head=2, body=b"ab") + b"abcde"
    if kind is M.PAGES:
        reader = FrameReader()
        reader.feed(data)
        assert frames_of(reader) == [(kind, b"abcde")]
    else:
        refused(data, f"{kind.name}: a head of 2 bytes in a body of 5")


@pytest.mark.parametrize("head", [6, 7, 0xFFFFFFFF])
def test_head_longer_than_its_body_is_refused(head):
    refused(header(M.PAGES, length=5, head=head), f"PAGES: a head of {head} bytes in a body of 5")


def test_damaged_head_is_found_before_its_data_arrives():
    data = bytearray(framed(M.PAGES, b"records", data=bytes(100_000)))
    data[HEADER_BYTES] ^= 1
    refused(bytes(data[: HEADER_BYTES + 7]), "PAGES: the check of its 7 bytes does not match")


def test_frame_check_excludes_batch_data():
    """The data's check is in the head: see proto/README.md, "PAGES"."""
    data = bytearray(framed(M.PAGES, b"records", data=b"abc"))
    data[-1] ^= 1
    reader = FrameReader()
    reader.feed(bytes(data))
    assert frames_of(reader) == [(M.PAGES, b"records" + bytes(data[-3:]))]


@pytest.mark.parametrize("kind", M)
def test_excessive_length_is_refused_from_the_header(kind):
    limit = BODY_LIMITS[kind]
    for length in (limit + 1, 0xFFFFFFFF):
        refused(header(kind, length=length), f"{kind.name}: {length} bytes are over {limit}")
    reader = FrameReader()
    reader.feed(header(kind, length=limit))
    assert reader.next_frame() is None


@pytest.mark.parametrize("kind", M)
def test_body_at_the_limit_passes_and_longer_one_is_not_sent(kind):
    limit = BODY_LIMITS[kind]
    reader = FrameReader()
    reader.feed(framed(kind, bytes(limit)))
    assert frames_of(reader) == [(kind, bytes(limit))]
    with pytest.raises(LocalError, match=f"{kind.name}: a body of {limit + 1} bytes"):
        seal(bytearray(HEADER_BYTES + limit + 1), kind)
    with pytest.raises(LocalError, match=f"{kind.name}: a body of {limit + 1} bytes"):
        seal(bytearray(HEADER_BYTES + 1), kind, 0, limit)


def test_incomplete_header_is_not_judged():
    """Before the check has arrived, only the magic can be wrong."""
    reader = FrameReader()
    reader.feed(header(255, flags=1)[:23])
    assert reader.next_frame() is None


def test_flipped_bit_is_found():
    """No part of a damaged frame is returned."""

    def check(bit):
        data = bytearray(framed(M.PING, b"abc"))
        data[bit // 8] ^= 1 << bit % 8
        refused(bytes(data), ".")

    check_each(check, range(8 * (HEADER_BYTES + 3)))


def test_flipped_bit_before_batch_data_is_found():
    """As above, but a flip that makes the body or its head longer only waits for more input."""

    def check(bit):
        data = bytearray(framed(M.PAGES, b"abc", data=b"de"))
        data[bit // 8] ^= 1 << bit % 8
        reader = FrameReader()
        reader.feed(bytes(data))
        try:
            assert reader.next_frame() is None
        except FrameError:
            return
        assert int.from_bytes(data[8:12], "big") > 5 or int.from_bytes(data[12:16], "big") > 3
        reader.feed(bytes(BODY_LIMITS[M.PAGES]))
        with pytest.raises(FrameError, match="check"):
            reader.next_frame()

    check_each(check, range(8 * (HEADER_BYTES + 3)))


def test_check_covers_the_header():
    """The same body under another type has another check."""
    as_ping, as_pong = framed(M.PING, b"abc"), framed(M.PONG, b"abc")
    assert as_ping[16:24] != as_pong[16:24]
    refused(as_pong[:16] + as_ping[16:], "PONG: the check of its 3 bytes does not match")


def test_frame_before_a_fault_is_returned():
    reader = FrameReader()
    reader.feed(STREAM + b"junk")
    found = [reader.next_frame().type for _ in SOME]
    assert found == [kind for kind, _ in SOME]
    with pytest.raises(FrameError):
        reader.next_frame()


# Bytes that get further than noise: frames, or headers, with some of them replaced.
@st.composite
def nearly_frames(draw):
    data = bytearray()
    for _ in range(draw(st.integers(1, 3))):
        body = draw(st.binary(max_size=40))
        if draw(st.booleans()):
            kind = draw(st.sampled_from(list(M)))
            more = draw(st.binary(max_size=40)) if kind is M.PAGES else b""
            data += framed(kind, body, data=more)
        else:
            length = draw(st.one_of(st.integers(0, 50), st.integers(0, 0xFFFFFFFF)))
            data += header(draw(st.integers(0, 18)), length=length, body=body) + body
    for _ in range(draw(st.integers(0, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@settings(max_examples=300)
@given(st.one_of(st.binary(max_size=200), nearly_frames()), st.integers(1, 64))
@example(b"", 1)
def test_arbitrary_bytes_give_frames_a_fault_or_nothing_yet(data, step):
    reader = FrameReader()
    for at in range(0, len(data), step):
        reader.feed(data[at : at + step])
        try:
            frames_of(reader)
        except FrameError:
            break
    assert arenas(reader) == 1


# ---------------------------------------------------------------- memory


def test_many_frames_reuse_two_arenas():
    reader = FrameReader()
    frame = framed(M.PAGES, bytes(1_000_003))
    for _ in range(40):
        reader.feed(frame)
        [(kind, body)] = frames_of(reader)
        assert (kind, len(body)) == (M.PAGES, 1_000_003)
    assert arenas(reader) <= 2


def test_kept_frames_are_not_overwritten():
    """Keep some frames while ten arenas of others arrive and are released."""
    reader, kept = FrameReader(), []
    for number in range(48):
        body = bytes([number]) * 900_000
        reader.feed(framed(M.PAGES, body))
        frame = reader.next_frame()
        assert frame.head == body
        if number % 6 == 0:
            kept.append((frame, body))
        else:
            frame.release()
    for frame, body in kept:
        assert frame.head == body
        frame.release()
    assert arenas(reader) <= ARENAS_KEPT + 1


def test_arenas_are_used_again_when_their_frames_are_released():
    """Keep a window of four frames, as a worker does that lags behind the wire."""
    reader, window, seen = FrameReader(), deque(), {}
    for number in range(60):
        body = bytes([number]) * 900_000
        reader.feed(framed(M.PAGES, body))
        window.append((reader.next_frame(), body))
        seen[id(reader._arena)] = reader._arena
        if len(window) > 4:
            frame, expected = window.popleft()
            assert frame.head == expected
            frame.release()
    assert 2 <= len(seen) <= ARENAS_KEPT + 1


def test_frames_may_be_released_by_another_thread():
    reader = FrameReader()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(300):
            reader.feed(framed(M.PING) * 10)
            while (frame := reader.next_frame()) is not None:
                pool.submit(frame.release)
    assert not reader._arena.in_use
    assert all(not arena.in_use for arena in reader._kept)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, MAX_BODY), st.integers(0, 5)), max_size=30))
def test_any_order_of_releases(plan):
    """Each frame is released after later ones have arrived, and is intact until then."""
    reader, kept = FrameReader(), []

    def let_go(frame, head, data):
        assert frame.head == head
        assert frame.data == data
        frame.release()

    for number, (size, patience) in enumerate(plan):
        body = number.to_bytes(4, "big") * (size // 4)
        head, data = body[: size // 7], body[size // 7 :]
        reader.feed(framed(M.PAGES, head, data=data))
        kept.append((number + patience, reader.next_frame(), head, data))
        for due in [entry for entry in kept if entry[0] <= number]:
            let_go(*due[1:])
            kept.remove(due)
    for due in kept:
        let_go(*due[1:])


def test_partial_frame_moves_to_a_new_arena():
    reader = FrameReader()
    body = bytes(range(256)) * 4000
    stream = framed(M.PAGES, body) * 12
    kept = []
    for at in range(0, len(stream), 300_000):
        reader.feed(stream[at : at + 300_000])
        while (frame := reader.next_frame()) is not None:
            kept.append(frame)
    assert len(kept) == 12
    assert all(frame.head == body for frame in kept)


@pytest.mark.parametrize("piece", [1000, 60_000, 1 << 20])
def test_arenas_grow_for_a_longer_frame_that_is_admitted(piece):
    """It arrives in pieces, while the frames before it are kept."""
    reader, kept = FrameReader(MAX_CONTROL), []
    bodies = [bytes([number]) * size for number, size in enumerate((9, 50_000, 50_000, MAX_BODY))]
    stream = b"".join(framed(M.PAGES, body) for body in bodies)
    while stream:
        buffer = reader.get_buffer()
        count = min(piece, len(buffer), len(stream))
        buffer[:count], stream = stream[:count], stream[count:]
        reader.received(count)
        while (frame := reader.next_frame()) is not None:
            kept.append(frame)
    assert [frame.head for frame in kept] == bodies
    assert reader._arena.largest == MAX_BODY


def test_released_body_cannot_be_read():
    reader = FrameReader()
    reader.feed(framed(M.PING, b"abc"))
    frame = reader.next_frame()
    frame.release()
    for part in (frame.head, frame.data):
        with pytest.raises(ValueError, match="released"):
            bytes(part)


def test_get_buffer_always_fits_the_rest_of_a_frame():
    reader = FrameReader()
    for size in (1, 100_000, MAX_BODY, 3, MAX_BODY - 1, MAX_BODY):
        frame = framed(M.PAGES, bytes(size))
        reader.feed(frame[:-1])
        assert reader.next_frame() is None
        assert len(reader.get_buffer()) > 0
        reader.feed(frame[-1:])
        assert frames_of(reader) == [(M.PAGES, bytes(size))]


def test_full_arena_of_unread_frames_is_a_local_error():
    """Without the error, a caller that feeds and never reads frames would wait forever."""
    reader = FrameReader()
    with pytest.raises(LocalError, match="take the frames that are whole"):
        reader.feed(framed(M.PAGES, bytes(100_000)) * ((2 * MAX_BODY + LEAST_READ) // 100_000 + 1))
    assert reader.next_frame() is not None


# ---------------------------------------------------------------- several channels


@pytest.mark.parametrize("channels", [2, 3, 8, 64])
def test_channels_share_the_memory_of_one(channels):
    """Bodies and arenas are smaller; the largest frame that fits still passes."""
    limit = max(MAX_BODY // channels, LEAST_BATCH + BATCH_SLACK)
    reader = FrameReader()
    reader.channel = 1
    reader.limit_bodies(channels)
    assert len(reader.get_buffer()) == 2 * limit + LEAST_READ
    for length in (limit, 5, limit, limit):
        frame = bytearray(HEADER_BYTES) + bytes(length)
        seal(frame, M.PAGES, 1)
        reader.feed(bytes(frame))
        taken = reader.next_frame()
        assert len(taken.head) == length
        taken.release()
    longer = bytearray(HEADER_BYTES) + bytes(limit + 1)
    seal(longer, M.PAGES, 1)
    reader.feed(bytes(longer[:HEADER_BYTES]))
    with pytest.raises(FrameError, match="are over"):
        reader.next_frame()


def test_channel_0_keeps_the_limit_of_complete():
    reader = FrameReader()
    reader.limit_bodies(64)
    frame = bytearray(HEADER_BYTES) + bytes(MAX_STATE + 1024)
    seal(frame, M.COMPLETE)
    reader.feed(bytes(frame))
    assert len(reader.next_frame().head) == MAX_STATE + 1024
