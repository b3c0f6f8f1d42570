"""Changes inputs piece by piece: libFuzzer's own mutations do not know where a piece begins."""

from __future__ import annotations

import os
import random
import re

from xbfuzz import mutated  # a part of fuzzer.c

from tests.fuzz.pieces import MOST, Piece, join, split
from tests.fuzz.seeds import seeds

_TARGET = os.environ["FUZZ_TARGET"]
_WORDS = [piece for seed in seeds(_TARGET) for piece in split(seed)[1]]
# What a text is made of, and what may stand there instead.
_TOKEN = re.compile(rb'"[^"]*"|[A-Za-z_]+|[\d.+-]+|[^\x00-\x7f]+|[^\s\w"]')
_GROUP = re.compile(rb"[{\[][^{}\[\]]*[}\]]")
_TOKENS = (
    b"[]", b"{}", b"7", b"-1", b"1e999", b"null", b"true", b'"x"', b'"\\ud800"', b'"', b'"\\',
    b"\xff", b"\0", b"//", b":", b"[", "\u017f".encode(), "\u212a".encode(), "\u0663".encode(),
)  # fmt: skip


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """A neighbour of `data`, of at most `most` bytes."""
    chance = random.Random(seed)
    control, pieces = split(data)
    if not _WORDS or not pieces or chance.random() < 0.2:
        return mutated(data, most)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        _change(chance, pieces)
    if chance.random() < 0.1:
        control = mutated(control, len(control)).ljust(len(control), b"\0")
    return join(control, pieces)[:most]


def _change(chance: random.Random, pieces: list[Piece]) -> None:
    at = chance.randrange(len(pieces) + 1)
    what = chance.random()
    if _TARGET == "text" and at < len(pieces) and chance.random() < 0.4:
        pieces[at] = Piece(pieces[at].kind, _with_token(chance, pieces[at].content))
    elif at == len(pieces) or what < 0.15:
        pieces.insert(at, chance.choice(_WORDS))
    elif what < 0.30:
        pieces[at] = Piece(pieces[at].kind, _one_more(chance, pieces[at].content))
    elif what < 0.65:
        kind, content = pieces[at]
        room = min(max(2 * len(content), 32), MOST)
        pieces[at] = Piece(kind, mutated(content, room))
    elif what < 0.75:
        pieces[at] = Piece(pieces[at].kind ^ 1 << chance.randrange(8), pieces[at].content)
    elif what < 0.82:
        pieces.insert(at, pieces[at])
    elif what < 0.90:
        other = chance.randrange(len(pieces))
        pieces[at], pieces[other] = pieces[other], pieces[at]
    elif len(pieces) > 1:
        del pieces[at]


def _one_more(chance: random.Random, content: bytes) -> bytes:
    """With one byte that is a little larger or smaller: what is off by one is found next to what
    is right."""
    if not content:
        return content
    at = chance.randrange(len(content))
    byte = content[at] + chance.choice((-2, -1, 1, 2))
    return content[:at] + bytes([byte & 0xFF]) + content[at + 1 :]


def _with_token(chance: random.Random, text: bytes) -> bytes:
    """A text with one token replaced by another, of this text or of any."""
    found = list((_GROUP if chance.random() < 0.3 else _TOKEN).finditer(text))
    if not found:
        return chance.choice(_TOKENS)
    old, other = chance.choice(found), chance.choice(found)
    new = other.group() if chance.random() < 0.3 else chance.choice(_TOKENS)
    return text[: old.start()] + new + text[old.end() :]
