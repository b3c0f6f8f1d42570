"""The survey: who writes a file guest, before anything is begun with it.

What would go on writing after the guest is paused is refused here, in words, and so is a process
that cannot be stopped: all of it could only be an error later, after everything has been sent.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import TypeVar

from migrate.errors import MigrationError, UsageError
from migrate.guests import companions
from migrate.guests.process import (
    Process,
    ancestors,
    is_kernel_thread,
    stands_still,
    start_time,
    status,
    task_states,
    users,
)
from migrate.guests.writers import (
    Census,
    Writer,
    kernel_writers,
    named,
    narrow_view,
    open_for_writing,
    opened_here,
)

# A look at all processes takes a fraction of a second; the kernel may let us wait for one of them.
LOOK_PATIENCE = 30.0
# The later ones take as long as the one in the pause will: see Census.seconds.
LOOKS = 3

T = TypeVar("T")


@dataclass
class Survey:
    """What a survey has found.

    taken    -- processes that are to be stopped, beside those that were named
    warnings -- what a user must know;  notices -- what is good to know
    seconds, new_seconds -- see Census
    """

    taken: dict[int, Process] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    seconds: float = 0.0
    new_seconds: float = 0.0


def survey(
    fd: int, path: str, pids: Container[int], *, stops: bool, auto: bool, commanded: bool
) -> Survey:
    """Looks who writes the guest that is open at `fd`.

    pids      -- the processes that were named to be stopped
    stops     -- whether there are any, or `auto`
    auto      -- whether all others are to be stopped too
    commanded -- whether a --pause-cmd stops writers: what it leaves running is seen in the pause

    Raises UsageError where something would go on writing, or cannot be stopped.
    """
    result, census = Survey(), Census(fd)
    if census.blind and stops:
        raise UsageError(f"--pid: {census.blind}: whether a process has stopped cannot be seen")
    found: list[Writer] = []
    for _ in range(LOOKS):
        found = _bounded(census.look)
    census.look_at_new()
    result.seconds, result.new_seconds = census.seconds, census.new_seconds
    others = [writer for writer in found if writer.pid not in pids]
    running = [writer for writer in others if runs(writer)]
    if auto:
        handles = {writer.pid: taken(fd, writer) for writer in others}
        result.taken = {pid: handle for pid, handle in handles.items() if handle is not None}
    elif running and commanded:
        result.notices.append(f"{named(running)} can write the guest: --pause-cmd must stop that")
    elif running:
        raise UsageError(f"guest file {path}: {unnamed(running, others_named=stops)}")
    if (kernel := kernel_writers(census.target)) and commanded:
        result.notices.append(f"{kernel[0]} can write the guest: --pause-cmd must stop that")
    elif kernel:
        raise UsageError(
            f"guest file {path}: {kernel[0]} writes it, which no signal stops: take that away "
            "(umount, losetup -d), or give --pause-cmd (fsfreeze -f) and --resume-cmd"
        )
    _say_what_is_unseen(
        result, census, path, found, alone=not (stops or commanded), kernel=bool(kernel)
    )
    if not commanded:
        result.warnings += companions.warnings(fd, path, found)
    return result


def unnamed(running: list[Writer], *, others_named: bool) -> str:
    """The error about writers that nothing would stop."""
    if others_named:
        return (
            f"{named(running)} can write it too, and what is written after the pause would be "
            "lost: name each with --pid, or all of them with --pid auto"
        )
    return (
        f"{named(running)} can write it, and would go on writing a copy that is no longer the "
        "guest: end that first, or give --pid auto, --pid PID or --pause-cmd"
    )


def runs(writer: Writer) -> bool:
    """Whether a writer runs, as far as can be seen."""
    try:
        return not stands_still(writer.pid)
    except MigrationError:
        return True


def stoppable(pid: int, what: str, born: str) -> Process:
    """A handle on a process that we may stop.

    born -- its start time; "" where a person has named it by its number

    Raises UsageError, which begins with `what`, where we may not, or cannot see whether it stops.
    """
    if pid == os.getpid():
        raise UsageError(f"{what}: that is migrate-src itself")
    try:
        handle = Process(pid, born)
    except ProcessLookupError:
        raise UsageError(f"{what}: there is no such process") from None
    try:
        _check_stoppable(handle, what)
    except UsageError:
        handle.close()
        raise
    return handle


def _check_stoppable(handle: Process, what: str) -> None:
    pid = handle.pid
    if pid == 1:
        raise UsageError(
            f"{what}: the kernel lets nobody here stop process 1: run migrate-src outside of its "
            "container, or give --pause-cmd"
        )
    if not task_states(pid):
        raise UsageError(
            f"{what}: /proc does not show it (hidepid?), so whether it has stopped could not be "
            "seen: run migrate-src as root"
        )
    if is_kernel_thread(pid):
        raise UsageError(f"{what}: that is a thread of the kernel, which no signal stops")
    facts = status(pid)
    if facts.get("Tgid", str(pid)) != str(pid):
        raise UsageError(f"{what}: that is a thread of process {facts['Tgid']}: give that")
    try:
        handle.signal(0)
    except ProcessLookupError:
        raise UsageError(f"{what}: there is no such process") from None
    except OSError as error:
        owner = facts.get("Uid", "?").split()[0]
        raise UsageError(
            f"{what}: it cannot be stopped: {error.strerror}: it belongs to user {owner}: run "
            "migrate-src as that user, or as root"
        ) from None


def taken(fd: int, writer: Writer) -> Process | None:
    """A handle on one that --pid auto is to stop; None if it has ended since. Raises UsageError."""
    what = f"--pid auto: process {writer}"
    if writer.pid in ancestors():
        raise UsageError(
            f"{what}, which has started migrate-src, can write the guest itself: start migrate-src "
            f"elsewhere, or say --pid {writer.pid}"
        )
    try:
        handle = stoppable(writer.pid, what, writer.born)
    except UsageError:
        if start_time(writer.pid) != writer.born:
            return None
        raise
    try:
        _check_owner(fd, writer, what)
    except UsageError:
        ended = handle.ended()
        handle.close()
        if ended:
            return None
        raise
    return handle


def _check_owner(fd: int, writer: Writer, what: str) -> None:
    """Raises UsageError for processes of others than the guest's owner (and us, where it is
    root's or ours): whoever has the file open could hand it to any service, to have that stopped.
    """
    owner, us = os.fstat(fd).st_uid, os.geteuid()
    others = users(writer.pid) - ({0, us} if owner in (0, us) else {owner})
    if others:
        raise UsageError(
            f"{what} can write the guest and belongs to user {min(others)}, and the guest to user "
            f"{owner}: if it is one of the guest's writers, say --pid {writer.pid} too"
        )


def _say_what_is_unseen(
    result: Survey, census: Census, path: str, found: list[Writer], *, alone: bool, kernel: bool
) -> None:
    """Processes that may not be looked into; not where the kernel says that nothing writes.

    alone  -- nothing is there to stop whatever writes. Raises UsageError where something does then
    kernel -- the kernel itself can write it, and that is said already
    """
    anything = None
    if not found and not opened_here(census.target):
        anything = not census.target.held and open_for_writing(census.target.fd)
        if anything and not census.look() and census.target.held:
            anything = False  # a mover has come meanwhile
    if anything is False:
        return
    hidden = [census.blind] if census.blind else []
    if census.unseen:
        processes = "process" if census.unseen == 1 else "processes"
        hidden.append(f"{census.unseen} {processes} of other users may not be looked into")
    if outside := narrow_view():
        hidden.append(f"{outside} cannot be seen")
    if anything and alone:
        raise UsageError(
            f"guest file {path}: something has it open for writing that is not to be seen from "
            f"here{' (' + '; '.join(hidden) + ')' if hidden else ''}: run migrate-src as root, or "
            "outside of a container, or give --pause-cmd"
        )
    if anything and not kernel:
        result.warnings.append(
            "something has the guest open for writing that no process shows (a descriptor on its "
            "way through a socket, io_uring, a file server in the kernel): what it writes to the "
            "guest after the pause is lost"
        )
    if census.init_unseen:
        # It starts the others, and a guest is none of its business: not worth an alarm.
        result.notices.append("process 1 may not be looked into")
    if hidden:
        result.warnings.append(
            f"{'; '.join(hidden)}: what one of them writes to the guest after the pause is lost"
        )


def _bounded(look: Callable[[], T]) -> T:
    """The result of a look; the kernel may let it wait for a process that hangs."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(look()), daemon=True)
    thread.start()
    thread.join(LOOK_PATIENCE)
    if not results:
        raise UsageError(
            f"who writes the guest could not be looked at in {LOOK_PATIENCE:g} s: a process hangs "
            "in the kernel"
        )
    return results[0]
