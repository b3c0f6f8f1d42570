"""Reads what a QEMU sends, in a worker thread, and cuts it into the items of our own stream.

    QEMU's socket -> StreamParser -> pages, in their order -> encoder -> batches
                                  -> all else              ->            pieces of bytes

Pages are collected until the batch is full, until something else comes, or until nothing has come
for LINGER_SECONDS: an item is sent soon after its last byte has come. The bytes without which no
QEMU lets the guest run are marked as held; the destination withholds them until GO.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

from migrate.errors import MigrationError, UsageError
from migrate.memory.memory import private_buffer
from migrate.memory.stream_buffer import StreamBuffer
from migrate.qemu.stream.return_path import MOVED
from proto.codec.kernel import PageEncoder
from proto.qemu.parts import FINISH, RAM, Command, CommandCode, End, Header, Pages, Part, Section
from proto.qemu.stream_parser import StreamParser
from proto.wire.errors import DecodeError, StreamError
from proto.wire.messages import PIECE_BYTES

logger = logging.getLogger(__name__)

USUAL_PAGE = 4096
# The buffer holds the longest record, a page of 16 KiB, more than twice (see StreamBuffer).
BUFFER_BYTES = 1 << 20
MIN_READ_BYTES = 128 << 10
# A batch of small deltas takes many pages until it is full. It is sent after this many, so that the
# destination works on some pages while others are read.
BATCH_PAGES = 2048
# An incomplete batch is sent when nothing has come for this long.
LINGER_SECONDS = 0.002
# A stream that may have ended has ended if nothing comes for this long: with old machine types no
# description of the devices follows, which would mark the end.
END_SECONDS = 0.3
# A QEMU that has switched to postcopy and sends nothing for this long has sent everything: it sends
# in each tenth of a second, however low its bandwidth is.
QUIET_SECONDS = 3.0
# How often `items` yields None while nothing comes, so that its caller can do other things.
IDLE_SECONDS = 0.1


class StreamLost(MigrationError):  # noqa: N818 - as PeerLost
    """QEMU has closed its stream before the end: it was cancelled there, or QEMU has ended."""


@dataclass(slots=True)
class Item:
    """A batch of pages, or a piece of anything else.

    head, data -- of a batch; `head` begins with room for a frame header
    body       -- of a piece
    held       -- whether the destination withholds the piece until GO
    """

    head: memoryview | None = None
    data: memoryview | None = None
    body: bytes = b""
    held: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        if self.head is None or self.data is None:
            return len(self.body)
        return len(self.head) + len(self.data)


class Intake:
    """One stream. Its methods run in the worker thread; others may read its attributes.

    machine      -- QEMU's machine type, from the header
    rounds       -- how many times the pages have begun at the first one, this time included
    stopped_at   -- when the guest was seen to be paused (time.monotonic); None: not yet
    return_path  -- whether QEMU has opened the return path
    postcopy_ram -- whether QEMU may switch to postcopy for RAM
    drained      -- whether QEMU has switched to postcopy, and has nothing more to send
    """

    def __init__(self, sock: socket.socket, page_size: int) -> None:
        """sock -- connected, and does not block; page_size -- of the guest, in bytes"""
        self.parser = StreamParser(page_size)
        self.machine = ""
        self.rounds = 1
        self.stopped_at: float | None = None
        self.return_path = self.postcopy_ram = False
        self.drained = False
        self._sock = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._stream = StreamBuffer(private_buffer(BUFFER_BYTES), MIN_READ_BYTES)
        self._part_end = 0  # where the part ends that `_step` has returned
        self._fed = 0  # pages since the last batch
        self._literal = bytearray()  # what is no page, and not yet in an item
        self._held = False  # whether what comes is held
        self._quiet_since = 0.0

    @property
    def received(self) -> int:
        """Bytes of the stream that have come."""
        return self._stream.received

    # -- bytes

    def _fill(self) -> bool:
        """Read what is there; return False if that is nothing. Raises StreamLost at the end."""
        try:
            count = self._sock.recv_into(self._stream.room())
        except BlockingIOError:
            return False
        except ConnectionResetError:
            count = 0  # QEMU has closed the socket before it had read what we said
        except OSError as error:
            raise StreamLost(f"QEMU's stream broke: {error.strerror}") from None
        if not count:
            raise StreamLost(
                "QEMU has closed its stream before the end: it was cancelled there, or is gone"
            )
        self._stream.add(count)
        self._quiet_since = 0.0
        return True

    def _wait(self, seconds: float) -> bool:
        """Wait until there is something to read, or the end; return False if that did not come."""
        return bool(self._poll.poll(seconds * 1e3))

    def _step(self, *, last: bool = False) -> Part | None:
        """Return the next part of the stream; None if it has not come completely.

        A part that is neither pages nor the end is moved to `_literal`: it is sent as it is.

        last -- no more comes
        """
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
        elif isinstance(part, Command):
            self.return_path |= part.number == CommandCode.OPEN_RETURN_PATH
            # With dirty-bitmaps alone QEMU announces postcopy too, without data.
            self.postcopy_ram |= part.number == CommandCode.POSTCOPY_ADVISE and bool(part.data)
        elif isinstance(part, Section) and (part.kind, part.name) == (FINISH, RAM.decode()):
            # QEMU pauses the guest before it sends the last pages.
            self.stopped_at = self.stopped_at or time.monotonic()
        return part

    def _drain(self) -> None:
        """Let a QEMU finish that has switched to postcopy, and tell it that its guest has moved.

        QEMU may do that with dirty-bitmaps. 7.2 never lets its guest run on if the stream breaks
        from then on; but once its migration has completed, `cont` does. It must hear SHUT when it
        has nothing more to send: before that SHUT breaks its migration too.
        """
        logger.debug("QEMU has switched to postcopy; reading the rest of its stream")
        with contextlib.suppress(OSError):
            self._run_dry()
            self._sock.send(MOVED)
            self._run_dry()
        self.drained = True

    def _run_dry(self) -> None:
        """Read and drop what comes, until QEMU is quiet or closes the stream."""
        while self._wait(QUIET_SECONDS) and self._sock.recv(BUFFER_BYTES):
            pass

    # -- the beginning

    def begin(self, seconds: float) -> bool:
        """Read up to the list of RAM blocks; return False if it does not come in time.

        Raises StreamLost, and MigrationError if this is no stream of QEMU's.
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
        """Raise UsageError if the stream must not be carried. Call it after `begin`.

        A QEMU that has switched to postcopy never lets its guest run on here, so it must not get
        that far.

        return_path -- whether QEMU must have opened the return path
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

    def items(self, encoder: PageEncoder) -> Iterator[Item | None]:
        """Yield everything that is to be carried, in order; None if nothing came for a moment.

        encoder -- makes batches of the pages; its round is begun when QEMU's round begins

        Raises StreamLost and MigrationError.
        """
        while not self.parser.complete:
            part = self._step()
            if isinstance(part, Pages):
                yield from self._pieces()
                yield from self._pages(part, encoder)
            elif isinstance(part, End):
                yield from self._batch(encoder)
                yield from self._pieces()
                # QEMU's guest runs once it has read this byte.
                self._held = True
                self._literal += self._stream.take(self._part_end)
            elif part is not None:
                yield from self._batch(encoder)
                if len(self._literal) >= PIECE_BYTES:
                    yield from self._pieces()
            elif not self._more():
                if self._over():
                    break
                yield from self._batch(encoder)
                yield from self._pieces()
                if not self._wait(IDLE_SECONDS):
                    yield None
        yield from self._pieces()

    def _more(self) -> bool:
        """Read more; return False if nothing comes for LINGER_SECONDS."""
        try:
            return self._fill() or (self._wait(LINGER_SECONDS) and self._fill())
        except StreamLost:
            if self.parser.ended and not self._stream:
                self.parser.complete = True
                return True
            raise

    def _over(self) -> bool:
        """Return whether the stream has ended, now that nothing has come for a moment."""
        now = time.monotonic()
        self._quiet_since = self._quiet_since or now
        if now - self._quiet_since < END_SECONDS:
            return False
        if self.parser.ended and not self._stream:
            return True
        if self.stopped_at is not None and self._stream:
            # The footer of the last section, with nothing behind it, is taken for the end.
            with contextlib.suppress(MigrationError):
                self._step(last=True)
        return False

    def _pages(self, part: Pages, encoder: PageEncoder) -> Iterator[Item]:
        """Encode pages; yield the batches that become full."""
        done, count, data = 0, part.count, self._stream.data[: self._stream.end]
        while True:
            try:
                done, wrapped = encoder.feed_records(data, self.parser.records, done, count)
            except DecodeError as error:
                raise MigrationError(f"QEMU's stream: {error}") from None
            if done == count:
                break
            yield from self._batch(encoder)
            if wrapped:
                self.rounds += 1
                encoder.begin_round(self.rounds)
        self._stream.take(self._part_end)
        self._fed += count
        if self._fed >= BATCH_PAGES:
            yield from self._batch(encoder)

    def _batch(self, encoder: PageEncoder) -> Iterator[Item]:
        """Yield the pages that the encoder has, if it has any."""
        self._fed = 0
        if encoder.pending:
            yield Item(*encoder.finish_batch())

    def _pieces(self) -> Iterator[Item]:
        """Yield what is in `_literal`, in pieces."""
        for at in range(0, len(self._literal), PIECE_BYTES):
            yield Item(body=bytes(self._literal[at : at + PIECE_BYTES]), held=self._held)
        self._literal.clear()
