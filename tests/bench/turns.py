"""Repeats measurements in turn, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def in_turn(
    contenders: Mapping[str, Callable[[], T]],
    runs: int,
    say: Callable[[str], None] = lambda text: None,
    again: Callable[[T], bool] = lambda result: True,
) -> dict[str, list[T]]:
    """Measures A B C A B C ...: the results of each, in the order they were taken.

    again -- whether a contender with this result is measured again
    """
    results: dict[str, list[T]] = {name: [] for name in contenders}
    for turn in range(1, runs + 1):
        for name, measure in contenders.items():
            if results[name] and not again(results[name][-1]):
                continue
            say(f"{name} ({turn} of {runs})")
            results[name].append(measure())
    return results


def median(values: Iterable[float]) -> float:
    """Raises ValueError where there is nothing to take a median of."""
    values = list(values)
    if not values:
        raise ValueError("no values to take a median of")
    return statistics.median(values)
