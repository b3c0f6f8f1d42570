"""A stream of QEMU's: any bytes, cut into parts; and the records of its pages, in and out.

`stream`: the pieces together are the stream, and each of them is what comes at a time. Control: the
page size. Their kinds mean nothing.

`records`: both kernels side by side, source and destinations. Control: page size, blocks, pages of
the cache, room of a batch. A piece is bytes of a RAM section, one record that is made right, a
batch of a hostile peer, or a change of the cache's size.
"""

from __future__ import annotations

from types import SimpleNamespace

from proto.codec._batch_twin import RAM_DELTA, RAM_RECORD
from proto.codec._hashes_twin import PageHashes
from proto.codec._xbzrle_twin import delta_runs
from proto.qemu._ram_reader_twin import RamReader
from proto.qemu._ram_writer_twin import RamWriter
from proto.qemu.parts import Body, Pages, Part, Text
from proto.qemu.stream_parser import StreamParser
from proto.wire.errors import DecodeError, StreamError
from tests.fuzz.guarded import Guarded, closed
from tests.fuzz.pages import SIZES, batch_of
from tests.fuzz.pieces import Piece, split
from tests.fuzz.sides import PATTERN, SIDES, outcome

SEED = bytes(range(16))
ROW = RAM_RECORD
LAYOUTS = (
    [(b"pc.ram", 20)],
    [(b"pc.ram", 9), (b"pc.rom", 1), (b"/rom@etc/acpi/tables", 14)],
    [(b"a", 1), (b"b" * 255, 1), (b"c", 22)],
    [(b"ram", 3), (b"ra", 3), (b"ramx", 18)],
)
MOST_PIECES = 40
FLAGS = (0x02, 0x08, 0x40)

# of a piece's kind, in `records`
BYTES, RECORD, BATCH, RESIZE = range(4)
KIND = 0x03


def stream(data: bytes) -> None:
    control, pieces = split(data)
    whole, ends = b"", []
    for piece in pieces:
        whole += piece.content
        ends.append(len(whole))
    page_size = SIZES[control[0] & 3]
    first, second = _parts(whole, page_size, ends[-1:]), _parts(whole, page_size, ends)
    assert first == second


def _parts(data: bytes, page_size: int, ends: list[int]) -> tuple[list[object], object]:
    """(the parts, those of one kind in a row put together; what was wrong, or how much is left)."""
    parser, at, found = StreamParser(page_size), 0, list[list[object]]()
    for end in ends:
        room = Guarded(data[:end])
        last = end == len(data)
        for _ in range(2 * len(data) + 9):
            with closed(room):
                try:
                    after, part = parser.step(room.view, at, end, last=last)
                except StreamError as error:
                    assert at <= error.at <= end
                    return [*found], (str(error), error.at)
            if part is None:
                assert after == at
                break
            assert at <= after <= end
            _add(found, *_told(parser, part), after - at)
            at = after
        else:
            raise AssertionError("it does not come to an end")
    return [*found], at


def _told(parser: StreamParser, part: Part) -> tuple[object, list[int]]:
    """What a part is, and the numbers of its pages."""
    if not isinstance(part, Pages):
        return part, []
    assert parser.reader is not None
    rows = parser.reader.records
    pages = sum(block.pages(parser.page_size) for block in parser.blocks)
    numbers = [ROW.unpack_from(rows, i * ROW.size)[0] for i in range(part.count)]
    assert all(number < pages for number in numbers)
    return Pages, numbers


def _add(found: list[list[object]], part: object, numbers: list[int], size: int) -> None:
    if found and found[-1][0] == part and (part is Pages or isinstance(part, Body | Text)):
        found[-1][1] += numbers  # type: ignore[operator]
        found[-1][2] += size  # type: ignore[operator]
    else:
        found.append([part, numbers, size])


class Carrier:
    """One implementation: a source's end, and what a destination writes for its QEMU."""

    def __init__(self, side: SimpleNamespace, ram: SimpleNamespace, control: bytes) -> None:
        self.page_size = SIZES[control[0] & 3]
        self.blocks = LAYOUTS[control[1] & 3]
        self.pages = sum(pages for _, pages in self.blocks)
        room = self.page_size + 96 if control[3] & 1 else 1 << 16
        cache = 1 << (control[2] & 3)
        self.cache = side.PageCache(cache * self.page_size, self.page_size)
        self.encoder = side.PageEncoder(self._hashes(side), self.cache, room=room)
        if control[2] & 4:
            self.encoder.active = False
        self.decoder = side.PageDecoder(self._hashes(side), self.pages * self.page_size)
        self.memory = Guarded(bytes(self.pages * self.page_size))
        self.reader = ram.RamReader(self.blocks, self.page_size)
        self.writer = ram.RamWriter(self._hashes(side), self.blocks)
        self.hostile = ram.RamWriter(self._hashes(side), self.blocks)
        self.round = 1
        self.encoder.begin_round(1)

    def _hashes(self, side: SimpleNamespace) -> PageHashes:
        hashes: PageHashes = side.PageHashes(self.pages, self.page_size, SEED)
        return hashes

    def scan(self, data: bytes) -> tuple[object, bytes]:
        """What is said, and the table."""
        room = Guarded(data)
        with closed(room):
            said = outcome(self.reader.scan, room.view, 0, len(data))
        count = said[1] if isinstance(said, tuple) else 0
        return said, bytes(self.reader.records[: ROW.size * count])

    def feed(self, data: bytes, rows: bytes, first: int) -> object:
        room, table = Guarded(data), Guarded(rows)
        with closed(room, table):
            return outcome(
                self.encoder.feed_records, room.view, table.view, first, len(rows) // ROW.size
            )

    def take(self) -> tuple[bytes, bytes] | None:
        if not self.encoder.pending:
            return None
        head, data = self.encoder.finish_batch()
        return bytes(head), bytes(data)

    def apply(self, head: bytes, data: bytes) -> None:
        records, raw = Guarded(head), Guarded(data)
        with closed(records, raw, self.memory):
            assert self.decoder.check(records.view, len(data))[0] == self.round
            self.decoder.apply(records.view, raw.view, self.memory.view)

    def write(self, writer: RamWriter, head: bytes, data: bytes) -> object:
        """The records of a batch, or why it is refused."""
        records, raw = Guarded(head), Guarded(data)
        with closed(records, raw):
            said = outcome(writer.begin, records.view, raw.view)
            if said is not None:
                return said
            out = b""
            while True:
                room = Guarded(bytes(16 + 255 + 2 * self.page_size))
                with closed(room):
                    count = writer.fill(room.view)
                if not count:
                    return out
                out += bytes(room)[:count]

    def next_round(self) -> None:
        self.round += 1
        self.encoder.begin_round(self.round)

    def state(self) -> tuple[object, ...]:
        e, r, w, h = self.encoder, self.reader, self.writer, self.hostile
        return (
            e.zero, e.unchanged, e.raw, e.delta, e.delta_bytes, e.hits, e.misses, e.overflows,
            e.spared, len(self.cache), self.cache.evictions, r.zero, r.raw, r.delta, r.delta_bytes,
            *((one.zero, one.raw, one.delta, one.received_pages) for one in (w, h)),
        )  # fmt: skip


def records(data: bytes) -> None:
    control, pieces = split(data)
    pair = _Pair([Carrier(*sides, control) for sides in zip(SIDES, SIDES, strict=True)])
    for piece in pieces[:MOST_PIECES]:
        if not pair.happens(piece):
            break
    assert pair.both[0].state() == pair.both[1].state()


class _Pair:
    def __init__(self, both: list[Carrier]) -> None:
        self.both = both
        self.one = both[1]
        self.model = bytearray(self.one.pages * self.one.page_size)
        self.there = RamReader(self.one.blocks, self.one.page_size)
        self.passed_on = bytearray(self.model)
        self.hashes = PageHashes(self.one.pages, self.one.page_size, SEED)

    def happens(self, piece: Piece) -> bool:
        """False where nothing more can follow."""
        what, content = piece.kind & KIND, piece.content
        if what == BYTES:
            return self._carry(content)
        if what == RECORD:
            return not content or self._carry(self._record(content))
        if what == BATCH:
            self._refuse_or_write(piece)
        elif content:
            for each in self.both:
                each.cache.resize((1 << (content[0] & 3)) * each.page_size)
        return True

    def _record(self, content: bytes) -> bytes:
        """A record of a page of this guest: page, kind, and what its body is made of."""
        size, page = self.one.page_size, content[0] % self.one.pages
        kind, rest = (content[1] if len(content) > 1 else 0) % 3, content[2:]
        name, first = self._block_of(page)
        word = ((page - first) * size | FLAGS[kind]).to_bytes(8, "big")
        word += bytes([len(name)]) + name
        if kind == 0:
            return word + b"\0"
        if kind == 2:
            rest = rest[:size]
            return word + b"\1" + len(rest).to_bytes(2, "big") + rest
        body = bytearray(self.model[page * size : (page + 1) * size])
        if rest and rest[0] & 1:
            body = bytearray(PATTERN[rest[0] : rest[0] + size])
        at = int.from_bytes(rest[1:3], "big") % size
        body[at : at + len(rest[3:])] = rest[3:]
        return word + body[:size].ljust(size, b"\0")

    def _block_of(self, page: int) -> tuple[bytes, int]:
        """The name of a block, and its first page."""
        first, found = 0, (b"", 0)
        for name, pages in self.one.blocks:
            if first <= page:
                found = name, first
            first += pages
        return found

    def _carry(self, data: bytes) -> bool:
        (said, rows), other = (each.scan(data) for each in self.both)
        assert (said, rows) == other
        if not isinstance(said, tuple):
            assert str(said).startswith(f"{StreamError.__name__}: "), said
            return False
        first, count = 0, len(rows) // ROW.size
        while first < count:
            went, other = (each.feed(data, rows, first) for each in self.both)
            assert went == other
            if not isinstance(went, tuple):
                assert str(went).startswith(f"{DecodeError.__name__}: "), went
                return False
            done, wrapped = went
            for i in range(first, done):
                self._load(self.model, data, rows, i)
            assert done > first or wrapped or self.one.encoder.full or self.one.encoder.pending
            first = done
            if first < count:
                self._flush()
                if wrapped:
                    for each in self.both:
                        each.next_round()
        self._flush()
        return True

    def _load(self, memory: bytearray, data: bytes, rows: bytes, i: int) -> None:
        """What QEMU's loader does with a record."""
        size = self.one.page_size
        page, at, length, kind = ROW.unpack_from(rows, i * ROW.size)
        base = page * size
        if kind == RAM_DELTA:
            for place, run in delta_runs(data[at : at + length], size):
                memory[base + place : base + place + len(run)] = run
        else:
            memory[base : base + size] = data[at : at + length] if kind else bytes(size)

    def _flush(self) -> None:
        batch, other = (each.take() for each in self.both)
        assert batch == other
        if batch is None:
            return
        for each in self.both:
            each.apply(*batch)
        written, other_written = (each.write(each.writer, *batch) for each in self.both)
        assert written == other_written
        assert isinstance(written, bytes)
        at = 0
        while at < len(written):
            at, count, _ = self.there.scan(written, at, len(written))
            assert count
            for i in range(count):
                self._load(self.passed_on, written, self.there.records, i)
        assert self.model == bytes(self.both[0].memory) == bytes(self.both[1].memory)
        assert self.model == self.passed_on

    def _refuse_or_write(self, piece: Piece) -> None:
        head, raw = batch_of(self.one.page_size, self.hashes, Piece(piece.kind >> 2, piece.content))
        said, other = (each.write(each.hostile, head, raw) for each in self.both)
        assert said == other
        assert isinstance(said, bytes) or str(said).startswith(f"{DecodeError.__name__}: "), said
