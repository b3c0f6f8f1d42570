"""migrate-stream on streams that are complete, damaged, truncated or hostile."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import random
import re
import shutil
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from migrate.cli import migrate_stream
from migrate.errors import MigrationError
from migrate.inspect import pages
from migrate.inspect.reading import Reader, read
from migrate.inspect.text import lines_of
from proto.survey.devices import DescriptionError, Devices
from proto.survey.facts import Field, FrameFacts, QemuFacts
from proto.survey.qemu import QemuSurvey
from proto.wire.frames import HEADER_BYTES, seal
from proto.wire.messages import (
    Blocks,
    Bytes,
    CacheSize,
    GuestInfo,
    Hello,
    Message,
    MessageType,
    Round,
    pack,
)
from proto.wire.session import TYPE_OF
from proto.xbzrle import encode
from tests.machine import Machine, Sweep
from tests.machine.capture import capture
from tests.machine.qemu import PROGRAM
from tests.machine.sweep import BASE, IMAGE_AT
from tests.programs import BIN, Program, destination, end_guest, guest_pid
from tests.relay import Relay
from tests.requirements import need, need_root

MIB = 1 << 20
PAGE = 1024


# ---------------------------------------------------------------- streams made by hand


def text(name: str) -> bytes:
    return bytes([len(name)]) + name.encode()


def section(kind: int, number: int, body: bytes, name: str = "", version: int = 0) -> list[bytes]:
    """Head, body and footer."""
    head = struct.pack(">BI", kind, number)
    if name:
        head += text(name) + struct.pack(">II", 0, version)
    return [head, body, struct.pack(">BI", 0x7E, number)]


def record(page: int, flags: int, body: bytes, block: str = "") -> bytes:
    word = struct.pack(">Q", page * PAGE | flags | (0 if block else 0x20))
    return word + (text(block) if block else b"") + body


def delta(page: int, body: bytes, block: str = "") -> bytes:
    return record(page, 0x40, struct.pack(">BH", 1, len(body)) + body, block)


ONE, TWO = random.Random(1).randbytes(PAGE), random.Random(2).randbytes(PAGE)
CHANGED = b"Z" + ONE[1:]
SMALL_DELTA = encode(ONE, CHANGED)
assert SMALL_DELTA
EOS = struct.pack(">Q", 0x10)
LIST = struct.pack(">Q", 6 * PAGE | 4) + b"".join(
    text(name) + struct.pack(">Q", pages * PAGE) for name, pages in (("a", 4), ("bb", 2))
)
RECORDS = [
    [record(0, 8, ONE, "a"), record(1, 2, b"\0"), record(2, 8, TWO), record(0, 2, b"\0", "bb")],
    [delta(0, SMALL_DELTA, "a"), delta(1, b"\2\1x"), record(2, 2, b"\0"), delta(0, b"", "bb")],
]
DEVICE = b"\1" + struct.pack(">I", 77) + b"\xff" * 3 + struct.pack(">hh", -2, 5)
SUBSECTION = b"\5" + text("clock/extra") + struct.pack(">I", 1) + struct.pack(">Q", 9)
DESCRIPTION = json.dumps({
    "page_size": PAGE,
    "devices": [
        {"name": "clock", "instance_id": 0, "vmsd_name": "clock", "version": 2, "fields": [
            {"name": "on", "type": "bool", "size": 1},
            {"name": "ticks", "type": "uint32", "size": 4},
            {"name": "rest", "type": "buffer", "size": 3},
            {"name": "pair", "type": "struct", "size": 2, "array_len": 2, "struct": {
                "vmsd_name": "half", "version": 1,
                "fields": [{"name": "half", "type": "int16", "size": 2}]}},
        ], "subsections": [
            {"vmsd_name": "clock/extra", "version": 1,
             "fields": [{"name": "since", "type": "uint64", "size": 8}]},
        ]},
    ],
}).encode()  # fmt: skip
HEADER = (
    b"QEVM\0\0\0\3\x07" + struct.pack(">I", 4) + b"pc-x"
    + b"\5" + text("configuration/target-page-bits") + struct.pack(">II", 1, 10)
)  # fmt: skip
PARTS = [
    HEADER,
    struct.pack(">BHH", 8, 1, 0),
    struct.pack(">BHHI", 8, 2, 4, 1),
    *section(1, 2, LIST + EOS, "ram", 4),
    *section(2, 2, b"".join(RECORDS[0]) + EOS),
    *section(3, 2, b"".join(RECORDS[1]) + EOS),
    *section(4, 7, DEVICE + SUBSECTION, "clock", 2),
    b"\0",
    b"\6" + struct.pack(">I", len(DESCRIPTION)),
    DESCRIPTION,
]
WHOLE = b"".join(PARTS)
# Where each part begins, the pages one by one.
PLACES = [len(b"".join(PARTS[:i])) for i in range(len(PARTS) + 1)]
FIRST_RECORD = PLACES[7]
SECOND_RECORDS = PLACES[10]


class Raw(io.RawIOBase):
    """Bytes in pieces of some size, as from a pipe."""

    def __init__(self, data: bytes, piece: int = 1 << 30) -> None:
        self._data, self._piece = io.BytesIO(data), piece

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        return self._data.readinto(view[: self._piece])


def facts_of(data: bytes, piece: int = 1 << 30) -> QemuFacts | FrameFacts:
    facts = read(Reader(Raw(data, piece)), QemuSurvey)  # type: ignore[arg-type]
    assert list(lines_of(facts, devices=True))
    if isinstance(facts, QemuFacts):
        counted = sum(getattr(facts.bytes, name) for name in facts.bytes.__struct_fields__)
        assert counted == facts.size == len(data)
    return facts


def of_qemu(data: bytes) -> QemuFacts:
    facts = facts_of(data)
    assert isinstance(facts, QemuFacts)
    return facts


def changed(at: int, content: bytes) -> bytes:
    return WHOLE[:at] + content + WHOLE[at + len(content) :]


@pytest.mark.parametrize("piece", [1 << 30, 1, 7])
def test_small_stream(piece) -> None:
    facts = facts_of(WHOLE, piece)
    assert isinstance(facts, QemuFacts)
    assert facts.whole
    assert not facts.faults
    assert not facts.notes
    assert (facts.machine, facts.page_size, facts.description) == ("pc-x", PAGE, "whole")
    assert [(one.name, one.zero, one.raw, one.delta, one.again, one.most, one.missing, one.gaps)
            for one in facts.blocks] == [
        ("a", 2, 2, 2, 3, 2, 1, [(3, 3)]), ("bb", 1, 0, 1, 1, 2, 1, [(1, 1)]),
    ]  # fmt: skip
    assert [(one.zero, one.raw, one.delta) for one in facts.rounds] == [(2, 2, 0), (1, 0, 3)]
    deltas = facts.deltas
    assert (deltas.count, deltas.bytes, deltas.changed, deltas.empty) == (3, 6, 2, 1)
    assert (deltas.average, deltas.encoding_rate, deltas.broken) == (2.0, 512.0, 0)
    assert [(one.name, one.data) for one in facts.commands] == [
        ("OPEN_RETURN_PATH", ""), ("PING", "00000001"),
    ]  # fmt: skip
    told = [(one.kind, one.id, one.name, one.at, one.size, one.whole) for one in facts.sections]
    assert told == [
        (kind, number, name, PLACES[i], PLACES[i + 3] - PLACES[i], True)
        for kind, number, name, i in (
            ("start", 2, "ram", 3), ("part", 2, "ram", 6), ("end", 2, "ram", 9),
            ("full", 7, "clock", 12),
        )
    ]  # fmt: skip


def test_devices_follow_the_description() -> None:
    clock = of_qemu(WHOLE).sections[-1]
    assert clock.decoded == clock.body == len(DEVICE + SUBSECTION)
    assert clock.fields == [
        Field("on", "bool", 1, True),
        Field("ticks", "uint32", 4, 77),
        Field("rest", "buffer", 3, "ffffff"),
        Field("pair[0]", "struct", 2, None, [Field("half", "int16", 2, -2)]),
        Field("pair[1]", "struct", 2, None, [Field("half", "int16", 2, 5)]),
        Field("clock/extra", "subsection", 25, None, [Field("since", "uint64", 8, 9)]),
    ]


@pytest.mark.parametrize("cut", range(1, len(PARTS)))
def test_stream_cut_between_parts(cut) -> None:
    facts = of_qemu(WHOLE[: PLACES[cut]])
    # A stream without a description may be whole: old types of machines write none.
    assert facts.whole == (PARTS[cut][:1] == b"\6" and cut == len(PARTS) - 2)
    if not facts.whole:
        assert len(facts.faults) == 1
        assert facts.faults[0].expected
    assert len(facts.commands) == min(max(cut - 1, 0), 2)
    assert sum(one.whole for one in facts.sections) == sum(
        cut >= end for end in (6, 9, 12, 15)
    )  # fmt: skip


@pytest.mark.programs
def test_stream_cut_anywhere() -> None:
    ends = [FIRST_RECORD]
    for one in RECORDS[0]:
        ends.append(ends[-1] + len(one))
    for cut in range(1, len(WHOLE)):
        facts = of_qemu(WHOLE[:cut])
        assert facts.whole == (cut == PLACES[-3])
        if FIRST_RECORD < cut < PLACES[8]:
            came = sum(one.zero + one.raw for one in facts.blocks)
            assert came == sum(end <= cut for end in ends[1:])
            [fault] = facts.faults
            assert fault.at == max(end for end in ends if end <= cut) or cut > ends[-1]
            assert fault.at + fault.skipped == cut


def test_place_of_the_cut() -> None:
    [fault] = of_qemu(WHOLE[: FIRST_RECORD + 100]).faults
    assert fault.at == FIRST_RECORD
    assert fault.what == "the stream ends inside a part, of which 100 bytes are there"
    assert fault.expected.startswith("a record of a page")
    [fault] = of_qemu(WHOLE[:-10]).faults
    assert (fault.at, fault.expected) == (len(WHOLE) - 10, "10 more bytes of the description")


@pytest.mark.parametrize(
    ("at", "content", "fault_at", "what", "skipped"),
    [
        (FIRST_RECORD + 4, b"\xff", FIRST_RECORD, "outside its block", PLACES[8] - FIRST_RECORD),
        (FIRST_RECORD + 7, b"\x01", FIRST_RECORD, "FULL", PLACES[8] - FIRST_RECORD),
        (FIRST_RECORD + 9, b"x", FIRST_RECORD, "a block b'x'", PLACES[8] - FIRST_RECORD),
        (SECOND_RECORDS + 10, b"\2", SECOND_RECORDS, "unknown encoding",
         PLACES[11] - SECOND_RECORDS),
        (SECOND_RECORDS + 11, b"\xff", SECOND_RECORDS, "longer than a page",
         PLACES[11] - SECOND_RECORDS),
        (PLACES[8], b"\0", PLACES[8], "without a footer", 5),
        (PLACES[8] + 4, b"\x09", PLACES[8], "the footer of section 9 behind section 2", 5),
        (PLACES[6], b"\x55", PLACES[6], "type 0x55", 5),
        (PLACES[6] + 4, b"\x09", PLACES[6], "section 9, which was never begun", 5),
        (PLACES[14], b"\0", PLACES[14], "without a footer", 5),
    ],
)  # fmt: skip
def test_reading_continues_after_damage(at, content, fault_at, what, skipped) -> None:
    facts = of_qemu(changed(at, content))
    [fault] = facts.faults
    assert (fault.at, fault.skipped) == (fault_at, skipped)
    assert what in fault.what
    assert fault.found == changed(at, content)[fault_at : fault_at + 8].hex(" ")
    assert facts.description == "whole"
    assert [one.kind for one in facts.sections] == ["start", "part", "end", "full"]
    assert sum(not one.whole for one in facts.sections) == 1
    assert facts.sections[-1].fields


@pytest.mark.parametrize("at", [PLACES[3], PLACES[12]], ids=["ram", "clock"])
def test_section_with_wrong_type(at) -> None:
    facts = of_qemu(changed(at, b"\x55"))
    assert [fault.at for fault in facts.faults] == [at]
    assert [one.name for one in facts.sections] == ["ram", "ram", "ram", "clock"]
    assert sum(one.zero + one.raw + one.delta for one in facts.blocks) == 8


def test_broken_delta() -> None:
    at = SECOND_RECORDS + len(RECORDS[1][0]) + 11
    facts = of_qemu(changed(at, b"\2\0"))
    assert not facts.whole
    assert not facts.faults
    [broken] = facts.deltas.faults
    assert (broken.at, broken.block, broken.page) == (at, "a", 1)
    assert broken.what == "an empty non-zero run"


@pytest.mark.parametrize(
    ("data", "what", "at"),
    [
        (WHOLE + b"more", "behind the end", len(WHOLE)),
        (b"QEVM\0\0\0\2" + WHOLE[8:], "another version than 3", 0),
        (changed(PLACES[1] + 1, b"\0\x63"), "a command 99", PLACES[1]),
        (
            b"".join([*PARTS[:6], *PARTS[3:]]),
            "a second list of the blocks",
            PLACES[6] + len(PARTS[3]),
        ),
    ],
)
def test_unexpected_parts(data, what, at) -> None:
    facts = of_qemu(data)
    assert not facts.whole
    assert what in facts.faults[0].what
    assert facts.faults[0].at == at


def test_description_mismatch() -> None:
    shorter = DESCRIPTION.replace(b'"size": 3', b'"size": 2')
    facts = of_qemu(b"".join([*PARTS[:-1], shorter]))
    assert facts.whole
    assert facts.notes == ["the description does not explain all of clock"]
    facts = of_qemu(b"".join([*PARTS[:-1], DESCRIPTION[:-1] + b"]"]))
    assert "no JSON" in facts.notes[0]


@pytest.mark.parametrize(
    "told",
    ["[]", "{}", '{"devices": 5}', "[" * 100_000, '{"devices": [' * 5000, "\xff"],
    ids=range(6),
)
def test_malformed_description(told) -> None:
    with pytest.raises(DescriptionError):
        Devices(told.encode("latin-1"))


def test_hostile_description_is_bounded() -> None:
    field: dict[str, object] = {"name": "x", "type": "uint8", "size": 0, "array_len": 1 << 39}
    for _ in range(100):
        field = {"name": "x", "type": "struct", "size": 0, "array_len": 1 << 39,
                 "struct": {"fields": [field]}}  # fmt: skip
    nested = {"name": "d", "instance_id": 0, "fields": [field, {"size": -1}, {"size": "1"}, 5]}
    odd = {"name": ["d"], "instance_id": 0}
    devices = Devices(json.dumps({"devices": [nested, odd, 7]}).replace("NaN", "").encode())
    fields, at = devices.decode("d", 0, b"body")
    assert fields
    assert at == 0
    assert devices.decode("e", 0, b"body") == ([], 0)


@pytest.mark.programs
def test_any_damage_is_survived() -> None:
    chance = random.Random(20)
    for data in (WHOLE, FRAMES):
        for _ in range(600):
            spoiled = bytearray(data)
            for _ in range(chance.choice([1, 1, 2, 5, 40])):
                at = chance.randrange(4, len(spoiled))
                kind = chance.randrange(3)
                if kind == 0:
                    spoiled[at] ^= 1 << chance.randrange(8)
                elif kind == 1:
                    spoiled[at:at] = chance.randbytes(chance.randrange(20))
                else:
                    del spoiled[at : at + chance.randrange(1, 30)]
            facts = facts_of(bytes(spoiled), chance.choice([1 << 30, 100]))
            assert facts.size == len(spoiled)


# ---------------------------------------------------------------- ours, made by hand


def frame(message: Message, channel: int = 0) -> bytes:
    made = pack(message, HEADER_BYTES)
    seal(made, TYPE_OF[type(message)], channel)
    return bytes(made)


def batch(number: int, first: int, records: bytes, data: bytes = b"", check: int = 0) -> bytes:
    made = bytearray(HEADER_BYTES) + struct.pack(">IQQ", number, first, check) + records
    seal(made, MessageType.PAGES, 0, len(data))
    return bytes(made) + data


GUEST = GuestInfo("qemu", 6 * PAGE, PAGE, bytes(16))
OURS = [
    frame(Hello(1, ("page-hash-nh", "stream"), ("xbzrle",))),
    frame(GUEST),
    frame(CacheSize(0)),
    frame(Blocks(((b"a", 4), (b"bb", 2)))),
    frame(Bytes(WHOLE[: PLACES[6]])),
    batch(1, 0, b"\0\6"),
    batch(1, 1, b"\x80\3\0\1x"),
    frame(Round(1, 7, 300)),
    frame(Bytes(b"the end", held=True)),
]
FRAMES = b"".join(OURS)
FRAME_PLACES = [len(b"".join(OURS[:i])) for i in range(len(OURS) + 1)]


def of_ours(data: bytes) -> FrameFacts:
    facts = facts_of(data)
    assert isinstance(facts, FrameFacts)
    return facts


@pytest.mark.parametrize("piece", [1 << 30, 1, 7])
def test_framed_stream(piece) -> None:
    facts = facts_of(FRAMES, piece)
    assert isinstance(facts, FrameFacts)
    assert facts.whole
    assert (facts.pages, facts.page_size, facts.received_pages) == (6, PAGE, 6)
    assert {one.type: one.count for one in facts.frames} == {
        "HELLO": 1, "GUEST": 1, "CACHE_SIZE": 1, "BLOCKS": 1, "BYTES": 2, "PAGES": 2, "ROUND": 1,
    }  # fmt: skip
    assert sum(one.bytes for one in facts.frames) == len(FRAMES)
    [first] = facts.rounds
    assert (first.frames, first.zero, first.delta, first.delta_bytes) == (2, 6, 1, 3)
    assert (first.told_pages, first.told_transferred, first.last) == (7, 300, False)
    assert [one.type for one in facts.messages] == [
        "HELLO", "GUEST", "CACHE_SIZE", "BLOCKS", "ROUND",
    ]  # fmt: skip
    assert facts.messages[1].fields["kind"] == "qemu"
    assert facts.messages[1].fields["hash_seed"] == "00" * 16
    assert [(one.name, one.pages) for one in facts.blocks] == [("a", 4), ("bb", 2)]
    assert [(one.type, one.pages, one.held) for one in facts.items] == [
        ("BYTES", 0, False), ("PAGES", 6, False), ("PAGES", 1, False), ("BYTES", 0, True),
    ]  # fmt: skip
    assert facts.items[0].data.startswith(b"QEVM".hex())
    assert (facts.literal_bytes, facts.held_bytes) == (PLACES[6] + 7, 7)


def test_framed_stream_cut() -> None:
    for cut in range(1, len(FRAMES)):
        facts = of_ours(FRAMES[:cut])
        whole = sum(place <= cut for place in FRAME_PLACES[1:])
        assert sum(one.count for one in facts.frames) == whole
        assert facts.whole == (cut in FRAME_PLACES)
        if not facts.whole:
            assert facts.faults[0].at == FRAME_PLACES[whole]
            assert "the stream ends inside" in facts.faults[0].what


@pytest.mark.parametrize(
    ("place", "content", "what", "fault_at", "lost"),
    [
        (FRAME_PLACES[2], b"Y", "no frame", FRAME_PLACES[2], 1),
        (FRAME_PLACES[2] + 4, b"\x63", "unknown frame type 99", FRAME_PLACES[2], 1),
        (FRAME_PLACES[2] + 5, b"\1", "flags", FRAME_PLACES[2], 1),
        (FRAME_PLACES[2] + 8, b"\xff", "are over", FRAME_PLACES[2], 1),
        (FRAME_PLACES[2] + 11, b"\1", "a head of", FRAME_PLACES[2], 1),
        (FRAME_PLACES[2] + 16, b"\0\0", "does not match", FRAME_PLACES[2], 0),
        (FRAME_PLACES[2] + 11, b"\x08\0\0\0\x08", "does not match", FRAME_PLACES[2], 1),
    ],
)
def test_reading_continues_after_broken_frame(place, content, what, fault_at, lost) -> None:
    data = FRAMES[:place] + content + FRAMES[place + len(content) :]
    facts = of_ours(data)
    [fault] = facts.faults
    assert what in fault.what
    assert fault.at == fault_at
    assert sum(one.count for one in facts.frames) == len(OURS) - lost
    size = dict(zip(FRAME_PLACES, map(len, OURS), strict=False))[fault_at]
    assert fault.skipped == (size if lost else 0)


def test_frames_that_a_receiver_refuses() -> None:
    raw = batch(1, 0, b"\x40\0\1", ONE, check=5)
    far = batch(1, 9, b"\0\1")
    bare = batch(1, 3, b"\x80\3\0\1x")
    wrong = bytearray(frame(Round(1, 7, 300)))
    wrong[-1] = 7
    seal(wrong, MessageType.ROUND)
    data = OURS[0] + OURS[1] + raw + far + bare + bytes(wrong)
    facts = of_ours(data)
    told = [(fault.at, fault.what) for fault in facts.faults]
    at = len(OURS[0] + OURS[1])
    assert told[0][0] == at + HEADER_BYTES + 12
    assert "does not match their check" in told[0][1]
    assert told[1] == (at + len(raw) + 28, "PAGES from 9: a page number outside the guest")
    assert told[2][1] == "PAGES from 3: deltas of 1 pages that never came"
    assert told[3][1].startswith("ROUND: ")


def test_pages_of_further_channel() -> None:
    made = bytearray(batch(1, 0, b"\x40\0\1", ONE, check=5))
    facts = of_ours(bytes(made))
    assert facts.whole
    assert facts.rounds[0].raw == 1
    assert facts.received_pages == -1
    assert "cannot be checked" in facts.notes[0]


# ---------------------------------------------------------------- the program


@pytest.fixture
def call(capfd):
    """Runs migrate-stream: (exit code, output, error)."""

    def run(*words: object) -> tuple[int, str, str]:
        code = migrate_stream.run([str(word) for word in words])
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def small(tmp_path) -> Path:
    path = tmp_path / "small"
    path.write_bytes(WHOLE)
    return path


def test_printed_survey(call, small) -> None:
    code, out, err = call(small, "--devices")
    assert (code, err) == (0, "")
    assert "machine: pc-x, pages of 1024 bytes" in out
    assert re.search(r"^  a +4096 +4 +2 +2 +2 +3 +2 +1$", out, re.MULTILINE)
    assert "ticks (uint32, 4) = 77" in out
    assert "never came of a: 3" in out


def test_json_survey(call, small, tmp_path) -> None:
    code, out, _ = call(small, "--json", "--pages", "a:0")
    told = json.loads(out)
    assert code == 0
    assert told["stream"] == "qemu"
    assert told["sections"][3]["fields"][1] == {
        "name": "ticks", "type": "uint32", "size": 4, "value": 77,
    }  # fmt: skip
    assert told["records"] == [
        {"at": FIRST_RECORD, "page": 0, "kind": "page", "length": PAGE},
        {"at": SECOND_RECORDS, "page": 0, "kind": "xbzrle", "length": 3},
    ]
    ours = tmp_path / "ours"
    ours.write_bytes(FRAMES)
    code, out, _ = call(ours, "--json")
    assert (code, json.loads(out)["stream"]) == (0, "xbmigrate")


def test_list_page_records(call, small) -> None:
    code, out, _ = call(small, "--pages", "a:1-2")
    rows = [line.split() for line in out.splitlines()]
    second = SECOND_RECORDS + len(RECORDS[1][0])
    assert code == 0
    assert rows == [
        [str(FIRST_RECORD + len(RECORDS[0][0])), "1", "zero", "0"],
        [str(FIRST_RECORD + len(RECORDS[0][0] + RECORDS[0][1])), "2", "page", "1024"],
        [str(second), "1", "xbzrle", "3"],
        [str(second + len(RECORDS[1][1])), "2", "zero", "0"],
    ]


def test_extract_blocks(call, small, tmp_path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"old" * 9000)
    code, _, err = call(small, "--overwrite", "--extract", f"a={a}", "--extract", f"bb={b}")
    assert (code, err) == (0, "")
    assert a.read_bytes() == CHANGED + b"\0\0x" + bytes(3 * PAGE - 3)
    assert b.read_bytes() == bytes(2 * PAGE)
    assert b.stat().st_blocks == 0


def test_extract_needs_overwrite(call, small, tmp_path) -> None:
    a = tmp_path / "a"
    a.write_bytes(b"precious")
    code, out, err = call(small, "--extract", f"a={a}")
    assert (code, out) == (2, "")
    assert f"{a} exists already: remove it, or give --overwrite" in err
    assert a.read_bytes() == b"precious"
    a.write_bytes(b"")
    assert call(small, "--extract", f"a={a}")[0] == 0


@pytest.mark.parametrize("kind", ["symlink", "hardlink"])
def test_extract_follows_no_links(call, small, tmp_path, kind) -> None:
    """Whose directory it is may have planted a link to a file of ours."""
    precious = tmp_path / "precious"
    precious.write_bytes(b"")
    if kind == "symlink":
        (tmp_path / "a").symlink_to(precious)
    else:
        (tmp_path / "a").hardlink_to(precious)
    for words in ([], ["--overwrite"]):
        code, out, err = call(small, *words, "--extract", f"a={tmp_path}/a")
        assert (code, out) == (1 if kind == "symlink" else 2, "")
        assert f"{tmp_path}/a" in err
        assert precious.stat().st_size == 0


@need_root("give files away")
def test_extract_into_file_of_another_user(call, small, tmp_path) -> None:
    """A user who can write in /tmp could have put it there, to read the memory."""
    theirs = tmp_path / "a"
    theirs.touch()
    os.chown(theirs, 65534, 65534)
    for words in ([], ["--overwrite"]):
        code, out, err = call(small, *words, "--extract", f"a={theirs}")
        assert (code, out) == (2, "")
        assert f"{theirs} belongs to user 65534" in err
        assert theirs.stat().st_size == 0


def test_extract_two_blocks_to_one_file(call, small, tmp_path) -> None:
    code, out, err = call(small, "--extract", f"a={tmp_path}/x", "--extract", f"bb={tmp_path}/./x")
    assert (code, out) == (2, "")
    assert "two blocks cannot be written to one file" in err
    assert not (tmp_path / "x").exists()


def test_extract_leaves_no_partial_file(call, small, tmp_path, monkeypatch) -> None:
    """For example on a full disk; from a damaged stream, the part that arrived is kept."""

    class Full:
        def __init__(self, *_: object) -> None:
            pass

        def apply(self, *_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pages, "RamImage", Full)
    code, out, err = call(small, "--extract", f"a={tmp_path}/x")
    assert (code, out) == (1, "")
    assert f"{tmp_path}/x: No space left on device" in err
    assert not (tmp_path / "x").exists()
    monkeypatch.undo()
    small.write_bytes(WHOLE[:-3])
    assert call(small, "--extract", f"a={tmp_path}/x")[0] == 1
    assert (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--pages", "a:6-9"], 2, "a has pages 0 to 3, no page 6"),
        (["--pages", "c"], 2, "the stream has no block 'c'; it has: a, bb"),
        (["--pages", "a:5-2"], 2, "the range ends before it begins"),
        (["--extract", "c=/dev/null"], 2, "the stream has no block 'c'"),
        (["--extract", "a=/dev/null"], 2, "is not a regular file"),
        (["--extract", "a"], 2, "write BLOCK=FILE"),
        (["--extract", "a={}"], 2, "is the stream itself"),
        (["--extract", "a=/nowhere/at/all"], 1, "/nowhere/at/all: No such file"),
        (["--extract", "a=/proc/version_signature"], 1, "/proc/version_signature: "),
        (["--nothing"], 2, "--help lists the options"),
    ],
)
def test_migrate_stream_usage_errors(call, small, words, code, says) -> None:
    ended, out, err = call(small, *(word.replace("{}", str(small)) for word in words))
    assert (ended, out) == (code, "")
    assert says in err
    assert err.count("\n") == 1
    assert small.read_bytes() == WHOLE


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "the stream is empty"),
        (b"hello", "not a migration stream: it begins with 68 65 6c 6c"),
        (b"\x16\x03\x01\0\0", "TLS"),
    ],
)
def test_not_a_stream(call, tmp_path, data, says) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    code, out, err = call(path)
    assert (code, out) == (1, "")
    assert says in err


def test_extract_from_framed_stream(call, tmp_path) -> None:
    path = tmp_path / "ours"
    path.write_bytes(FRAMES)
    code, _, err = call(path, "--extract", f"a={tmp_path}/x")
    assert code == 2
    assert "are for streams of QEMU" in err


def test_exit_code_of_damaged_stream(call, tmp_path) -> None:
    path = tmp_path / "cut"
    path.write_bytes(WHOLE[: FIRST_RECORD + 5])
    code, out, _ = call(path)
    assert code == 1
    assert f"byte {FIRST_RECORD}: the stream ends inside a part" in out.splitlines()[-1]
    code, out, err = call(path, "--pages", "a")
    assert code == 1
    assert f"byte {FIRST_RECORD}: " in err


def test_pipes(small) -> None:
    command = f"cat {small} | {BIN}/migrate-stream - --json"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, check=True)
    assert json.loads(done.stdout)["whole"]
    command = f"{BIN}/migrate-stream {small} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, check=False)
    assert done.returncode in (0, 1)
    assert done.stderr == b""


def test_absurd_guest_size_costs_no_memory(call, tmp_path) -> None:
    huge = struct.pack(">Q", (1 << 62) | 4) + text("a") + struct.pack(">Q", 1 << 62)
    parts = [HEADER, *section(1, 2, huge + EOS, "ram", 4)]
    path = tmp_path / "huge"
    path.write_bytes(b"".join(parts))
    code, out, _ = call(path)
    assert code == 1
    assert "can be carried" in out
    code, _, err = call(path, "--extract", f"a={tmp_path}/x")
    assert code in (1, 2)
    assert err.count("\n") == 1


def test_missing_stream_file(call, tmp_path) -> None:
    assert (
        call(tmp_path / "none")[2]
        == f"migrate-stream: {tmp_path}/none: No such file or directory\n"
    )
    code, _, err = call(tmp_path)
    assert code == 1
    assert "Is a directory" in err


def test_names_in_a_stream_are_printable() -> None:
    evil = HEADER.replace(b"pc-x", b"\x1b[2J")
    lines = "\n".join(lines_of(of_qemu(b"".join([evil, *PARTS[1:]]))))
    assert "\x1b" not in lines


def test_json_is_ascii(call, tmp_path) -> None:
    """A terminal obeys C1 controls and marks of direction, and a reader of JSON gets them back."""
    evil, path = "\x9b\u202e", tmp_path / "stream"
    path.write_bytes(WHOLE.replace(b'"ticks"', f'"{evil}"'.encode()))
    assert path.stat().st_size == len(WHOLE)
    code, out, _ = call(path, "--json")
    assert code == 0
    assert out.isascii()
    assert "\x1b" not in out
    assert json.loads(out)["sections"][3]["fields"][1]["name"] == evil


def test_unknown_kind_of_stream() -> None:
    with pytest.raises(MigrationError):
        facts_of(b"XBM2")


# ---------------------------------------------------------------- real ones


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> SimpleNamespace:
    """A QEMU's stream with all that there can be in it, and what that QEMU said of it."""
    need(shutil.which(PROGRAM), f"{PROGRAM} (qemu-system-x86)")
    place = tmp_path_factory.mktemp("captured")
    path, size = place / "stream", 32 * MIB

    async def make() -> tuple[dict, bytes, bytes]:
        sweep = Sweep(4 * MIB, fill=16 * MIB, rate=400_000)
        async with Machine(
            sweep, size=size, blocks=["m0", "m1"], dimm=2 * MIB,
            devices=["virtio-rng-pci", "virtio-balloon-pci"],
        ) as machine:  # fmt: skip
            await machine.wait_for_count(sweep.every)
            info = await capture(machine, path, "xbzrle", "return-path")
            return info, await machine.read(0, size), random.Random(0).randbytes(2 * MIB)

    info, memory, dimm = asyncio.run(make())
    return SimpleNamespace(path=path, info=info, memory=memory, dimm=dimm, size=size)


@pytest.mark.programs
def test_real_stream_matches_qemus_counters(captured) -> None:
    facts = of_qemu(captured.path.read_bytes())
    assert facts.whole
    assert not facts.faults
    assert not facts.notes  # the description explains each byte of each device
    assert facts.machine.startswith("pc-i440fx-")
    assert [one.name for one in facts.commands] == ["OPEN_RETURN_PATH", "PING"]
    by_name = {one.name: one for one in facts.blocks}
    assert by_name["m0"].size == by_name["m1"].size == captured.size // 2
    assert all(one.missing == 0 for one in facts.blocks)
    ram, cache = captured.info["ram"], captured.info["xbzrle-cache"]
    assert sum(one.raw for one in facts.blocks) == ram["normal"]
    assert sum(one.zero for one in facts.blocks) == ram["duplicate"]
    assert facts.deltas.count > 0
    assert facts.deltas.broken == facts.deltas.baseless == 0
    assert facts.deltas.bytes + 3 * facts.deltas.count == cache["bytes"]
    assert facts.rounds_seen >= 3
    names = [one.name for one in facts.sections]
    assert names[0] == "ram"
    assert names[-1] == "globalstate"
    assert any("virtio-balloon" in name for name in names)
    assert all(one.decoded == one.body for one in facts.sections if one.kind == "full")


def test_extracted_memory_of_real_stream(captured, call, tmp_path) -> None:
    words = []
    for name in ("m0", "m1", "dimm0"):
        words += ["--extract", f"{name}={tmp_path / name}"]
    code, _, err = call(captured.path, *words)
    assert (code, err) == (0, "")
    written = (tmp_path / "m0").read_bytes() + (tmp_path / "m1").read_bytes()
    for part in (slice(IMAGE_AT), slice(BASE, None)):  # between them is the machine's firmware
        assert written[part] == captured.memory[part]
    assert (tmp_path / "dimm0").read_bytes() == captured.dimm


@pytest.mark.programs
def test_any_damage_to_real_stream_is_survived(captured) -> None:
    data = captured.path.read_bytes()
    devices = next(one.at for one in of_qemu(data).sections if one.kind == "full")
    chance = random.Random(5)
    for _ in range(40):
        at = chance.choice([chance.randrange(100), chance.randrange(devices, len(data) - 90_000)])
        spoiled = bytearray(data)
        spoiled[at] ^= chance.choice([1, 0x80, 0xFF])
        if spoiled[:4] == b"QEVM":
            facts_of(bytes(spoiled))


@pytest.mark.programs
def test_real_framed_stream(tmp_path) -> None:
    program, address = destination()
    with Relay(address, keep=True) as relay:
        source = Program(
            "migrate-src", "--guest", "demo:16m,hot=4m,fill=random", "--json", relay.address
        )
        assert source.wait() == 0, source.err
        assert program.wait() == 0, program.err
        end_guest(guest_pid(program.out + program.err))
        sent = bytes(relay.sent)
    facts = of_ours(sent)
    told = json.loads(source.out)
    assert facts.whole, facts.faults
    assert facts.pages == facts.received_pages == 16 * MIB // 4096
    assert [one.number for one in facts.rounds] == list(range(1, len(facts.rounds) + 1))
    assert facts.rounds[-1].last
    assert facts.rounds[0].raw + facts.rounds[0].zero == facts.pages
    assert facts.deltas.count > 0
    assert facts.deltas.count == told["xbzrle-cache"]["pages"]
    assert [one.type for one in facts.messages][:2] == ["HELLO", "GUEST"]
    assert facts.messages[-1].type == "DONE"
    spoiled = bytearray(sent)
    spoiled[len(sent) // 2] ^= 1
    assert not of_ours(bytes(spoiled)).whole


def test_memory_use_is_bounded(tmp_path) -> None:
    pages = b"".join([record(0, 8, ONE, "a"), *[record(1, 8, TWO)] * 999]) + EOS
    part = b"".join(section(2, 2, pages))
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.write(b"".join(PARTS[:6]))
        for _ in range(300):
            file.write(part)
        file.write(b"".join(PARTS[9:]))
    code = (
        "import sys; from migrate.cli import migrate_stream; migrate_stream.run(sys.argv[1:]); "
        "print(open('/proc/self/status').read(), file=sys.stderr)"
    )
    done = subprocess.run(
        [BIN / "python", "-c", code, path, "--json"], capture_output=True, timeout=60, check=True
    )
    assert json.loads(done.stdout)["whole"]
    peak = re.search(rb"VmHWM:\s+(\d+) kB", done.stderr)
    assert peak
    assert int(peak[1]) < 100 << 10
    os.unlink(path)
