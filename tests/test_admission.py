"""The admission queue: which connection is displaced when there are too many."""

from __future__ import annotations

import resource
import socket
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.transport import networks
from migrate.transport.address import ip_of
from migrate.transport.admission import MAX_QUEUED, RANKS, SHOWN, SILENT, SPEAKS, AdmissionQueue
from migrate.transport.networks import is_own
from tests.requirements import need

NEAR, FAR = ("10.0.0.1", 1), ("10.0.0.2", 1)


def queue_of(most: int) -> tuple[AdmissionQueue[int], list[int]]:
    gone: list[int] = []
    return AdmissionQueue(gone.append, most), gone


def test_silent_connections_do_not_displace_one_that_speaks() -> None:
    queue, gone = queue_of(8)
    queue.add(-1, NEAR)
    queue.promote(-1, SPEAKS)
    for number in range(1000):
        queue.add(number, NEAR)
    assert -1 in queue
    assert len(queue) == 8
    assert gone == list(range(993))


def test_connections_without_certificate_do_not_displace_one_with() -> None:
    queue, gone = queue_of(8)
    queue.add(-1, NEAR, SHOWN)
    for number in range(100):
        queue.add(number, NEAR)
        queue.promote(number, SPEAKS)
    assert -1 in queue
    assert gone == list(range(93))


def test_address_displaces_its_own_connections() -> None:
    queue, gone = queue_of(8)
    queue.add(-1, FAR)
    for number in range(1000):
        queue.add(number, (NEAR[0], number))
    assert -1 in queue
    assert -1 not in gone


def test_speaking_connections_do_not_displace_a_silent_one_of_another_address() -> None:
    queue, gone = queue_of(8)
    for number in range(8):
        queue.add(number, NEAR)
        queue.promote(number, SPEAKS)
    queue.add(-1, FAR)
    for number in range(8, 1000):
        queue.add(number, NEAR)
        queue.promote(number, SPEAKS)
    assert -1 in queue
    assert gone == list(range(993))


def test_equally_crowded_addresses_lose_the_longest_waiting() -> None:
    """Many addresses that speak do not displace a connection that has just come."""
    queue, gone = queue_of(3)
    for number in (1, 2):
        queue.add(number, (f"10.0.1.{number}", 1), SPEAKS)
    for number in (3, 4, 5):
        queue.add(number, (f"10.0.1.{number}", 1))
    assert gone == [1, 2]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("2001:db8::1", 1, 0, 0), ("2001:db8::ffff:1", 2, 0, 0), True),
        (("2001:db8::1", 1, 0, 0), ("2001:db8:0:1::1", 2, 0, 0), False),
        (("::ffff:10.0.0.1", 1, 0, 0), ("::ffff:10.0.0.2", 1, 0, 0), False),
        (("fe80::1%eth0", 1, 0, 2), ("fe80::2%eth0", 1, 0, 2), True),
        (("64:ff9b::a00:1", 1, 0, 0), ("64:ff9b::a00:2", 1, 0, 0), False),
        (("64:ff9b::a00:1", 1, 0, 0), ("64:ff9b::a00:1", 2, 0, 0), True),
        (("64:ff9b::a00:1", 1, 0, 0), ("10.0.0.1", 1), True),
        (("64:ff9b:1::a00:1", 1, 0, 0), ("64:ff9b:1::a00:2", 1, 0, 0), False),
        (("64:ff9b:2::a00:1", 1, 0, 0), ("64:ff9b:2::a00:2", 1, 0, 0), True),
        (("2002:a00:1:1::1", 1, 0, 0), ("2002:a00:1:2::1", 1, 0, 0), True),
        (("2002:a00:1::1", 1, 0, 0), ("2002:a00:2::1", 1, 0, 0), False),
        (("2001::1:0:0:f5ff:fffe", 1, 0, 0), ("2001::1:0:0:f5ff:fffd", 1, 0, 0), False),
        (("2001:0:1::1:f5ff:fffe", 1, 0, 0), ("2001:0:2::2:f5ff:fffe", 1, 0, 0), True),
        (("::ffff:10.0.0.1", 1, 0, 0), ("10.0.0.1", 1), True),
        (("127.0.0.1", 1), ("127.77.1.2", 1), True),
        (("127.0.0.1", 1), ("::1", 1, 0, 0), True),
        (("127.0.0.1", 1), ("::ffff:127.1.2.3", 1, 0, 0), True),
        (("127.0.0.1", 1), "", True),
        (("127.0.0.1", 1), ("10.0.0.1", 1), False),
        (("64:ff9b::7f00:1", 1, 0, 0), ("127.0.0.1", 1), False),
        ("", None, True), (b"", (), True), (("what?", 1), "", True),
    ],
)  # fmt: skip
def test_ipv6_network_and_translated_ipv4_host_count_as_one_address(one, other, same) -> None:
    queue, gone = queue_of(3)
    for number in range(2):
        queue.add(number, one)
    queue.add(2, other)
    queue.add(3, other)
    assert gone == [0]  # the oldest of all, or of the most crowded address
    queue.add(4, other)
    assert gone == ([0, 1] if same else [0, 2])


def test_local_user_with_many_loopback_addresses_is_one_stranger() -> None:
    queue, gone = queue_of(8)
    queue.add(-1, FAR)
    for number in range(1000):
        queue.add(number, (f"127.0.{number // 250}.{number % 250 + 1}", number))
    assert gone == list(range(993))


def test_addresses_of_this_host_are_one_stranger() -> None:
    """A socket that is connected to an address of documentation tells which one is ours."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError:
            need(False, "a route to other hosts")
        own = probe.getsockname()
    queue, gone = queue_of(3)
    queue.add(0, FAR)
    for number, one in enumerate((own, ("127.0.0.1", 1), ("127.0.0.2", 1)), 1):
        queue.add(number, one)
    assert gone == [1]


@pytest.mark.parametrize(("value", "own"), [("0", True), ("1", False), (None, False)])
def test_own_addresses_are_unknown_where_any_can_be_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, own: bool
) -> None:
    if value is not None:
        (tmp_path / "4").write_text(f"{value}\n")
    monkeypatch.setattr(networks, "NONLOCAL_BIND", f"{tmp_path}/{{}}")
    networks._binds_anywhere.cache_clear()
    monkeypatch.setattr(socket.socket, "bind", lambda _socket, _address: None)
    try:
        assert is_own(ip_of("203.0.113.1")) == own
        assert is_own(ip_of("127.3.3.3"))
    finally:
        networks._binds_anywhere.cache_clear()


STEPS = st.tuples(st.integers(0, 9), st.integers(0, 4), st.sampled_from(RANKS))


def may_be_displaced(here: dict[int, tuple[int, int]]) -> set[int]:
    """Return which of {number: (address, rank)} the next one may displace."""
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
def test_random_steps_keep_the_limit_and_drop_each_connection_once(steps) -> None:
    queue, gone = queue_of(4)
    here: dict[int, tuple[int, int]] = {}
    for number, (what, address, rank) in enumerate(steps):
        if what < 7:
            before = len(gone)
            possible = may_be_displaced(here) if here else set()
            queue.add(number, (f"10.0.0.{address}", 1), rank)
            for one in gone[before:]:
                assert one in possible
                del here[one]
            here[number] = address, rank
        elif here:
            one = sorted(here)[number % len(here)]
            if what == 7:
                queue.discard(one)
                queue.discard(one)
                here.pop(one)
            else:
                queue.promote(one, rank)
                here[one] = here[one][0], max(here[one][1], rank)
        assert set(queue.members()) == set(here)
        assert len(queue) <= 4
    assert len(gone) == len(set(gone))
    for one in [*here]:
        queue.discard(one)
    assert len(queue) == 0
    assert not any(queue._ranks)


def test_limit_is_a_share_of_the_descriptors(monkeypatch) -> None:
    unlimited = resource.RLIM_INFINITY
    for soft, limit in ((1024, 256), (20000, MAX_QUEUED), (3, 1), (unlimited, MAX_QUEUED)):
        monkeypatch.setattr(resource, "getrlimit", lambda _what, soft=soft: (soft, soft))
        assert AdmissionQueue(id).limit == limit
    assert SILENT < SPEAKS < SHOWN
