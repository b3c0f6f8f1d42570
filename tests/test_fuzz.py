"""The fuzzer's seeds and its past findings, run through the same targets without instrumentation.

`make fuzz` looks for more (tests/fuzz). A file in tests/fuzz/cases/TARGET is an input that once
broke something, and is named after what it broke.
"""

from pathlib import Path

import pytest

from tests.fuzz.pieces import Piece, join, split
from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS

CASES = sorted((Path(__file__).parent / "fuzz/cases").glob("*/*"))


@pytest.mark.parametrize("target", TARGETS)
def test_fuzz_targets_accept_their_seeds(target):
    for seed in seeds(target):
        TARGETS[target](seed)


@pytest.mark.parametrize("case", CASES, ids=[f"{case.parent.name}-{case.name}" for case in CASES])
def test_recorded_fuzz_cases_pass(case):
    TARGETS[case.parent.name](case.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_any_bytes_are_valid_fuzz_input(target):
    for data in (b"", b"\0", b"\xff" * 40, bytes(range(256))):
        TARGETS[target](data)


def test_fuzz_input_splits_as_it_was_joined():
    pieces = [Piece(1, b"abc"), Piece(255, b""), Piece(0, bytes(70))]
    assert split(join(b"ctrl", pieces)) == (b"ctrl", pieces)
    assert split(join(b"ctrl", pieces)[:-1])[1][-1] == Piece(0, bytes(69))


def test_fuzz_targets_detect_a_difference(monkeypatch):
    """A twin whose result differs in one byte makes the target fail."""
    from tests.fuzz import sides

    right = sides.TWIN.decode

    def wrong(change, page):
        right(change, page)
        page[0] ^= 1

    monkeypatch.setattr(sides.TWIN, "decode", wrong)
    with pytest.raises(AssertionError):
        TARGETS["delta"](seeds("delta")[0])
