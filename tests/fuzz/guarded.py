"""Bytes between two guards: nobody may write to these, and in the sanitizer build not even read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

try:
    from xbfuzz import poison
except ImportError:  # not in fuzzer.c: the guards are only compared

    def poison(_buffer: bytearray, _front: int, _back: int, _closed: bool) -> None: ...


GUARD = b"\xc5" * 64


class Guarded:
    """A copy of `content`; `view` is what may be touched."""

    def __init__(self, content: bytes) -> None:
        self.whole = bytearray(GUARD + content + GUARD)
        self.view = memoryview(self.whole)[len(GUARD) : len(GUARD) + len(content)]

    def __bytes__(self) -> bytes:
        return bytes(self.view)

    def check(self) -> None:
        assert self.whole.startswith(GUARD), "written before the beginning"
        assert self.whole.endswith(GUARD), "written behind the end"


@contextlib.contextmanager
def closed(*all_of_them: Guarded) -> Iterator[None]:
    """The guards are closed in here."""
    for one in all_of_them:
        poison(one.whole, len(GUARD), len(GUARD), True)
    try:
        yield
    finally:
        for one in all_of_them:
            poison(one.whole, 0, 0, False)
        for one in all_of_them:
            one.check()
