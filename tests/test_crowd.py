"""Who has to go of too many: nobody with a certificate before one without, nor one of an address
that has fewer places than another."""

from __future__ import annotations

import resource
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.crowd import MOST, RANKS, SHOWN, SILENT, SPEAKS, Crowd

NEAR, FAR = ("10.0.0.1", 1), ("10.0.0.2", 1)


def crowd(most: int) -> tuple[Crowd[int], list[int]]:
    gone: list[int] = []
    return Crowd(gone.append, most), gone


def test_who_only_connects_pushes_out_nobody_who_speaks() -> None:
    found, gone = crowd(8)
    found.come(-1, NEAR)
    found.rise(-1, SPEAKS)
    for number in range(1000):
        found.come(number, NEAR)
    assert -1 in found
    assert len(found) == 8
    assert gone == list(range(993))


def test_who_says_something_pushes_out_nobody_who_has_shown_a_certificate() -> None:
    found, gone = crowd(8)
    found.come(-1, NEAR, SHOWN)
    for number in range(100):
        found.come(number, NEAR)
        found.rise(number, SPEAKS)
    assert -1 in found
    assert gone == list(range(93))


def test_a_stranger_takes_his_own_places() -> None:
    found, gone = crowd(8)
    found.come(-1, FAR)
    for number in range(1000):
        found.come(number, (NEAR[0], number))
    assert -1 in found
    assert -1 not in gone


def test_strangers_of_one_address_who_speak_push_out_no_silent_one_of_another() -> None:
    found, gone = crowd(8)
    for number in range(8):
        found.come(number, NEAR)
        found.rise(number, SPEAKS)
    found.come(-1, FAR)
    for number in range(8, 1000):
        found.come(number, NEAR)
        found.rise(number, SPEAKS)
    assert -1 in found
    assert gone == list(range(993))


def test_of_addresses_with_as_many_places_the_one_that_waits_longest_goes() -> None:
    """So a crowd of many addresses that speak does not push out who has just come."""
    found, gone = crowd(3)
    for number in (1, 2):
        found.come(number, (f"10.0.1.{number}", 1), SPEAKS)
    for number in (3, 4, 5):
        found.come(number, (f"10.0.1.{number}", 1))
    assert gone == [1, 2]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("2001:db8::1", 1, 0, 0), ("2001:db8::ffff:1", 2, 0, 0), True),
        (("2001:db8::1", 1, 0, 0), ("2001:db8:0:1::1", 2, 0, 0), False),
        (("::ffff:10.0.0.1", 1, 0, 0), ("::ffff:10.0.0.2", 1, 0, 0), False),
        (("fe80::1%eth0", 1, 0, 2), ("fe80::2%eth0", 1, 0, 2), True),
        ("", None, True), (b"", (), True), (("what?", 1), "", True),
    ],
)  # fmt: skip
def test_a_network_of_ipv6_is_one_stranger(one, other, same) -> None:
    found, gone = crowd(3)
    for number in range(2):
        found.come(number, one)
    found.come(2, other)
    found.come(3, other)
    assert gone == [0]  # the oldest of all, or of the address that has most
    found.come(4, other)
    assert gone == ([0, 1] if same else [0, 2])


STEPS = st.tuples(st.integers(0, 9), st.integers(0, 4), st.sampled_from(RANKS))


def may_go(here: dict[int, tuple[int, int]]) -> set[int]:
    """Of {number: (address, rank)}: without a certificate, of an address that has most."""
    bare = {one: where for one, where in here.items() if where[1] != SHOWN} or here
    places = Counter(address for address, _ in bare.values())
    most = max(places.values())
    may = set()
    for address in (address for address, count in places.items() if count == most):
        theirs = {one: rank for one, (where, rank) in bare.items() if where == address}
        silent = {one for one, rank in theirs.items() if rank == SILENT}
        may |= silent or set(theirs)
    return may


@given(st.lists(STEPS, max_size=80))
def test_as_many_are_in_it_as_may_be_and_each_is_told_once_that_it_goes(steps) -> None:
    found, gone = crowd(4)
    here: dict[int, tuple[int, int]] = {}
    for number, (what, address, rank) in enumerate(steps):
        if what < 7:
            before = len(gone)
            possible = may_go(here) if here else set()
            found.come(number, (f"10.0.0.{address}", 1), rank)
            for one in gone[before:]:
                assert one in possible
                del here[one]
            here[number] = address, rank
        elif here:
            one = sorted(here)[number % len(here)]
            if what == 7:
                found.go(one)
                found.go(one)
                here.pop(one)
            else:
                found.rise(one, rank)
                here[one] = here[one][0], max(here[one][1], rank)
        assert set(found.members()) == set(here)
        assert len(found) <= 4
    assert len(gone) == len(set(gone))
    for one in [*here]:
        found.go(one)
    assert len(found) == 0
    assert not any(found._ranks)


def test_a_share_of_the_descriptors_is_the_bound(monkeypatch) -> None:
    for soft, most in ((1024, 256), (20000, MOST), (3, 1), (resource.RLIM_INFINITY, MOST)):
        monkeypatch.setattr(resource, "getrlimit", lambda _what, soft=soft: (soft, soft))
        assert Crowd(id).most == most
    assert SILENT < SPEAKS < SHOWN
