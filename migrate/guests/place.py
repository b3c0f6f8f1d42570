"""The place of a guest at the destination.

make_ready      before the source may send
persist         once the place is in the journal
allocate, sync  while pages come
prepare         all that may fail before the guest is ours
mark_complete   once the journal says that the guest is complete
start, close    the guest is ours, and runs
discard         at any step before `start` has returned: the guest does not come
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from migrate.memory.memory import Memory


class Place(ABC):
    """The place of a guest at the destination."""

    # Whether the guest comes as QEMU's stream instead of pages for `memory`.
    takes_stream = False
    # Writable, in whole pages.
    memory: memoryview
    # The same bytes, as extents are found in them and digests computed.
    content: Memory
    # Whether `memory` is all zeros at first, apart from what an earlier program has received.
    zeroed = True
    # Whether an earlier program has received some of the guest here.
    partial = False
    # Whether the place outlives this program, so that a later one can resume.
    persistent = False
    # The file that `memory` maps, or -1. Raw pages are written to it.
    fd = -1
    # Where the guest begins in that file, in bytes.
    fd_offset = 0
    # The process that is the guest, if it is one that we started: its number and start time.
    pid, start_time = 0, ""
    # Whether the guest runs once it is started. A virtual machine may arrive paused.
    runs = True
    # Whether `start` may take effect before it returns, so that no later program can know.
    irrevocable = False

    async def make_ready(self) -> None:
        """Wait until the place can take a guest. The source is told to begin after that."""

    def persist(self) -> None:
        """Make a `persistent` place outlive this program from here on. Raises MigrationError.

        Called once the journal has the facts of the place.
        """

    def allocate(self, page: int) -> None:
        """Allocate a page that is about to be written through `memory` for the first time.

        Raises OSError if there is no space: a mapping can only answer with SIGBUS.
        """

    def sync(self) -> None:
        """Write what has come to stable storage. Called at the end of each round."""

    async def prepare(self, state: bytes) -> None:
        """Do all that can fail before the guest is ours, so that `start` cannot.

        Raises MigrationError, and PeerError for a `state` that makes no sense.
        """

    def unprepare(self) -> None:
        """Undo `prepare` and `mark_complete`: more pages will come."""

    def mark_complete(self) -> None:
        """Let the guest outlive this program: the journal says that it is complete."""

    @abstractmethod
    async def start(self, state: bytes) -> str:
        """Let the guest run: it is ours. Return a sentence for the user.

        Raises MigrationError if that fails; then the guest did not run and never will.
        """

    async def confirm_running(self, running: str) -> str:
        """Return the sentence of `start`, or a truer one: the source knows that the guest is ours.

        running -- the sentence of `start`
        """
        return running

    def close(self) -> None:
        """Free what was needed to receive the guest: it runs, and the source knows it.

        Not part of `start`, because unmapping a large memory would lengthen the pause.
        """

    @abstractmethod
    async def discard(self) -> None:
        """Leave nothing behind: the guest does not come."""

    def facts(self) -> dict[str, Any]:
        """Return what a later program needs to start a prepared guest, or to discard it.

        The journal keeps it; see migrate.cli.reopen.
        """
        return {"kind": "buffer"}
