"""A migration as observers see it, and two programs that run a real one."""

from __future__ import annotations

from collections.abc import Iterator

from migrate.events import SourceEvent
from migrate.statistics import Statistics, Status
from tests.programs import Program, destination, end_guest, guest_pid

MIB = 1 << 20
Told = tuple[str, Statistics]


def story(rounds: int = 3, status: Status = Status.COMPLETED) -> Iterator[Told]:
    """Each round after the first sends 100 deltas of 10 bytes and one page whole."""
    s = Statistics(status=Status.SETUP, total=64 * MIB, remaining=64 * MIB)
    yield SourceEvent.STATUS, s
    s = s.with_(
        status=Status.ACTIVE, setup_time=0.1, capabilities={"xbzrle": True}, cache_size=16 * MIB
    )
    yield SourceEvent.STATUS, s
    s = s.with_(transferred=8 * MIB, normal=2048, duplicate=14336, total_time=1.1, mbps=67.0)
    yield SourceEvent.PROGRESS, s.with_(remaining=32 * MIB, total_time=0.6)
    for number in range(1, rounds + 1):
        if number > 1:
            s = s.with_(
                transferred=s.transferred + 5200, normal=s.normal + 1, cache_miss=number - 1,
                xbzrle_pages=s.xbzrle_pages + 100, xbzrle_bytes=s.xbzrle_bytes + 1000,
                cache_hits=s.cache_hits + 100, total_time=s.total_time + 0.5,
            )  # fmt: skip
        s = s.with_(
            remaining=404 * 1024, dirty_pages_rate=202.0, expected_downtime=0.2 / number,
            dirty_sync_count=number,
        )  # fmt: skip
        yield SourceEvent.ROUND_DONE, s
    if status is Status.COMPLETED:
        s = s.with_(status=Status.DEVICE)
        yield SourceEvent.STATUS, s
        yield SourceEvent.PAUSED, s
        s = s.with_(dirty_sync_count=rounds + 1, transferred=s.transferred + 600, downtime=0.05,
                    xbzrle_pages=s.xbzrle_pages + 10, remaining=0, downtime_bytes=600)  # fmt: skip
    s = s.with_(status=status, error="" if status is Status.COMPLETED else "it was <b>given</b> up")
    yield SourceEvent.STATUS, s
    yield "end", s.with_(total_time=s.total_time + 0.06, transferred=s.transferred + 20)


def move(*arguments: str, receiving: tuple[str, ...] = ()) -> tuple[Program, Program]:
    """A demo guest that really moves, and is ended: (source, destination), both over."""
    receiver, address = destination(*receiving)
    source = Program(
        "migrate-src", "--guest", "demo:16m,hot=4m,fill=random", "--max-bandwidth", "32m",
        *arguments, address,
    )  # fmt: skip
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0, receiver.err
    end_guest(guest_pid(receiver.out + receiver.err))
    return source, receiver
