"""The shape of an input: four bytes of control, then pieces of (kind, length, bytes).

A piece is a frame, a batch, an operation or a line, as the target likes: so an input can be cut,
spliced and repeated where it means something. Any bytes are an input; what a length lacks is left
out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

CONTROL = 4
MOST = 0xFFFF


class Piece(NamedTuple):
    kind: int
    content: bytes


def split(data: bytes) -> tuple[bytes, list[Piece]]:
    """(control, pieces) of any bytes."""
    pieces, at = [], CONTROL
    while at + 3 <= len(data):
        kind, length = data[at], int.from_bytes(data[at + 1 : at + 3], "big")
        pieces.append(Piece(kind, data[at + 3 : at + 3 + length]))
        at += 3 + length
    return data[:CONTROL].ljust(CONTROL, b"\0"), pieces


def join(control: bytes, pieces: Iterable[Piece]) -> bytes:
    return control + b"".join(
        bytes([kind]) + len(content).to_bytes(2, "big") + content for kind, content in pieces
    )
