"""Captures the migration stream of a real QEMU in a file.

With return-path QEMU waits for SHUT before its migration completes. The sink answers QEMU's PING,
and says SHUT 0 when the stream is whole. It understands no more of the stream than that.

    QEMU ---- OPEN_RETURN_PATH, PING n --> sink        within the first bytes
    QEMU <------------------------ PONG n
    QEMU ---- ... EOF, VMDESCRIPTION ---->
    QEMU <------------------------ SHUT 0
"""

from __future__ import annotations

import asyncio
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

from tests.machine.qemu import PATIENCE, SLOW, Machine, MachineError

PIECE = 1 << 16
PING = re.compile(rb"\x08\x00\x01\x00\x00\x08\x00\x02\x00\x04(.{4})", re.DOTALL)
PING_WITHIN = 1 << 12
SHUT, PONG = 1, 2
DESCRIPTION = b"\x06"
DESCRIPTION_WITHIN = 1 << 20


async def capture(
    machine: Machine, path: Path, *capabilities: str, passes: int = 4, bandwidth: int = SLOW
) -> dict[str, Any]:
    """Migrate a machine into a file; return the answer to query-migrate.

    passes -- at least, over its memory; see Machine.begin
    """
    with path.open("wb") as file:
        sink = Sink(file, answers="return-path" in capabilities)
        where = machine.directory / "sink"
        server = await asyncio.start_unix_server(sink.serve, where, limit=PIECE)
        async with server:
            await machine.begin(f"unix:{where}", *capabilities, passes=passes, bandwidth=bandwidth)
            info = await machine.finish()
            async with asyncio.timeout(PATIENCE):
                await sink.closed.wait()
    if not sink.whole:
        raise MachineError(f"the stream in {path} has no end: {path.stat().st_size} bytes")
    return info


class Sink:
    """Writes a stream to a file, and answers on the return path.

    closed -- set when QEMU has closed the connection
    whole  -- whether the stream has its end
    """

    def __init__(self, file: BinaryIO, *, answers: bool) -> None:
        self.closed = asyncio.Event()
        self.whole = False
        self._file = file
        self._answers = answers
        self._pinged = False
        self._head = self._tail = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(PIECE):
                self._file.write(piece)
                self._take(piece)
                if self._answers:
                    self._answer(writer)
                    await writer.drain()
        finally:
            writer.close()
            self.closed.set()

    def _take(self, piece: bytes) -> None:
        self._head += piece[: PING_WITHIN - len(self._head)]
        self._tail = (self._tail + piece)[-DESCRIPTION_WITHIN:]
        self.whole = is_end(self._tail)

    def _answer(self, writer: asyncio.StreamWriter) -> None:
        if not self._pinged and (ping := PING.search(self._head)):
            self._pinged = True
            writer.write(struct.pack(">HH", PONG, 4) + ping[1])
        if self.whole:
            writer.write(struct.pack(">HHI", SHUT, 4, 0))


def is_end(tail: bytes) -> bool:
    """Return whether a stream with this tail is whole: a description of the right length ends it.

    The description is text, so the last zero byte is one of the four bytes of its length.
    """
    if not tail.endswith(b"}"):
        return False
    last = tail.rfind(b"\0")
    return any(
        tail[start - 5 : start] == DESCRIPTION + (len(tail) - start).to_bytes(4)
        for start in range(max(last + 1, 5), last + 5)
    )
