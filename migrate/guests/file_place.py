"""The place of a file guest at the destination: `--output PATH`."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import resource
from typing import Any

from migrate.errors import MigrationError, UsageError
from migrate.files.openers import openers
from migrate.files.partial_output import PartialOutput
from migrate.guests.output_file import OutputFile, check_output
from migrate.guests.place import Place
from migrate.guests.proc_view import command_line
from migrate.guests.rights import Rights
from migrate.memory.memory import Memory
from migrate.runtime.processes import command_name, user_ids
from migrate.units import format_size
from proto.wire.messages import MAX_PAGES, GuestInfo


class FilePlace(Place):
    """A file that appears under its name once it is complete (see OutputFile).

    Pages that are never written stay holes.

    partial -- what an earlier program has received of this guest; it is resumed
    rights  -- mode and owner that the user asks for

    Raises UsageError.
    """

    persistent = True

    def __init__(
        self, info: GuestInfo, path: str, overwrite: bool, partial: PartialOutput | None = None,
        rights: Rights | None = None,
    ) -> None:  # fmt: skip
        self.path = path
        self.partial = partial is not None
        self._size, self._page_size = info.size, info.page_size
        self._padded = info.pages * info.page_size
        self._overwrite = overwrite
        self._check(info)
        # Number and name of each process that will keep the file that is replaced.
        self._users = opened_by(path) if overwrite else []
        self._check_not_the_guest()
        try:
            self._open(partial, rights or Rights())
        except OSError as error:
            why = str(error.strerror)
            if error.errno == errno.EFBIG:
                why += f": the file system takes no file of {format_size(info.size)}"
            raise UsageError(f"--output {path}: {why}") from None
        self.fd = self._file.fd
        self.memory = memoryview(self._map)
        self.content = Memory(info.size, fd=self.fd)

    def _check(self, info: GuestInfo) -> None:
        """Raise UsageError if no file there can be the output."""
        if info.pages > MAX_PAGES:
            raise UsageError(f"a guest of {format_size(info.size)} is larger than any output")
        check_output(self.path, self._overwrite)
        most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        if 0 <= most < self._padded:
            raise UsageError(
                f"--output {self.path}: the guest has {format_size(self._size)}, and no file may "
                f"have more than {format_size(most)} here: raise the limit (ulimit -f)"
            )

    def _check_not_the_guest(self) -> None:
        """Raise UsageError if a source here moves the very file that is to be replaced."""
        for pid, name in self._users:
            if _moves_guest(pid, name):
                raise UsageError(
                    f"--output {self.path}: process {pid} ({name}) moves that very file: a guest "
                    "cannot replace itself: name another output"
                )

    def _open(self, partial: PartialOutput | None, rights: Rights) -> None:
        """Open and map the file. Raises OSError, UsageError."""
        if partial is None:
            self._file = OutputFile.create(
                self.path, self._size, overwrite=self._overwrite, rights=rights
            )
        else:
            self._file = OutputFile.resume(
                self.path, self._size, partial, overwrite=self._overwrite, rights=rights
            )
        try:
            os.ftruncate(self._file.fd, self._padded)
            self._map = mmap.mmap(self._file.fd, self._padded)
        except OSError:
            self._file.remove()
            self._file.close()
            raise

    def notices(self) -> list[str]:
        """Return sentences for the user, before the guest comes."""
        found = []
        with contextlib.suppress(OSError):
            system = os.fstatvfs(self.fd)
            free = system.f_bavail * system.f_frsize + os.fstat(self.fd).st_blocks * 512
            if system.f_blocks and free < self._size:
                found.append(
                    f"the guest has up to {format_size(self._size)}, and "
                    f"{self._file.directory.path} has room for {format_size(free)}: it fits only "
                    "if all else is zeros"
                )
        found += [
            f"process {pid} ({name}) has {self.path} open: it will go on with the old file"
            for pid, name in self._users
        ]
        return found

    async def make_ready(self) -> None:
        self._file.reserve()

    def persist(self) -> None:
        self._file.persist()

    def allocate(self, page: int) -> None:
        os.posix_fallocate(self.fd, page * self._page_size, self._page_size)

    def sync(self) -> None:
        self._file.check_present()
        os.fdatasync(self.fd)

    async def prepare(self, state: bytes) -> None:
        self._file.check_present()
        try:
            check_output(self.path, self._overwrite)
        except UsageError as error:
            raise MigrationError(str(error)) from None
        self._file.complete(Rights.unpack(state))

    def unprepare(self) -> None:
        os.ftruncate(self.fd, self._padded)

    def facts(self) -> dict[str, Any]:
        return self._file.facts()

    async def start(self, state: bytes) -> str:
        return self._file.deliver()

    def close(self) -> None:
        with contextlib.suppress(BufferError):
            self.memory.release()
            self._map.close()
        self._file.close()

    async def discard(self) -> None:
        self._file.remove()
        self.close()


class PreparedFilePlace(Place):
    """A complete file that an earlier program has prepared. No more pages come."""

    persistent = True

    def __init__(self, file: OutputFile) -> None:
        self._file = file

    @classmethod
    def reopen(cls, facts: dict[str, Any]) -> PreparedFilePlace:
        """Return the place that a journal names. Raises MigrationError if the file is gone."""
        return cls(OutputFile.reopen(facts))

    def facts(self) -> dict[str, Any]:
        return self._file.facts()

    async def start(self, state: bytes) -> str:
        return self._file.deliver()

    def close(self) -> None:
        self._file.close()

    async def discard(self) -> None:
        self._file.remove()
        self.close()


def opened_by(path: str) -> list[tuple[int, str]]:
    """Return number and name of other processes that have a file open, as far as we may look."""
    try:
        processes = openers(os.stat(path))
    except OSError:
        return []
    return [(pid, command_name(pid)) for pid in processes]


def _moves_guest(pid: int, name: str) -> bool:
    """Return whether a process is a migrate-src of root's or of our user.

    Any process may call itself so: another user's must not keep guests from landing.
    """
    if not user_ids(pid) <= {0, os.geteuid()}:
        return False
    words = [name, *command_line(pid)[:2]]  # the name may be that of the Python that runs it
    return any("migrate-src" in os.path.basename(word) for word in words)
