"""Deltas by themselves. Control: page size (2 bytes), content of the page, where the delta is cut
in two for the calls that take many. The rest is the delta."""

from __future__ import annotations

from array import array

from proto.wire.errors import DecodeError
from tests.fuzz.guarded import Guarded, closed
from tests.fuzz.pieces import CONTROL
from tests.fuzz.sides import PATTERN, SIDES, SIMD, outcome, use_simd

MAX_PAGE = 16384
TWIN_SIZE = 1500  # the twin encodes a larger page in milliseconds


def delta(data: bytes) -> None:
    control, content = data[:CONTROL].ljust(CONTROL, b"\0"), data[CONTROL:]
    size = 1 + int.from_bytes(control[:2], "big") % MAX_PAGE
    old = PATTERN[control[2] : control[2] + size]
    results = []
    for side in SIDES:
        page, change = Guarded(old), Guarded(content)
        with closed(page, change):
            said = outcome(side.decode, change.view, page.view)
        assert said is None or said.startswith(f"{DecodeError.__name__}: "), said
        assert said is None or bytes(page) == old, "refused, and the page changed"
        assert bytes(change) == content
        results.append((said, bytes(page)))
    assert results[0] == results[1], [said for said, _ in results]
    if results[0][0] is None:
        _round_trip(old, results[0][1])
    _many(content, size, old, control[3])


def _round_trip(old: bytes, new: bytes) -> None:
    """Every kernel writes the same delta, and it leads to `new`."""
    for merge in (False, True):
        found = {}
        for name in SIMD:
            use_simd(name)
            before, after = Guarded(old), Guarded(new)
            with closed(before, after):
                found[name] = SIDES[0].encode(before.view, after.view, merge)
        use_simd()
        if len(old) <= TWIN_SIZE:
            found["twin"] = SIDES[1].encode(old, new, merge)
        [made] = set(found.values())
        if made is not None:
            page = bytearray(old)
            SIDES[0].decode(made, page)
            assert page == new


def _many(content: bytes, size: int, old: bytes, cut: int) -> None:
    """The delta cut in two, whose halves may claim more than there is."""
    claims = [cut, len(content) - cut, -1 if cut & 1 else 3]
    results = []
    for side in SIDES:
        pages, deltas = Guarded(old * len(claims)), Guarded(content)
        with closed(pages, deltas):
            said = outcome(side.decode_pages, deltas.view, array("i", claims), pages.view, size)
        results.append((said, bytes(pages)))
    assert results[0] == results[1], [said for said, _ in results]
