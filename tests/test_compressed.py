"""Compressed batches on the wire: what they hold, and what a receiver refuses."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from proto.wire.compressed import MAX_WINDOW, SIZES, BatchCompressor, BatchOpener
from proto.wire.errors import DecodeError, FrameError
from proto.wire.frames import HEADER_BYTES, FrameReader, seal
from proto.wire.messages import MAX_BODY, MessageType

M = MessageType
HEAD, DATA = b"records " * 20, bytes(range(256)) * 64
# Golden: level 1 of zstd 1.5. Other levels and releases may write other bytes; all read these.
GOLDEN = bytes.fromhex(
    "000000a00000400028b52ffd60a03fb5080084107265636f72647320000102030405060708090a0b"
    "0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f30313233"
    "3435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b"
    "5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f80818283"
    "8485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaab"
    "acadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3"
    "d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafb"
    "fcfdfeff020000fd7e60f1b332aa7001"
)


def compressed(head: bytes, data: bytes, level: int = 1) -> bytes:
    """Return the body of a compressed batch."""
    made = BatchCompressor(level).compress(
        memoryview(bytes(HEADER_BYTES) + head), memoryview(data)
    )  # fmt: skip
    return bytes(made[HEADER_BYTES:])


def opened(body: bytes, most: int = MAX_BODY) -> tuple[bytes, bytes]:
    head, data = BatchOpener(most).decompress(memoryview(body))
    return bytes(head), bytes(data)


def said(head: int, data: int, content: bytes) -> bytes:
    return SIZES.pack(head, data) + content


@given(st.binary(min_size=1, max_size=500), st.binary(max_size=20_000), st.sampled_from([-5, 1, 3]))
def test_a_batch_comes_out_as_it_went_in(head, data, level):
    assert opened(compressed(head, data, level)) == (head, data)


def test_the_golden_batch_is_read():
    assert opened(GOLDEN) == (HEAD, DATA)


def test_one_opener_reads_batch_after_batch():
    opener = BatchOpener()
    for number in range(1, 20):
        body = compressed(HEAD * number, DATA)
        assert opener.decompress(memoryview(body))[0] == HEAD * number
        with pytest.raises(DecodeError):
            opener.decompress(memoryview(body[:-1]))


# ---------------------------------------------------------------- hostile


def refused(body: bytes, says: str, most: int = MAX_BODY) -> None:
    with pytest.raises(DecodeError, match=says):
        opened(body, most)


def test_truncated_batches_are_refused():
    body = compressed(HEAD, DATA)
    for end in range(len(body)):
        refused(body[:end], "compressed batch")


def test_what_follows_a_batch_is_refused():
    body = compressed(HEAD, DATA)
    refused(body + b"\0", "cannot be decompressed")
    refused(body + body[SIZES.size :], "cannot be decompressed")


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_changed_bytes_are_refused_or_make_a_batch_of_the_same_size(place, change):
    """The check of the frame finds damage; this is about malice."""
    body = bytearray(compressed(HEAD, DATA))
    body[place % len(body)] ^= change
    try:
        head, data = opened(bytes(body))
    except DecodeError:
        return
    assert (len(head), len(data)) == struct.unpack_from(">II", body)


def test_sizes_over_the_limit_are_refused():
    content = compressed(HEAD, DATA)[SIZES.size :]
    refused(said(len(HEAD), MAX_BODY, content), f"{MAX_BODY} are the most")
    refused(said(2**32 - 1, 2**32 - 1, content), f"{MAX_BODY} are the most")
    refused(compressed(HEAD, DATA), "1000 are the most", most=1000)


def test_sizes_that_are_not_those_of_the_content_are_refused():
    content = compressed(HEAD, DATA)[SIZES.size :]
    size = len(HEAD) + len(DATA)
    refused(said(len(HEAD), len(DATA) + 1, content), f"whose content says {size}")
    refused(said(0, 0, content), f"whose content says {size}")
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(HEAD + DATA)
    refused(said(len(HEAD), len(DATA), silent), "whose content says")


def test_a_bomb_takes_no_memory():
    """256 MiB of zeros in a few KiB, which say that, or lie."""
    chunks = zstandard.ZstdCompressor(level=3).compressobj(size=1 << 28)
    bomb = b"".join([*(chunks.compress(bytes(1 << 24)) for _ in range(16)), chunks.flush()])
    # The size is at byte 6 or so of the frame; a lie is put in its place.
    parameters = zstandard.get_frame_parameters(bomb)
    assert parameters.content_size == 1 << 28
    lie = bomb.replace((1 << 28).to_bytes(4, "little"), (1 << 20).to_bytes(4, "little"), 1)
    assert zstandard.get_frame_parameters(lie).content_size == 1 << 20
    tracemalloc.start()
    try:
        refused(said(0, 1 << 20, bomb), "whose content says 268435456")
        refused(said(0, 1 << 20, lie), "larger window|cannot be decompressed")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_window_beyond_the_limit_is_refused():
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=-1)
    content = compressor.compress(HEAD + DATA) + compressor.flush()
    assert zstandard.get_frame_parameters(content).window_size > MAX_WINDOW
    refused(said(len(HEAD), len(DATA), content), "compressed batch")


def test_a_dictionary_is_refused():
    dictionary = zstandard.ZstdCompressionDict(DATA[:1000] * 10)
    content = zstandard.ZstdCompressor(dict_data=dictionary).compress(HEAD + DATA)
    refused(said(len(HEAD), len(DATA), content), "compressed batch")


def test_other_formats_are_refused():
    refused(said(1, 1, b""), "compressed batch")
    refused(said(1, 1, b"\x1f\x8b" + bytes(30)), "compressed batch")
    refused(said(0, 0, struct.pack("<II", 0x184D2A50, 4) + b"skip"), "compressed batch")
    refused(b"", "compressed batch of 0 bytes")


# ---------------------------------------------------------------- frames


def sealed(body: bytes, kind: MessageType = M.PAGES, data: bytes = b"") -> bytes:
    frame = bytearray(HEADER_BYTES) + body
    seal(frame, kind, 0, len(data), compressed=True)
    return bytes(frame) + data


def reader(*, agreed: bool = True) -> FrameReader:
    made = FrameReader()
    made.compressed = agreed
    return made


def test_a_compressed_frame_is_read():
    ours = reader()
    ours.feed(sealed(compressed(HEAD, DATA)))
    frame = ours.next_frame()
    assert frame is not None
    assert frame.compressed
    head, data = BatchOpener().open(frame)
    assert (bytes(head), bytes(data)) == (HEAD, DATA)
    frame.release()
    assert (bytes(head), bytes(data)) == (HEAD, DATA), "they are copies"


def test_it_is_refused_where_it_was_not_agreed_on():
    ours = reader(agreed=False)
    ours.feed(sealed(compressed(HEAD, DATA)))
    with pytest.raises(FrameError, match="PAGES: flags 0x1 are not in use"):
        ours.next_frame()


@pytest.mark.parametrize("kind", [kind for kind in M if kind is not M.PAGES])
def test_nothing_but_pages_is_compressed(kind):
    ours = reader()
    ours.feed(sealed(b"x", kind))
    with pytest.raises(FrameError, match="flags 0x1 are not in use"):
        ours.next_frame()


def test_a_compressed_frame_is_all_head():
    ours = reader()
    ours.feed(sealed(b"head", data=b"data"))
    with pytest.raises(FrameError, match="a head of 4 bytes in a body of 8"):
        ours.next_frame()


def test_damage_is_found_before_it_is_decompressed():
    made = bytearray(sealed(compressed(HEAD, DATA)))
    made[-1] ^= 1
    ours = reader()
    ours.feed(bytes(made))
    with pytest.raises(FrameError, match="the check of its"):
        ours.next_frame()
