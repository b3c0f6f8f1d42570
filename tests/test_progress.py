"""What a user sees while a migration runs."""

from __future__ import annotations

import io

from migrate.progress import Progress, progress_line
from migrate.statistics import Statistics

BUSY = Statistics(
    status="active", remaining=900 << 20, dirty_sync_count=12, dirty_pages_rate=230_000.0,
    mbps=9876.5, expected_downtime=4.4,
)  # fmt: skip


def test_the_line_tells_all_and_fits_a_terminal() -> None:
    line = progress_line(BUSY)
    assert line == (
        "round 13: 900.0 MiB left, dirty 898.4 MiB/s, 9876 Mbit/s, exp. downtime 4400 ms"
    )
    small = BUSY.with_(remaining=64 << 20, dirty_pages_rate=7500.0, mbps=989.0)
    assert len(progress_line(small)) <= 79


def test_no_dirty_rate_is_shown_before_there_is_one() -> None:
    assert "dirty" not in progress_line(Statistics(status="active"))


def test_elsewhere_than_on_a_terminal_there_are_whole_lines() -> None:
    stream = io.StringIO()
    progress = Progress("auto", stream)
    for _ in range(100):
        progress.show("progress", BUSY)
    progress.show("notice: something", BUSY)
    progress.clear()
    lines = stream.getvalue().splitlines()
    assert lines == [f"migrate-src: {progress_line(BUSY)}", "migrate-src: something"]
    assert "\r" not in stream.getvalue()


def test_never_means_notices_only() -> None:
    stream = io.StringIO()
    progress = Progress("never", stream)
    progress.show("round", BUSY)
    progress.show("notice: the destination has no xbzrle: it is not used", BUSY)
    assert stream.getvalue() == ("migrate-src: the destination has no xbzrle: it is not used\n")
