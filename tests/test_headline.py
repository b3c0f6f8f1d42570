"""The seed's claim in small, over a link whose kernel keeps the rate; `make headline` is the whole.

48 MiB are written again and again: at 1 Gbit/s that is 0.4 s a round, too long for a pause of
0.3 s; as deltas it is milliseconds.
"""

from __future__ import annotations

import pytest

from tests import headline
from tests.bench.report import LeftOutError
from tests.network import check_usable
from tests.requirements import need

GUEST = "demo:96m,hot=48m,stride=4096,fill=random"


@pytest.fixture(scope="module")
def usable() -> None:
    try:
        check_usable()
    except LeftOutError as error:
        need(False, str(error))


@pytest.mark.exhaustive
def test_headline_guest_converges_only_with_xbzrle(usable, tmp_path) -> None:
    runs = [headline.measure(name, GUEST, "--max-rounds", "6") for name in headline.RUNS]
    off, on = runs
    assert off.status == 7
    assert off.result["ram"]["dirty-sync-count"] == 6
    assert off.verdict == "guest runs at the source"
    assert on.status == 0
    assert on.verdict == "guest runs at the destination"
    assert on.result["xbzrle-cache"]["pages"] >= 48 * 256
    for run in runs:
        assert max(one.remaining for one in run.samples) > 48 << 20
        assert all(one.dirty <= 48 << 20 for one in run.samples)
    headline.draw(runs, tmp_path / "plot.svg")
    assert "runs at the destination" in (tmp_path / "plot.svg").read_text()
