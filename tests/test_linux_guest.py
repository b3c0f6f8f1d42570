"""A real Linux guest, with Redis and a checker of its memory, is moved and is well afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from tests.bench import linux as bench
from tests.bench import qemu
from tests.bench.guest_files import shelf
from tests.bench.linux import BOOT, CHECKED, Guest, Journey, Way
from tests.bench.processes import ProgramError
from tests.bench.qemu import Emulator
from tests.bench.workload import Attempt, Workload
from tests.machine import between
from tests.machine.linux import Linux, LinuxError, build, read
from tests.network import Link
from tests.requirements import need

MIB = 1 << 20
LOG = b"""\
[    0.000000] Kernel command line: panic=1
[    7.100000] Run /init as init process
[    9.200000] redis: 
[   10.200000] redis: +PONG  :1  +OK  
[   10.900000] checker: 4096 pages checked, 0 wrong
[   11.200000] redis: +PONG  :2  +OK  
"""  # noqa: W291


def linux() -> Linux:
    """Return the guest; skip the test if it cannot be made."""
    try:
        return Linux(build(), size=512 * MIB, checked=CHECKED, pace=4000)
    except LinuxError as error:
        need(False, str(error))
        raise


@pytest.mark.qemu
@pytest.mark.timeout(300)
def test_linux_guest_is_well_after_a_move() -> None:
    guest, emulator = linux(), Emulator(between.later())
    with (
        shelf(4 * guest.size) as directory,
        Guest(guest, emulator, directory, "near") as near,
        Guest(guest, emulator, directory, "far", "", "-S", "-incoming", "defer") as far,
    ):
        near.wait_for_more(BOOT)
        workload = Workload(size=guest.size, patience=60.0)
        done = qemu.through(near, far, workload, address="127.0.0.1")
        assert done.completed, done.why
        far.arrive_from(near)


def test_report_of_a_healthy_guest() -> None:
    report = read(LOG)
    assert (report.redis, report.checked, report.trouble) == (2, 4096, ())


@pytest.mark.parametrize(
    "line",
    [
        b"[   12.0] BUG: unable to handle page fault for address: 00000000deadbeef",
        b"[   12.0] Oops: 0000 [#1] PREEMPT SMP NOPTI",
        b"[   12.0] Kernel panic - not syncing: Attempted to kill init!",
        b"[   12.0] rcu: INFO: rcu_preempt self-detected stall on CPU",
        b"[   12.0] redis-server[77]: segfault at 8 ip 000000000 sp 000000000 error 4",
        b"[   12.0] Call Trace:",
        b"[   12.0] checker: WRONG page 7 in pass 3",
        b"[   12.0] checker: 8192 pages checked, 1 wrong",
        b"[   12.0] checker: 4000 pages checked, 0 wrong",
        b"[   12.0] redis: +PONG  :4  +OK",
    ],
)
def test_trouble_in_the_guest_is_found(line: bytes) -> None:
    assert len(read(LOG + line + b"\n").trouble) == 1


def test_line_that_is_not_complete_is_not_read() -> None:
    """QEMU writes the file one character at a time."""
    answers = b"".join(b"redis: +PONG  :%d  +OK\n" % number for number in range(3, 18))
    for length in range(len(answers)):
        assert not read(LOG + answers[:length]).trouble
    assert read(LOG + answers).redis == 17


def test_progress_needs_redis_and_the_checker() -> None:
    before = read(LOG)
    more = b"redis: +PONG  :3  +OK\n", b"checker: 5000 pages checked, 0 wrong\n"
    assert not any(read(LOG + line).went_on(before, 1, 904) for line in more)
    assert read(LOG + b"".join(more)).went_on(before, 1, 904)
    assert not read(LOG + b"".join(more)).went_on(before, 1, 905)


# ---------------------------------------------------------------- one guest, many attempts


class FakeGuest:
    """Stands for a QEMU. `made` has all of them."""

    made: ClassVar[list[FakeGuest]] = []

    def __init__(self, *arguments: object) -> None:
        self.host, self.incoming = arguments[4], "-incoming" in arguments
        self.open = False
        self.made.append(self)

    def __enter__(self) -> FakeGuest:
        self.open = True
        return self

    def __exit__(self, *_: object) -> None:
        self.open = False

    def wait_for_more(self, timeout: float = 0.0) -> None:
        pass

    def arrive_from(self, near: FakeGuest) -> None:
        pass


@pytest.fixture
def journey(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Journey]:
    monkeypatch.setattr(bench, "Guest", FakeGuest)
    monkeypatch.setattr(FakeGuest, "made", [])
    guest = Linux(tmp_path, size=MIB, checked=MIB, pace=0)
    with Journey(guest, Emulator(), tmp_path, Link()) as journey:
        yield journey
    assert not any(guest.open for guest in FakeGuest.made)


def moves(completed: bool) -> Way:
    result = Attempt(completed, "", 1.0, 0, None, None, "-", {})
    return lambda near, far, workload, link, address: result


def fails(*_: object) -> Attempt:
    raise ProgramError("QEMU has ended")


def test_guest_boots_once_and_goes_to_and_fro(journey: Journey) -> None:
    for _ in range(3):
        assert journey.attempt(Workload(), moves(True)).memory == "equal"
    first, *others = FakeGuest.made
    assert not first.incoming
    assert all(guest.incoming for guest in others)
    hosts = [guest.host for guest in FakeGuest.made]
    assert hosts[0] == hosts[2] != hosts[1] == hosts[3]
    assert [guest.open for guest in FakeGuest.made] == [False, False, False, True]


def test_guest_stays_where_it_is_if_an_attempt_gives_up(journey: Journey) -> None:
    assert journey.attempt(Workload(), moves(False)).memory == "-"
    assert journey.attempt(Workload(), moves(True)).completed
    assert [guest.incoming for guest in FakeGuest.made] == [False, True, True]
    assert FakeGuest.made[1].host == FakeGuest.made[2].host


def test_guest_boots_again_after_an_attempt_that_fails(journey: Journey) -> None:
    with pytest.raises(ProgramError):
        journey.attempt(Workload(), fails)
    assert not any(guest.open for guest in FakeGuest.made)
    assert journey.attempt(Workload(), moves(True)).completed
    assert [guest.incoming for guest in FakeGuest.made] == [False, True, False, True]
