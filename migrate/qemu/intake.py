"""What a QEMU sends, taken in and cut into the items of our stream, in a worker thread.

    QEMU's socket -> StreamParser -> pages, in their order -> encoder -> batches
                                  -> all else              ->            pieces of bytes

Pages are collected until the batch is full, something else comes, or nothing comes for a moment: an
item is on its way soon after the last byte of it came. What would let the guest run is held.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

from migrate.errors import MigrationError, UsageError
from migrate.memory import private_buffer
from migrate.qemu.holder import MOVED
from migrate.sliding import Sliding
from proto.errors import DecodeError, StreamError
from proto.kernel import PageEncoder
from proto.messages import PIECE_BYTES
from proto.qemu import (
    FINISH,
    RAM,
    Command,
    End,
    Header,
    Order,
    Pages,
    Part,
    Section,
    StreamParser,
)

USUAL_PAGE = 4096
BUFFER_BYTES = 1 << 20
LEAST_READ = 128 << 10
# Small deltas would fill a batch only after many pages; the other end is to work on some of them
# while others are taken in.
BATCH_PAGES = 2048
# What is incomplete goes on its way when nothing has come for so long.
LINGER_SECONDS = 0.002
# A stream that says nothing for so long where it may be over is over: old machine types end without
# a description.
END_SECONDS = 0.3
# A QEMU that has switched to postcopy, and is silent for so long, is through: it sends in each
# tenth of a second, however slowly it is to.
QUIET_SECONDS = 3.0
# So often the loop hears from the thread while nothing comes.
NEWS_SECONDS = 0.1


class StreamLost(MigrationError):  # noqa: N818 - as PeerLost
    """QEMU has closed its stream before the end: it was cancelled there, or QEMU is gone."""


@dataclass(slots=True)
class Item:
    """A batch of pages, `head` (with room for a frame header) and `data`; or a piece of `body`."""

    head: memoryview | None = None
    data: memoryview | None = None
    body: bytes = b""
    held: bool = False

    @property
    def size(self) -> int:
        if self.head is None or self.data is None:
            return len(self.body)
        return len(self.head) + len(self.data)


class Intake:
    """One stream. All but the attributes is for the worker thread.

    sock -- connected, not blocking
    """

    def __init__(self, sock: socket.socket, page_size: int) -> None:
        self.parser = StreamParser(page_size)
        self.machine = ""
        self.encoder: PageEncoder | None = None
        self.rounds = 1
        """How often the pages have begun from the first one, this time included."""
        self.stopped_at: float | None = None
        """When the guest was seen to stand still."""
        self.return_path = self.postcopy_ram = False
        self.drained = False
        """It was switched to postcopy, and nothing more is to come of it."""
        self._sock = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._stream = Sliding(private_buffer(BUFFER_BYTES), LEAST_READ)
        self._part_end = 0
        self._fed = 0  # pages since the last batch
        self._literal = bytearray()
        self._held = False
        self._quiet_since = 0.0

    @property
    def received(self) -> int:
        """Bytes of the stream."""
        return self._stream.received

    # -- bytes

    def _fill(self) -> bool:
        """Takes in what is there; False where that is nothing. Raises StreamLost at the end."""
        try:
            count = self._sock.recv_into(self._stream.room())
        except BlockingIOError:
            return False
        except ConnectionResetError:
            count = 0  # it has closed it, and had not read all that was said to it
        except OSError as error:
            raise StreamLost(f"QEMU's stream broke: {error.strerror}") from None
        if not count:
            raise StreamLost(
                "QEMU has closed its stream before the end: it was cancelled there, or is gone"
            )
        self._stream.come(count)
        self._quiet_since = 0.0
        return True

    def _wait(self, seconds: float) -> bool:
        """Whether something is there, or the end, within so long."""
        return bool(self._poll.poll(seconds * 1e3))

    def _step(self, *, last: bool = False) -> Part | None:
        """The next part. Where it is no pages, and not the end, it is taken: to go on its way as it
        is."""
        stream = self._stream
        try:
            at, part = self.parser.step(stream.data, stream.start, stream.end, last=last)
        except StreamError as error:
            if self.parser.switched:
                self._drain()
            place = stream.base + error.at
            size = self.parser.page_size
            hint = "" if size == USUAL_PAGE else f" (--page-size {size}: has this QEMU such pages?)"
            raise MigrationError(f"QEMU's stream, byte {place}: {error}{hint}") from None
        self._part_end = at
        if part is not None and not isinstance(part, Pages | End):
            self._literal += stream.take(at)
        if isinstance(part, Header):
            self.machine = part.machine
        elif isinstance(part, Order):
            self.return_path |= part.number == Command.OPEN_RETURN_PATH
            # with dirty bitmaps it is announced too, and has nothing to say then
            self.postcopy_ram |= part.number == Command.POSTCOPY_ADVISE and bool(part.data)
        elif isinstance(part, Section) and (part.kind, part.name) == (FINISH, RAM.decode()):
            self.stopped_at = self.stopped_at or time.monotonic()
        return part

    def _drain(self) -> None:
        """QEMU has switched to postcopy, as it may with dirty bitmaps: 7.2 never lets its guest run
        on where its stream breaks now, but where it is through it can be told to. It hears that
        the guest has moved when it has nothing more to say: before that the word breaks it too."""
        with contextlib.suppress(OSError):
            self._run_dry()
            self._sock.send(MOVED)
            self._run_dry()
        self.drained = True

    def _run_dry(self) -> None:
        while self._wait(QUIET_SECONDS) and self._sock.recv(BUFFER_BYTES):
            pass

    # -- the beginning

    def begin(self, seconds: float) -> bool:
        """Reads up to the list of blocks; False where it did not come in time.

        Raises StreamLost, and MigrationError for what is no such stream.
        """
        until = time.monotonic() + seconds
        while not self.parser.blocks:
            if self._step() is None and not self._fill():
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self._wait(left)
        return True

    def check(self, *, return_path: bool) -> None:
        """Raises UsageError for a stream that should not be carried.

        A QEMU that has switched to postcopy never lets its guest run on: it must not get so far.
        """
        if return_path and not self.return_path:
            raise UsageError(
                "QEMU keeps no return path: it would take its guest for moved as soon as all is "
                "sent, wherever it is then. Set the capability return-path there; or say "
                "--no-return-path"
            )
        if self.postcopy_ram:
            raise UsageError(
                "QEMU may be told to let its guest go on at the destination before its memory is "
                "there, which cannot be carried, and the guest would be lost: switch the "
                "capability postcopy-ram off"
            )

    # -- items

    def items(self) -> Iterator[Item | None]:
        """All that is to be carried, in order; None: nothing came for a moment.

        Raises StreamLost and MigrationError.
        """
        while not self.parser.complete:
            part = self._step()
            if isinstance(part, Pages):
                yield from self._pieces()
                yield from self._pages(part)
            elif isinstance(part, End):
                yield from self._batch()
                yield from self._pieces()
                self._held = True
                self._literal += self._stream.take(self._part_end)
            elif part is not None:
                yield from self._batch()
                if len(self._literal) >= PIECE_BYTES:
                    yield from self._pieces()
            elif not self._more():
                if self._over():
                    break
                yield from self._batch()
                yield from self._pieces()
                if not self._wait(NEWS_SECONDS):
                    yield None
        yield from self._pieces()

    def _more(self) -> bool:
        """Takes in more, if there soon is more."""
        try:
            return self._fill() or (self._wait(LINGER_SECONDS) and self._fill())
        except StreamLost:
            if self.parser.ended and not self._stream:
                self.parser.complete = True
                return True
            raise

    def _over(self) -> bool:
        """Nothing has come for a moment: whether nothing will, since the end may be here."""
        now = time.monotonic()
        self._quiet_since = self._quiet_since or now
        if now - self._quiet_since < END_SECONDS:
            return False
        if self.parser.ended and not self._stream:
            return True
        if self.stopped_at is not None and self._stream:
            with contextlib.suppress(MigrationError):
                self._step(last=True)  # the footer of the last section, and nothing behind it
        return False

    def _pages(self, part: Pages) -> Iterator[Item]:
        encoder, reader = self.encoder, self.parser.reader
        assert encoder is not None
        assert reader is not None
        done, count, data = 0, part.count, self._stream.data[: self._stream.end]
        while True:
            try:
                done, wrapped = encoder.feed_records(data, reader.records, done, count)
            except DecodeError as error:
                raise MigrationError(f"QEMU's stream: {error}") from None
            if done == count:
                break
            yield from self._batch()
            if wrapped:
                self.rounds += 1
                encoder.begin_round(self.rounds)
        self._stream.take(self._part_end)
        self._fed += count
        if self._fed >= BATCH_PAGES:
            yield from self._batch()

    def _batch(self) -> Iterator[Item]:
        self._fed = 0
        if self.encoder is not None and self.encoder.pending:
            yield Item(*self.encoder.take())

    def _pieces(self) -> Iterator[Item]:
        for at in range(0, len(self._literal), PIECE_BYTES):
            yield Item(body=bytes(self._literal[at : at + PIECE_BYTES]), held=self._held)
        self._literal.clear()
