"""Samples of a guest, by a clock that is passed in, and the estimates made from them."""

import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.guests.buffer import BufferGuest
from migrate.guests.file import FileGuest
from migrate.memory._memory import set_marks
from migrate.source.sample import INTERVALS, WARM_SECONDS, Cost, Interval, Sample, Sampler

PAGE = 4096


class Time:
    """A clock that only sleeping moves; the guest writes meanwhile."""

    def __init__(self, write):
        self.now = 0.0
        self.write = write

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.write(seconds)


class Writer:
    """Writes one byte in each of `rate` pages a second, in turn, of the first `hot`."""

    def __init__(self, memory, rate, hot, mark=lambda _offset, _length: None, length=1):
        self.memory, self.rate, self.hot, self.mark, self.length = memory, rate, hot, mark, length
        self.page = self.owed = 0

    def __call__(self, seconds):
        self.owed += seconds * self.rate
        while self.owed >= 1:
            self.owed -= 1
            at = self.page * PAGE
            old = self.memory[at : at + self.length]
            self.memory[at : at + self.length] = bytes((byte + 1) % 256 for byte in old)
            self.mark(at, self.length)
            self.page = (self.page + 1) % self.hot


def sampled(guest, writer, *, cache=1 << 20, xbzrle=True, most=1 << 30):
    time = Time(writer)
    sampler = Sampler(
        guest, PAGE, cache, xbzrle=xbzrle, merge=True, sleep=time.sleep, clock=time.clock, most=most
    )
    return sampler.take()


@pytest.mark.parametrize("marks", [True, False])
def test_sample_of_buffer_guest_matches_its_writes(marks):
    memory = bytearray(os.urandom(64 * PAGE) + bytes(192 * PAGE))
    guest = BufferGuest(memory, marks=marks)
    writer = Writer(memory, 100, 64, guest.mark if marks else lambda _offset, _length: None)
    sample = sampled(guest, writer)
    assert (sample.pages, sample.share) == (256, 1.0)
    assert sample.zero == 192
    assert 64 * PAGE < sample.first.wire_bytes < 65 * PAGE
    for interval in sample.intervals[:-1]:
        assert interval.cost.pages == pytest.approx(min(100 * interval.seconds, 64), abs=1)
    assert sample.intervals[-1].seconds == pytest.approx(sum(INTERVALS))
    assert sample.intervals[-1].cost.pages == 64
    assert sample.cost(10, 0.4).wire_bytes < 10 * 64  # deltas
    assert sample.deltas > 0
    assert sample.overflows == 0
    assert sample.dirty(1e6) == 64
    assert (sample.scan_seconds == 0) is marks


def test_marks_are_taken_without_scan():
    memory = bytearray(64 * PAGE)
    guest = BufferGuest(memory, marks=True)
    set_marks(guest._marks, 0, 64)  # before we looked
    sample = sampled(guest, Writer(memory, 0, 1))
    assert all(interval.cost.pages == 0 for interval in sample.intervals)
    assert sample.dirty(10) == 0
    assert sample.cost(0, 1).wire_bytes == 0


def test_page_without_delta_costs_page_size():
    memory = bytearray(64 * PAGE)
    guest = BufferGuest(memory, marks=True)
    sample = sampled(guest, Writer(memory, 100, 64, guest.mark), xbzrle=False)
    assert sample.cost(10, 0.4).wire_bytes == pytest.approx(10 * PAGE, rel=0.01)
    assert sample.deltas == sample.hits == 0


def test_new_pages_count_as_overflows():
    memory = bytearray(os.urandom(64 * PAGE))
    guest = BufferGuest(memory, marks=True)
    sample = sampled(guest, Writer(memory, 100, 16, guest.mark, length=PAGE))
    assert sample.overflows > 0
    assert sample.deltas == 0
    assert sample.cost(10, 0.4).wire_bytes == pytest.approx(10 * PAGE, rel=0.01)


@pytest.mark.parametrize("marks", [True, False])
def test_large_guest_is_sampled_in_part(marks):
    pages = 64 * 20 + 7
    memory = bytearray(os.urandom(pages * PAGE))
    guest = BufferGuest(memory, marks=marks)
    writer = Writer(memory, 4000, pages, guest.mark if marks else lambda _offset, _length: None)
    sample = sampled(guest, writer, most=pages * PAGE // 3)
    assert 0.2 < sample.share < 0.35
    assert sample.pages == pages
    assert sample.first.wire_bytes == pytest.approx(pages * PAGE, rel=0.01)
    assert sample.intervals[-1].cost.pages == pytest.approx(pages, rel=0.01)
    assert sample.dirty(0.2) == pytest.approx(800, rel=0.4)


def test_holes_of_sparse_file_are_not_read(tmp_path):
    path = tmp_path / "guest"
    with path.open("wb") as file:
        file.truncate(1024 * PAGE)
        file.seek(512 * PAGE)
        file.write(os.urandom(64 * PAGE))
    guest = FileGuest(str(path))
    with path.open("r+b") as file:

        def write(seconds):
            file.seek(513 * PAGE)
            file.write(os.urandom(16))
            file.seek(900 * PAGE)  # was a hole
            file.write(b"x")
            file.flush()

        for most in (1 << 30, 256 * PAGE):
            sample = sampled(guest, write, most=most)
            assert sample.first.wire_bytes < 70 * PAGE if most > PAGE << 8 else 300 * PAGE
            assert sample.zero >= 800
            assert sample.scan_seconds > 0
    os.close(guest._fd)


# ---------------------------------------------------------------- what is concluded


def curve(*points):
    first = Cost(1000, 1000 * PAGE, 0.001)
    intervals = tuple(Interval(t, Cost(p, p * 10, p * 1e-6)) for t, p in points)
    return Sample(1000, PAGE, first, intervals)


def test_dirty_pages_are_interpolated():
    sample = curve((0.1, 10), (0.2, 30), (0.4, 40))
    assert [sample.dirty(t) for t in (0, 0.05, 0.1, 0.15, 0.3)] == pytest.approx([0, 5, 10, 20, 35])


def test_dirty_pages_are_extrapolated_while_they_grow():
    assert curve((0.1, 10), (0.2, 20)).dirty(1.0) == pytest.approx(100)
    assert curve((0.1, 10), (0.2, 20)).dirty(100.0) == 1000  # all there are
    assert curve((0.1, 500), (0.2, 501)).dirty(100.0) == 501
    assert curve().dirty(5) == 0


def test_dirty_pages_never_fall_after_disturbance():
    sample = curve((0.1, 100), (0.2, 90), (0.4, 120))
    assert sample.dirty(0.2) == 100


def test_page_cost_is_interpolated():
    first = Cost(1000, 1000 * PAGE, 0.001)
    sample = Sample(
        1000, PAGE, first,
        (Interval(0.1, Cost(10, 100, 0.1)), Interval(0.3, Cost(10, 300, 0.3))),
    )  # fmt: skip
    assert sample.cost(1, 0.01).wire_bytes == pytest.approx(10)
    assert sample.cost(1, 0.2).wire_bytes == pytest.approx(20)
    assert sample.cost(2, 9.0).wire_bytes == pytest.approx(60)
    assert sample.cost(2, 9.0).encode_seconds == pytest.approx(0.06)
    assert curve().cost(3, 1.0).wire_bytes == pytest.approx(3 * PAGE)


@given(
    points=st.lists(st.tuples(st.floats(1e-4, 10), st.floats(0, 1000)), max_size=8),
    times=st.lists(st.floats(0, 1e6), min_size=2, max_size=10),
)
def test_dirty_pages_grow_with_time(points, times):
    sample = curve(*sorted(points))
    seen = [sample.dirty(t) for t in sorted(times)]
    assert all(0 <= a <= 1000 for a in seen)
    assert all(a <= b + 1e-6 for a, b in itertools.pairwise(seen))
    for t in times:
        cost = sample.cost(sample.dirty(t), t)
        assert cost.wire_bytes >= 0


def test_sampling_takes_seconds_of_intervals():
    assert WARM_SECONDS + sum(INTERVALS) < 2


@pytest.mark.parametrize(("filled", "share"), [(100, 1.0), (2000, 0.5)])
def test_sampled_share_depends_on_data_not_on_holes(tmp_path, filled, share):
    """A hole of 64 GiB is skipped in no time, and does not scale the measurement by 4096."""
    path, size = tmp_path / "guest", 64 << 30
    with path.open("wb") as file:
        file.truncate(size)
        os.pwrite(file.fileno(), bytes([1]) * (filled * PAGE), 32 << 30)
    guest = FileGuest(str(path))
    sample = sampled(guest, lambda _seconds: None, most=1000 * PAGE)
    assert sample.pages == size // PAGE
    assert sample.share == pytest.approx(share, rel=0.01)
    os.close(guest._fd)
