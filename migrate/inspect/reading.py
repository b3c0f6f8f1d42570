"""Read a stream from a file or a pipe, in one pass and with bounded memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import BinaryIO, Protocol

from migrate.errors import MigrationError
from migrate.memory.stream_buffer import StreamBuffer
from proto.survey.facts import FrameFacts, QemuFacts
from proto.survey.frames import FrameSurvey
from proto.survey.qemu import QemuSurvey
from proto.wire.frames import MAGIC

# More than twice the largest piece that must be in memory as a whole, in either kind of stream.
BUFFER_BYTES = 8 << 20
MIN_READ_BYTES = 4 << 20
QEMU = b"QEVM"
# The interval between two reports of progress.
PROGRESS_SECONDS = 0.5

Progress = Callable[[int], object]


class Survey(Protocol):
    """Takes a stream piece by piece, and collects facts about it."""

    def feed(self, data: memoryview, start: int, end: int, base: int, *, last: bool = False) -> int:
        """Take data[start:end]; return the index up to which it was consumed.

        base -- place of data[0] in the stream
        last -- no more data follows
        """


class Reader:
    """A stream. Its first four bytes tell its kind (`begins`).

    progress -- called now and then with the number of bytes read
    """

    def __init__(self, file: BinaryIO, progress: Progress = lambda _read: None) -> None:
        self._file = file
        self._progress = progress
        self._stream = StreamBuffer(memoryview(bytearray(BUFFER_BYTES)), MIN_READ_BYTES)
        self._over = False
        self._told = 0.0
        while len(self._stream) < len(QEMU) and not self._over:
            self._fill()
        self.begins = bytes(self._stream.data[: min(self._stream.end, len(QEMU))])

    def _fill(self) -> None:
        count = self._file.readinto(self._stream.room())  # type: ignore[attr-defined]
        self._over = not count
        self._stream.add(count or 0)
        if (now := time.monotonic()) - self._told > PROGRESS_SECONDS:
            self._told = now
            self._progress(self._stream.received)

    def run(self, survey: Survey) -> None:
        """Give the whole stream to the survey."""
        stream = self._stream
        while True:
            stream.start = survey.feed(
                stream.data, stream.start, stream.end, stream.base, last=self._over
            )
            if self._over:
                return
            self._fill()


def read(reader: Reader, qemu: Callable[[], QemuSurvey]) -> QemuFacts | FrameFacts:
    """Return the facts about a stream. Raises MigrationError if it is of neither kind.

    qemu -- returns the survey for a stream of QEMU
    """
    begins = reader.begins
    survey: QemuSurvey | FrameSurvey
    if begins and QEMU.startswith(begins):
        survey = qemu()
    elif begins and MAGIC.startswith(begins):
        survey = FrameSurvey()
    elif not begins:
        raise MigrationError("the stream is empty")
    elif begins[:2] == b"\x16\x03":
        raise MigrationError("the stream is encrypted with TLS, and cannot be read")
    else:
        raise MigrationError(
            f"this is not a migration stream: it begins with {begins.hex(' ')}, not QEVM or XBM1"
        )
    reader.run(survey)
    return survey.finish()
