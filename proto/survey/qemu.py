"""What is in a stream of QEMU, even if it is damaged.

    feed(data, ...)    parts of the stream, as far as they are whole --> facts
         |
      StreamError      the place is noted; reading goes on behind the next bytes that can be a
                       footer, or at the next that can be a head; what is before them is skipped

`observers` also get the records of pages, in their order. This module does no I/O:
`migrate.inspect` reads the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from proto.qemu.kernel import RamSurvey
from proto.qemu.parts import (
    FULL,
    RAM,
    BlockList,
    Body,
    Command,
    CommandCode,
    Description,
    Header,
    Pages,
    Section,
    SectionEnd,
    Text,
)
from proto.qemu.parts import Part as AnyPart
from proto.qemu.stream_parser import WINDOW, StreamParser
from proto.survey.devices import DescriptionError, Devices
from proto.survey.facts import (
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
from proto.survey.salvage import KINDS, LONGEST_PART, SalvageParser
from proto.wire.errors import StreamError
from proto.wire.messages import MAX_PAGES

# Bytes of devices' bodies that are kept until the description comes.
MAX_KEPT = 64 << 20
# As what the bytes of a part are counted. Other parts are framing.
SHARES: dict[type, str] = {
    Header: "header", BlockList: "blocks", Command: "commands", Description: "description",
    Text: "description",
}  # fmt: skip

# (parser, data, where its first record begins, how many records, where data[0] is)
Observer = Callable[[StreamParser, memoryview, int, int, int], object]


class QemuSurvey:
    """Reads a stream in order: `feed` as often as there are bytes, then `finish`.

    observers -- called with the records of pages
    page_size -- bytes of a page, if the stream does not say it
    """

    def __init__(self, observers: Iterable[Observer] = (), page_size: int = 4096) -> None:
        self.parser = SalvageParser(page_size)
        self.facts = QemuFacts()
        self._observers = tuple(observers)
        self._survey: RamSurvey | None = None
        self._fault: Fault | None = None  # behind it, a place to go on is looked for
        self._trailing: Fault | None = None
        self._section: SectionFact | None = None
        self._hurt = False  # that section is damaged
        self._kept: list[tuple[SectionFact, bytearray]] = []
        self._kept_bytes = 0
        self._body: bytearray | None = None
        self._text = bytearray()
        self._firsts = [0]
        self._counting = False
        self._lost_pages = False
        self._before = (0, 0, 0, 0)

    def feed(self, data: memoryview, start: int, end: int, base: int, *, last: bool = False) -> int:
        """Read data[start:end] as far as it is whole. Return where the rest begins.

        base -- byte of the stream that data[0] is
        last -- nothing follows: read to the end
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
            before = sum(self.parser.counts[:3])
            try:
                at, part = self._step(data, start, end, last)
            except StreamError as error:
                if count := sum(self.parser.counts[:3]) - before:
                    self._pages(data, start, error.at, count, base)
                    start = error.at
                at = max(start, error.at)
                what = str(error)
                if last and what == "the stream ends inside a part":
                    what = f"the stream ends inside a part, of which {end - at} bytes are there"
                self._skip(None, at - start)
                fault = self._lose(base + at, what, data, at, end)
                start = self._mended(fault, data, at, end, base)
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

    def _lose(self, at: int, what: str, data: memoryview, start: int, end: int) -> Fault:
        """Note that the stream cannot be read here. Bytes that are skipped count as this fault."""
        found = bytes(data[start : min(start + 8, end)]).hex(" ")
        fault = Fault(at, what, self.parser.expected, found)
        self._fault = add_fault(self.facts, fault)
        self._hurt = True
        self._lost_pages |= self._section is not None and self._section.name.encode() == RAM
        return self._fault

    def _mended(self, fault: Fault, data: memoryview, at: int, end: int, base: int) -> int:
        """Return where reading goes on if only a head or a footer is broken, else `at`."""
        behind = self.parser.mend(data, at, end)
        if behind is None:
            return at
        self._fault = None
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
        """Note that there are bytes behind the end of the stream. They are not looked at."""
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
        """Follow the parser, which may be in another section after damage, or in none."""
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
            case Command(number, command):
                self._command(base + start, number, command)
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
        known = number in CommandCode.__members__.values()
        if not known:
            add_fault(self.facts, Fault(at, f"a command {number}, which there is not"))
        self.facts.postcopy |= self.parser.postcopy
        if len(self.facts.commands) < MAX_LISTED:
            name = CommandCode(number).name if known else "?"
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
        self._survey.note(data, self.parser.records, count, base)
        for observer in self._observers:
            observer(self.parser, data, start, count, base)

    def _sums(self) -> tuple[int, int, int, int]:
        """Return the counts of records and bytes since the last call."""
        now = self.parser.counts
        zero, raw, delta, delta_bytes = (a - b for a, b in zip(now, self._before, strict=True))
        self._before = now
        return zero, raw, delta, delta_bytes

    # -- the end

    def finish(self) -> QemuFacts:
        """End the stream. Return all that is known."""
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
