"""What a QEMU is told about its switchover: as short a pause as the guest allows."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import QemuError
from migrate.policy.aim import SHORT_SECONDS, WORTH_A_ROUND, DowntimeAim
from migrate.qemu import switchover
from migrate.qemu.qmp.status import MachineStatus, parse_status
from migrate.qemu.switchover import PageRate, SwitchoverControl

LIMIT = 0.3
PAGE = 4096
STEP = 0.1

# -- the aim

seconds = st.floats(0, 100)


def test_aim_is_short_while_each_round_shortens_the_pause() -> None:
    aim = DowntimeAim()
    for expected in (3.0, 0.5, 0.1, 0.05, 0.03):
        assert aim.learn(expected, LIMIT) == SHORT_SECONDS


def test_aim_rises_from_the_best_pause_when_it_does_not_fall() -> None:
    aim = DowntimeAim()
    aim.learn(0.06, LIMIT)
    assert aim.learn(0.06, LIMIT) == pytest.approx(0.08)
    assert aim.learn(0.2, LIMIT) == pytest.approx(0.08 / WORTH_A_ROUND)
    assert aim.learn(0.02, LIMIT) == SHORT_SECONDS  # the guest has become quieter


@given(st.lists(seconds, max_size=50), seconds)
def test_aim_never_exceeds_the_limit(pauses: list[float], limit: float) -> None:
    aim = DowntimeAim()
    for expected in pauses:
        assert 0 <= aim.learn(expected, limit) <= limit


@given(st.lists(st.floats(1e-3, LIMIT), min_size=60, max_size=60))
def test_any_series_of_pauses_within_the_limit_ends(pauses: list[float]) -> None:
    """However they vary: there are few new bests, and after each the aim reaches the limit soon."""
    aim = DowntimeAim()
    assert any(expected <= aim.learn(expected, LIMIT) for expected in pauses * 3)


# -- the pages a second


def test_slowest_second_of_the_last_few_counts() -> None:
    rate, pages, now = PageRate(), 0, 0.0
    for pages_in_step in [1000] * 30 + [100] * 10 + [1000] * 30:
        now, pages = now + STEP, pages + pages_in_step
        found = rate.add(now, pages)
    assert found == pytest.approx(1000)
    for _ in range(40):
        now, pages = now + STEP, pages + 1000
        found = rate.add(now, pages)
    assert found == pytest.approx(10000)


def test_rate_is_unknown_until_pages_have_passed_for_a_while() -> None:
    rate = PageRate()
    assert rate.add(0.0, 100) == 0
    assert rate.add(0.1, 200) == 0
    assert rate.add(0.2, 200) == 0
    assert rate.add(0.3, 400) == pytest.approx(1000)


# -- one QEMU


@dataclass
class Fake:
    """A QEMU that says what is prepared, a status each STEP; then it does not answer."""

    statuses: list[MachineStatus]
    pages: list[int]
    knows_bandwidth: bool
    limits: list[float] = field(default_factory=list)
    bandwidths: list[int] = field(default_factory=list)
    reports: list[tuple[float | None, float]] = field(default_factory=list)
    now: float = 0.0

    async def status(self) -> MachineStatus:
        if not self.statuses:
            raise QemuError("it has ended")
        self.now += STEP
        return self.statuses.pop(0)

    async def set_switchover_bandwidth(self, bandwidth: int) -> bool:
        self.bandwidths.append(bandwidth)
        return self.knows_bandwidth

    async def set_downtime_limit(self, limit: float) -> None:
        self.limits.append(limit)

    def run(self, limit: float = LIMIT) -> None:
        control = SwitchoverControl(
            self, lambda: limit, lambda: self.pages.pop(0),  # type: ignore[arg-type]
            lambda _status, expected, aim: self.reports.append((expected, aim)),
            lambda: self.now,
        )  # fmt: skip
        asyncio.run(control.run())


def active(number: int, remaining: int, mbps: float = 100.0) -> MachineStatus:
    return MachineStatus(
        status="active", page_size=PAGE, dirty_sync_count=number, remaining=remaining * PAGE,
        mbps=mbps,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switchover, "STATUS_SECONDS", 0)


@pytest.mark.parametrize("name", ["remaining", "page-size", "dirty-sync-count", "transferred"])
@pytest.mark.parametrize("value", [-1, 10**400, 1 << 63])
def test_absurd_numbers_of_a_qemu_are_refused(name: str, value: int) -> None:
    with pytest.raises(QemuError, match="not understood"):
        parse_status({"status": "active", "ram": {name: value}}, "running")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_bandwidth_that_is_none_counts_as_unknown(value: float) -> None:
    assert parse_status({"status": "active", "ram": {"mbps": value}}, "running").mbps == 0


def test_nothing_is_told_in_the_first_round() -> None:
    qemu = Fake([active(1, 10000)] * 20, [], knows_bandwidth=True)
    qemu.run()
    assert not qemu.limits
    assert set(qemu.reports) == {(None, SHORT_SECONDS)}


def test_aim_rises_round_by_round_with_a_later_qemu() -> None:
    """Each round leaves 1000 pages, a tenth of a second of them."""
    statuses = [active(2 + step // 5, 1000) for step in range(40)]
    qemu = Fake(statuses, [1000 * step for step in range(40)], knows_bandwidth=True)
    qemu.run()
    assert qemu.bandwidths[-1] == pytest.approx(10000 * PAGE)
    assert qemu.limits[0] == SHORT_SECONDS
    assert qemu.limits == sorted(qemu.limits)
    assert qemu.limits[1] == pytest.approx(0.1 / WORTH_A_ROUND)
    assert qemu.limits[-1] == LIMIT
    assert qemu.reports[-1] == (pytest.approx(0.1), LIMIT)


def test_earlier_qemu_is_told_a_limit_in_its_own_bandwidth() -> None:
    """It measures 12.5 MB/s of deltas, where 10000 pages a second pass: 41 MB/s."""
    statuses = [active(2 + step // 5, 1000) for step in range(40)]
    qemu = Fake(statuses, [1000 * step for step in range(40)], knows_bandwidth=False)
    qemu.run()
    assert qemu.limits[-1] == pytest.approx(LIMIT * 10000 * PAGE / 12.5e6)


def test_earlier_qemu_does_not_pause_early_after_a_burst() -> None:
    """For 100 ms a full buffer empties ten times as fast as the pages of a second pass."""
    statuses = [active(2 + step // 5, 1000, mbps=8 * 41) for step in range(40)]
    statuses[-3] = active(9, 1000, mbps=8 * 410)
    qemu = Fake(statuses, [1000 * step for step in range(40)], knows_bandwidth=False)
    qemu.run()
    assert qemu.limits[-1] == pytest.approx(LIMIT * 10000 * PAGE / 410e6)
