"""What is in a stream of QEMU's, also in one that is damaged.

    feed(data, ...)    parts of the stream, as far as they are whole --> facts
         |
      StreamError      the place is noted, and reading goes on behind the next footer, or at the
                       next head, that can be one: between them the bytes are skipped

The records of pages go to those who want them too (`observers`), where they come by. It does no
I/O: `migrate.stream` reads files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from proto.errors import StreamError
from proto.kernel import RamSurvey
from proto.messages import MAX_PAGES
from proto.qemu import (
    EOF,
    FINISH,
    FULL,
    HEAD_BYTES,
    PART,
    RAM,
    START,
    WINDOW,
    BlockList,
    Body,
    Command,
    Description,
    Header,
    Order,
    Pages,
    Section,
    SectionEnd,
    StreamParser,
    Text,
    _Cut,
)
from proto.qemu import Part as AnyPart
from proto.qemu_devices import DescriptionError, Devices
from proto.stream_facts import (
    MAX_LISTED,
    BlockFact,
    BrokenDelta,
    CommandFact,
    Fault,
    QemuFacts,
    RoundFact,
    SectionFact,
    add_fault,
)

# Bodies of devices that are kept until the description comes.
MAX_KEPT = 64 << 20
# No part that must be whole is longer.
LONGEST_PART = 512 << 10
FOOTER_BYTES = 5
# Where the bytes of a part are counted; all others are framing.
SHARES: dict[type, str] = {
    Header: "header", BlockList: "blocks", Order: "commands", Description: "description",
    Text: "description",
}  # fmt: skip
KINDS = {START: "start", PART: "part", FINISH: "end", FULL: "full"}
# A footer and what may follow on it, or the head of the section of the pages.
MARK = re.compile(
    rb"\x7e(?=.{4}(?:[\x00-\x04\x08]|\Z))|\x01(?=.{4}\x03ram\0\0\0\0\0\0\0\x04)", re.DOTALL
)
# In the body of a device: a footer and something behind it, or the end and a description.
BODY_MARK = re.compile(rb"\x7e\0\0..(?=[\0\x04])|\0(?=\x06.{4}\{\")", re.DOTALL)
MARK_BYTES = FOOTER_BYTES + HEAD_BYTES

# (parser, data, where its first record begins, how many records, where data[0] is)
Observer = Callable[[StreamParser, memoryview, int, int, int], object]


class SalvageParser(StreamParser):
    """Reads what cannot be carried too, and goes on behind damage."""

    def _command(self, cut: _Cut) -> Order:
        number, length = cut.u16(), cut.u16()
        data = cut.take(length)
        self.postcopy |= number == Command.POSTCOPY_ADVISE
        return Order(number, data)  # what PACKAGED packs is sections as any others

    def _open(self, section: Section) -> Section:
        self._listed &= section.kind != START
        return super()._open(section)

    def _body(self, cut: _Cut, section: Section, last: bool) -> Body:
        """As far as there is no end of another section in it: then its own footer is broken."""
        at = cut.at
        part = super()._body(cut, section, last)
        for mark in BODY_MARK.finditer(cut.data, at, cut.at):
            if cut.data[mark.start()] == EOF:
                head = mark.start()
            else:
                rest = bytes(cut.data[mark.end() : min(mark.end() + HEAD_BYTES, cut.end)])
                number = mark[0][1:]
                if rest[:1] not in (b"\4", b"\0") or not self._may_follow(rest):
                    continue
                head = bytes(cut.data[at : mark.start()]).find(bytes([FULL]) + number) + at
            if head - FOOTER_BYTES < at:
                continue
            cut.at = head - FOOTER_BYTES
            self._closing = True
            break
        return part

    def mend(self, data: memoryview, at: int, end: int) -> int | None:
        """Behind a wrong head or footer where what follows is as it must be: reads on there."""
        rest = bytes(data[at : min(at + MARK_BYTES, end)])
        if self.section is not None:
            if self._closing and self._may_follow(rest[FOOTER_BYTES:]):
                self.section = None
                return at + FOOTER_BYTES
            return None
        if not self._began or self.ended or len(rest) < FOOTER_BYTES:
            return None
        return self._mend_head(rest, at)

    def _mend_head(self, rest: bytes, at: int) -> int | None:
        """A head, of which its type or its number is wrong."""
        number = int.from_bytes(rest[1:FOOTER_BYTES], "big")
        if number not in self._sections and rest[0] in (PART, FINISH) and len(self._sections) == 1:
            (number,) = self._sections
        if known := self._sections.get(number):
            self._open(Section(PART, number, known.name, known.instance, known.version))
            return at + FOOTER_BYTES
        if rest[0] in KINDS or not self._may_follow(bytes([FULL]) + rest[1:]):
            return None
        cut = _Cut(memoryview(rest), 1, len(rest))
        section = Section(FULL, cut.u32(), cut.name().decode(), cut.u32(), cut.u32())
        if max(section.id, section.instance, section.version) >= 1 << 16:
            return None
        self._open(replace(section, kind=START) if section.name.encode() == RAM else section)
        return at + cut.at

    @property
    def read(self) -> int:
        """Records, so far."""
        reader = self.reader
        return reader.zero + reader.raw + reader.delta if reader is not None else 0

    def find(self, data: memoryview, start: int, end: int, last: bool) -> tuple[int, bool]:
        """Where reading can go on: (place, whether that is one). Else, up to where there is none.

        A footer closes whatever is open; it must be of a section that is known, or something must
        follow on it that is hardly found by chance.
        """
        for mark in MARK.finditer(data, start, end):
            at = mark.start()
            if data[at] == START:
                self._go_on(None)
                return at, True
            number = int.from_bytes(data[at + 1 : at + FOOTER_BYTES], "big")
            rest = bytes(data[at + FOOTER_BYTES : min(at + MARK_BYTES, end)])
            follows = self._may_follow(rest)
            current = self.section is not None and number == self.section.id
            if follows is None and not last:
                return at, False
            if follows is None:
                follows = current and not rest
            known = current or number in self._sections
            if follows and (known or (rest[0] in (START, FULL, EOF) and number < 1 << 16)):
                self._go_on(number)
                return at, True
        return (end if last else max(start, end - MARK_BYTES)), False

    def _go_on(self, footer: int | None) -> None:
        """Reads on at the footer of this section, or at the head of one."""
        self._began = True
        self.ended = False
        self._text_left = -1
        self._listed = False
        if footer is None:
            self.section = None
            return
        if self.section is None or self.section.id != footer:
            known = self._sections.get(footer)
            self.section = Section(PART, footer, known.name if known else "")
        self._closing = True

    @property
    def expected(self) -> str:
        """What should come now."""
        if not self._began:
            return "the header of the stream"
        if self.section is not None:
            return self._expected_in(self.section)
        if self._text_left > 0:
            return f"{self._text_left} more bytes of the description"
        if self.ended:
            return "the description of the devices: 06"
        return "a section: 01 to 04, a command: 08, or the end: 00"

    def _expected_in(self, section: Section) -> str:
        name = f"section {section.name!r}"
        if self._closing:
            return f"the footer of {name}: 7e {section.id:08x}"
        if section.name.encode() != RAM:
            return f"the body of {name} and its footer: 7e {section.id:08x}"
        if section.kind == START and not self._listed:
            return "the list of the blocks"
        return "a record of a page, or the end of the section: 0000000000000010"

    @property
    def text_left(self) -> int:
        """Of the description; -1: it has not begun."""
        return self._text_left


class QemuSurvey:
    """Takes a stream in order and tells what is in it.

    observers -- see each record of a page
    page_size -- of the guest, where the stream does not say it
    """

    def __init__(self, observers: Iterable[Observer] = (), page_size: int = 4096) -> None:
        self.parser = SalvageParser(page_size)
        self.facts = QemuFacts()
        self._observers = tuple(observers)
        self._survey: RamSurvey | None = None
        self._fault: Fault | None = None  # behind it, where to go on is looked for
        self._trailing: Fault | None = None
        self._section: SectionFact | None = None
        self._hurt = False  # that section is
        self._kept: list[tuple[SectionFact, bytearray]] = []
        self._kept_bytes = 0
        self._body: bytearray | None = None
        self._text = bytearray()
        self._firsts = [0]
        self._counting = False
        self._lost_pages = False
        self._before = (0, 0, 0, 0)

    def feed(self, data: memoryview, start: int, end: int, base: int, *, last: bool = False) -> int:
        """Takes in data[start:end], as far as it goes: where the rest begins.

        base -- where the stream's data[0] is;  last: nothing follows, all is taken
        """
        self.facts.size = max(self.facts.size, base + end)
        while start < end:
            if self._fault is not None:
                at, found = self.parser.find(data, start, end, last)
                self._skip(self._fault, at - start)
                start = at
                if not found:
                    return start
                self._fault = None
                self._open(base + start)
                continue
            if self.parser.complete:
                self._behind(base + start, data, start, end)
                return end
            before = self.parser.read
            try:
                at, part = self._step(data, start, end, last)
            except StreamError as error:
                if count := self.parser.read - before:
                    self._pages(data, start, error.at, count, base)
                    start = error.at
                at = max(start, error.at)
                what = str(error)
                if last and what == "the stream ends inside a part":
                    what = f"the stream ends inside a part, of which {end - at} bytes are there"
                self._skip(None, at - start)
                self._lose(base + at, what, data, at, end)
                start = self._mended(data, at, end, base)
                continue
            if part is None:
                if not last and end - start >= LONGEST_PART:
                    self._lose(base + start, "a part that is too long", data, start, end)
                    continue
                return start
            self._note(part, data, start, at, base)
            start = at
        return start

    def _step(
        self, data: memoryview, start: int, end: int, last: bool
    ) -> tuple[int, AnyPart | None]:
        parser = self.parser
        in_pages = parser.section is not None and parser.section.name.encode() == RAM
        if not in_pages and end - start > WINDOW:
            at, part = parser.step(data, start, start + WINDOW)
            if part is not None:
                return at, part
        return parser.step(data, start, end, last=last)

    # -- damage

    def _lose(self, at: int, what: str, data: memoryview, start: int, end: int) -> None:
        found = bytes(data[start : min(start + 8, end)]).hex(" ")
        fault = Fault(at, what, self.parser.expected, found)
        self._fault = add_fault(self.facts, fault)
        self._hurt = True
        self._lost_pages |= self._section is not None and self._section.name.encode() == RAM

    def _mended(self, data: memoryview, at: int, end: int, base: int) -> int:
        """Where reading goes on, if only a head or a footer is broken; else `at`."""
        assert self._fault is not None
        behind = self.parser.mend(data, at, end)
        if behind is None:
            return at
        fault, self._fault = self._fault, None
        section = self.parser.section
        if section is None:
            self._skip(fault, behind - at)
            self._section = self._body = None
            return behind
        self._begin(section, base + at)
        self._skip(fault, behind - at)
        self._hurt = True
        return behind

    def _behind(self, at: int, data: memoryview, start: int, end: int) -> None:
        """Something stands behind the end of the stream: it is not looked at."""
        if self._trailing is None:
            found = bytes(data[start : min(start + 8, end)]).hex(" ")
            fault = Fault(at, "something behind the end of the stream", "nothing more", found)
            self._trailing = add_fault(self.facts, fault)
        self._skip(self._trailing, end - start)

    def _skip(self, fault: Fault | None, count: int) -> None:
        self.facts.bytes.skipped += count
        if fault is not None:
            fault.skipped += count
        self._grow(count)

    def _open(self, at: int) -> None:
        """Behind damage: the parser may be in another section than it was, or in none."""
        section = self.parser.section
        if section is None or self._section is None or self._section.id != section.id:
            self._section = None
            self._body = None

    # -- parts

    def _note(self, part: AnyPart, data: memoryview, start: int, at: int, base: int) -> None:
        facts, count, share = self.facts, at - start, SHARES.get(type(part), "framing")
        match part:
            case Header(machine, capabilities):
                facts.machine, facts.capabilities = machine, list(capabilities)
            case Section():
                self._begin(part, base + start)
            case BlockList():
                self._blocks(base + start)
            case Body(section) if section.name.encode() != RAM:
                self._keep(data[start:at])
                share = "devices"
            case Order(number, order):
                self._command(base + start, number, order)
            case Text():
                self._text += data[start:at]
        if isinstance(part, Pages):
            self._pages(data, start, at, part.count, base)
            return
        setattr(facts.bytes, share, getattr(facts.bytes, share) + count)
        if isinstance(part, Description | Text):
            facts.description = "whole" if self.parser.complete else "cut"
        self._grow(count)
        if isinstance(part, SectionEnd):
            if self._section is not None:
                self._section.whole = not self._hurt
            self._section = self._body = None

    def _grow(self, count: int) -> None:
        if self._section is not None:
            self._section.size += count

    def _begin(self, section: Section, at: int) -> None:
        fact = SectionFact(
            at, 0, KINDS[section.kind], section.id, section.name, section.instance, section.version
        )
        self._section, self._body, self._hurt = fact, None, False
        if len(self.facts.sections) < MAX_LISTED:
            self.facts.sections.append(fact)
            if section.kind == FULL:
                self._body = bytearray()
                self._kept.append((fact, self._body))
        else:
            self.facts.sections_left_out += 1

    def _keep(self, data: memoryview) -> None:
        if self._section is not None:
            self._section.body += len(data)
        if self._body is not None and self._kept_bytes + len(data) <= MAX_KEPT:
            self._kept_bytes += len(data)
            self._body += data

    def _command(self, at: int, number: int, data: bytes) -> None:
        known = number in Command.__members__.values()
        if not known:
            add_fault(self.facts, Fault(at, f"a command {number}, which there is not"))
        self.facts.postcopy |= self.parser.postcopy
        if len(self.facts.commands) < MAX_LISTED:
            name = Command(number).name if known else "?"
            self.facts.commands.append(CommandFact(at, number, name, data[:64].hex()))
        else:
            self.facts.commands_left_out += 1

    def _blocks(self, at: int) -> None:
        size = self.parser.page_size
        self._before = (0, 0, 0, 0)
        facts = [
            BlockFact(one.name.decode("ascii", "backslashreplace"), one.size, one.pages(size))
            for one in self.parser.blocks
        ]
        if self.facts.blocks:
            told = [(one.name, one.size) for one in self.facts.blocks]
            self._counting &= told == [(one.name, one.size) for one in facts]
            add_fault(self.facts, Fault(at, "a second list of the blocks"))
            return
        for fact in facts:
            self._firsts.append(self._firsts[-1] + fact.pages)
        self.facts.blocks = facts
        if self._firsts[-1] > MAX_PAGES:
            what = f"{self._firsts[-1]} pages of memory: more than can be counted"
            add_fault(self.facts, Fault(at, what))
            return
        self._survey = RamSurvey(self._firsts, size)
        self._counting = True

    def _pages(self, data: memoryview, start: int, at: int, count: int, base: int) -> None:
        reader = self.parser.reader
        assert reader is not None
        facts, size = self.facts, self.parser.page_size
        zero, raw, delta, delta_bytes = self._sums()
        facts.bytes.raw += raw * size
        facts.bytes.zero += zero
        facts.bytes.deltas += delta_bytes
        heads = (at - start) - raw * size - zero - delta_bytes
        facts.bytes.page_heads += heads
        if self._section is not None:
            self._section.zero += zero
            self._section.raw += raw
            self._section.delta += delta
        self._grow(at - start)
        if not self._counting or self._survey is None:
            return
        self._survey.note(data, reader.records, count, base)
        for observer in self._observers:
            observer(self.parser, data, start, count, base)

    def _sums(self) -> tuple[int, int, int, int]:
        """Of what came since it was asked last."""
        reader = self.parser.reader
        assert reader is not None
        now = reader.zero, reader.raw, reader.delta, reader.delta_bytes
        zero, raw, delta, delta_bytes = (a - b for a, b in zip(now, self._before, strict=True))
        self._before = now
        return zero, raw, delta, delta_bytes

    # -- the end

    def finish(self) -> QemuFacts:
        """Nothing follows: all that is known."""
        facts, parser = self.facts, self.parser
        if self._fault is None and not parser.complete and not (
            parser.ended and parser.text_left < 0
        ):  # fmt: skip
            add_fault(facts, Fault(facts.size, "the stream ends here", parser.expected))
        facts.page_size = parser.page_size
        self._finish_pages()
        self._finish_devices()
        facts.whole = not facts.faults and not facts.deltas.broken
        return facts

    def _finish_pages(self) -> None:
        facts, survey = self.facts, self._survey
        if survey is None:
            return
        deltas = facts.deltas
        for number, (fact, counts) in enumerate(zip(facts.blocks, survey.blocks, strict=True)):
            fact.zero, fact.raw, fact.delta, fact.delta_bytes, changed, empty, broken, base = counts
            fact.came, fact.again, fact.most, fact.gaps = survey.coverage(number)
            fact.missing = fact.pages - fact.came
            deltas.count += fact.delta
            deltas.bytes += fact.delta_bytes
            deltas.changed += changed
            deltas.empty += empty
            deltas.broken += broken
            deltas.baseless += base
        deltas.wire_bytes = deltas.bytes + 11 * deltas.count
        deltas.finish(facts.page_size)
        for page, at, what in survey.broken:
            name, inside = self._place(page)
            deltas.faults.append(BrokenDelta(at, name, inside, what))
        facts.rounds = [RoundFact(at, n, *rest) for n, (at, *rest) in enumerate(survey.rounds, 1)]
        facts.rounds_seen = survey.rounds_seen
        if self._lost_pages and len(facts.blocks) > 1:
            facts.notes.append(
                "behind skipped bytes, pages that name no block are taken for those of the last one"
            )

    def _place(self, page: int) -> tuple[str, int]:
        number = max(n for n, first in enumerate(self._firsts[:-1]) if first <= page)
        return self.facts.blocks[number].name, page - self._firsts[number]

    def _finish_devices(self) -> None:
        facts = self.facts
        if facts.description == "cut":
            facts.notes.append("the description is cut off: the devices cannot be told")
        if facts.description == "absent" and self.parser.ended:
            facts.notes.append(
                "no description: this type of machine writes none, or it was cut off as a whole"
            )
        if facts.description != "whole":
            return
        try:
            devices = Devices(bytes(self._text))
        except DescriptionError as error:
            facts.notes.append(str(error))
            return
        for fact, body in self._kept:
            fact.fields, fact.decoded = devices.decode(fact.name, fact.instance, bytes(body))
        odd = [fact.name for fact, _ in self._kept if fact.whole and fact.decoded != fact.body]
        if odd:
            facts.notes.append(f"the description does not explain all of {', '.join(odd[:20])}")
