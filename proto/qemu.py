"""QEMU's migration stream, version 3, cut into its parts as it comes.

    "QEVM" 3  [configuration]  section*  EOF  [description]

    START 01, FULL 04   id  name  instance  version  body  FOOTER
    PART 02, END 03     id  body  FOOTER
    COMMAND 08          number  length  data
    FOOTER 7e           id

The body of the section "ram" is records (see proto/_ram.pyx), the first of them, at START, the
list of the blocks. Any other body can be read by QEMU alone, and says nowhere how long it is: it
ends before a footer with the section's own id behind which something stands that may follow on a
footer. Every part is a range of bytes, and all ranges together are the stream.

The parser knows nothing of where the bytes come from. Facts: QEMU's docs/devel/migration, and
streams of 7.2 and 10.0.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from proto.errors import StreamError
from proto.kernel import SCAN_END, SCAN_MORE, RamReader
from proto.messages import MAX_BLOCKS, MAX_PAGES, MIN_PAGE_SIZE

MAGIC = b"QEVM\x00\x00\x00\x03"
EOF, START, PART, FINISH, FULL, SUBSECTION, DESCRIPTION, CONFIGURATION, COMMAND = range(9)
FOOTER = 0x7E
RAM = b"ram"
RAM_VERSION = 4
MEM_SIZE = 0x04
EOS = struct.pack(">Q", 0x10)
MAX_SECTIONS = 1024
# JSON takes up to some ten times its bytes to be read.
MAX_DESCRIPTION = 8 << 20
MAX_MACHINE = 255
# Behind a footer so many bytes are enough to tell what follows, of a section's head the longest.
HEAD_BYTES = 5 + 1 + 255 + 8
# Outside of pages so much is looked at in one step, which may copy it.
WINDOW = 64 << 10
DEFAULT_PAGE = 4096


class Command(IntEnum):
    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11


def order(number: Command, data: bytes = b"") -> bytes:
    """A command, as it stands in the stream."""
    return struct.pack(">BHH", COMMAND, number, len(data)) + data


class Reply(IntEnum):
    """What the destination says on the return path."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7


@dataclass(frozen=True)
class Block:
    """A RAM block: `size` bytes of it are in use."""

    name: bytes
    size: int

    def pages(self, page_size: int) -> int:
        return -(-self.size // page_size)


@dataclass(frozen=True)
class Header:
    """The stream begins; machine: "" where it is not told."""

    machine: str = ""
    capabilities: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A section begins."""

    kind: int
    id: int
    name: str
    instance: int = 0
    version: int = 0


@dataclass(frozen=True)
class BlockList:
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Pages:
    """So many records are in `parser.reader.records`; more may follow at once."""

    count: int


@dataclass(frozen=True)
class Body:
    """Bytes of a section that only QEMU can read."""

    section: Section


@dataclass(frozen=True)
class SectionEnd:
    section: Section


@dataclass(frozen=True)
class Order:
    """A command."""

    number: int
    data: bytes


@dataclass(frozen=True)
class End:
    """No section follows; the description may."""


@dataclass(frozen=True)
class Description:
    """JSON on the devices begins, which those who load them do not need; `Text` follows."""

    length: int


@dataclass(frozen=True)
class Text:
    """A piece of the description."""


Part = Header | Section | BlockList | Pages | Body | SectionEnd | Order | End | Description | Text


class StreamParser:
    """Cuts a stream: `step` gives one part after the other.

    page_size -- of the guest, where the stream does not say it
    """

    def __init__(self, page_size: int = DEFAULT_PAGE) -> None:
        self.page_size = page_size
        self.blocks: tuple[Block, ...] = ()
        self.reader: RamReader | None = None
        self.section: Section | None = None
        """That is being read."""
        self.ended = False
        """No section follows."""
        self.complete = False
        """Nothing follows."""
        self.postcopy = False
        """It was announced that it may come."""
        self.switched = False
        """It has come: the guest is not to run where it was."""
        self._sections: dict[int, Section] = {}
        self._began = False
        self._configured = False
        self._listed = False  # the blocks, in this section
        self._closing = False  # the body of this section is over, its footer follows
        self._text_left = -1  # of the description; -1: it has not begun

    def step(
        self, data: memoryview, start: int, end: int, *, last: bool = False
    ) -> tuple[int, Part | None]:
        """The part that begins at `start` of data[:end]: (where it ends, what it is).

        None: more bytes are needed to tell. last: none will come.

        Raises StreamError, whose `at` is an index of `data`.
        """
        cut = _Cut(data, start, end)
        try:
            part = self._step(cut, last)
        except _ShortError:
            if last and start < end:
                raise StreamError("the stream ends inside a part", start) from None
            return start, None
        return cut.at, part

    def _step(self, cut: _Cut, last: bool) -> Part | None:
        if not self._began:
            return self._header(cut)
        if self.section is not None:
            return self._in_section(cut, self.section, last)
        if self.ended:
            return self._text(cut) if self._text_left >= 0 else self._description(cut)
        return self._between(cut)

    def _between(self, cut: _Cut) -> Part:
        """Between two sections."""
        at = cut.at
        kind = cut.u8()
        if kind == EOF:
            self.ended = True
            return End()
        if kind in (START, FULL):
            section = _section_head(cut, kind)
            if kind == START and len(self._sections) == MAX_SECTIONS:
                raise StreamError(f"more than {MAX_SECTIONS} sections of several parts", at)
            return self._open(section)
        if kind in (PART, FINISH):
            number = cut.u32()
            known = self._sections.get(number)
            if known is None:
                raise StreamError(f"a part of section {number}, which was never begun", at)
            return self._open(Section(kind, number, known.name, known.instance, known.version))
        if kind == COMMAND:
            return self._command(cut)
        raise StreamError(f"a section of type {kind:#04x}, which there is not", at)

    # -- the beginning

    def _header(self, cut: _Cut) -> Header:
        magic = cut.peek(min(len(MAGIC), cut.left))
        if magic != MAGIC[: len(magic)]:
            if magic[:4] == MAGIC[:4]:
                raise StreamError("a migration stream of another version than 3", cut.at)
            raise StreamError("this is no migration stream of QEMU", cut.at)
        cut.take(len(MAGIC))
        machine = ""
        capabilities: tuple[str, ...] = ()
        if cut.peek(1)[0] == CONFIGURATION:
            cut.take(1)
            at, length = cut.at, cut.u32()
            if length > MAX_MACHINE:
                raise StreamError(f"a machine type of {length} bytes", at)
            machine = _text(cut.take(length))
            names = set[bytes]()
            while cut.peek(1)[0] == SUBSECTION:
                capabilities += self._subsection(cut, names)
        self._began = True
        return Header(machine, capabilities)

    def _subsection(self, cut: _Cut, names: set[bytes]) -> tuple[str, ...]:
        """Of the configuration, beside those of these names; the capabilities that it lists."""
        at = cut.at
        cut.take(1)
        name = cut.name()
        cut.u32()
        if name in names:
            raise StreamError(f"a second {_text(name)}", at)
        names.add(name)
        if name == b"configuration/target-page-bits":
            bits = cut.u32()
            if not 10 <= bits <= 14:
                raise StreamError(f"pages of 2^{bits} bytes: 1k to 16k can be carried", at)
            self.page_size = 1 << bits
        elif name == b"configuration/capabilities":
            count = cut.u32()
            if count > 255:
                raise StreamError(f"{count} capabilities in the configuration", at)
            listed = tuple(_text(cut.name()) for _ in range(count))
            for unfit in ("mapped-ram", "x-ignore-shared"):
                if unfit in listed:
                    raise StreamError(f"switch the capability {unfit} off", at)
            return listed
        elif name == b"configuration/uuid":
            cut.take(16)
        else:
            raise StreamError(f"an unknown part of the configuration, {_text(name)}", at)
        return ()

    # -- sections

    def _open(self, section: Section) -> Section:
        self.section = section
        if section.kind == START:
            self._sections[section.id] = section
        self._closing = False
        return section

    def _in_section(self, cut: _Cut, section: Section, last: bool) -> Part | None:
        if self._closing:
            return self._footer(cut, section)
        if section.name.encode() == RAM:
            return self._ram(cut, section)
        return self._body(cut, section, last)

    def _footer(self, cut: _Cut, section: Section) -> SectionEnd:
        at = cut.at
        if cut.u8() != FOOTER:
            raise StreamError(
                "a section without a footer: the option send-section-footer must be on", at
            )
        if (number := cut.u32()) != section.id:
            raise StreamError(f"the footer of section {number} behind section {section.id}", at)
        self.section = None
        return SectionEnd(section)

    def _ram(self, cut: _Cut, section: Section) -> Part | None:
        if section.version != RAM_VERSION:
            raise StreamError(f"the section ram has version {section.version}, not 4", cut.at)
        if section.kind == START and not self._listed:
            return self._block_list(cut)
        if self.reader is None:
            raise StreamError("pages, but there was no list of blocks", cut.at)
        at, count, why = self.reader.scan(cut.data, cut.at, cut.end)
        if count:
            # The end of the section is found once more, as a part of its own.
            cut.at = at - len(EOS) if why == SCAN_END else at
            return Pages(count)
        if why == SCAN_MORE:
            raise _ShortError
        cut.at = at
        self._closing = True
        return Body(section)

    def _block_list(self, cut: _Cut) -> BlockList:
        at = cut.at
        word = cut.u64()
        if word % self.page_size != MEM_SIZE:
            raise StreamError("the section ram does not begin with the list of blocks", at)
        left, blocks = word - MEM_SIZE, dict[bytes, Block]()
        while left > 0:
            if len(blocks) == MAX_BLOCKS:
                raise StreamError(f"more than {MAX_BLOCKS} blocks", at)
            name = cut.name()
            if not name and blocks:
                # an address, or how a file is laid out: numbers that begin with zeros
                raise StreamError(
                    "a list of blocks with more than their sizes: switch the capabilities "
                    "x-ignore-shared and mapped-ram off",
                    at,
                )
            size = cut.u64()
            if size > left or not name:
                raise StreamError("a list of blocks that does not come to its sum", at)
            if name in blocks:
                raise StreamError(f"two blocks {name!r}", at)
            left -= size
            blocks[name] = Block(name, size)
            _skip_huge_page(cut)
        self.blocks = tuple(block for block in blocks.values() if block.size)
        pages = sum(block.pages(self.page_size) for block in self.blocks)
        if not 0 < pages <= MAX_PAGES:
            raise StreamError(f"a guest of {pages} pages: 1 to {MAX_PAGES} can be carried", at)
        self.reader = RamReader(
            [(block.name, block.pages(self.page_size)) for block in self.blocks], self.page_size
        )
        self._listed = True
        return BlockList(self.blocks)

    def _body(self, cut: _Cut, section: Section, last: bool) -> Body:
        """As far as it surely goes: to its footer, or to where that might begin."""
        mark = bytes([FOOTER]) + struct.pack(">I", section.id)
        end = min(cut.end, cut.at + WINDOW)
        last = last and end == cut.end
        rest = bytes(cut.data[cut.at : end])
        at = rest.find(mark)
        while at >= 0:
            follows = self._may_follow(rest[at + len(mark) : at + len(mark) + HEAD_BYTES])
            if follows or (follows is None and last):
                break
            if follows is None:
                if at == 0:
                    raise _ShortError
                cut.at += at
                return Body(section)
            at = rest.find(mark, at + 1)
        if at >= 0:
            cut.at += at
            self._closing = True
            return Body(section)
        keep = next((n for n in range(len(mark) - 1, 0, -1) if rest.endswith(mark[:n])), 0)
        if len(rest) == keep:
            raise _ShortError
        cut.at += len(rest) - keep
        return Body(section)

    def _may_follow(self, rest: bytes) -> bool | None:
        """Whether this may stand behind a footer; None: more bytes would tell."""
        if not rest:
            return None
        may, kind = False, rest[0]
        try:
            cut = _Cut(memoryview(rest), 1, len(rest))
            if kind == EOF:
                may = cut.u8() == DESCRIPTION and cut.u32() > 0 and cut.u8() == ord("{")
            elif kind in (PART, FINISH):
                may = cut.u32() in self._sections
            elif kind in (START, FULL):
                name = _section_head(cut, kind).name
                may = bool(name) and name.isprintable()
            elif kind == COMMAND:
                may = cut.u16() in Command.__members__.values()
        except _ShortError:
            return None
        return may

    def _command(self, cut: _Cut) -> Order:
        at = cut.at - 1
        number, length = cut.u16(), cut.u16()
        data = cut.take(length)
        if number in (Command.POSTCOPY_LISTEN, Command.POSTCOPY_RUN, Command.PACKAGED):
            self.switched = True
            raise StreamError("the guest was switched to postcopy, which cannot be carried", at)
        if number == Command.ENABLE_COLO:
            raise StreamError("COLO cannot be carried: switch the capability x-colo off", at)
        self.postcopy |= number == Command.POSTCOPY_ADVISE
        return Order(number, data)

    def _description(self, cut: _Cut) -> Description:
        at = cut.at
        if cut.u8() != DESCRIPTION:
            raise StreamError("something else than the description behind the end", at)
        length = cut.u32()
        if length > MAX_DESCRIPTION:
            raise StreamError(f"a description of {length} bytes", at)
        self._text_left = length
        self.complete = length == 0
        return Description(length)

    def _text(self, cut: _Cut) -> Text:
        count = min(self._text_left, cut.left)
        if not count:
            raise _ShortError
        cut.at += count
        self._text_left -= count
        self.complete = not self._text_left
        return Text()


def _section_head(cut: _Cut, kind: int) -> Section:
    number = cut.u32()
    name = cut.name()
    return Section(kind, number, _text(name), cut.u32(), cut.u32())


def _skip_huge_page(cut: _Cut) -> None:
    """The size of a block's pages on the host, which may stand behind it: neither a name nor what
    ends the list looks like that."""
    if cut.peek(1)[0] == 0:
        size = int.from_bytes(cut.peek(8), "big")
        if size >= MIN_PAGE_SIZE and size & (size - 1) == 0:
            cut.take(8)


def _text(name: bytes) -> str:
    return name.decode("ascii", "backslashreplace")


class _ShortError(Exception):
    """More bytes are needed."""


class _Cut:
    """Reads data[at:end] from its beginning."""

    def __init__(self, data: memoryview, at: int, end: int) -> None:
        self.data = data
        self.at = at
        self.end = end

    @property
    def left(self) -> int:
        return self.end - self.at

    def peek(self, count: int) -> bytes:
        if count > self.left or self.left == 0:
            raise _ShortError
        return bytes(self.data[self.at : self.at + count])

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise _ShortError
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "big")

    def name(self) -> bytes:
        return self.take(self.u8())
