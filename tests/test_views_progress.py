"""What a user sees where there is no terminal: whole lines, and not too many."""

from __future__ import annotations

import io
import os

from migrate.output import Output, behind
from migrate.statistics import Statistics
from migrate.views.history import History
from migrate.views.progress import Lines, progress_line

BUSY = Statistics(
    status="active", remaining=900 << 20, dirty_sync_count=12, dirty_pages_rate=230_000.0,
    mbps=9876.5, expected_downtime=4.4,
)  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Shown:
    """Lines with a clock of their own, and what they have written."""

    def __init__(self, *, silent: bool = False) -> None:
        self.stream, self.clock, self.history = io.StringIO(), Clock(), History()
        self.view = Lines(self.history, stream=self.stream, silent=silent, clock=self.clock)

    def observe(self, event: str, s: Statistics) -> None:
        self.history.observe(event, s)
        self.view.observe(event, s)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()


def test_the_line_tells_all_and_fits_a_terminal():
    line = progress_line(BUSY)
    assert line == (
        "round 13: 900.0 MiB left, dirty 898.4 MiB/s, 9876 Mbit/s, exp. downtime 4400 ms"
    )
    small = BUSY.with_(remaining=64 << 20, dirty_pages_rate=7500.0, mbps=989.0)
    assert len(progress_line(small)) <= 79
    assert progress_line(BUSY.with_(cpu_throttle_percentage=30)).endswith(", slowed 30 %")


def test_no_dirty_rate_is_shown_before_there_is_one():
    assert "dirty" not in progress_line(Statistics(status="active"))


def test_a_line_for_each_interval():
    shown = Shown()
    for tick in range(60):
        shown.clock.now = tick / 10
        shown.observe("progress", BUSY)
    assert shown.lines == [f"migrate-src: {progress_line(BUSY)}"] * 3


def test_a_line_for_each_round():
    shown = Shown()
    s = BUSY.with_(dirty_sync_count=0)
    shown.observe("status", s)
    for number in range(1, 4):
        shown.clock.now += 1.0
        s = s.with_(dirty_sync_count=number, total_time=number * 1.0, transferred=number << 20,
                    normal=number * 256, cache_hits=number * 3, cache_miss=number)  # fmt: skip
        shown.observe("round", s)
    assert shown.lines[1] == (
        "migrate-src: round 2 took 1.00 s: 1.0 MiB for 0 zero, 256 whole and 0 delta pages, "
        "cache hits 75%, 900.0 MiB dirty (898.4 MiB/s), exp. downtime 4400 ms"
    )
    assert len(shown.lines) == 3


def test_rounds_of_milliseconds_are_told_together_and_the_last_one_always():
    shown = Shown()
    s = BUSY.with_(dirty_sync_count=0)
    for number in range(1, 501):
        shown.clock.now = number / 1000
        s = s.with_(dirty_sync_count=number, transferred=number * 100, total_time=number / 1000)
        shown.observe("round", s)
    assert len(shown.lines) == 3
    shown.observe("status", s.with_(status="device"))
    assert "rounds 402 to 500 took 0.10 s: 9.7 KiB" in shown.lines[-1]


def test_nothing_is_written_in_the_pause():
    shown = Shown()
    shown.observe("status", BUSY.with_(status="device"))
    shown.observe("paused", BUSY.with_(status="device"))
    shown.clock.now = 100.0
    shown.observe("progress", BUSY.with_(status="device"))
    assert shown.lines == []


def test_silence_means_notices_only():
    shown = Shown(silent=True)
    shown.observe("round", BUSY)
    shown.observe("notice: the destination has no xbzrle: it is not used", BUSY)
    assert shown.lines == ["migrate-src: the destination has no xbzrle: it is not used"]


def test_a_reader_that_does_not_read_keeps_nobody_waiting():
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
        history.observe("round", BUSY.with_(dirty_sync_count=number))
        view.observe("round", BUSY)
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


def test_a_reader_that_is_gone_is_no_reason_to_stop():
    reading, writing = os.pipe()
    os.close(reading)
    stream = Output(writing)
    view = Lines(History(), stream=stream)
    view.say("nobody hears it")
    view.observe("progress", BUSY)
    stream.outlet.close()
    os.close(writing)
