"""Compressed batches: the second stage, behind the deltas.

    body of a compressed PAGES frame
    offset  bytes  field     (integers big-endian)
    0       4      head      bytes of the batch's head
    4       4      data      bytes of its data
    8       ...    content   head and data of the batch, as one Zstandard frame (RFC 8878)

The head is compressed together with the data, since many deltas of one batch are alike. Each batch
stands for itself, so batches of several channels, and those after a break, need no common state.

What a peer says is checked before anything is allocated: both sizes against the longest body that
it may send, the size in the Zstandard frame against those, and the window against MAX_WINDOW.

zstandard is the library: it tells the sizes in a frame before it decompresses, and releases the GIL
meanwhile. (backports.zstd, which Python 3.14 has as compression.zstd, needs a second library for
the former.) It is imported when the first batch comes: not every migration has one.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from proto.wire.errors import DecodeError
from proto.wire.frames import HEADER_BYTES, Frame
from proto.wire.messages import MAX_BODY

if TYPE_CHECKING:
    import zstandard

SIZES = struct.Struct(">II")
CONTENT_AT = HEADER_BYTES + SIZES.size
# The largest window of a Zstandard frame: that of the levels up to 19 for content as long as ours.
MAX_WINDOW = 8 << 20


class BatchCompressor:
    """Compresses batches at one level of Zstandard's, negative ones included.

    Not for several threads at a time.
    """

    def __init__(self, level: int) -> None:
        import zstandard

        self._zstd = zstandard.ZstdCompressor(level, write_checksum=False)

    def compress(self, head: memoryview, data: memoryview) -> bytearray:
        """Return the head of a frame, which is to be sealed as compressed.

        head -- begins with HEADER_BYTES of room for a frame header, as the encoder makes it
        """
        content = self._zstd.compress(b"".join((head[HEADER_BYTES:], data)))
        frame = bytearray(CONTENT_AT + len(content))
        SIZES.pack_into(frame, HEADER_BYTES, len(head) - HEADER_BYTES, len(data))
        frame[CONTENT_AT:] = content
        return frame


class BatchOpener:
    """Gives the head and the data of PAGES frames, compressed or not.

    most -- bytes of the longest batch that may be in a frame

    Not for several threads at a time.
    """

    def __init__(self, most: int = MAX_BODY) -> None:
        self._most = most
        self._zstd: zstandard.ZstdDecompressor | None = None

    def open(self, frame: Frame) -> tuple[memoryview, memoryview]:
        """Return head and data. They are valid until the frame is released.

        Raises DecodeError for a body that is no compressed batch.
        """
        if not frame.compressed:
            return frame.head, frame.data
        return self.decompress(frame.head)

    def decompress(self, body: memoryview) -> tuple[memoryview, memoryview]:
        """Return the head and the data that are compressed in a body. Raises DecodeError."""
        import zstandard

        if len(body) < SIZES.size:
            raise DecodeError(f"a compressed batch of {len(body)} bytes")
        head, data = SIZES.unpack_from(body)
        if head + data > self._most:
            raise DecodeError(
                f"a compressed batch of {head} and {data} bytes: {self._most} are the most"
            )
        content = body[SIZES.size :]
        if self._zstd is None:
            self._zstd = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        try:
            said = zstandard.get_frame_parameters(content)
            if said.content_size != head + data:
                raise DecodeError(
                    f"a compressed batch of {head} and {data} bytes, whose content says "
                    f"{said.content_size}"
                )
            if said.window_size > MAX_WINDOW or said.dict_id:
                raise DecodeError("a compressed batch needs a larger window, or a dictionary")
            batch = memoryview(self._zstd.decompress(content, allow_extra_data=False))
        except zstandard.ZstdError as error:
            raise DecodeError(f"a compressed batch cannot be decompressed: {error}") from None
        return batch[:head], batch[head:]
