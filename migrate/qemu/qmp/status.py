"""The state of a migration and its guest, parsed from QEMU's answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from migrate.errors import QemuError

# Statuses of query-migrate in which no migration goes on.
AT_REST = ("none", "completed", "failed", "cancelled")
FINISHING = "finish-migrate"
# A larger number of bytes or pages is none.
MAX_COUNT = (1 << 63) - 1


@dataclass(frozen=True)
class MachineStatus:
    """The state of a migration and its guest. Times are in seconds, sizes in bytes.

    runstate -- of query-status: running, paused, prelaunch, inmigrate, postmigrate, ...
    status   -- of query-migrate: none, setup, active, completed, failed, cancelled, ...

    The values of RAM (transferred to mbps) are 0 before the migration is active and after it has
    failed. QEMU counts a whole page for each dirty one. It knows `downtime` once the migration has
    completed, and `expected_downtime` before that.
    """

    runstate: str = ""
    status: str = "none"
    error: str = ""
    blocked: tuple[str, ...] = ()
    total_time: float = 0.0
    setup_time: float = 0.0
    downtime: float | None = None
    expected_downtime: float | None = None
    transferred: int = 0
    remaining: int = 0
    total: int = 0
    page_size: int = 0
    dirty_sync_count: int = 0
    dirty_pages_rate: int = 0
    mbps: float = 0.0

    @property
    def going_on(self) -> bool:
        """Whether a migration goes on. QEMU 7.2 says `completed` while it still tidies up: then the
        run state is finish-migrate, and the downtime is not known yet."""
        return self.status not in AT_REST or self.runstate == FINISHING


def unexpected_answer(command: str, answer: object) -> QemuError:
    return QemuError(f"{command}: QEMU's answer is not understood: {repr(answer)[:80]}", command)


def object_in(command: str, answer: object) -> Mapping[str, Any]:
    if not isinstance(answer, dict):
        raise unexpected_answer(command, answer)
    return answer


def parse_status(answer: object, runstate: str) -> MachineStatus:
    """Return the status from an answer to query-migrate. Raises QemuError if it makes no sense."""
    info = object_in("query-migrate", answer)
    try:
        ram = object_in("query-migrate", info.get("ram", {}))
        return MachineStatus(
            runstate=runstate,
            status=str(info.get("status", "none")),
            error=str(info.get("error-desc", "")),
            blocked=tuple(str(reason) for reason in info.get("blocked-reasons", ())),
            total_time=info.get("total-time", 0) / 1e3,
            setup_time=info.get("setup-time", 0) / 1e3,
            downtime=_seconds(info.get("downtime")),
            expected_downtime=_seconds(info.get("expected-downtime")),
            transferred=_count(ram, "transferred"),
            remaining=_count(ram, "remaining"),
            total=_count(ram, "total"),
            page_size=_count(ram, "page-size"),
            dirty_sync_count=_count(ram, "dirty-sync-count"),
            dirty_pages_rate=_count(ram, "dirty-pages-rate"),
            mbps=_rate(ram.get("mbps", 0)),
        )
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise unexpected_answer("query-migrate", answer) from None


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _count(ram: Mapping[str, Any], name: str) -> int:
    """Return a number of bytes or pages, or raise ValueError if it cannot be one."""
    count = int(ram.get(name, 0))
    if not 0 <= count <= MAX_COUNT:
        raise ValueError(name)
    return count


def _rate(value: float) -> float:
    """Return a bandwidth; 0.0 for what cannot be one, such as NaN."""
    rate = float(value)
    return rate if 0 <= rate <= MAX_COUNT else 0.0
