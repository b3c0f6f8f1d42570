"""What the fuzzer begins with, and what it has found, through the same functions, uninstrumented.

`make fuzz` looks for more (tests/fuzz). A file in tests/fuzz/cases/TARGET is an input that once
broke something, named for what that was.
"""

from pathlib import Path

import pytest

from tests.fuzz.pieces import Piece, join, split
from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS

CASES = sorted((Path(__file__).parent / "fuzz/cases").glob("*/*"))


@pytest.mark.parametrize("target", TARGETS)
def test_seeds(target):
    for seed in seeds(target):
        TARGETS[target](seed)


@pytest.mark.parametrize("case", CASES, ids=[f"{case.parent.name}-{case.name}" for case in CASES])
def test_cases(case):
    TARGETS[case.parent.name](case.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_any_bytes_are_an_input(target):
    for data in (b"", b"\0", b"\xff" * 40, bytes(range(256))):
        TARGETS[target](data)


def test_pieces_are_cut_as_they_were_joined():
    pieces = [Piece(1, b"abc"), Piece(255, b""), Piece(0, bytes(70))]
    assert split(join(b"ctrl", pieces)) == (b"ctrl", pieces)
    assert split(join(b"ctrl", pieces)[:-1])[1][-1] == Piece(0, bytes(69))


def test_the_targets_do_compare(monkeypatch):
    """A twin that differs in one byte fails them."""
    from tests.fuzz import sides

    right = sides._twin.decode

    def wrong(change, page):
        right(change, page)
        page[0] ^= 1

    monkeypatch.setattr(sides._twin, "decode", wrong)
    with pytest.raises(AssertionError):
        TARGETS["delta"](seeds("delta")[0])
