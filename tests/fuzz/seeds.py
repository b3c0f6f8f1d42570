"""Inputs to begin with, made by the real encoders: `seeds` gives them for a target."""

from __future__ import annotations

import random
from collections.abc import Callable

from proto import xbzrle
from proto.wire.capabilities import OPTIONAL, answer, offer
from proto.wire.compressed import SIZES, BatchCompressor
from proto.wire.frames import HEADER_BYTES
from proto.wire.messages import MessageType, pack
from tests.fuzz import pages, rounds
from tests.fuzz import stream as streams
from tests.fuzz.frames import GOLDEN, LONG, LONGEST, ODD
from tests.fuzz.pages import END_ROUND
from tests.fuzz.pieces import Piece, join
from tests.fuzz.sides import PATTERN
from tests.fuzz.text import TEXTS

ROLE = {"source": 1, "destination": 0}  # who hears it is the other one


def seeds(target: str) -> list[bytes]:
    return _SEEDS[target]()


def _frame(vector: dict[str, str]) -> Piece:
    """A golden frame as a piece, whose header is made again."""
    frame = bytes.fromhex(vector["frame"])
    kind, head = frame[4], int.from_bytes(frame[12:16], "big")
    body = frame[HEADER_BYTES : HEADER_BYTES + head]
    data = len(frame) - HEADER_BYTES - head
    return Piece(kind, data.to_bytes(2, "big") + body if vector["type"] == "PAGES" else body)


def _frames() -> list[bytes]:
    found = []
    for speaker, heard_by in ROLE.items():
        talk = [_frame(vector) for vector in GOLDEN if vector["from"] == speaker]
        told = {vector["type"]: piece for vector, piece in zip(
            [v for v in GOLDEN if v["from"] == speaker], talk, strict=True)}  # fmt: skip
        if speaker == "destination":  # the golden one takes shorter batches than are made here
            reply, _ = answer(offer(OPTIONAL), OPTIONAL)
            talk[0] = Piece(MessageType.HELLO, bytes(pack(reply)))
        for choice in range(3):
            found.append(join(bytes([heard_by | choice << 1, 60, 1, 0x25]), talk))
        if speaker == "source":
            join_first = [told["JOIN"], told["PAGES"], told["ROUND"], told["PING"]]
            found.append(join(bytes([heard_by, 9, 3, 0x31]), join_first))
            measures = [told["HELLO"], *[told["PROBE"]] * 3, told["PING"]]
            found.append(join(bytes([heard_by, 20, 3, 1]), [*measures, told["GUEST"]]))
            found.append(join(bytes([heard_by, 20, 3, 1]), [told["HELLO"], told["GUEST"],
                told["PROBE"]]))  # fmt: skip
            after = [told["QUERY"], told["GO"], told["DONE"]]
            found.append(join(bytes([heard_by, 5, 3, 1]), after))
            long = Piece(told["PAGES"].kind | LONG, b"\x9f\x00" + told["PAGES"].content[2:])
            open_ = [told["HELLO"], told["GUEST"], told["CACHE_SIZE"], told["PAGES"]]
            talk = [told["HELLO"], told["GUEST"], *[long] * 3, told["PING"], *[long] * 3]
            for keeps in (0x0F, 0x1F, 0x2F, 0x57):
                found.append(join(bytes([heard_by, 255, 0, keeps]), [*talk, told["ROUND"]]))
            found.append(join(bytes([heard_by, 3, 7, 0]), [
                *open_, Piece(told["PAGES"].kind | ODD, told["PAGES"].content),
                Piece(0, bytes.fromhex(GOLDEN[5]["frame"])[:60])]))  # fmt: skip
        else:
            asked = [told["OWNERSHIP"], told["PING"], told["OWNERSHIP"], told["RUNNING"]]
            found.append(join(bytes([heard_by | 2 << 1, 5, 3, 1]), asked))
            found.append(join(bytes([heard_by | 1 << 1, 5, 3, 1]), [told["JOINED"], told["PING"]]))
    return [*found, *_headers(), join(bytes([1, 30, 0, 2]), _strangers())]


def _strangers() -> list[Piece]:
    golden = b"".join(bytes.fromhex(vector["frame"]) for vector in GOLDEN[:3])
    return [Piece(0, golden), Piece(0, b"GET / HTTP/1.1\r\n")]


def _headers() -> list[bytes]:
    """Headers alone, of the longest bodies."""
    opening = [_frame(vector) for vector in GOLDEN if vector["type"] in ("HELLO", "GUEST")]
    opening = [opening[0], opening[-1]]
    found = []
    for kind, before in (
        (MessageType.HELLO, []),
        (MessageType.QUERY, []),
        (MessageType.PAGES, opening),
    ):
        for flags in (2, 10):
            piece = Piece(kind | LONGEST, b"\0\x80")
            found.append(join(bytes([1, 30, 0, flags]), [*before, piece]))
    return found


def _deltas() -> list[bytes]:
    chance = random.Random(1)
    found = []
    for size in (1, 64, 300, 1024, 4096, 16384):
        for changes in (1, 5, 60, size):
            old = PATTERN[7 : 7 + size]
            new = bytearray(old)
            for _ in range(changes):
                new[chance.randrange(size)] ^= chance.randrange(1, 256)
            for merge in (False, True):
                made = xbzrle.encode(old, bytes(new), merge)
                if made is not None and len(made) < 4000:
                    cut = len(made) // 2 % 256
                    found.append((size - 1).to_bytes(2, "big") + bytes([7, cut]) + made)
    return found


def _batches() -> list[bytes]:
    """Rounds of a source with a cache, as batches to a guest of its size."""
    found = []
    for control in (b"\x17\0\0\0", b"\x17\0\x09\0", b"\x17\x03\x03\x01", b"\x63\0\x07\x02"):
        count, size = 1 + control[0] % 100, pages.SIZES[control[1] & 3]
        pair = rounds.Pair(rounds.SIDES[1], bytes([3, min(count, 24) - 1, 3, 0]), size)
        guest = bytearray(min(count, 24) * size)
        made: list[Piece] = []
        for now in (1, 2, 3):
            for page in range(now, 12, now + 1):
                guest[page * size + 10 * now : page * size + 14 * now] = bytes([2 * page]) * 4 * now
            guest[5 * size : 6 * size] = bytes([2 * now]) * size
            full = rounds.PageSet.full(min(count, 24))
            for head, data in pair.send(now, bytes(guest), full):
                made.append(_batch(head, data, size))
        made[-1] = Piece(made[-1].kind | END_ROUND, made[-1].content)
        found.append(join(control, made[:12]))
    gaps = [  # each kind of record behind each kind of gap, in a guest of 100 pages
        ("000000010000000000000000" + "0000000000000000" + "0064", 0),
        ("000000010000000000000002" + "0000000000000000" + "4400027f0000014100010501", 4),
        ("000000020000000000000000" + "0000000000000000" + "8603000101bf0203040102", 0),
        ("000000020000000000000006" + "0000000000000000" + "80060001050201068004" + "00020708", 0),
    ]
    ends = [  # deltas up to the last byte of a page of 1024, in the middle and at the end
        ("000000010000000000000000" + "0000000000000000" + "0064", 0),
        (
            "000000020000000000000005" + "0000000000000000" + "8004ff070155" + "8007fc070401020304",
            0,
        ),
        (
            "000000020000000000000062"
            + "0000000000000000"
            + "8009f90701010303030405"
            + "8004ff070177",
            0,
        ),
    ]
    pieces = [Piece(raw, bytes.fromhex(head)) for head, raw in gaps]
    last = [Piece(raw, bytes.fromhex(head)) for head, raw in ends]
    found += [join(bytes([99, 0, 0, flags]), last) for flags in range(2)]
    found += [join(bytes([99, 0, 0, flags]), pieces) for flags in range(4)]
    return found


def _batch(head: bytes, data: bytes, size: int) -> Piece:
    """The records as they are; the raw pages are those that the harness makes of the last bytes."""
    return Piece(min(len(data) // size, 7), head[:12] + bytes(8) + head[20:])


def _rounds() -> list[bytes]:
    found = []
    for control in (b"\x03\x0b\x06\0", b"\x05\x17\x03\x04", b"\x07\x05\x41\x08", b"\0\x03\xff\x03"):
        chance, happens = random.Random(control[1]), []
        for _ in range(3):
            for _ in range(5):
                page, offset = bytes([chance.randrange(24)]), chance.randrange(1024).to_bytes(2)
                happens += [
                    Piece(rounds.WRITE, page + offset + chance.randbytes(chance.randrange(1, 40))),
                    Piece(chance.choice((rounds.FILL, rounds.CLEAR, rounds.COPY)),
                          page + offset + chance.randbytes(1)),
                ]  # fmt: skip
            happens.append(Piece(rounds.SEND, b""))
            happens.append(Piece(rounds.RESIZE, bytes([1 << chance.randrange(4)])))
            happens.append(Piece(rounds.SCAN, b""))
        happens.append(Piece(rounds.HOLES, b"\2\0\4"))
        found.append(join(control, happens))
        for step in range(1, 10):  # what overflows, again and again, with deltas off and on between
            happens = happens[1:]
            happens += [Piece(rounds.FILL, bytes([3, 0, 0, 2 * step + 1])), Piece(rounds.SEND, b"")]
            happens.append(Piece(rounds.RESIZE, bytes([rounds.SWITCHES + step % 5])))
        found.append(join(control, happens))
    return found


def _streams() -> list[bytes]:
    """Each kind of part, in pieces."""
    eos, foot = bytes(7) + b"\x10", b"\x7e\0\0\0\2"
    page = b"\0\0\0\0\0\0\4"
    opening = b"QEVM\0\0\0\3"
    configuration = b"\7\0\0\0\2pc" + b"".join(
        b"\5" + bytes([len(name)]) + name + b"\0\0\0\1" + body
        for name, body in (
            (b"configuration/target-page-bits", b"\0\0\0\x0a"),
            (b"configuration/capabilities", b"\0\0\0\1\1x"),
            (b"configuration/uuid", bytes(16)),
        )
    )
    listed = bytes(6) + b"\x14\4" + b"\6pc.ram" + bytes(6) + b"\x10\0" + b"\1b" + bytes(6) + b"\4\0"
    ram = [b"\1\0\0\0\2\3ram\0\0\0\0\0\0\0\4", listed + eos, foot]
    records = [
        bytes(7) + b"\2\6pc.ram\0", page + b"\x28" + PATTERN[:1024],
        page + b"\x60\1\0\3\0\1x", bytes(7) + b"\2\1b\0", eos,
    ]  # fmt: skip
    parts = [b"\2\0\0\0\2", *records, foot, b"\3\0\0\0\2", *records[:1], eos, foot]
    commands = [b"\x08\0\1\0\0", b"\x08\0\2\0\4\0\0\0\1", b"\x08\0\3\0\0", b"\x08\0\x0b\0\0"]
    device = [b"\4\0\0\0\2\5timer" + bytes(8), b"state" + foot + b"\5" + foot[:3], foot]
    other = [b"\1\0\0\0\3\5block" + bytes(8), b"\2\0", b"\x7e\0\0\0\3"]
    end = [b"\0", b"\6\0\0\0\2{}"]
    found = []
    for many in (
        [opening, *ram, *parts, *device, *end],
        [opening + configuration, *commands, *ram, *other, *parts, commands[3], *device, *end],
        [opening, *other, *device, *device, b"\0"],
        [opening, *ram, b"\2\0\0\0\2" + b"".join(records[:4]) + bytes(7) + b"\x80"],
        [opening + b"\x08\0\7\0\4\0\0\0\1"],
    ):
        found.append(join(bytes(4), [Piece(0, part) for part in many]))
    return found


def _records() -> list[bytes]:
    found = []
    for control in (b"\0\1\1\0", b"\0\2\0\1", b"\3\3\2\0", b"\0\0\4\0", b"\0\1\3\1"):
        chance, happens = random.Random(control[1]), []
        for step in range(24):
            page, kind = chance.randrange(8), chance.randrange(3)
            body = bytes([chance.randrange(256)]) + chance.randrange(1000).to_bytes(2, "big")
            body += chance.randbytes(chance.randrange(1, 20))
            if kind == 2:
                body = chance.choice((b"\0\1x", b"", b"\5\2xy\3\1z", b"\xff\7\1e"))
            if step < 8:
                page, kind = step, step % 2
            happens.append(Piece(streams.RECORD, bytes([page, kind]) + body))
        happens.insert(14, Piece(streams.RESIZE, b"\1"))
        raw = Piece(streams.BYTES, bytes(7) + b"\2\6pc.ram\0" * 2)
        found.append(join(control, [*happens, raw]))
        again = [Piece(streams.RECORD, bytes([3, 1, fill, 0, 0])) for fill in (1, 3, 5)]
        again += [Piece(streams.RECORD, bytes([3, 0])), Piece(streams.RECORD, b"\3\2\0\1x")]
        found.append(join(control, [*again, *again]))
    batch = "000000010000000000000000" + "0000000000000000"
    hostile = [
        Piece(streams.BATCH, bytes.fromhex(batch + body))
        for body in (
            "0018",
            "800300017880030001798204fe070121",
            "4000014100020001",
            "c000",
            "bf7f00",
        )
    ]
    hostile = [Piece(piece.kind | raw << 2, piece.content) for piece in hostile for raw in (0, 1)]
    return [*found, join(b"\0\1\1\0", hostile)]


def _texts() -> list[bytes]:
    return [
        join(bytes([which, side, 1 + side, 0]), [Piece(kind, part) for kind, part in said])
        for which, said in TEXTS
        for side in range(2)
    ]


def _compressed() -> list[bytes]:
    found = []
    for level in (-5, 1, 3, 19):
        for head, data in ((b"records", PATTERN[:5000]), (b"", bytes(100_000)), (PATTERN, b"")):
            made = BatchCompressor(level).compress(
                memoryview(bytes(HEADER_BYTES) + head), memoryview(data)
            )  # fmt: skip
            body = bytes(made[HEADER_BYTES:])
            found += [b"\x01\0\0\0" + body, b"\x01\0\x07\x01" + body[SIZES.size :]]
    return found


_SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "frames": _frames,
    "pages": _batches,
    "compressed": _compressed,
    "delta": _deltas,
    "rounds": _rounds,
    "stream": _streams,
    "records": _records,
    "text": _texts,
}
