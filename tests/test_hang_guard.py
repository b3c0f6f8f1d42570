"""Calls that hang are left behind, and cost neither the others nor much time."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator

import pytest

from migrate.runtime import hang_guard
from migrate.runtime.hang_guard import HangGuard
from tests.waiting import wait_until

PATIENCE = 0.05


class Looks:
    """Looks at numbers; those in `hang` do not return before `go_on`."""

    def __init__(self) -> None:
        self.hang: set[int] = set()
        self.go_on = threading.Event()
        self.made: list[int] = []

    def __call__(self, number: int) -> int:
        self.made.append(number)
        if number in self.hang:
            self.go_on.wait()
        return number * 10


@pytest.fixture
def looks() -> Iterator[Looks]:
    looks = Looks()
    yield looks
    looks.go_on.set()


def test_results_in_order(looks: Looks) -> None:
    guard = HangGuard[int, int]()
    assert guard.each([3, 1, 2], looks, PATIENCE) == {3: 30, 1: 10, 2: 20}
    assert looks.made == [3, 1, 2]
    assert guard.each([], looks, PATIENCE) == {}
    assert not guard.hanging


def test_processor_time_of_the_looks_is_counted() -> None:
    def spin(_number: int) -> None:
        until = time.thread_time() + 0.01
        while time.thread_time() < until:
            pass

    guard = HangGuard[int, None]()
    for _ in range(2):
        guard.each([1, 2], spin, 10)
    assert 0.04 <= guard.seconds < 1


def test_many_quick_looks_may_take_longer_than_one(looks: Looks) -> None:
    def slow(number: int) -> int:
        time.sleep(PATIENCE / 2)
        return looks(number)

    assert len(HangGuard[int, int]().each(range(8), slow, PATIENCE)) == 8


def test_look_that_uses_the_processor_does_not_hang(looks: Looks) -> None:
    """On a busy machine it may wait for one, and seem to stand still."""
    seconds = []

    def busy(number: int) -> int:
        began = time.monotonic()
        while not sum(seconds) > 4 * PATIENCE:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 20)  # without the lock of the interpreter
            seconds.append(time.monotonic() - began)
        return looks(number)

    guard = HangGuard[int, int]()
    assert guard.each([1, 2], busy, PATIENCE) == {1: 10, 2: 20}
    assert not guard.hanging


def test_hanging_items_are_left_out_until_they_return(looks: Looks) -> None:
    guard = HangGuard[int, int]()
    looks.hang = {1, 4}
    assert guard.each(range(5), looks, PATIENCE) == {0: 0, 2: 20, 3: 30}
    assert guard.hanging == {1, 4}
    began = time.monotonic()
    assert guard.each(range(5), looks, PATIENCE) == {0: 0, 2: 20, 3: 30}
    assert time.monotonic() - began < PATIENCE, "they are known to hang"
    looks.go_on.set()
    wait_until(lambda: not guard.hanging)
    made = len(looks.made)
    assert guard.each(range(5), looks, PATIENCE) == {n: 10 * n for n in range(5)}
    assert len(looks.made) == made + 5, "the threads that were left behind have ended"


def test_number_of_threads_is_bounded(looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hang_guard, "MAX_HANGING", 3)
    guard = HangGuard[int, int]()
    looks.hang = set(range(5))
    assert guard.each(range(7), looks, 0.01) == {}
    assert guard.hanging == {0, 1, 2}
    assert guard.each([9], looks, 0.01) == {}


def test_no_more_threads(looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    assert HangGuard[int, int]().each([1], looks, PATIENCE) == {}


def test_errors_are_raised(looks: Looks) -> None:
    def fails(number: int) -> int:
        return 1 // number

    guard = HangGuard[int, int]()
    with pytest.raises(ZeroDivisionError):
        guard.each([1, 0, 2], fails, PATIENCE)
    assert guard.each([1, 2], looks, PATIENCE) == {1: 10, 2: 20}
