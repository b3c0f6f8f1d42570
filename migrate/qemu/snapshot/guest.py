"""A snapshot as a guest to migrate: it is restored from its directory into a QEMU.

The directory stays as it is. A machine may be restored any number of times, and two that were
restored from one snapshot know nothing of each other.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from migrate.errors import MigrationError
from migrate.files.lock import DirectoryLock
from migrate.qemu.guest import BEGIN_SECONDS, Owner, QemuGuest
from migrate.qemu.qmp.stream_pair import stream_pair
from migrate.qemu.snapshot.layout import Snapshot
from migrate.qemu.snapshot.sending import SnapshotSender
from migrate.qemu.stream.intake import Intake, StreamLost
from migrate.runtime.threads import in_thread


class SnapshotGuest(QemuGuest):
    """The machine that was saved in `path`. Raises UsageError if there is none."""

    while_undecided = "the snapshot is as it was"
    if_here = f"the guest does not run at the destination; {while_undecided}"
    if_there = f"the guest runs at the destination; {while_undecided}"

    def __init__(self, path: str) -> None:
        super().__init__(None)
        self._path = path
        self._snapshot = Snapshot.read(path)
        self._sender: SnapshotSender | None = None
        self._directory: DirectoryLock | None = None

    async def lock(self) -> None:
        if self._directory is None:
            lock = DirectoryLock(self._path, f"guest snapshot:{self._path}")
            await lock.acquire()
            self._directory, self.cautions = lock, lock.cautions

    def unlock(self) -> None:
        if self._directory is not None:
            self._directory.close()
            self._directory = None

    @property
    def after_failure(self) -> str:  # type: ignore[override]
        return self.while_undecided

    @property
    def driven(self) -> bool:
        """True: the stream begins once there is a destination."""
        return True

    @property
    def description(self) -> str:  # type: ignore[override]
        return f"snapshot of a QEMU guest ({self._snapshot.machine})"

    async def make_ready(self) -> None:
        """Lock the snapshot, and begin to send its stream. Raises UsageError, MigrationError."""
        if self._intake is not None:
            return
        await self.lock()
        ours, theirs = stream_pair()
        self._socket = ours
        self._sender = SnapshotSender(self._path, self._snapshot, theirs)
        self._sender.start()
        intake = SnapshotIntake(ours, self._snapshot.page_size, self._sender)
        if not await in_thread(intake.begin, BEGIN_SECONDS):
            raise MigrationError(f"{self._path} was not read in {BEGIN_SECONDS:g} s")
        intake.check(return_path=True)
        self._intake = intake

    async def relinquish(self) -> None:
        """Note that the owner is undecided; nothing here can run the guest."""
        self._owner = Owner.UNDECIDED

    async def close(self) -> None:
        await super().close()
        if self._sender is not None:
            await in_thread(self._sender.join)
        self.unlock()

    def facts(self) -> dict[str, Any]:
        return {"kind": "snapshot", "path": os.path.abspath(self._path)}


class SnapshotIntake(Intake):
    """Reads the stream of a SnapshotSender, which knows why its stream was cut."""

    def __init__(self, sock: socket.socket, page_size: int, sender: SnapshotSender) -> None:
        super().__init__(sock, page_size)
        self._sender = sender

    def _fill(self) -> bool:
        try:
            return super()._fill()
        except StreamLost:
            self._sender.join()
            if self._sender.error:
                raise MigrationError(self._sender.error) from None
            raise
