"""The guest of migrate-src: read from --guest, and opened anew for each migration."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from migrate import units
from migrate.cli.options import QEMU_FORMS, number, qemu_words, seconds
from migrate.cli.source_options import throttle_of
from migrate.errors import UsageError
from migrate.output import say
from migrate.runtime.processes import Process
from migrate.transport.address import parse_address

if TYPE_CHECKING:
    from migrate.guests.guest import Guest, MemoryGuest
    from migrate.qemu.guest import QemuGuest

STREAMS = ("qemu", "snapshot")


class SourceGuest:
    """Opens the guest that --guest describes.

    A new demo guest gets a process when it is opened for the first time; from then on it is
    `demo:pid=N`. The constructor raises UsageError.
    """

    def __init__(self, args: argparse.Namespace, page_size: int) -> None:
        self._args = args
        self._page_size = page_size
        self._described = args.guest
        # Whether QEMU, or a snapshot of it, sends the guest as a stream.
        self.is_stream = args.guest.partition(":")[0] in STREAMS
        # Whether the first `open` starts the guest.
        self.is_new = args.guest.startswith("demo") and "pid=" not in args.guest
        # The process of a demo guest; 0 if there is none.
        self.pid, self.start_time = 0, ""
        # Whether that process ends with this program. One that was started elsewhere outlives a
        # program that has moved nothing.
        self.ends_with_program = args.stay
        self._open: Callable[[], Guest]
        if self.is_stream:
            stream = qemu_guest(args, page_size)
            self._open = lambda: stream
        else:
            self._open = memory_guest(args, args.guest, page_size)

    def open(self) -> Guest:
        """Open the guest; the caller closes it. Raises MigrationError."""
        return self._open()

    def open_memory(self) -> MemoryGuest:
        """Open a guest whose memory this program reads. Raises MigrationError."""
        from migrate.guests.guest import MemoryGuest

        guest = self._open()
        if not isinstance(guest, MemoryGuest):
            raise UsageError(f"--guest {self._described}: QEMU alone can read its memory")
        return guest

    def open_stream(self) -> QemuGuest:
        """Open a guest that comes as a stream. Raises MigrationError."""
        from migrate.qemu.guest import QemuGuest

        guest = self._open()
        if not isinstance(guest, QemuGuest):
            raise UsageError(f"--guest {self._described}: no QEMU sends it")
        return guest

    def remember(self, guest: Guest) -> None:
        """Open the guest anew next time, and find the process in which a demo guest runs."""
        if guest.pid:
            self.ends_with_program |= f"pid={guest.pid}" not in self._described
            self.pid, self.start_time = guest.pid, guest.start_time
            self._described = f"demo:pid={guest.pid}"
        self._open = self._open_again

    def _open_again(self) -> Guest:
        if self.is_stream:
            return qemu_guest(self._args, self._page_size)
        return memory_guest(self._args, self._described, self._page_size, self.start_time)()

    def end(self) -> None:
        """End the process of a demo guest that this program has started."""
        if self.pid and self.ends_with_program:
            with contextlib.suppress(ProcessLookupError):
                Process(self.pid, self.start_time).signal(signal.SIGTERM)


def memory_guest(
    args: argparse.Namespace, described: str, page_size: int, start_time: str = ""
) -> Callable[[], MemoryGuest]:
    """Return a function that opens a demo guest or a file guest. Raises UsageError.

    described  -- the guest, as --guest describes it
    start_time -- of the process of demo:pid=N, if it is known

    A new demo guest is started by that function, not here: if the program cannot connect, no guest
    is left running.
    """
    kind, _, rest = described.partition(":")
    if kind == "file":
        return _file_guest(args, rest)
    if kind == "demo":
        return _demo_guest(args, rest, page_size, start_time)
    raise UsageError(
        f"--guest {described!r} is not understood: write demo[:...], file:PATH, {QEMU_FORMS}, or "
        "snapshot:DIR"
    )


def _file_guest(args: argparse.Namespace, path: str) -> Callable[[], MemoryGuest]:
    from migrate.guests.file import FileGuest
    from migrate.tracking.tracker import Tracking

    if not path:
        raise UsageError("guest file: name the file: --guest file:PATH")
    pids = [number(pid, "--pid") for pid in args.pid if pid != "auto"]
    guest = FileGuest(
        path, pids, args.pause_cmd, args.resume_cmd,
        seconds(args.command_timeout, "--command-timeout"), auto="auto" in args.pid,
        tracking=Tracking(args.tracking),
    )  # fmt: skip
    guest.survey()
    for text in guest.warnings:
        say(f"migrate-src: warning: {text}")
    for text in guest.notices if not args.quiet else ():
        say(f"migrate-src: {text}")
    return lambda: guest


def _demo_guest(
    args: argparse.Namespace, words: str, page_size: int, start_time: str
) -> Callable[[], MemoryGuest]:
    from migrate.guests.demo.guest import DemoGuest, parse_demo
    from migrate.guests.demo.shared_memory import check_fits

    if args.pid or args.pause_cmd or args.resume_cmd:
        raise UsageError("--pid, --pause-cmd and --resume-cmd are for file guests")
    if words.startswith("pid="):
        running = DemoGuest.open(words, page_size, start_time)
        return lambda: running
    check_fits(parse_demo(words, page_size))
    return lambda: DemoGuest.open(words, page_size)


def qemu_guest(args: argparse.Namespace, page_size: int) -> QemuGuest:
    """Return the guest of a QEMU, or one from a snapshot. Raises UsageError."""
    from migrate.policy.aim import SHORT_SECONDS
    from migrate.qemu.guest import QemuGuest

    if args.pid or args.pause_cmd or args.resume_cmd or args.dry_run:
        raise UsageError(
            "--pid, --pause-cmd, --resume-cmd and --dry-run are not for a QEMU guest: QEMU itself "
            "pauses it"
        )
    if args.guest.startswith("snapshot"):
        return _snapshot_guest(args)
    where, qmp = qemu_words(args.guest.removeprefix("qemu").removeprefix(":"))
    if args.auto_converge and not qmp:
        raise UsageError("--auto-converge: QEMU slows its guest if it is told to: add qmp=PATH")
    limit = units.parse_milliseconds(args.downtime_limit, "--downtime-limit") / 1e3
    settings: dict[str, Any] = {"downtime_limit": min(limit, SHORT_SECONDS)}  # it rises: see aim.py
    if args.auto_converge:
        settings |= {"auto_converge": True, **asdict(throttle_of(args))}
    return QemuGuest(
        parse_address(where, listen=True) if where else None, qmp, page_size=page_size,
        return_path=not args.no_return_path, settings=settings,
    )  # fmt: skip


def _snapshot_guest(args: argparse.Namespace) -> QemuGuest:
    from migrate.qemu.snapshot.guest import SnapshotGuest

    path = args.guest.removeprefix("snapshot").removeprefix(":")
    if not path:
        raise UsageError("guest snapshot: name the directory: --guest snapshot:DIR")
    if args.auto_converge or args.no_return_path:
        raise UsageError("--auto-converge and --no-return-path are for a QEMU that sends its guest")
    return SnapshotGuest(path)
