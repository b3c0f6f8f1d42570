"""What is in a stream of ours, one direction of one connection, even if it is damaged.

Each frame is checked as a receiver checks it: header, check of the head, fields, the records of
PAGES, their deltas, and the raw pages if GUEST has told the seed. After bytes that cannot be a
frame, reading goes on at the next ones that can be a header. This module does no I/O.
"""

from __future__ import annotations

import re
from typing import cast

import msgspec
import xxhash

from proto.codec.kernel import BatchSurvey
from proto.survey.facts import (
    MAX_LISTED,
    BlockFact,
    Fault,
    FrameFacts,
    FrameKind,
    FrameRound,
    ItemFact,
    MessageFact,
    add_fault,
)
from proto.wire.compressed import BatchOpener
from proto.wire.errors import DecodeError, MessageError
from proto.wire.frames import COMPRESSED, HEADER, HEADER_BYTES, MAGIC
from proto.wire.messages import (
    BODY_LIMITS,
    MAX_PAGES,
    Blocks,
    Bytes,
    GuestInfo,
    Hello,
    Message,
    MessageType,
    Round,
    unpack,
)

MARK = re.compile(re.escape(MAGIC))
SHOWN_BYTES = 64
# There can be very many of these: they are counted, and not listed.
UNLISTED = {MessageType.PING, MessageType.PONG, MessageType.TAKEN, MessageType.PROBE,
            MessageType.PROBED, MessageType.HELD}  # fmt: skip


class FrameSurvey:
    """Reads a stream in order: `feed` as often as there are bytes, then `finish`."""

    def __init__(self) -> None:
        self.facts = FrameFacts()
        self._kinds: dict[tuple[MessageType, int], FrameKind] = {}
        self._rounds: dict[int, FrameRound] = {}
        self._batches = BatchSurvey(0, 0, b"")
        self._opener = BatchOpener()
        self._fault: Fault | None = None

    def feed(self, data: memoryview, start: int, end: int, base: int, *, last: bool = False) -> int:
        """Read data[start:end] as far as it is whole. Return where the rest begins.

        base -- byte of the stream that data[0] is
        last -- nothing follows: read to the end
        """
        self.facts.size = max(self.facts.size, base + end)
        while start < end:
            if self._fault is not None:
                at = self._find(data, start, end)
                if at < 0:
                    keep = min(end - start, 0 if last else HEADER_BYTES)
                    self._skip(self._fault, end - keep - start)
                    return end - keep
                self._skip(self._fault, at - start)
                self._fault, start = None, at
            step = self._frame(data, start, end, base, last)
            if step == 0:
                return start
            start += step
        return start

    def _skip(self, fault: Fault, count: int) -> None:
        fault.skipped += count
        self.facts.skipped += count

    def _lose(self, at: int, what: str, expected: str, found: memoryview) -> int:
        """Note that no frame can be read here. Skip one byte, so as not to find the same again."""
        fault = Fault(at, what, expected, bytes(found[:8]).hex(" "))
        self._fault = add_fault(self.facts, fault)
        self._skip(self._fault, 1)
        return 1

    def _find(self, data: memoryview, start: int, end: int) -> int:
        """Return the place of the next bytes that can be a header, or -1.

        A magic that is cut off by the end is not found: it is in the rest.
        """
        for found in MARK.finditer(data, start, end - HEADER_BYTES + len(MAGIC)):
            if not header_fault(data[found.start() : found.start() + HEADER_BYTES]):
                return found.start()
        return -1

    def _frame(self, data: memoryview, start: int, end: int, base: int, last: bool) -> int:
        """Read the frame that begins here. Return its bytes, or 0 if more are needed."""
        at, left = base + start, end - start
        if left < HEADER_BYTES:
            if not last:
                return 0
            known = bytes(data[start : min(start + 4, end)])
            what = f"the stream ends inside a header, of which {left} bytes are there"
            if known != MAGIC[: len(known)]:
                what = "this is no frame"
            return self._lose(at, what, "a frame: XBM1", data[start:end])
        header = data[start : start + HEADER_BYTES]
        if what := header_fault(header):
            return self._lose(at, what, "a frame: XBM1", header)
        size = HEADER_BYTES + int.from_bytes(header[8:12], "big")
        if left >= size:
            return self._whole(at, data[start : start + size], data[start + size : end])
        if not last:
            return 0
        kind = MessageType(header[4]).name
        what = f"the stream ends inside {kind}, of which {left} bytes of {size} are there"
        return self._lose(at, what, f"{size - left} bytes more", header)

    def _whole(self, at: int, frame: memoryview, following: memoryview) -> int:
        """Read a frame whose bytes are all there. Return how many bytes were read."""
        _, number, flags, channel, _, head, check = HEADER.unpack_from(frame)
        kind, body = MessageType(number), frame[HEADER_BYTES:]
        seed = int.from_bytes(frame[4:12], "big")
        right = xxhash.xxh3_64_intdigest(body[:head], seed=seed) == check
        if not right:
            what = f"{kind.name}: the check of its {head} bytes does not match"
            # If another frame follows, the length was right at least.
            follows = bytes(following[: len(MAGIC)])
            if follows != MAGIC[: len(follows)]:
                return self._lose(at, what, f"the check {check:016x}", frame)
            add_fault(self.facts, Fault(at, what, f"the check {check:016x}"))
        self._count(kind, channel, len(frame))
        if right and flags == COMPRESSED:
            self._compressed(at, body, len(frame))
        elif right and kind is MessageType.PAGES:
            self._pages(at, body[:head], body[head:], len(frame))
        elif right:
            self._message(at, kind, channel, body)
        return len(frame)

    def _count(self, kind: MessageType, channel: int, size: int) -> None:
        fact = self._kinds.get((kind, channel))
        if fact is None:
            if len(self._kinds) >= MAX_LISTED:
                return
            fact = self._kinds[kind, channel] = FrameKind(kind.name, channel)
            self.facts.frames.append(fact)
        fact.count += 1
        fact.bytes += size

    def _round(self, at: int, number: int) -> FrameRound | None:
        fact = self._rounds.get(number)
        if fact is None and len(self._rounds) < MAX_LISTED:
            fact = self._rounds[number] = FrameRound(at, number)
            self.facts.rounds.append(fact)
        elif fact is None:
            self.facts.rounds_left_out += 1
        return fact

    def _pages(self, at: int, head: memoryview, data: memoryview, size: int) -> None:
        number, first, zero, raw, delta, delta_bytes, changed, base_less, where, what = (
            self._batches.read(head, data)
        )
        if what:
            add_fault(self.facts, Fault(at + HEADER_BYTES + where, f"PAGES from {first}: {what}"))
        if base_less:
            what = f"PAGES from {first}: deltas of {base_less} pages that never came"
            add_fault(self.facts, Fault(at, what))
        fact = self._round(at, number)
        if fact is not None:
            fact.frames += 1
            fact.bytes += size
            fact.zero += zero
            fact.raw += raw
            fact.delta += delta
            fact.delta_bytes += delta_bytes
        deltas = self.facts.deltas
        deltas.count += delta
        deltas.bytes += delta_bytes
        deltas.changed += changed
        deltas.baseless += base_less
        if self.facts.blocks:
            self._item(ItemFact(at, "PAGES", size - HEADER_BYTES, zero + raw + delta))

    def _compressed(self, at: int, body: memoryview, size: int) -> None:
        try:
            head, data = self._opener.decompress(body)
        except DecodeError as error:
            add_fault(self.facts, Fault(at + HEADER_BYTES, f"PAGES: {error}"))
            return
        compressed = self.facts.compressed
        compressed.batches += 1
        compressed.bytes += len(body)
        compressed.content_bytes += len(head) + len(data)
        self._pages(at, head, data, size)

    def _item(self, item: ItemFact) -> None:
        if len(self.facts.items) < MAX_LISTED:
            self.facts.items.append(item)
        else:
            self.facts.items_left_out += 1

    def _message(self, at: int, kind: MessageType, channel: int, body: memoryview) -> None:
        try:
            message = unpack(kind, body)
        except MessageError as error:
            add_fault(self.facts, Fault(at + HEADER_BYTES, str(error)))
            return
        if isinstance(message, Bytes):
            self.facts.literal_bytes += len(message.data)
            self.facts.held_bytes += len(message.data) if message.held else 0
            shown = message.data[:SHOWN_BYTES].hex()
            self._item(ItemFact(at, "BYTES", len(message.data), 0, message.held, shown))
            return
        if isinstance(message, Hello):
            self._batches = BatchSurvey(0, 0, b"")  # another connection
        elif isinstance(message, GuestInfo):
            self._guest(at, message)
        elif isinstance(message, Blocks):
            self._blocks(message)
        elif isinstance(message, Round) and (fact := self._round(at, message.number)) is not None:
            fact.told_pages, fact.told_transferred = message.pages, message.transferred
            fact.last = message.last
        if kind not in UNLISTED:
            self._list(at, kind, channel, message)

    def _list(self, at: int, kind: MessageType, channel: int, message: Message) -> None:
        if len(self.facts.messages) >= MAX_LISTED:
            self.facts.messages_left_out += 1
            return
        fields = cast("dict[str, object]", msgspec.to_builtins(message, builtin_types=(bytes,)))
        shown = {name: _shown(value) for name, value in fields.items()}
        self.facts.messages.append(MessageFact(at, kind.name, channel, shown))

    def _guest(self, at: int, guest: GuestInfo) -> None:
        self.facts.page_size, self.facts.pages = guest.page_size, guest.pages
        if guest.pages > MAX_PAGES:
            add_fault(self.facts, Fault(at, f"GUEST: {guest.pages} pages are over {MAX_PAGES}"))
            return
        whole = not guest.resume and guest.channels == 1
        self._batches = BatchSurvey(guest.pages, guest.page_size, guest.hash_seed, whole=whole)

    def _blocks(self, message: Blocks) -> None:
        size = self.facts.page_size
        self.facts.blocks = [
            BlockFact(name.decode("ascii", "backslashreplace"), pages * size, pages)
            for name, pages in message.blocks
        ]

    def finish(self) -> FrameFacts:
        """End the stream. Return all that is known."""
        facts = self.facts
        facts.deltas.finish(facts.page_size)
        facts.deltas.wire_bytes = facts.deltas.bytes
        if self._batches.whole:
            facts.received_pages = self._batches.received_pages
        elif facts.pages:
            facts.notes.append(
                "only a part of the guest's pages is in here: some are held from before, or go "
                "over other channels"
            )
        elif any(frame.type == "PAGES" for frame in facts.frames):
            facts.notes.append("there is no GUEST in here: raw pages cannot be checked")
        facts.whole = not facts.faults
        return facts


def header_fault(header: memoryview) -> str:
    """Return what is wrong with a whole header, "" if nothing is."""
    magic, number, flags, _, length, head, _ = HEADER.unpack_from(header)
    if magic != MAGIC:
        return "this is no frame"
    if number not in MessageType.__members__.values():
        return f"unknown frame type {number}"
    kind = MessageType(number)
    compressed = flags == COMPRESSED and kind is MessageType.PAGES
    if flags and not compressed:
        return f"{kind.name}: flags {flags:#x} are not in use"
    if length > BODY_LIMITS[kind]:
        return f"{kind.name}: {length} bytes are over {BODY_LIMITS[kind]}"
    if head > length or (head < length and (kind is not MessageType.PAGES or compressed)):
        return f"{kind.name}: a head of {head} bytes in a body of {length}"
    return ""


def _shown(value: object) -> object:
    """Return a value to be shown: of bytes the first ones, in hexadecimal."""
    if isinstance(value, bytes):
        dots = "..." if len(value) > SHOWN_BYTES else ""
        return value[:SHOWN_BYTES].hex() + dots
    if isinstance(value, list | tuple):
        return [_shown(one) for one in value]
    return value
