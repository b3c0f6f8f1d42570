"""Reads a stream from a file or a pipe, in one pass and in little memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import BinaryIO, Protocol

from migrate.errors import MigrationError
from migrate.sliding import Sliding
from proto.frame_survey import FrameSurvey
from proto.frames import MAGIC
from proto.qemu_survey import QemuSurvey
from proto.stream_facts import FrameFacts, QemuFacts

# More than twice of what must be whole at once, of either kind.
BUFFER_BYTES = 8 << 20
LEAST_READ = 4 << 20
QEMU = b"QEVM"
TELL_SECONDS = 0.5

Progress = Callable[[int], object]


class Survey(Protocol):
    def feed(
        self, data: memoryview, start: int, end: int, base: int, *, last: bool = False
    ) -> int: ...


class Reader:
    """A stream; `begins` with four bytes of which kind it is.

    progress -- told now and then how many bytes were read
    """

    def __init__(self, file: BinaryIO, progress: Progress = lambda _read: None) -> None:
        self._file = file
        self._progress = progress
        self._stream = Sliding(memoryview(bytearray(BUFFER_BYTES)), LEAST_READ)
        self._over = False
        self._told = 0.0
        while len(self._stream) < len(QEMU) and not self._over:
            self._fill()
        self.begins = bytes(self._stream.data[: min(self._stream.end, len(QEMU))])

    def _fill(self) -> None:
        count = self._file.readinto(self._stream.room())  # type: ignore[attr-defined]
        self._over = not count
        self._stream.come(count or 0)
        if (now := time.monotonic()) - self._told > TELL_SECONDS:
            self._told = now
            self._progress(self._stream.received)

    def run(self, survey: Survey) -> None:
        """Gives all of it to the survey."""
        stream = self._stream
        while True:
            stream.start = survey.feed(
                stream.data, stream.start, stream.end, stream.base, last=self._over
            )
            if self._over:
                return
            self._fill()


def read(reader: Reader, qemu: Callable[[], QemuSurvey]) -> QemuFacts | FrameFacts:
    """What is in a stream. Raises MigrationError where it is of neither kind.

    qemu -- makes what a stream of QEMU's is given to
    """
    begins = reader.begins
    survey: QemuSurvey | FrameSurvey
    if begins and QEMU.startswith(begins):
        survey = qemu()
    elif begins and MAGIC.startswith(begins):
        survey = FrameSurvey()
    elif not begins:
        raise MigrationError("there is nothing in it")
    elif begins[:2] == b"\x16\x03":
        raise MigrationError("this is TLS: what is inside cannot be read")
    else:
        raise MigrationError(
            f"this is no migration stream: it begins with {begins.hex(' ')}, not with QEVM or XBM1"
        )
    reader.run(survey)
    return survey.finish()
