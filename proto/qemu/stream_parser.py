"""QEMU's migration stream, version 3, cut into its parts as it arrives.

    "QEVM" 3  [configuration]  section*  EOF  [description]

    START 01, FULL 04   id  name  instance  version  body  FOOTER
    PART 02, END 03     id  body  FOOTER
    COMMAND 08          number  length  data
    FOOTER 7e           id

The body of the section "ram" is records of pages (proto/qemu/_ram.pxd); at START, the list of the
blocks comes first. Only QEMU can read any other body, and nothing says how long such a body is. It
ends before a footer that has the section's own id, and behind which there is something that may
follow a footer: a device's state can contain five bytes that look like its footer. Every part is a
range of bytes, and all ranges together are the stream.

Nothing is kept but the sections that have begun: a stream of any length takes the memory of one
part. A part is bounded by what QEMU writes: names by a byte of length, the machine type by
MAX_MACHINE, the description by MAX_DESCRIPTION, the body of a device by WINDOW at a time.

Some capabilities make a stream that cannot be carried: it would need more connections, files that
both ends share, or a guest that runs before its memory is there. Each is refused where it first
shows, by a sentence that names the capability to switch off.

The parser does not know where the bytes come from. The facts are from QEMU's docs/devel/migration,
and from streams of QEMU 7.2 and 10.0.
"""

from __future__ import annotations

import struct

from proto.qemu.cursor import Cursor, ShortError
from proto.qemu.kernel import SCAN_END, SCAN_MORE, RamReader
from proto.qemu.parts import (
    COMMAND,
    CONFIGURATION,
    DESCRIPTION,
    EOF,
    EOS,
    FINISH,
    FOOTER,
    FULL,
    MAGIC,
    MEM_SIZE,
    PART,
    RAM,
    RAM_VERSION,
    START,
    SUBSECTION,
    Block,
    BlockList,
    Body,
    Command,
    CommandCode,
    Description,
    End,
    Header,
    Pages,
    Part,
    Section,
    SectionEnd,
    Text,
)
from proto.wire.errors import StreamError
from proto.wire.messages import MAX_BLOCKS, MAX_PAGES, MIN_PAGE_SIZE

# Sections of several parts: "ram", and a few others, like "dirty-bitmap".
MAX_SECTIONS = 1024
# Parsing JSON takes up to about ten times its bytes of memory.
MAX_DESCRIPTION = 8 << 20
MAX_MACHINE = 255
# Bytes behind a footer that are enough to tell what follows: the longest head of a section.
HEAD_BYTES = 5 + 1 + 255 + 8
# Outside of pages, one step looks at this many bytes at most, since it may copy them.
WINDOW = 64 << 10
DEFAULT_PAGE = 4096


class StreamParser:
    """Cuts a stream: `step` gives one part after the other.

    page_size -- bytes of a page, if the stream does not say it
    """

    def __init__(self, page_size: int = DEFAULT_PAGE) -> None:
        self.page_size = page_size
        self.blocks: tuple[Block, ...] = ()
        self.reader: RamReader | None = None
        """Finds the pages, once the list of blocks has come."""
        self.records = memoryview(b"")
        """The table of the last `Pages`: see _ram_reader.pyx."""
        self.section: Section | None = None
        """The section that is being read."""
        self.ended = False
        """The end mark was read."""
        self.complete = False
        """Nothing follows."""
        self.postcopy = False
        """The stream says that postcopy may follow."""
        self.switched = False
        """Postcopy has begun: the guest must not run at the source any more."""
        self._sections: dict[int, Section] = {}
        self._began = False
        self._listed = False  # the blocks, in this section
        self._closing = False  # the body of this section is over; its footer follows
        self._text_left = -1  # bytes of the description; -1 before it begins

    def step(
        self, data: memoryview, start: int, end: int, *, last: bool = False
    ) -> tuple[int, Part | None]:
        """Read the part that begins at `start` of data[:end]. Return (where it ends, the part).

        last -- no bytes will follow `end`

        The part is None if more bytes are needed. Raises StreamError, whose `at` is an index of
        `data`.
        """
        # A part that is not whole yet raises ShortError, and is read again from `start` when more
        # has come: what it has set by then it sets again.
        cursor = Cursor(data, start, end)
        try:
            part = self._step(cursor, last)
        except ShortError:
            if last and start < end:
                raise StreamError("the stream ends inside a part", start) from None
            return start, None
        return cursor.at, part

    def _step(self, cursor: Cursor, last: bool) -> Part | None:
        if not self._began:
            return self._header(cursor)
        if self.section is not None:
            return self._in_section(cursor, self.section, last)
        if self.ended:
            return self._text(cursor) if self._text_left >= 0 else self._description(cursor)
        return self._between(cursor)

    def _between(self, cursor: Cursor) -> Part:
        """Read what may stand between two sections."""
        at = cursor.at
        kind = cursor.u8()
        if kind == EOF:
            self.ended = True
            return End()
        if kind in (START, FULL):
            section = _section_head(cursor, kind)
            if kind == START and len(self._sections) == MAX_SECTIONS:
                raise StreamError(f"more than {MAX_SECTIONS} sections of several parts", at)
            return self._open(section)
        if kind in (PART, FINISH):
            number = cursor.u32()
            known = self._sections.get(number)
            if known is None:
                raise StreamError(f"a part of section {number}, which was never begun", at)
            return self._open(Section(kind, number, known.name, known.instance, known.version))
        if kind == COMMAND:
            return self._command(cursor)
        raise StreamError(f"a section of type {kind:#04x}, which there is not", at)

    # -- the beginning

    def _header(self, cursor: Cursor) -> Header:
        magic = cursor.peek(min(len(MAGIC), cursor.left))
        if magic != MAGIC[: len(magic)]:
            if magic[:4] == MAGIC[:4]:
                raise StreamError("a migration stream of another version than 3", cursor.at)
            raise StreamError("this is no migration stream of QEMU", cursor.at)
        cursor.take(len(MAGIC))
        machine = ""
        capabilities: tuple[str, ...] = ()
        if cursor.peek(1)[0] == CONFIGURATION:
            cursor.take(1)
            at, length = cursor.at, cursor.u32()
            if length > MAX_MACHINE:
                raise StreamError(f"a machine type of {length} bytes", at)
            machine = _text(cursor.take(length))
            names = set[bytes]()
            while cursor.peek(1)[0] == SUBSECTION:
                capabilities += self._subsection(cursor, names)
        self._began = True
        return Header(machine, capabilities)

    def _subsection(self, cursor: Cursor, names: set[bytes]) -> tuple[str, ...]:
        """Read a subsection of the configuration. Return the capabilities that it lists.

        names -- of the subsections before; this one's is added
        """
        at = cursor.at
        cursor.take(1)
        name = cursor.name()
        cursor.u32()
        if name in names:
            raise StreamError(f"a second {_text(name)}", at)
        names.add(name)
        if name == b"configuration/target-page-bits":
            bits = cursor.u32()
            if not 10 <= bits <= 14:
                raise StreamError(f"pages of 2^{bits} bytes: 1k to 16k can be carried", at)
            self.page_size = 1 << bits
        elif name == b"configuration/capabilities":
            count = cursor.u32()
            if count > 255:
                raise StreamError(f"{count} capabilities in the configuration", at)
            listed = tuple(_text(cursor.name()) for _ in range(count))
            for unfit in ("mapped-ram", "x-ignore-shared"):
                if unfit in listed:
                    raise StreamError(f"switch the capability {unfit} off", at)
            return listed
        elif name == b"configuration/uuid":
            cursor.take(16)
        else:
            raise StreamError(f"an unknown part of the configuration, {_text(name)}", at)
        return ()

    # -- sections

    def _open(self, section: Section) -> Section:
        """Enter a section."""
        self.section = section
        if section.kind == START:
            self._sections[section.id] = section
        self._closing = False
        return section

    def _in_section(self, cursor: Cursor, section: Section, last: bool) -> Part | None:
        """Read a part of the section that is open."""
        if self._closing:
            return self._footer(cursor, section)
        if section.name.encode() == RAM:
            return self._ram(cursor, section)
        return self._body(cursor, section, last)

    def _footer(self, cursor: Cursor, section: Section) -> SectionEnd:
        at = cursor.at
        if cursor.u8() != FOOTER:
            raise StreamError(
                "a section without a footer: the option send-section-footer must be on", at
            )
        if (number := cursor.u32()) != section.id:
            raise StreamError(f"the footer of section {number} behind section {section.id}", at)
        self.section = None
        return SectionEnd(section)

    def _ram(self, cursor: Cursor, section: Section) -> Part | None:
        if section.version != RAM_VERSION:
            raise StreamError(f"the section ram has version {section.version}, not 4", cursor.at)
        if section.kind == START and not self._listed:
            return self._block_list(cursor)
        if self.reader is None:
            raise StreamError("pages, but there was no list of blocks", cursor.at)
        at, count, why = self.reader.scan(cursor.data, cursor.at, cursor.end)
        if count:
            # The end of the section is left for the next step, as a part of its own.
            cursor.at = at - len(EOS) if why == SCAN_END else at
            return Pages(count)
        if why == SCAN_MORE:
            raise ShortError
        cursor.at = at
        self._closing = True
        return Body(section)

    def _block_list(self, cursor: Cursor) -> BlockList:
        at = cursor.at
        word = cursor.u64()
        if word % self.page_size != MEM_SIZE:
            raise StreamError("the section ram does not begin with the list of blocks", at)
        left, blocks = word - MEM_SIZE, dict[bytes, Block]()
        while left > 0:
            if len(blocks) == MAX_BLOCKS:
                raise StreamError(f"more than {MAX_BLOCKS} blocks", at)
            name = cursor.name()
            if not name and blocks:
                # A block's address, or the layout of a file, follows the size with these
                # capabilities: a number that begins with a zero, where a name's length would be.
                raise StreamError(
                    "a list of blocks with more than their sizes: switch the capabilities "
                    "x-ignore-shared and mapped-ram off",
                    at,
                )
            size = cursor.u64()
            if size > left or not name:
                raise StreamError("a list of blocks that does not come to its sum", at)
            if name in blocks:
                raise StreamError(f"two blocks {name!r}", at)
            left -= size
            blocks[name] = Block(name, size)
            _skip_huge_page(cursor)
        self.blocks = tuple(block for block in blocks.values() if block.size)
        pages = sum(block.pages(self.page_size) for block in self.blocks)
        if not 0 < pages <= MAX_PAGES:
            raise StreamError(f"a guest of {pages} pages: 1 to {MAX_PAGES} can be carried", at)
        self.reader = RamReader(
            [(block.name, block.pages(self.page_size)) for block in self.blocks], self.page_size
        )
        self.records = self.reader.records
        self._listed = True
        return BlockList(self.blocks)

    def _body(self, cursor: Cursor, section: Section, last: bool) -> Body:
        """Read a body as far as it certainly goes: to its footer, or to where that might begin."""
        # Device state is opaque, so a footer is known by its mark and by what follows it. A state
        # that contains both is possible in principle: five right bytes, and a legal head behind.
        mark = bytes([FOOTER]) + struct.pack(">I", section.id)
        end = min(cursor.end, cursor.at + WINDOW)
        last = last and end == cursor.end
        rest = bytes(cursor.data[cursor.at : end])
        at = rest.find(mark)
        while at >= 0:
            follows = self._may_follow(rest[at + len(mark) : at + len(mark) + HEAD_BYTES])
            if follows or (follows is None and last):
                break
            if follows is None:
                if at == 0:
                    raise ShortError
                cursor.at += at
                return Body(section)
            at = rest.find(mark, at + 1)
        if at >= 0:
            cursor.at += at
            self._closing = True
            return Body(section)
        keep = next((n for n in range(len(mark) - 1, 0, -1) if rest.endswith(mark[:n])), 0)
        if len(rest) == keep:
            raise ShortError
        cursor.at += len(rest) - keep
        return Body(section)

    def _may_follow(self, rest: bytes) -> bool | None:
        """Return whether these bytes may follow a footer, or None if more are needed to tell."""
        if not rest:
            return None
        may, kind = False, rest[0]
        try:
            cursor = Cursor(memoryview(rest), 1, len(rest))
            if kind == EOF:
                may = cursor.u8() == DESCRIPTION and cursor.u32() > 0 and cursor.u8() == ord("{")
            elif kind in (PART, FINISH):
                may = cursor.u32() in self._sections
            elif kind in (START, FULL):
                name = _section_head(cursor, kind).name
                may = bool(name) and name.isprintable()
            elif kind == COMMAND:
                may = cursor.u16() in CommandCode.__members__.values()
        except ShortError:
            return None
        return may

    def _command(self, cursor: Cursor) -> Command:
        at = cursor.at - 1
        number, length = cursor.u16(), cursor.u16()
        data = cursor.take(length)
        if number in (CommandCode.POSTCOPY_LISTEN, CommandCode.POSTCOPY_RUN, CommandCode.PACKAGED):
            self.switched = True
            raise StreamError("the guest was switched to postcopy, which cannot be carried", at)
        if number == CommandCode.ENABLE_COLO:
            raise StreamError("COLO cannot be carried: switch the capability x-colo off", at)
        self.postcopy |= number == CommandCode.POSTCOPY_ADVISE
        return Command(number, data)

    def _description(self, cursor: Cursor) -> Description:
        at = cursor.at
        if cursor.u8() != DESCRIPTION:
            raise StreamError("something else than the description behind the end", at)
        length = cursor.u32()
        if length > MAX_DESCRIPTION:
            raise StreamError(f"a description of {length} bytes", at)
        self._text_left = length
        self.complete = length == 0
        return Description(length)

    def _text(self, cursor: Cursor) -> Text:
        count = min(self._text_left, cursor.left)
        if not count:
            raise ShortError
        cursor.at += count
        self._text_left -= count
        self.complete = not self._text_left
        return Text()


def _section_head(cursor: Cursor, kind: int) -> Section:
    number = cursor.u32()
    name = cursor.name()
    return Section(kind, number, _text(name), cursor.u32(), cursor.u32())


def _skip_huge_page(cursor: Cursor) -> None:
    """Skip the size of a block's pages on the host, which may follow the block.

    It is a power of two from 1024 on in eight bytes, so it begins with a zero byte. Neither a name,
    whose length is not 0, nor the word that follows the list looks like that.
    """
    if cursor.peek(1)[0] == 0:
        size = int.from_bytes(cursor.peek(8), "big")
        if size >= MIN_PAGE_SIZE and size & (size - 1) == 0:
            cursor.take(8)


def _text(name: bytes) -> str:
    return name.decode("ascii", "backslashreplace")
