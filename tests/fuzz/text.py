"""What people and their programs say: the sockets, journals, addresses, sizes and times.

Control: which of these, and how it is said. A piece is a part of the text; in a journal it is a
line, with a right check if its kind is odd; for the monitor it is long then.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Coroutine
from typing import Any

from migrate import units
from migrate.errors import JournalError, MigrationError, UsageError
from migrate.monitor import qmp, server
from migrate.monitor.monitored import CommandError
from migrate.monitor.terminal import MAX_LINE_BYTES, TOO_LONG, HumanConversation
from migrate.ownership.journal import Journal, name_of
from migrate.ownership.source_attempts import find_attempt
from migrate.ownership.stored_journals import claim_in, journals
from migrate.transport import address
from proto.wire.ownership import TABLE, Claim, Event, Role
from tests.fuzz.pieces import Piece, split
from tests.recording_program import RecordingProgram

PLACE = "/dev/shm" if os.path.isdir("/dev/shm") else None
TOKEN = bytes(range(16))
QUIT = CommandError("not now")
SIZE_TEXT = 200


def text(data: bytes) -> None:
    control, pieces = split(data)
    content = b"".join(piece.content for piece in pieces)
    readers: tuple[Callable[[], None], ...] = (
        lambda: _control_socket(content, [len(piece.content) for piece in pieces]),
        lambda: _journal(control, pieces),
        lambda: _address(content[:SIZE_TEXT].decode(errors="surrogateescape")),
        lambda: _quantities(content[:SIZE_TEXT].decode(errors="surrogateescape")),
        lambda: _monitor([_long(piece) for piece in pieces], bool(control[1] & 1)),
    )
    readers[control[0] % len(readers)]()


# ---------------------------------------------------------------- the control socket


def _refuse(arguments: dict[str, Any]) -> None:
    raise QUIT


COMMANDS: dict[str, qmp.Command] = {
    "query-status": lambda _arguments: {"running": True},
    "echo": lambda arguments: arguments,
    "quit": _refuse,
    "nothing": lambda _arguments: None,
}


def _control_socket(content: bytes, sizes: list[int]) -> None:
    whole = _answers(content, [len(content)])
    assert whole == _answers(content, sizes)
    if len(content) < 300:
        assert whole == _answers(content, [1] * len(content))
    texts = list(qmp.JsonStream().feed(content))
    alone = [list(qmp.JsonStream().feed(part)) for part in content.split(b"\xff")]
    assert texts == [text for part in alone for text in part], "something is left after 0xFF"


def _answers(content: bytes, sizes: list[int]) -> list[str]:
    """What is sent back, text by text; a client that must be dropped hears why last."""
    conversation = qmp.Conversation(COMMANDS, {"qemu": {"major": 0}})
    said, at = [], 0
    try:
        for size in sizes:
            for answer in conversation.answers(content[at : at + size]):
                assert answer.keys() - {"id"} in ({"return"}, {"error"}), answer
                said.append(json.dumps(answer))
            at += size
    except CommandError as error:
        said.append(str(error))
    return said


# ---------------------------------------------------------------- the monitor for people


def _monitor(parts: list[bytes], receives: bool) -> None:
    content = b"".join(parts)
    whole = _said([content], receives)
    assert whole == _said(parts, receives)
    if len(content) < 300:
        assert whole == _said([content[at : at + 1] for at in range(len(content))], receives)


def _long(piece: Piece) -> bytes:
    """With what comes before or behind it, it is too long for a line, or just not."""
    return piece.content + b"x" * (MAX_LINE_BYTES - 2) if piece.kind & 1 else piece.content


def _said(parts: list[bytes], receives: bool) -> tuple[object, ...]:
    """The answers, line by line, and what has come of them."""
    program = RecordingProgram(receives=receives)
    program.why = "nobody listens there"
    talk, said = HumanConversation(program, "1.2.3"), []
    prompt = f"({program.name}) ".encode()

    async def listen() -> None:
        for part in parts:
            said.extend([reply async for reply in talk.replies(part)])

    _at_once(listen())
    lines = b"".join(parts).split(b"\n")[:-1]
    for line, reply in zip(lines, said, strict=True):
        assert reply.endswith(prompt), reply
        text = reply.removesuffix(prompt)
        assert not text or text.endswith(b"\r\n"), reply
        too_long = text == TOO_LONG.replace("\n", "\r\n").encode()
        assert too_long == (len(line) > MAX_LINE_BYTES), line[:80]
    return said, program.done, program.parameters


def _at_once(work: Coroutine[Any, Any, None]) -> None:
    """Without a loop: nothing here waits for anything."""
    with contextlib.suppress(StopIteration):
        work.send(None)
        raise AssertionError("it waits")


# ---------------------------------------------------------------- journals


def _journal(control: bytes, pieces: list[Piece]) -> None:
    role = Role.SOURCE if control[1] & 1 else Role.DESTINATION
    lines = [_line(piece) for piece in pieces]
    with tempfile.TemporaryDirectory(dir=PLACE) as directory:
        path = os.path.join(directory, f"{name_of(TOKEN)}.{role.value}")
        content = b"".join(lines)
        with open(path, "wb") as file:
            file.write(content)
        with contextlib.suppress(MigrationError):
            assert claim_in(path)[:2] == (role, name_of(TOKEN))
        for found in journals(role, directory):
            assert isinstance(found.settled, bool)
        with contextlib.suppress(JournalError):
            if found := find_attempt({"kind": "demo"}, "tcp:there:1", directory):
                found._unlock()
        event = list(Event)[control[2] % len(Event)]
        with contextlib.suppress(JournalError):
            _write_on(Journal(role, TOKEN, directory), path, event)
        if os.path.exists(path):
            with open(path, "rb") as file:
                _assert_kept(content, lines, file.read())


def _line(piece: Piece) -> bytes:
    if not piece.kind & 1:
        return piece.content
    line = piece.content.replace(b"\n", b" ")
    return b"%08x %b\n" % (zlib.crc32(line), line)


def _write_on(found: Journal, path: str, event: Event) -> None:
    """What is written stands there for the next who reads, and so does what stood there."""
    found.open()
    try:
        assert isinstance(found.claim, Claim)
        json.dumps(found.facts)
        before = found.claim, dict(found.facts)
        with contextlib.suppress(JournalError):
            found.move(event, must=True, place={"path": "x"})
            assert found.claim is TABLE[found.role][before[0], event]
            assert found.facts == before[1] | {"place": {"path": "x"}}
        assert claim_in(path) == (found.role, found.name, found.claim)
    finally:
        found.close()


def _assert_kept(content: bytes, lines: list[bytes], after: bytes) -> None:
    """Only what a crash can have cut off is gone: nothing that a whole line stands behind."""
    kept = next(
        (i for i, pair in enumerate(zip(content, after, strict=False)) if pair[0] != pair[1]),
        min(len(content), len(after)),
    )
    lost = content[kept:]
    for line in lost.split(b"\n")[1:-1]:
        check, _, rest = line.partition(b" ")
        assert check != b"%08x" % zlib.crc32(rest), "a whole line is lost"


# ---------------------------------------------------------------- words on a command line


def _address(said: str) -> None:
    for listen in (False, True):
        with contextlib.suppress(UsageError):
            found = address.parse_address(said, listen=listen)
            assert 0 <= found.port <= 65535
            assert found.path or listen or (found.host and found.port)
            assert address.parse_address(str(found), listen=listen) == found, str(found)
    with contextlib.suppress(UsageError):
        assert server.parse_path(said)


def _quantities(said: str) -> None:
    with contextlib.suppress(UsageError):
        assert 0 <= units.parse_size(said, "it") < 1 << 62
    for page in (1, 4096):
        with contextlib.suppress(UsageError):
            size = units.parse_cache_size(said, page)
            assert size.bit_count() == 1
            assert size >= page
    for bare in ("ms", "s"):
        with contextlib.suppress(UsageError):
            assert 0 <= units.parse_milliseconds(said, "it", bare=bare) < 1e20


# ---------------------------------------------------------------- what to begin with

# (which reader, the pieces); the odd lines of journals get their check.
TEXTS: list[tuple[int, list[tuple[int, bytes]]]] = [
    (0, [(0, b'{"execute": "qmp_capabilities"}\r\n'),
         (0, b'{"execute": "query-status", "id": 7}{"execute":"quit"} '),
         (0, b'{"execute": "echo", "arguments": {"a": [1, "\\"}", null]}, "id": "x"}')]),
    (0, [(0, b'\xff{"execute": "qmp_capabilities", "arguments": {"enable": []}}'),
         (0, b'{"execute": "query-commands"} {"execute": "query-version"} nonsense [] {}')]),
    (0, [(0, b"{'execute': 'qmp_capabilities'}{'execute':'echo','id':'it\\'s \"}'}")]),
    (0, [(0, b'{"execute": "half\\'), (0, b'\xff{"execute": "qmp_capabilities"}')]),
    (1, [(1, b'{"claim": "NONE", "facts": {"description": "demo", "place": {"path": "/x"}}}'),
         (1, b'{"claim": "COMMITTED", "event": "READY", "facts": {}}')]),
    (1, [(1, b'{"claim": "PREPARED", "event": "VERIFIED", "facts": {"place": {}}}'),
         (1, b'{"claim": "OWNER", "event": "GO", "facts": {}}'), (1, b'{"started": true}'),
         (0, b'deadbeef {"cla')]),
    (1, [(1, b'{"claim": "NONE", "facts": {"guest": {"kind": "demo"}, "address": "tcp:there:1"}}'),
         (1, b'{"facts": {"ended": true}}')]),
    (1, [(1, b'{"claim": "NONE"}'), (0, b"00000000 {}\n"), (1, b'{"claim": "OWNER"}')]),
    *((2, [(0, said)]) for said in (
        b"tcp:host:4444", b"tcp:[::1]:4444", b"unix:/run/x", b"unix:///run/x", b"4444", b":0",
        b"tcp://host:1", b"[::]:4444")),
    *((3, [(0, said)]) for said in (
        b"64m", b"1GiB", b"4096", b" 2t ", b"300ms", b"1.5s", b"2h", b"5", b"1e9", b"-1")),
    (4, [(0, b"migrate_set_cache_size 256m\r\nmigrate -d tcp:ho"),
         (0, b"st:4444\ninfo migrate -a\n")]),
    (4, [(0, b"help\n? info\ninfo\ninfo migrate_parameters\ninfo migrate_capabilities\n"),
         (0, b"migrate_set_parameter max-bandwidth 10\nmigrate_set_parameter timeout 1.5s\n"),
         (0, b"migrate_set_capability xbzrle off\nmigrate_set_capability xbzrle maybe\n")]),
    (4, [(0, b"migrate_set_speed 1g\nmigrate_set_downtime 0.3\nmigrate unix:/run/x\nmigrate_inco"),
         (0, b"ming tcp:[::]:4444\nmigrate_cancel now\ninfo status\nq\n")]),
    (4, [(1, b"info "), (0, b"xx\nfl\xfcg\0\xef\xbf\xbd\n"), (1, b"y"), (0, b"xx\n\ninfo \nquit")]),
]  # fmt: skip
