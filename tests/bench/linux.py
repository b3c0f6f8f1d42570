"""A real Linux guest over the same link: by QEMU alone, each way it has, and through us."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tests import network
from tests.bench import kvm, qemu, rivals
from tests.bench.guest_files import shelf
from tests.bench.machine import version
from tests.bench.processes import ProgramError
from tests.bench.qemu import Emulator, Running
from tests.bench.report import LeftOutError, Options, Part, size_name
from tests.bench.turns import in_turn
from tests.bench.workload import Attempt, Workload
from tests.machine.linux import Linux, LinuxError, Report, build, read
from tests.network import FAR, NEAR, Link

MIB, PAGE = 1 << 20, 4096
CHECKED = 64 * MIB
# Pages a second that the checker writes; 0: all it can.
PACES = (2500, 0)
# Bits a second: 30 and 117 MB/s.
RATES = (240_000_000, 936_000_000)
BOOT = 180.0
LOOK = 60.0
# What Redis has to answer before the guest counts as going on.
ANSWERS = 2

Way = Callable[["Guest", "Guest", Workload, Link, str], Attempt]


class Guest(Running):
    """A QEMU that has the Linux guest, or waits for it.

    before -- what the guest has said on its serial port until it came here
    """

    def __init__(
        self, linux: Linux, emulator: Emulator, directory: Path, name: str, namespace: str = "",
        *extra: str,
    ) -> None:  # fmt: skip
        self.linux = linux
        self.before = b""
        super().__init__([*linux.words(), *extra], emulator, directory, name, namespace)

    def report(self) -> Report:
        return read(self.before + self.serial)

    def wait_for_more(self, timeout: float = LOOK) -> None:
        """Wait until Redis has answered twice, and the checker has seen all its memory once.

        Raises ProgramError if that takes too long, or if there is trouble.
        """
        pages = self.linux.checked // PAGE
        began, end = self.report(), time.monotonic() + timeout
        while True:
            now = self.report()
            if now.trouble:
                raise ProgramError(f"the Linux guest is not well: {'; '.join(now.trouble[:3])}")
            if now.went_on(began, ANSWERS, pages):
                return
            if time.monotonic() > end:
                tail = (self.before + self.serial)[-1000:].decode(errors="replace")
                raise ProgramError(f"the Linux guest does not go on in {timeout:.0f} s: {tail}")
            time.sleep(0.1)

    def arrive_from(self, near: Guest) -> None:
        """Compare the memory of both, which stand still, and have the guest run on here.

        Raises ProgramError if the memory differs, or the guest does not run on as it should.
        """
        if not qemu.same_memory(near, self, 0, self.linux.size):
            raise ProgramError("the memory at the destination differs")
        self.before = near.before + near.serial
        self.qmp.execute("cont")
        self.wait_for_more()


class Journey:
    """One guest, which boots once and then goes from host to host, one attempt after the other.

    After an attempt that has broken something, the next one boots the guest again.
    """

    def __init__(self, linux: Linux, emulator: Emulator, directory: Path, link: Link) -> None:
        self._start = partial(Guest, linux, emulator, directory)
        self._link = link
        self._hosts = [(link.near, NEAR), (link.far, FAR)]
        self._here: Guest | None = None
        self._stack = contextlib.ExitStack()
        self._moves = 0

    def __enter__(self) -> Journey:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def attempt(self, workload: Workload, way: Way) -> Attempt:
        """Move the guest to the other host.

        Raises ProgramError or QMPError if something breaks, also if the guest is not as it was.
        """
        near = self._here or self._boot()
        self._moves += 1
        namespace, address = self._hosts[1]
        with contextlib.ExitStack() as stack:
            far = self._start(f"qemu-{self._moves}", namespace, "-S", "-incoming", "defer")
            stack.enter_context(far)
            try:
                done = way(near, far, workload, self._link, address)
                if not done.completed:
                    near.wait_for_more()
                    return done
                far.arrive_from(near)
            except BaseException:
                self._leave()
                raise
            self._leave()
            self._here, self._stack = far, stack.pop_all()
            self._hosts.reverse()
        return replace(done, memory="equal")

    def _boot(self) -> Guest:
        guest = self._start(f"qemu-{self._moves}", self._hosts[0][0])
        self._here = self._stack.enter_context(guest)
        guest.wait_for_more(BOOT)
        return guest

    def _leave(self) -> None:
        self._stack.close()
        self._here = None


def run(options: Options) -> Part:
    network.check_usable()
    emulator = qemu.later()
    try:
        place = build()
    except LinuxError as error:
        raise LeftOutError(f"{error}") from error
    size = (512 if options.quick else 1024) * MIB
    paces, rates = (PACES[:1], RATES[1:]) if options.quick else (PACES, RATES)
    tables, data, found = [], [], []
    for pace in paces:
        linux = Linux(place, size, CHECKED, pace)
        with shelf(4 * size) as directory, Link(rates[0]) as link, Journey(
            linux, emulator, directory, link
        ) as journey:  # fmt: skip
            for rate in rates:
                link.set_rate(rate)
                workload = Workload(size=size, hot=CHECKED, rate=pace, patience=60.0, link=rate)
                written = f"{pace} pages a second" if pace else "as many pages as it can"
                title = f"{rate / 8e6:.0f} MB/s, the checker writes {written}"
                options.say(f"{title}:")
                results = in_turn(
                    contenders(journey, workload), options.turns(), options.say,
                    again=lambda attempt: attempt.completed,
                )  # fmt: skip
                tables.append(kvm.table(title, results))
                found += [f"{title}: {note}" for note in kvm.trouble(results)]
                data.append({
                    "workload": workload.numbers(),
                    "title": title,
                    "runs": {who: [run.numbers() for run in runs] for who, runs in results.items()},
                })  # fmt: skip
    return Part(
        "linux", "A real Linux guest, by QEMU and through xbmigrate",
        f"QEMU {version(emulator.command)} (TCG), {size_name(size)}: Debian's cloud kernel, Redis "
        "with redis-benchmark as its load, and a checker, a program that owns "
        f"{size_name(CHECKED)} and checks each page before it writes a sixteenth of it again. "
        "Compressed with zstd, what the checker owns has less than half its size, and the values "
        "in Redis are all alike. The guest boots once and then moves to and fro between two hosts "
        "(two network namespaces, veth, tbf), so each attempt finds it a little older. The "
        "downtime limit is 300 ms, QEMU's own page cache "
        f"is as large as the guest, an attempt is given up after 60 s. {options.counted()} Times "
        "and downtimes are what QEMU reports. After each move the whole memory is compared while "
        "both guests are stopped. Then the guest runs on: Redis answers and has lost no increment, "
        "the checker has gone over all its pages and found none wrong, and the kernel has logged "
        "no error. An attempt that fails any of this does not count as completed.",
        tables, {"rows": data}, found,
    )  # fmt: skip


def contenders(journey: Journey, workload: Workload) -> dict[str, Callable[[], Attempt]]:
    """Each way to move the guest, by its name in the table."""
    cache = {"xbzrle_cache_size": workload.size}
    ways: dict[str, Way] = {
        "QEMU": partial(direct, [], {}),
        "QEMU, xbzrle": partial(direct, ["xbzrle"], cache),
        "QEMU, multifd, zstd": partial(direct, ["multifd"], {"multifd_compression": "zstd"}),
        "through xbmigrate": partial(through, []),
        "through xbmigrate, zstd off": partial(through, ["--capability", "zstd=off"]),
    }
    return {
        name: rivals.guarded(partial(journey.attempt, workload, way)) for name, way in ways.items()
    }


def direct(
    capabilities: list[str], parameters: dict[str, Any],
    near: Guest, far: Guest, workload: Workload, link: Link, address: str,
) -> Attempt:  # fmt: skip
    return qemu.direct(near, far, workload, capabilities, link=link, address=address, **parameters)


def through(
    options: list[str], near: Guest, far: Guest, workload: Workload, link: Link, address: str
) -> Attempt:
    return qemu.through(near, far, workload, options, link=link, address=address)
