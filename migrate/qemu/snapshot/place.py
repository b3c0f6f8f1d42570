"""A directory as the place where a QEMU's guest goes: it is saved there, and runs nowhere."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from migrate.errors import MigrationError, UsageError
from migrate.files.directory import Directory
from migrate.files.identity import Identity
from migrate.files.lock import DirectoryLock
from migrate.files.reservation import Reservation
from migrate.qemu.snapshot.files import SnapshotFiles
from migrate.qemu.snapshot.prepared import Output, PreparedSnapshot, check_snapshot_output
from migrate.qemu.snapshot.saving import SnapshotSaver
from migrate.qemu.stream.loader import Loader
from migrate.qemu.stream.place import NoQemuError, StreamPlace
from migrate.qemu.stream.return_path import LOAD_SECONDS
from migrate.runtime.threads import in_thread


@dataclass(frozen=True)
class _Saving:
    """A snapshot that is being saved.

    reservation -- of its name
    before      -- the directory that it replaces, which is locked
    """

    saver: SnapshotSaver
    reservation: Reservation
    before: Identity | None


class SnapshotPlace(StreamPlace):
    """A directory `path` that a machine is saved in.

    overwrite -- whether it may replace a snapshot
    """

    runs = False

    def __init__(self, path: str, *, overwrite: bool = False) -> None:
        super().__init__()
        self.path = path
        self._overwrite = overwrite
        self._saving: _Saving | None = None
        self._finished = False  # the end of the stream was sent
        self._prepared: PreparedSnapshot | None = None
        self._resources = contextlib.ExitStack()

    async def make_ready(self) -> None:
        """Check the output, reserve its name, and begin to save. Raises NoQemuError."""
        if self._saving is not None:
            return
        try:
            check_snapshot_output(self.path, self._overwrite)
            reservation = Reservation(self.path)
            self._resources.callback(reservation.close)
            files = SnapshotFiles(self.path)
            self._resources.callback(files.free)
            before = await self._lock_replaced(files.directory)
            with contextlib.ExitStack() as until_saving:
                ours, theirs = map(until_saving.enter_context, socket.socketpair())
                saver = SnapshotSaver(files, theirs)
                until_saving.pop_all()
        except UsageError as error:
            raise NoQemuError(str(error)) from None
        except OSError as error:
            raise NoQemuError(f"--output {self.path}: {error.strerror}") from None
        self._saving = _Saving(saver, reservation, before)
        saver.start()
        ours.setblocking(False)
        self._loader = Loader(ours, self._fault)

    async def _lock_replaced(self, above: Directory) -> Identity | None:
        """Lock the directory that the snapshot replaces, so that it is not restored meanwhile.

        Returns its identity: no other directory is replaced later. None if nothing has the name.
        """
        output = Output(self.path, above, self._overwrite)
        found = output.open_existing()
        if found is None:
            return None
        with found:
            lock = DirectoryLock(".", output.option, start=found.fd)
            self._resources.callback(lock.close)
            await lock.acquire()
            return found.identity

    def _fault(self, reason: str, advice: str = "") -> MigrationError:
        del advice
        error = self._saving.saver.error if self._saving else ""
        return MigrationError(error or f"--output {self.path}: the snapshot {reason}")

    def announce(self, blocks: Sequence[tuple[bytes, int]], page_size: int) -> None:
        saver = self._saved().saver
        saver.announced, saver.announced_size = blocks, page_size

    def _saved(self) -> _Saving:
        """Return what is being saved, after `make_ready`."""
        assert self._saving is not None
        return self._saving

    async def prove(self, *, return_path: bool) -> None:
        """Return when the whole machine is safe on the disk. Raises MigrationError."""
        del return_path
        if not self._finished:
            self._finished = True
            await self.loader.finish()
            self.loader.end_stream()
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                await self.loader.ended.wait()
        except TimeoutError:
            raise MigrationError(
                f"--output {self.path}: the disk has not taken the machine in {LOAD_SECONDS:g} s"
            ) from None
        saving = self._saved()
        saved, left = saving.saver.snapshot, saving.saver.left
        if saved is None or left is None:
            raise self._fault("has failed")
        self._prepared = PreparedSnapshot(
            left, saved.id, saved.memory, overwrite=self._overwrite,
            directory=saving.saver.files.directory, before=saving.before,
            reservation=saving.reservation,
        )  # fmt: skip

    async def start(self, state: bytes) -> str:
        assert self._prepared is not None
        return await self._prepared.start(state)

    def facts(self) -> dict[str, Any]:
        return self._prepared.facts() if self._prepared else {"kind": "snapshot"}

    def close(self) -> None:
        super().close()
        if self._saving is not None:
            self._saving.saver.close()
        if self._prepared is not None:
            self._prepared.close()
        self._resources.close()

    async def discard(self) -> None:
        super().close()
        if self._saving is not None:
            await in_thread(self._saving.saver.close)
            await in_thread(self._saving.saver.files.remove)
        self._resources.close()
