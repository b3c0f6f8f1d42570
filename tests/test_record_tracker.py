"""When the kernel's record is used, and that nothing is lost when it is given up."""

from __future__ import annotations

import time

import pytest

from migrate.memory.dirty import Method
from migrate.memory.memory import Memory
from migrate.tracking.record import Refused
from migrate.tracking.tracker import RecordTracker, Tracking, is_wanted
from proto.codec.kernel import PageEncoder, PageHashes
from proto.codec.pageset import PageSet
from tests.recording import PAGE


class Fake:
    """A record that names the pages it is told to."""

    seconds = 0.0
    pids = (4711,)

    def __init__(self) -> None:
        self.pages: set[int] = set()
        self.happened, self.refusal = "", ""
        self.closed = False

    def look(self, dirty: PageSet) -> str:
        if self.refusal:
            raise Refused(self.refusal)
        for page in self.pages:
            dirty.add(page)
        self.pages = set()
        happened, self.happened = self.happened, ""
        return happened

    def close(self) -> None:
        self.closed = True


class Tracked:
    """A guest of eight pages, all of which the peer holds, and a tracker with a fake record."""

    def __init__(self, *, tracking: Tracking = Tracking.KERNEL, limit: float = 0.3) -> None:
        self.memory = bytearray(8 * PAGE)
        self.encoder = PageEncoder(PageHashes(8, PAGE, bytes(16)), headroom=64)
        self.encoder.adopt_zeros(0, 8)
        self.record = Fake()
        self.begun, self.running = 0, True
        self.tracker = RecordTracker(
            Memory(len(self.memory), memoryview(self.memory)), self.encoder, self.begin,
            is_wanted(tracking, lambda: limit), lambda: self.running,
        )  # fmt: skip

    def begin(self) -> Fake:
        self.begun += 1
        if self.record.refusal:
            raise Refused(self.record.refusal)
        return self.record

    def write(self, page: int, *, named: bool = True) -> None:
        self.memory[page * PAGE] += 1
        if named:
            self.record.pages.add(page)

    def take(self) -> set[int]:
        return set(self.tracker.take())


def test_pages_written_before_the_record_began_are_found_by_comparing() -> None:
    guest = Tracked()
    guest.write(3, named=False)
    assert guest.take() == {3}
    assert guest.tracker.method is Method.KERNEL
    assert "the kernel records what process 4711 writes" in guest.tracker.collect_notices()[0]


def test_the_record_is_used_only_where_comparing_takes_too_long() -> None:
    patient, hasty = Tracked(tracking=Tracking.AUTO), Tracked(tracking=Tracking.AUTO, limit=0.0)
    patient.take()
    hasty.take()
    assert (patient.begun, hasty.begun) == (0, 1)
    assert patient.tracker.method is Method.COMPARE
    forbidden = Tracked(tracking=Tracking.COMPARE, limit=0.0)
    forbidden.take()
    assert not forbidden.begun


def test_the_record_does_not_begin_in_the_pause() -> None:
    guest = Tracked()
    guest.running = False
    guest.write(2, named=False)
    assert guest.take() == {2}
    assert not guest.begun


def test_pages_put_back_are_taken_again() -> None:
    guest = Tracked()
    guest.take()
    guest.tracker.put_back(PageSet(8, {5, 6}))
    guest.write(1)
    assert guest.take() == {1, 5, 6}


def test_a_refused_record_is_said_once_and_the_guest_is_compared() -> None:
    guest = Tracked()
    guest.record.refusal = "gdb (4712) traces it"
    guest.write(1, named=False)
    assert guest.take() == {1}
    assert guest.take() == {1}, "it was not sent"
    assert guest.begun == 1
    (notice,) = guest.tracker.collect_notices()
    assert notice.endswith("cannot be used: gdb (4712) traces it")


def test_a_record_that_ends_loses_nothing() -> None:
    guest = Tracked()
    guest.take()
    guest.write(4, named=False)
    guest.record.refusal = "a process writes it by a descriptor"
    assert guest.take() == {4}
    assert guest.tracker.method is Method.COMPARE
    assert guest.record.closed


@pytest.mark.parametrize("running", [True, False])
def test_after_anything_unusual_the_guest_is_compared(running: bool) -> None:
    guest = Tracked()
    guest.take()
    guest.running = running
    guest.write(4, named=False)
    guest.record.happened = "a process that maps the guest has forked"
    assert guest.take() == {4}
    assert guest.tracker.method is Method.KERNEL, "once is no reason to give it up"


def test_a_record_that_missed_a_page_is_not_used_again() -> None:
    guest = Tracked()
    guest.take()
    guest.write(4, named=False)
    deadline = time.monotonic() + 60
    while guest.take() != {4}:  # the next proof is not due yet
        assert time.monotonic() < deadline
    assert "it has missed 1 written pages" in guest.tracker.collect_notices()[-1]
    assert guest.record.closed
    assert guest.tracker.take_seconds > 0


def test_a_restart_forgets_what_will_be_sent_anyway() -> None:
    guest = Tracked()
    guest.take()
    guest.tracker.put_back(PageSet(8, {1}))
    guest.write(2)
    guest.tracker.start()
    guest.record.pages = {3}
    assert 3 in guest.take()


def test_closing_ends_the_record() -> None:
    guest = Tracked()
    guest.take()
    guest.tracker.close()
    assert guest.record.closed
