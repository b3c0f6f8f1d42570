"""A parser of QEMU's stream that goes on behind damage, and reads what cannot be carried.

A damaged head or footer is mended if what follows it is right. Else `find` looks for the next
bytes that can be a footer or the head of the section of the pages.
"""

from __future__ import annotations

import re
from dataclasses import replace

from proto.qemu.cursor import Cursor
from proto.qemu.parts import (
    EOF,
    FINISH,
    FULL,
    PART,
    RAM,
    START,
    Body,
    Command,
    CommandCode,
    Section,
)
from proto.qemu.stream_parser import HEAD_BYTES, StreamParser

# Longer than any part that must be whole to be read.
LONGEST_PART = 512 << 10
FOOTER_BYTES = 5
KINDS = {START: "start", PART: "part", FINISH: "end", FULL: "full"}
# A footer and what may follow it, or the head of the section of the pages.
MARK = re.compile(
    rb"\x7e(?=.{4}(?:[\x00-\x04\x08]|\Z))|\x01(?=.{4}\x03ram\0\0\0\0\0\0\0\x04)", re.DOTALL
)
# In the body of a device: a footer and something behind it, or the end and a description.
BODY_MARK = re.compile(rb"\x7e\0\0..(?=[\0\x04])|\0(?=\x06.{4}\{\")", re.DOTALL)
MARK_BYTES = FOOTER_BYTES + HEAD_BYTES


class SalvageParser(StreamParser):
    """Reads streams that cannot be carried too, and goes on behind damage."""

    def _command(self, cursor: Cursor) -> Command:
        number, length = cursor.u16(), cursor.u16()
        data = cursor.take(length)
        self.postcopy |= number == CommandCode.POSTCOPY_ADVISE
        return Command(number, data)  # PACKAGED contains sections like any others

    def _open(self, section: Section) -> Section:
        self._listed &= section.kind != START
        return super()._open(section)

    def _body(self, cursor: Cursor, section: Section, last: bool) -> Body:
        """Read a body, but not past the end of another section: then its own footer is broken."""
        at = cursor.at
        part = super()._body(cursor, section, last)
        for mark in BODY_MARK.finditer(cursor.data, at, cursor.at):
            if cursor.data[mark.start()] == EOF:
                head = mark.start()
            else:
                rest = bytes(cursor.data[mark.end() : min(mark.end() + HEAD_BYTES, cursor.end)])
                number = mark[0][1:]
                if rest[:1] not in (b"\4", b"\0") or not self._may_follow(rest):
                    continue
                head = bytes(cursor.data[at : mark.start()]).find(bytes([FULL]) + number) + at
            if head - FOOTER_BYTES < at:
                continue
            cursor.at = head - FOOTER_BYTES
            self._closing = True
            break
        return part

    def mend(self, data: memoryview, at: int, end: int) -> int | None:
        """Go on behind a wrong head or footer, if what follows is right.

        Returns the place from which reading goes on, or None.
        """
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
        """Go on behind a head of which the type or the number is wrong."""
        number = int.from_bytes(rest[1:FOOTER_BYTES], "big")
        if number not in self._sections and rest[0] in (PART, FINISH) and len(self._sections) == 1:
            (number,) = self._sections
        if known := self._sections.get(number):
            self._open(Section(PART, number, known.name, known.instance, known.version))
            return at + FOOTER_BYTES
        if rest[0] in KINDS or not self._may_follow(bytes([FULL]) + rest[1:]):
            return None
        cursor = Cursor(memoryview(rest), 1, len(rest))
        section = Section(FULL, cursor.u32(), cursor.name().decode(), cursor.u32(), cursor.u32())
        if max(section.id, section.instance, section.version) >= 1 << 16:
            return None
        self._open(replace(section, kind=START) if section.name.encode() == RAM else section)
        return at + cursor.at

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """How many records were read so far: zeros, raw, deltas; and the bytes of the deltas."""
        reader = self.reader
        if reader is None:
            return 0, 0, 0, 0
        return reader.zero, reader.raw, reader.delta, reader.delta_bytes

    def find(self, data: memoryview, start: int, end: int, last: bool) -> tuple[int, bool]:
        """Find where reading can go on. Return (place, whether it is one).

        If there is none, the place is that up to which there is none. A footer closes any section.
        It must have the number of a known section, or something must follow that is unlikely to be
        there by chance.
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
        """Go on at the footer of the section of this number, or at the head of a section."""
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
        """What should come next, for a user."""
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
        """Bytes left of the description; -1 before it begins."""
        return self._text_left
