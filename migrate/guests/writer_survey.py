"""The survey of a file guest's writers, before the migration begins.

A writer that would go on after the guest is paused is refused here, and so is one that cannot be
stopped. Found later, either would be an error after everything has been sent.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import TypeVar

from migrate.errors import MigrationError, UsageError
from migrate.guests import companions
from migrate.guests.guest_file import open_for_writing, opened_here
from migrate.guests.kernel_writers import kernel_writers
from migrate.guests.proc_view import narrow_view
from migrate.guests.writer_search import Writer, WriterSearch, named
from migrate.runtime.processes import (
    Process,
    ancestors,
    is_kernel_thread,
    is_stopped,
    start_time_of,
    status,
    task_states,
    user_ids,
)

# A search takes a fraction of a second, but the kernel may let us wait for one of the processes.
SEARCH_PATIENCE = 30.0
# The first search takes longer than the one in the pause will: see WriterSearch.seconds.
SEARCHES = 3

T = TypeVar("T")


@dataclass
class Survey:
    """What a survey has found.

    taken    -- processes to stop, beside those that the user has named
    warnings -- sentences about what may be lost
    notices  -- sentences about what is good to know
    seconds, new_seconds, skipped -- see WriterSearch
    """

    taken: dict[int, Process] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    seconds: float = 0.0
    new_seconds: float = 0.0
    skipped: int = 0


def survey(
    fd: int, path: str, pids: Container[int], *, stops: bool, auto: bool, commanded: bool
) -> Survey:
    """Find the writers of the guest that is open at `fd`.

    path      -- of the guest, for messages
    pids      -- the processes that the user has named, to be stopped (--pid PID)
    stops     -- there are such processes, or `auto` is set
    auto      -- all other writers are to be stopped too (--pid auto)
    commanded -- a --pause-cmd stops writers; those that it leaves running are found in the pause

    Raises UsageError if a writer would go on after the pause, or cannot be stopped.
    """
    result, search = Survey(), WriterSearch(fd)
    if search.unavailable and stops:
        raise UsageError(
            f"--pid: {search.unavailable}: whether a process has stopped cannot be seen"
        )
    found: list[Writer] = []
    for _ in range(SEARCHES):
        found = _bounded(search.search)
    _bounded(search.search_new)
    result.seconds, result.new_seconds = search.seconds, search.new_seconds
    result.skipped = search.skipped
    others = [writer for writer in found if writer.pid not in pids]
    running = [writer for writer in others if runs(writer)]
    if auto:
        handles = {writer.pid: taken(fd, writer) for writer in others}
        result.taken = {pid: handle for pid, handle in handles.items() if handle is not None}
    elif running and commanded:
        result.notices.append(f"{named(running)} can write the guest: --pause-cmd must stop that")
    elif running:
        raise UsageError(f"guest file {path}: {unnamed(running, others_named=stops)}")
    if (kernel := kernel_writers(search.guest)) and commanded:
        result.notices.append(f"{kernel[0]} can write the guest: --pause-cmd must stop that")
    elif kernel:
        raise UsageError(
            f"guest file {path}: {kernel[0]} writes it, which no signal stops: take that away "
            "(umount, losetup -d), or give --pause-cmd (fsfreeze -f) and --resume-cmd"
        )
    _tell_what_is_hidden(
        result, search, path, found, alone=not (stops or commanded), kernel=bool(kernel)
    )
    if not commanded:
        result.warnings += companions.warnings(fd, path, found)
    return result


def unnamed(running: list[Writer], *, others_named: bool) -> str:
    """Word the error about writers that nothing would stop."""
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
    """Return whether a writer runs, or may run for all that can be seen."""
    try:
        return not is_stopped(writer.pid)
    except MigrationError:
        return True


def stoppable(pid: int, what: str, start_time: str) -> Process:
    """Return a handle on a process that we may stop.

    start_time -- its start time; "" where an operator has named it by its number

    Raises UsageError, which begins with `what`, where we may not, or cannot see whether it stops.
    """
    if pid == os.getpid():
        raise UsageError(f"{what}: that is migrate-src itself")
    try:
        handle = Process(pid, start_time)
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
    """Return a handle on a writer that --pid auto is to stop; None if it has ended since.

    Raises UsageError if it is not ours to stop.
    """
    what = f"--pid auto: process {writer}"
    if writer.pid in ancestors():
        raise UsageError(
            f"{what}, which has started migrate-src, can write the guest itself: start migrate-src "
            f"elsewhere, or say --pid {writer.pid}"
        )
    try:
        handle = stoppable(writer.pid, what, writer.start_time)
    except UsageError:
        if start_time_of(writer.pid) != writer.start_time:
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
    """Check that a writer acts for the guest's owner, or for us if the guest is root's or ours.

    Any user that may open the file could pass its descriptor to a service, to have us stop that.
    Raises UsageError for writers of other users.
    """
    owner, us = os.fstat(fd).st_uid, os.geteuid()
    others = user_ids(writer.pid) - ({0, us} if owner in (0, us) else {owner})
    if others:
        raise UsageError(
            f"{what} can write the guest and belongs to user {min(others)}, and the guest to user "
            f"{owner}: if it is one of the guest's writers, say --pid {writer.pid} too"
        )


def _tell_what_is_hidden(
    result: Survey,
    search: WriterSearch,
    path: str,
    found: list[Writer],
    *,
    alone: bool,
    kernel: bool,
) -> None:
    """Add warnings about processes that may not be looked into, unless nothing can write the guest.

    alone  -- nothing stops writers; then UsageError is raised if something has the guest open
    kernel -- something in the kernel writes the guest, and the user is told of that already
    """
    anything = None
    if not found and not opened_here(search.guest):
        anything = not search.guest.migrates and open_for_writing(search.guest.fd)
        if anything and not _bounded(search.search) and search.guest.migrates:
            anything = False  # the descriptor of another migration, which has come meanwhile
    if anything is False:
        return
    hidden = [search.unavailable] if search.unavailable else []
    if search.hidden:
        processes = "process" if search.hidden == 1 else "processes"
        hidden.append(f"{search.hidden} {processes} of other users may not be looked into")
    if search.skipped:
        hidden.append(skipped(search.skipped))
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
    if search.init_hidden:
        # Process 1 starts the others and has no business with a guest: no reason for a warning.
        result.notices.append("process 1 may not be looked into")
    if hidden:
        result.warnings.append(
            f"{'; '.join(hidden)}: what one of them writes to the guest after the pause is lost"
        )


def skipped(count: int) -> str:
    """Word how many processes no search had the time for."""
    return (
        f"{count} {'process' if count == 1 else 'processes'} of other users could not be looked "
        "into in time (very many processes or open files, or one that hangs in the kernel)"
    )


def _bounded(look: Callable[[], T]) -> T:
    """Return the result of a search.

    Raises UsageError after SEARCH_PATIENCE: a process that hangs in the kernel may hang a search,
    if it is one of root's, of the guest's owner or of ours.
    """
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(look()), daemon=True)
    thread.start()
    thread.join(SEARCH_PATIENCE)
    if not results:
        raise UsageError(
            f"who writes the guest could not be looked at in {SEARCH_PATIENCE:g} s: a process "
            "hangs in the kernel"
        )
    return results[0]
