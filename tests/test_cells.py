"""A test over a table reports every cell that fails."""

import pytest

from tests.cells import check_each


def below(number: int, limit: int) -> None:
    assert number < limit, f"{number} is not below {limit}"


def test_every_failing_cell_is_reported() -> None:
    with pytest.raises(AssertionError) as info:
        check_each(below, [(1, 2), (3, 2), (1, 1), (0, 1)])
    summary, *lines = str(info.value).splitlines()
    assert summary == "2 of 4 cells failed:"
    assert [line for line in lines if line.startswith("3, 2: AssertionError: 3 is not below 2")]
    assert [line for line in lines if line.startswith("1, 1: AssertionError: 1 is not below 1")]
    assert info.value.__cause__ is not None


def test_missing_exception_in_a_cell_is_reported() -> None:
    def check(text: str) -> None:
        with pytest.raises(ValueError, match="invalid literal"):
            int(text)

    with pytest.raises(AssertionError, match=r"1 of 2 cells failed:\n'1': Failed: "):
        check_each(check, ["one", "1"])


def test_table_without_cells_fails() -> None:
    with pytest.raises(AssertionError, match="no cells"):
        check_each(below, [])
