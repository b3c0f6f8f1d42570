"""How long something that breaks is tried again: only progress renews it."""

import pytest

from migrate.transport.retry_budget import Budget


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_retry_time_runs_from_the_first_break(clock):
    budget = Budget(clock=clock)
    for _ in range(5):
        budget.broke()
        clock.now += 10
    assert budget.left(60) == 10
    assert (budget.breaks, budget.used()) == (5, 50)


def test_progress_renews_it(clock):
    budget = Budget((0.1, 5.0), clock)
    budget.broke()
    clock.now += 50
    assert [budget.pause(60) for _ in range(3)] == [0.1, 0.2, 0.4]
    budget.renew()
    assert budget.used() == 0.0
    clock.now += 1000
    budget.broke()
    assert budget.left(60) == 60
    assert budget.pause(60) == 0.1


def test_pause_is_limited_by_the_time_left(clock):
    budget = Budget((4.0, 5.0), clock)
    budget.broke()
    assert [budget.pause(60) for _ in range(3)] == [4.0, 5.0, 5.0]
    clock.now += 58
    assert budget.pause(60) == 2.0
    clock.now += 10
    assert budget.pause(60) == 0.0


def test_attempt_with_possible_progress_gets_time_to_ask(clock):
    """It ran for long: whether that was for nothing is known when the other side is asked."""
    budget = Budget(clock=clock)
    budget.broke()
    clock.now += 5
    assert not budget.over(60)
    clock.now += 300
    budget.broke(greeted=True)
    assert budget.left(60) == 60
    assert budget.over(60), "and where nothing came, that is the end"
    budget.renew()
    assert not budget.over(60)


def test_first_attempt_after_a_break_may_continue(clock):
    budget = Budget(clock=clock)
    budget.broke(greeted=True)
    clock.now += 3
    budget.broke()  # in the greeting
    clock.now += 70
    assert not budget.over(60)


def test_greetings_alone_do_not_renew_it(clock):
    budget = Budget((0.1, 5.0), clock)
    budget.broke(greeted=True)
    attempts = 0
    while budget.left(60) > 0 and not budget.over(60):
        clock.now += budget.pause(60)
        budget.broke(greeted=True)
        attempts += 1
    assert 10 < attempts < 30
    assert budget.used() < 70
