"""Our attempts at the workload: the demo guest, and a file that another process writes."""

from __future__ import annotations

from collections.abc import Sequence

from tests.bench.guest_files import random_file, same_content, shelf
from tests.bench.migration import Migration, migration, python
from tests.bench.processes import Measured
from tests.bench.workload import Attempt, Workload
from tests.network import FAR, Link
from tests.programs import guest_pid, look_at

LOOK = 2.0


def demo_guest(workload: Workload, xbzrle: bool) -> Attempt:
    """The demo guest, which says itself what it has written. Each of its bytes is checked."""
    shape = (
        f"demo:{workload.size},hot={workload.hot},stride={workload.stride},rate={workload.rate},"
        "fill=random"
    )
    with Link(workload.link) as link, migration(
        ["--guest", shape, *_options(workload, xbzrle)], listen=f"{FAR}:0",
        namespaces=(link.near, link.far), timeout=workload.patience,
    ) as moved:  # fmt: skip
        carried = link.carried()
        memory, extra = "-", {}
        if moved.completed:
            before, after, wrong = look_at(guest_pid(moved.destination.out), LOOK)
            memory = "equal" if wrong < 0 and after >= before else f"WRONG at byte {wrong}"
            if workload.rate == 0:  # many sweeps: counting whole ones is exact enough
                extra["rate"] = (after - before) * (workload.hot / workload.stride) / LOOK
        return _attempt(moved, carried, memory, **extra)


def file_guest(workload: Workload) -> Attempt:
    """A file in a tmpfs and a process that knows nothing of us: writes are found by comparing."""
    with shelf(2 * workload.size) as directory, Link(workload.link) as link:
        path, output = random_file(directory / "guest", workload.size), directory / "arrived"
        with writing(workload, str(path)) as writer, migration(
            ["--guest", f"file:{path}", "--pid", str(writer.pid), *_options(workload, True)],
            ["--output", str(output)],
            listen=f"{FAR}:0", namespaces=(link.near, link.far), timeout=workload.patience,
        ) as moved:  # fmt: skip
            carried = link.carried()
            memory = "-"
            if moved.completed:
                memory = "equal" if same_content(path, output) else "WRONG"
            return _attempt(moved, carried, memory)


def writing(workload: Workload, path: str) -> Measured:
    """A process that writes the file as the workload wants it, already at it."""
    words = [path, *map(str, (workload.hot, workload.stride, workload.rate))]
    writer = Measured(python("tests.bench.writer", *words))
    try:
        writer.wait_for("writing")
    except BaseException as error:
        writer.__exit__(type(error), error, None)
        raise
    return writer


def _options(workload: Workload, xbzrle: bool) -> Sequence[str]:
    return (
        "--downtime-limit", f"{workload.downtime_limit * 1e3:.0f}",
        "--stall-timeout", "0",
        *(["--cache-size", str(workload.cache)] if xbzrle else ["--capability", "xbzrle=off"]),
    )  # fmt: skip


def _attempt(moved: Migration, carried: int, memory: str, **extra: float) -> Attempt:
    def time_of(name: str) -> float | None:
        return moved.result[name] / 1e3 if name in moved.result else None

    return Attempt(
        completed=moved.completed,
        why="" if moved.completed else moved.why,
        seconds=moved.seconds,
        link_bytes=carried,
        downtime=time_of("downtime") if moved.completed else None,
        expected=time_of("expected-downtime"),
        memory=memory,
        detail={**moved.numbers(), **extra},
    )
