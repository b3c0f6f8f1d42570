"""Check all cells of a table in one test, so that pytest counts behaviours and not cells."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def check_each(check: Callable[..., object], cells: Iterable[Any]) -> None:
    """Call `check` for each cell, and fail with all the cells whose check failed.

    A cell that is a tuple is passed as the arguments of `check`, any other one as its argument.
    An empty table fails too: it would check nothing.
    """
    cells, failed = list(cells), []
    for cell in cells:
        arguments = cell if isinstance(cell, tuple) else (cell,)
        try:
            check(*arguments)
        except (Exception, pytest.fail.Exception) as error:
            failed.append((", ".join(map(_brief, arguments)), error))
    assert cells, "the table has no cells"
    if failed:
        lines = [f"{name}: {type(error).__name__}: {error}" for name, error in failed]
        text = f"{len(failed)} of {len(cells)} cells failed:\n" + "\n".join(lines)
        # The traceback of the first one shows where the check failed.
        raise AssertionError(text) from failed[0][1]


def _brief(value: object) -> str:
    if isinstance(value, enum.Enum):
        return value.name
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
