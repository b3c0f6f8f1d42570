"""The stream parser: every byte of QEMU's stream is in one part, however the stream is cut.

The streams are made by hand, from the format alone.
"""

from __future__ import annotations

import itertools
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.qemu.parts import (
    FINISH,
    FULL,
    PART,
    START,
    Block,
    BlockList,
    Body,
    Command,
    Description,
    End,
    Header,
    Pages,
    Section,
    SectionEnd,
    Text,
)
from proto.qemu.stream_parser import HEAD_BYTES, MAX_DESCRIPTION, MAX_SECTIONS, StreamParser
from proto.wire.errors import StreamError
from proto.wire.messages import MAX_BLOCKS
from tests.cells import check_each

MAGIC = b"QEVM\0\0\0\3"
PAGE = 4096
EOS = bytes.fromhex("0000000000000010")


def u16(value: int) -> bytes:
    return value.to_bytes(2, "big")


def u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def u64(value: int) -> bytes:
    return value.to_bytes(8, "big")


def counted(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def configuration(machine: bytes, *parts: bytes) -> bytes:
    return b"\7" + u32(len(machine)) + machine + b"".join(parts)


def subsection(name: bytes, body: bytes) -> bytes:
    return b"\5" + counted(b"configuration/" + name) + u32(1) + body


def page_bits(bits: int) -> bytes:
    return subsection(b"target-page-bits", u32(bits))


def capabilities(*names: bytes) -> bytes:
    return subsection(b"capabilities", u32(len(names)) + b"".join(map(counted, names)))


def command(number: int, data: bytes = b"") -> bytes:
    return b"\x08" + u16(number) + u16(len(data)) + data


def opening(kind: int, number: int, name: bytes, instance: int, version: int) -> bytes:
    return bytes([kind]) + u32(number) + counted(name) + u32(instance) + u32(version)


def footer(number: int) -> bytes:
    return b"\x7e" + u32(number)


def start(number: int, name: bytes, body: bytes, version: int = 4) -> bytes:
    return opening(1, number, name, 0, version) + body + footer(number)


def full(number: int, name: bytes, body: bytes) -> bytes:
    return opening(4, number, name, 7, 3) + body + footer(number)


def part(number: int, body: bytes, kind: int = 2) -> bytes:
    return bytes([kind]) + u32(number) + body + footer(number)


def description(text: bytes) -> bytes:
    return b"\6" + u32(len(text)) + text


def block_list(*blocks: tuple[bytes, int], huge: dict[bytes, int] | None = None) -> bytes:
    out = u64(sum(size for _, size in blocks) | 4)
    for name, size in blocks:
        out += counted(name) + u64(size)
        if huge and name in huge:
            out += u64(huge[name])
    return out


ZERO = u64(2 * PAGE | 2) + counted(b"pc.ram") + b"\0"
MORE = u64(3 * PAGE | 0x28) + b"\x7e\0\0\0\2" * 819 + b"\0"
DELTA = u64(3 * PAGE | 0x60) + b"\1\0\3\0\1x"
LIST = block_list((b"pc.ram", 16 * PAGE), (b"pc.bios", PAGE))
RAM = start(2, b"ram", LIST + EOS)
JSON = json.dumps({"page_size": PAGE, "devices": []}).encode()


# ---------------------------------------------------------------- reading


def stepped(parser: StreamParser, data: bytes, ends: list[int]):
    """All parts, as they come up to each of these ends, each with its range; then the error."""
    at, found = 0, []
    for end in [*ends, len(data)]:
        piece = memoryview(data[:end])  # nothing behind the end can be seen
        last = end == len(data)
        while True:
            try:
                after, one = parser.step(piece, at, end, last=last)
            except StreamError as error:
                return found, (str(error), error.at)
            assert at <= after <= end
            if one is None:
                assert after == at
                break
            if isinstance(one, Pages):
                rows = memoryview(parser.reader.records)[: 24 * one.count].cast("Q")
                one = [(rows[3 * i], bytes(piece[at:after])) for i in range(one.count)]
                one = [row[0] for row in one]
            found.append((one, data[at:after]))
            at = after
    return found, data[at:]


def joined(found):
    """Parts that may come in pieces, put together: pages, a body, the text."""
    out = []
    for one, piece in found:
        same = out and (
            (isinstance(one, list) and isinstance(out[-1][0], list))
            or (isinstance(one, Body | Text) and out[-1][0] == one)
        )
        if not same:
            out.append((one, piece))
        else:
            before, bytes_ = out.pop()
            out.append((before + one if isinstance(one, list) else one, bytes_ + piece))
    return out


def parts(data: bytes, ends: list[int] | None = None, page_size: int = PAGE):
    """Return (parts, the rest or the error). Assert that the ranges of the parts are the stream."""
    found, rest = stepped(StreamParser(page_size), data, ends or [])
    whole = b"".join(piece for _, piece in found)
    assert data.startswith(whole)
    if isinstance(rest, bytes):
        assert whole + rest == data
    return joined(found), rest


def kinds(data: bytes):
    found, rest = parts(data)
    assert rest == b"", rest
    return [one for one, _ in found]


def refused(data: bytes) -> tuple[str, int]:
    _, why = parts(data)
    assert isinstance(why, tuple), why
    return why


RAM_START = Section(START, 2, "ram", 0, 4)
SLIRP = Section(FULL, 9, "slirp", 7, 3)


def test_every_kind_of_part():
    """With their bytes, for a stream that comes whole and in pieces."""
    head = MAGIC + configuration(
        b"pc-i440fx-7.2", page_bits(12), capabilities(b"auto-converge"),
        subsection(b"uuid", bytes(range(16))),
    )  # fmt: skip
    body = b"\1\2\3" + footer(9)[:4] + footer(2) + b"\4"
    pieces = [
        (Header("pc-i440fx-7.2", ("auto-converge",)), head),
        (Command(1, b""), command(1)),
        (Command(2, u32(1)), command(2, u32(1))),
        (RAM_START, opening(1, 2, b"ram", 0, 4)),
        (BlockList((Block(b"pc.ram", 16 * PAGE), Block(b"pc.bios", PAGE))), LIST),
        (Body(RAM_START), EOS),
        (SectionEnd(RAM_START), footer(2)),
        (Section(START, 3, "dirty-bitmap", 0, 1), opening(1, 3, b"dirty-bitmap", 0, 1)),
        (Body(Section(START, 3, "dirty-bitmap", 0, 1)), b"\x10"),
        (SectionEnd(Section(START, 3, "dirty-bitmap", 0, 1)), footer(3)),
        (Section(PART, 2, "ram", 0, 4), b"\2" + u32(2)),
        ([2, 3], ZERO + MORE),
        (Body(Section(PART, 2, "ram", 0, 4)), EOS),
        (SectionEnd(Section(PART, 2, "ram", 0, 4)), footer(2)),
        (Section(PART, 3, "dirty-bitmap", 0, 1), b"\2" + u32(3)),
        (Body(Section(PART, 3, "dirty-bitmap", 0, 1)), b"bits"),
        (SectionEnd(Section(PART, 3, "dirty-bitmap", 0, 1)), footer(3)),
        (Command(11, b""), command(11)),
        (Section(FINISH, 2, "ram", 0, 4), b"\3" + u32(2)),
        ([3], DELTA),
        (Body(Section(FINISH, 2, "ram", 0, 4)), EOS),
        (SectionEnd(Section(FINISH, 2, "ram", 0, 4)), footer(2)),
        (SLIRP, opening(4, 9, b"slirp", 7, 3)),
        (Body(SLIRP), body),
        (SectionEnd(SLIRP), footer(9)),
        (Section(FULL, 10, "globalstate", 7, 3), opening(4, 10, b"globalstate", 7, 3)),
        (Body(Section(FULL, 10, "globalstate", 7, 3)), b""),
        (SectionEnd(Section(FULL, 10, "globalstate", 7, 3)), footer(10)),
        (End(), b"\0"),
        (Description(len(JSON)), b"\6" + u32(len(JSON))),
        (Text(), JSON),
    ]
    data = b"".join(piece for _, piece in pieces)
    assert parts(data) == (pieces, b"")
    step = 7
    assert parts(data, list(range(0, len(data), step))) == (pieces, b"")
    parser = StreamParser(PAGE)
    stepped(parser, data, [])
    assert parser.ended
    assert parser.complete
    assert not parser.postcopy
    assert parser.section is None


def test_stream_without_configuration():
    assert kinds(MAGIC + RAM)[:2] == [Header(), RAM_START]


@pytest.mark.parametrize("bits", [10, 11, 12, 13, 14])
def test_page_size_from_configuration(bits):
    size = 1 << bits
    parser = StreamParser(PAGE)
    blocks = block_list((b"ram", 3 * size), (b"rom", size - 512), (b"vga", 512))
    body = u64(2 * size | 2) + counted(b"ram") + b"\0" + EOS
    data = MAGIC + configuration(b"none", page_bits(bits)) + start(5, b"ram", blocks + EOS)
    found, _ = stepped(parser, data + part(5, body), [])
    assert parser.page_size == size
    assert [2] in [one for one, _ in found]
    assert parser.reader is not None


def test_end_of_stream_without_description():
    found, rest = parts(MAGIC + RAM + full(9, b"x", b"state") + b"\0")
    assert [one for one, _ in found][-2:] == [SectionEnd(Section(FULL, 9, "x", 7, 3)), End()]
    assert rest == b""


def test_empty_description_ends_stream():
    parser = StreamParser(PAGE)
    data = MAGIC + RAM + b"\0" + description(b"") + b"more"
    found, _ = stepped(parser, data, [len(data) - 4])
    assert found[-1] == (Description(0), description(b""))
    assert parser.complete


def test_huge_page_size_in_block_list():
    """If postcopy may come, the page size follows a block; the last one too, before no name."""
    blocks = ((b"pc.ram", 4 << 20), (b"vga", PAGE), (b"big", 2 << 20))
    for huge in ({b"pc.ram": 2 << 20}, {b"big": 2 << 20}, {b"pc.ram": 1 << 30, b"big": 2 << 20}):
        listed = block_list(*blocks, huge=huge)
        found, rest = parts(MAGIC + start(2, b"ram", listed + EOS))
        assert rest == b""
        assert found[2] == (BlockList(tuple(Block(*block) for block in blocks)), listed)


def test_empty_block_has_no_pages():
    found = kinds(
        MAGIC
        + start(2, b"ram", block_list((b"a", PAGE), (b"b", 0), (b"c", 5), (b"d", PAGE - 5)) + EOS)
    )
    assert found[2] == BlockList((Block(b"a", PAGE), Block(b"c", 5), Block(b"d", PAGE - 5)))
    assert [block.pages(PAGE) for block in found[2].blocks] == [1, 1, 1]


def test_postcopy_advise_is_accepted():
    parser = StreamParser(PAGE)
    stepped(parser, MAGIC + command(3, bytes(16)), [])
    assert parser.postcopy
    assert not parser.switched


# ---------------------------------------------------------------- bodies that only QEMU reads

NAME = b"x" * 255
LOOKALIKES = [
    footer(9),
    footer(9) * 3,
    footer(9) + b"\x7e",
    footer(9) + b"\0\6\0\0\0\0",  # no description has no bytes
    footer(9) + b"\0\6\0\0\0\5[",
    footer(9) + b"\0\7",
    footer(9) + b"\2" + u32(77),  # a part of what was never begun
    footer(9) + opening(4, 10, b"", 0, 0),
    footer(9) + opening(4, 10, b"a\0b", 0, 0),
    footer(9) + b"\x08" + u16(12),
    footer(9) + b"\x08" + u16(0),
    footer(9) + b"\5",
    footer(9)[:3],
    footer(9)[:4] * 2,
]


FOLLOWING = {
    "full": full(10, NAME, b"") + b"\0",
    "part": part(2, EOS, 3) + b"\0",
    "command": command(11) + b"\0",
    "end": b"\0" + description(JSON),
    "bare end": b"\0",
}


def test_bytes_like_a_footer_do_not_end_section():
    def check(looks, follows):
        body = b"\0\1" + looks + b"\2"
        data = MAGIC + RAM + full(9, b"slirp", body) + FOLLOWING[follows]
        expected = parts(data)
        assert (Body(SLIRP), body) in expected[0]
        assert (SectionEnd(SLIRP), footer(9)) in expected[0]
        assert not expected[1]
        for step in (1, 3):
            assert parts(data, list(range(0, len(data), step))) == expected

    check_each(check, itertools.product(LOOKALIKES, FOLLOWING))


def test_search_for_footer_is_bounded():
    """It covers a window, and not everything that has come."""
    unit = full(9, b"slirp", b"a body")

    def seconds(behind: int) -> float:
        data = memoryview(b"QEVM\0\0\0\3" + unit * 400 + bytes(behind))
        parser, at = StreamParser(PAGE), 0
        began = time.thread_time()
        while at < 8 + 400 * len(unit):
            at, part = parser.step(data, at, len(data))
            assert part is not None
        return time.thread_time() - began

    assert min(seconds(16 << 20) for _ in range(3)) < 10 * min(seconds(64 << 10) for _ in range(3))


def test_body_is_returned_before_its_end_is_known():
    parser = StreamParser(PAGE)
    begun = MAGIC + opening(4, 9, b"slirp", 7, 3)
    body = bytes(1000) + footer(9)[:2]
    found, rest = stepped(parser, begun + body, [len(begun + body)])
    assert found[-1] == (Body(SLIRP), bytes(1000))
    assert rest == ("the stream ends inside a part", len(begun) + 1000)


def test_footer_needs_a_whole_head_behind_it():
    head = opening(4, 10, NAME, 0, 0)
    assert len(head) == HEAD_BYTES
    data = MAGIC + full(9, b"slirp", b"body") + head
    parser = StreamParser(PAGE)
    found, _ = stepped(parser, data[:-1] + b"?", [len(data) - 1])
    seen = [one for one, _ in found]
    assert seen.count(Body(SLIRP)) == 2, "up to the footer, and once more when that is sure"


# ---------------------------------------------------------------- any cutting


@st.composite
def streams(draw) -> bytes:
    """Right, mostly: any order of sections, any bodies."""
    looks = st.sampled_from(LOOKALIKES) | st.binary(max_size=20)
    pages = st.lists(st.sampled_from([ZERO, MORE, DELTA]), max_size=4).map(
        lambda several: b"".join([ZERO, *several, EOS])
    )
    middle = st.one_of(
        pages.map(lambda body: part(2, body)),
        pages.map(lambda body: part(2, body, 3)),
        looks.map(lambda body: full(9, b"slirp", body)),
        looks.map(lambda body: start(3, b"dirty-bitmap", body, 1)),
        st.sampled_from([command(1), command(2, u32(7)), command(11)]),
    )
    data = bytearray(MAGIC + draw(st.sampled_from([b"", configuration(b"pc", page_bits(12))])))
    data += RAM + b"".join(draw(st.lists(middle, max_size=6)))
    data += draw(st.sampled_from([b"\0", b"\0" + description(JSON), b""]))
    for _ in range(draw(st.integers(0, 2)) if draw(st.booleans()) else 0):
        at = draw(st.integers(0, len(data) - 1))
        if draw(st.booleans()):
            data[at] = draw(st.integers(0, 255))
        else:
            del data[at : at + draw(st.integers(1, 40))]
    return bytes(data)


@settings(max_examples=300)
@given(streams(), st.lists(st.integers(0, 1 << 16), max_size=8))
def test_any_cuts_give_the_same_parts(data, places):
    ends = sorted(place % (len(data) + 1) for place in places)
    assert parts(data, ends) == parts(data)


@given(st.binary(max_size=100), st.lists(st.integers(0, 120), max_size=5))
def test_any_bytes_are_parts_or_a_stream_error(data, places):
    for before in (b"", MAGIC, MAGIC + RAM, MAGIC + RAM + b"\0"):
        ends = sorted(place % (len(before + data) + 1) for place in places)
        assert parts(before + data, ends) == parts(before + data)


# ---------------------------------------------------------------- what is refused

AT = len(MAGIC)
BEHIND = len(MAGIC + RAM)
RAM_BODY = len(MAGIC + opening(1, 2, b"ram", 0, 4))
MANY = [(b"b%d" % i, PAGE) for i in range(MAX_BLOCKS + 1)]
IN_RAM = MAGIC + opening(1, 2, b"ram", 0, 4)
REFUSED = [
    (b"HELO", "this is no migration stream of QEMU", 0),
    (b"QEVM\0\0\0\2", "a migration stream of another version than 3", 0),
    (MAGIC + configuration(b"x" * 256), "a machine type of 256 bytes", AT + 1),
    (MAGIC + configuration(b"pc", page_bits(9)), "pages of 2^9 bytes: 1k to 16k can be carried",
     AT + 7),
    (MAGIC + configuration(b"pc", page_bits(16)), "pages of 2^16 bytes: 1k to 16k can be carried",
     AT + 7),
    (MAGIC + configuration(b"pc", page_bits(12), page_bits(12)),
     "a second configuration/target-page-bits", AT + 7 + len(page_bits(12))),
    (MAGIC + configuration(b"pc", subsection(b"capabilities", u32(256))),
     "256 capabilities in the configuration", AT + 7),
    (MAGIC + configuration(b"pc", capabilities(b"a", b"x-ignore-shared")),
     "switch the capability x-ignore-shared off", AT + 7),
    (MAGIC + configuration(b"pc", capabilities(b"mapped-ram")),
     "switch the capability mapped-ram off", AT + 7),
    (MAGIC + configuration(b"pc", subsection(b"new\xff", b"")),
     r"an unknown part of the configuration, configuration/new\xff", AT + 7),
    (MAGIC + RAM + b"\x09", "a section of type 0x09, which there is not", BEHIND),
    (MAGIC + RAM + b"\x7e", "a section of type 0x7e, which there is not", BEHIND),
    (MAGIC + RAM + b"\2" + u32(3), "a part of section 3, which was never begun", BEHIND),
    (MAGIC + RAM[:-5] + b"\2" + u32(2),
     "a section without a footer: the option send-section-footer must be on", BEHIND - 5),
    (MAGIC + RAM[:-5] + footer(3), "the footer of section 3 behind section 2", BEHIND - 5),
    (MAGIC + opening(1, 2, b"ram", 0, 3), "the section ram has version 3, not 4", RAM_BODY),
    (MAGIC + opening(4, 2, b"ram", 0, 4) + EOS, "pages, but there was no list of blocks", RAM_BODY),
    (IN_RAM + EOS, "the section ram does not begin with the list of blocks", RAM_BODY),
    (IN_RAM + u64(PAGE // 2 | 4) + bytes(8), "the section ram does not begin with the list of "
     "blocks", RAM_BODY),
    (IN_RAM + u64(PAGE | 4) + counted(b"a") + u64(PAGE + 1),
     "a list of blocks that does not come to its sum", RAM_BODY),
    (IN_RAM + u64(PAGE | 4) + counted(b"") + u64(PAGE),
     "a list of blocks that does not come to its sum", RAM_BODY),
    (IN_RAM + u64(2 * PAGE | 4) + counted(b"a") + u64(PAGE) + u64(0) + counted(b"b"),
     "a list of blocks with more than their sizes: switch the capabilities x-ignore-shared and "
     "mapped-ram off", RAM_BODY),
    (IN_RAM + block_list((b"a", PAGE), (b"a", PAGE)), "two blocks b'a'", RAM_BODY),
    (IN_RAM + block_list(*MANY), "more than 1024 blocks", RAM_BODY),
    (IN_RAM + u64(PAGE | 4) + b"".join(counted(b"%d" % i) + u64(0) for i in range(1025)),
     "more than 1024 blocks", RAM_BODY),
    (IN_RAM + u64(4), "a guest of 0 pages: 1 to 4294967296 can be carried", RAM_BODY),
    (IN_RAM + block_list((b"a", (1 << 44) + PAGE)) + EOS,
     "a guest of 4294967297 pages: 1 to 4294967296 can be carried", RAM_BODY),
    (MAGIC + RAM + part(2, ZERO + u64(0x80))[:-5],
     "a record with the flag HOOK: RDMA cannot be carried", BEHIND + 5 + len(ZERO)),
    (MAGIC + RAM + opening(1, 2, b"ram", 0, 4) + LIST,
     "a record with the flag MEM_SIZE, though the blocks are known", BEHIND + RAM_BODY - AT),
    (MAGIC + command(4), "the guest was switched to postcopy, which cannot be carried", AT),
    (MAGIC + command(5), "the guest was switched to postcopy, which cannot be carried", AT),
    (MAGIC + command(7, u32(9)), "the guest was switched to postcopy, which cannot be carried", AT),
    (MAGIC + command(8), "COLO cannot be carried: switch the capability x-colo off", AT),
    (MAGIC + b"\0\x07", "something else than the description behind the end", AT + 1),
    (MAGIC + b"\0\6" + u32(MAX_DESCRIPTION + 1), f"a description of {MAX_DESCRIPTION + 1} bytes",
     AT + 1),
    (MAGIC + RAM + b"\2\0", "the stream ends inside a part", BEHIND),
    (MAGIC + RAM + part(2, ZERO + MORE)[:100], "the stream ends inside a part",
     BEHIND + 5 + len(ZERO)),
    (MAGIC, "the stream ends inside a part", 0),
]  # fmt: skip


@pytest.mark.parametrize(("data", "text", "at"), REFUSED, ids=[text for _, text, _ in REFUSED])
def test_unfit_streams_are_refused_at_their_place(data, text, at):
    assert refused(data) == (text, at)
    for step in (1, 5):
        _, why = parts(data, list(range(0, min(len(data), 3000), step)))
        assert why == (text, at)


def test_number_of_sections_is_bounded():
    def begun(count: int) -> bytes:
        return MAGIC + b"".join(start(i, b"s", b"\0") for i in range(count))

    kinds(begun(MAX_SECTIONS) + b"\0")
    text, at = refused(begun(MAX_SECTIONS + 1))
    assert text == "more than 1024 sections of several parts"
    assert at == len(begun(MAX_SECTIONS))


def test_part_may_begin_anywhere_in_data():
    """Places in errors are indexes of the data, as all places are."""
    parser = StreamParser(PAGE)
    data = memoryview(b"????" + MAGIC + b"\x55")
    assert parser.step(data, 4, len(data)) == (12, Header())
    with pytest.raises(StreamError, match="type 0x55") as info:
        parser.step(data, 12, len(data))
    assert info.value.at == 12
    assert StreamParser(PAGE).step(data, 4, 4) == (4, None)
    assert StreamParser(PAGE).step(data, 4, 9) == (4, None)
