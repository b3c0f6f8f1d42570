"""Progress without a terminal: whole lines, and not too many."""

from __future__ import annotations

import io
import os

from migrate.events import Notice, SourceEvent
from migrate.output.streams import Output, behind
from migrate.statistics import Statistics, Status
from migrate.views.history import History
from migrate.views.progress import Lines, progress_line

BUSY = Statistics(
    status=Status.ACTIVE, remaining=900 << 20, dirty_sync_count=12, dirty_pages_rate=230_000.0,
    mbps=9876.5, expected_downtime=4.4,
)  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Shown:
    """A Lines view with a clock that is passed in, and its output."""

    def __init__(self, *, silent: bool = False) -> None:
        self.stream, self.clock, self.history = io.StringIO(), Clock(), History()
        self.view = Lines(self.history, stream=self.stream, silent=silent, clock=self.clock)

    def observe(self, event: str, s: Statistics) -> None:
        self.history.observe(event, s)
        self.view.observe(event, s)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()


def test_progress_line():
    line = progress_line(BUSY)
    assert line == (
        "round 13: 900.0 MiB left, dirty 898.4 MiB/s, 9876 Mbit/s, exp. downtime 4400 ms"
    )
    small = BUSY.with_(remaining=64 << 20, dirty_pages_rate=7500.0, mbps=989.0)
    assert len(progress_line(small)) <= 79
    assert progress_line(BUSY.with_(cpu_throttle_percentage=30)).endswith(", slowed 30 %")


def test_no_dirty_rate_in_the_first_round():
    assert "dirty" not in progress_line(Statistics(status=Status.ACTIVE))


def test_line_per_interval():
    shown = Shown()
    for tick in range(60):
        shown.clock.now = tick / 10
        shown.observe(SourceEvent.PROGRESS, BUSY)
    assert shown.lines == [f"migrate-src: {progress_line(BUSY)}"] * 3


def test_line_per_round():
    shown = Shown()
    s = BUSY.with_(dirty_sync_count=0)
    shown.observe(SourceEvent.STATUS, s)
    for number in range(1, 4):
        shown.clock.now += 1.0
        s = s.with_(dirty_sync_count=number, total_time=number * 1.0, transferred=number << 20,
                    normal=number * 256, cache_hits=number * 3, cache_miss=number)  # fmt: skip
        shown.observe(SourceEvent.ROUND_DONE, s)
    assert shown.lines[1] == (
        "migrate-src: round 2 took 1.00 s: 1.0 MiB for 0 zero, 256 whole and 0 delta pages, "
        "cache hits 75%, 900.0 MiB dirty (898.4 MiB/s), exp. downtime 4400 ms"
    )
    assert len(shown.lines) == 3


def test_short_rounds_are_merged():
    shown = Shown()
    s = BUSY.with_(dirty_sync_count=0)
    for number in range(1, 501):
        shown.clock.now = number / 1000
        s = s.with_(dirty_sync_count=number, transferred=number * 100, total_time=number / 1000)
        shown.observe(SourceEvent.ROUND_DONE, s)
    assert len(shown.lines) == 3
    shown.observe(SourceEvent.STATUS, s.with_(status=Status.DEVICE))
    assert "rounds 402 to 500 took 0.10 s: 9.7 KiB" in shown.lines[-1]


def test_no_progress_line_during_the_pause():
    shown = Shown()
    shown.observe(SourceEvent.STATUS, BUSY.with_(status=Status.DEVICE))
    shown.observe(SourceEvent.PAUSED, BUSY.with_(status=Status.DEVICE))
    shown.clock.now = 100.0
    shown.observe(SourceEvent.PROGRESS, BUSY.with_(status=Status.DEVICE))
    assert shown.lines == []


def test_silent_prints_notices_only():
    shown = Shown(silent=True)
    shown.observe(SourceEvent.ROUND_DONE, BUSY)
    shown.observe(Notice("the destination has no xbzrle: it is not used"), BUSY)
    assert shown.lines == ["migrate-src: the destination has no xbzrle: it is not used"]


def test_slow_reader_does_not_block():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    while True:
        try:
            os.write(writing, bytes(4096))
        except BlockingIOError:
            break
    os.set_blocking(writing, True)
    history, clock = History(), Clock()
    stream = Output(writing)
    view = Lines(history, stream=stream, clock=clock)
    view.say("a sentence is kept")
    for number in range(1, 100):  # a write would block for ever
        clock.now += 1.0
        history.observe(SourceEvent.ROUND_DONE, BUSY.with_(dirty_sync_count=number))
        view.observe(SourceEvent.ROUND_DONE, BUSY)
    assert behind(stream)
    os.set_blocking(reading, False)
    taken = b""
    while True:
        try:
            taken += os.read(reading, 65536)
        except BlockingIOError:
            break
    assert not behind(stream)
    assert os.read(reading, 65536) == b"migrate-src: a sentence is kept\n", "rounds are left out"
    stream.outlet.close()
    os.close(writing)
    os.close(reading)


def test_closed_reader_stops_nothing():
    reading, writing = os.pipe()
    os.close(reading)
    stream = Output(writing)
    view = Lines(History(), stream=stream)
    view.say("nobody hears it")
    view.observe(SourceEvent.PROGRESS, BUSY)
    stream.outlet.close()
    os.close(writing)
