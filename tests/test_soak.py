"""The soak, briefly: some rounds with faults, the same in each run. `make soak` is the long one."""

from __future__ import annotations

import pytest

from tests.requirements import need
from tests.soak import soak
from tests.soak_qemu import missing


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_few_rounds_of_the_soak() -> None:
    tally = soak(6, seed=4444)
    assert tally.rounds.total() == 6
    assert tally.faults.total() > 0
    assert tally.compared > 0


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_few_rounds_with_virtual_machines() -> None:
    need(not missing(), missing())
    tally = soak(3, seed=4444, guests=["qemu"])
    assert tally.rounds == {"qemu": 3}
    assert tally.faults.total() > 0
