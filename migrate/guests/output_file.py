"""The file that a file guest lands in: complete and verified under its name, or not at all."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from migrate.directory import Directory, Identity, Left, identity_of
from migrate.errors import MigrationError, UsageError
from migrate.filesystem import (
    check_replaceable,
    check_writable,
    hidden_name,
    kind_of,
    try_directory,
)
from migrate.guests.guest import Place
from migrate.guests.process import users
from migrate.guests.reservation import NameTaken, Reservation
from migrate.guests.rights import Rights, keep_attributes
from migrate.memory import Memory
from migrate.quantities import format_size
from proto.messages import MAX_PAGES, GuestInfo


class FilePlace(Place):
    """`--output PATH`: appears under its name when it is complete, or not at all.

    Until then it has a hidden name beside that, and none at all before that name is written down,
    where the file system can do that (O_TMPFILE). Pages that were never written stay holes.
    """

    lasting = True

    def __init__(
        self, info: GuestInfo, path: str, overwrite: bool, left: Left | None = None,
        rights: Rights | None = None,
    ) -> None:  # fmt: skip
        """left   -- of this guest by an earlier program: it is gone on with.
        rights -- mode and owner that the user asks for; see migrate.guests.rights for the rest

        Raises UsageError.
        """
        self.path = path
        self._asked = rights or Rights()
        self._rights = self._asked
        self._keeps_list = self._asked == Rights()
        """Whether the access list of a replaced file is: not where mode or owner was said."""
        self.held = left is not None
        self._size = info.size
        self._page_size = info.page_size
        self._padded = info.pages * info.page_size
        self._overwrite = overwrite
        if info.pages > MAX_PAGES:
            raise UsageError(f"a guest of {format_size(info.size)} is larger than any output")
        check_output(path, overwrite)
        self._check_size()
        self._users = _opened_by(path) if overwrite else []
        self._check_not_the_guest()
        where, self._name = os.path.split(os.path.abspath(path))
        self._hidden = left.name if left else os.path.basename(hidden_name(path))
        self._nameless = False
        self._reservation: Reservation | None = None
        if left:
            self._reserve()  # what came before stays as it was, if another program has the name
        try:
            self._directory = Directory(where)
            try:
                self.fd = self._directory.take(left.name, left.known) if left else self._make()
                try:
                    os.ftruncate(self.fd, self._padded)
                    self._map = mmap.mmap(self.fd, self._padded)
                except OSError:
                    self._drop()
                    os.close(self.fd)
                    raise
            except OSError:
                self._directory.close()
                raise
        except OSError as error:
            self._free_name()
            why = str(error.strerror)
            if error.errno == errno.EFBIG:
                why += f": the file system takes no file of {format_size(info.size)}"
            raise UsageError(f"--output {path}: {why}") from None
        self.memory = memoryview(self._map)
        self.reads = Memory(info.size, fd=self.fd)

    def _make(self) -> int:
        fd = self._directory.make_nameless()
        self._nameless = fd >= 0
        return fd if self._nameless else self._directory.make(self._hidden)

    @property
    def _known(self) -> Identity:
        return identity_of(os.fstat(self.fd))

    def _reserve(self) -> None:
        """Raises NameTaken."""
        if self._reservation is None:
            self._reservation = Reservation(self.path)

    def _free_name(self) -> None:
        if self._reservation is not None:
            self._reservation.close()
            self._reservation = None

    async def ready(self) -> None:
        self._reserve()

    def _check_size(self) -> None:
        """Raises UsageError where no file may be as large as the guest."""
        most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        if 0 <= most < self._padded:
            raise UsageError(
                f"--output {self.path}: the guest has {format_size(self._size)}, and no file may "
                f"have more than {format_size(most)} here: raise the limit (ulimit -f)"
            )

    def _check_not_the_guest(self) -> None:
        """Raises UsageError where the file to be replaced is what a source here moves."""
        for pid, name in self._users:
            # Anybody's process may have the name, and keep guests from landing by it.
            if "migrate-src" in name and users(pid) <= {0, os.geteuid()}:
                raise UsageError(
                    f"--output {self.path}: process {pid} ({name}) moves that very file: a guest "
                    "cannot replace itself: name another output"
                )

    def notices(self) -> list[str]:
        """What the user should know before the guest comes."""
        found = []
        with contextlib.suppress(OSError):
            room = os.fstatvfs(self.fd)
            free = room.f_bavail * room.f_frsize + os.fstat(self.fd).st_blocks * 512
            if room.f_blocks and free < self._size:
                found.append(
                    f"the guest has up to {format_size(self._size)}, and {self._directory.path} "
                    f"has room for {format_size(free)}: it fits only if all else is zeros"
                )
        found += [
            f"process {pid} ({name}) has {self.path} open: it will go on with the old file"
            for pid, name in self._users
        ]
        return found

    def persist(self) -> None:
        if not self._nameless:
            return
        try:
            self._directory.link(self.fd, self._hidden)
        except OSError as error:
            raise MigrationError(f"--output {self.path}: {error.strerror}") from None
        self._nameless = False

    def make_room(self, page: int) -> None:
        os.posix_fallocate(self.fd, page * self._page_size, self._page_size)

    def sync(self) -> None:
        self._check_there()
        os.fdatasync(self.fd)

    def _check_there(self) -> None:
        """Raises MigrationError where the file has lost its hidden name."""
        if self._nameless or not self._hidden or self._directory.has(self._hidden, self._known):
            return
        hidden = os.path.join(self._directory.path, self._hidden)
        raise MigrationError(
            f"--output {self.path}: what had come of the guest, {hidden}, was removed or "
            "replaced meanwhile: leave the directory alone until the guest is there"
        )

    async def prepare(self, state: bytes) -> None:
        self._check_there()
        try:
            check_output(self.path, self._overwrite)
        except UsageError as error:
            raise MigrationError(str(error)) from None
        self._rights = self._asked.over(self._rights_before(Rights.unpack(state)))
        try:
            os.ftruncate(self.fd, self._size)
            os.fsync(self.fd)
        except OSError as error:
            raise MigrationError(f"--output {self.path}: {error.strerror}") from None

    def _rights_before(self, guests: Rights) -> Rights:
        """Of the file that is replaced, else of the guest's own."""
        with self._replaced() as there:
            return guests if there is None else Rights.of(os.fstat(there))

    @contextlib.contextmanager
    def _replaced(self) -> Iterator[int | None]:
        """The file that is replaced (O_PATH), where it is one, and those to be trusted put it
        there: root, ourselves and the owner of the directory. Where others can write in the
        directory, it must belong to one of them."""
        with contextlib.ExitStack() as stack:
            found = None
            with contextlib.suppress(OSError):
                fd = os.open(self._name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self._directory.fd)
                stack.callback(os.close, fd)
                there, above = os.fstat(fd), os.fstat(self._directory.fd)
                closed = not above.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
                trusted = closed or there.st_uid in (
                    0, os.geteuid(), above.st_uid, self._directory.owner,
                )  # fmt: skip
                if self._overwrite and stat.S_ISREG(there.st_mode) and trusted:
                    found = fd
            yield found

    def unprepare(self) -> None:
        os.ftruncate(self.fd, self._padded)

    def facts(self) -> dict[str, Any]:
        return {
            "kind": "file", "path": os.path.join(self._directory.path, self._name),
            "temporary": os.path.join(self._directory.path, self._hidden),
            "overwrite": self._overwrite, "size": self._size, "inode": list(self._known),
            "rights": [self._rights.mode, self._rights.uid, self._rights.gid],
            "keeps_list": self._keeps_list,
        }  # fmt: skip

    @classmethod
    def reopen(cls, facts: dict[str, Any]) -> FilePlace:
        """A file that an earlier program had prepared: complete, under its hidden name."""
        place = cls.__new__(cls)
        try:
            left = Left.read(facts)
            place._overwrite, place._size = bool(facts["overwrite"]), int(facts["size"])
        except (ValueError, KeyError, TypeError):
            raise MigrationError("its journal does not say where it is") from None
        place.path, place._name = left.path, os.path.basename(left.path)
        place._nameless = False
        place._rights = Rights.read(facts.get("rights"))
        place._keeps_list = facts.get("keeps_list") is True
        place._reservation = None
        try:
            place._directory = Directory(left.directory)
            try:
                place._reopen(left)
            except OSError:
                place._directory.close()
                raise
        except OSError:
            raise MigrationError(f"what was prepared for {place.path} is gone") from None
        place.memory = memoryview(place._map)
        return place

    def _reopen(self, left: Left) -> None:
        """Raises OSError where it is gone."""
        if self._directory.has(self._name, left.known):
            # It has its name already, and maybe a mode that lets us do nothing with it.
            self._hidden = ""
            self.fd = os.open(self._name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self._directory.fd)
            self._map = mmap.mmap(-1, max(self._size, 1))
            return
        self._hidden = left.name
        self.fd = self._directory.take(left.name, left.known, self._rights.uid)
        try:
            self._map = mmap.mmap(self.fd, max(self._size, 1))
        except OSError:
            os.close(self.fd)
            raise
        with contextlib.suppress(NameTaken):  # `start` asks again
            self._reserve()

    async def start(self, state: bytes) -> str:
        trouble = []
        if self._hidden:
            self._reserve()
            try:
                trouble = self._give_rights()
                self._directory.give_name(
                    self._known, self._hidden, self._name, overwrite=self._overwrite
                )
            except OSError as error:
                raise MigrationError(f"--output {self.path}: {error.strerror}") from None
            self._hidden = ""
        # It stands under its name now: nothing below may say that it was not started.
        with contextlib.suppress(OSError):
            self._directory.sync()
        return "; ".join([f"{self.path} is complete, {format_size(self._size)}", *trouble])

    def _give_rights(self) -> list[str]:
        """As the file will have them, just before it has its name; what could not be set."""
        left = []
        if self._overwrite:
            # Its access list names people: not before the owner is right, and before the mode is.
            Rights(uid=self._rights.uid, gid=self._rights.gid).give(self.fd)
            left = self._keep_attributes()
        said = [f"not kept of the file before: {', '.join(left)}"] if left else []
        if why := self._rights.give(self.fd):
            said.append(why)
        return said

    def _keep_attributes(self) -> list[str]:
        """Those of the file that is replaced; those not kept."""
        with self._replaced() as there:
            if there is None:
                return []
            return keep_attributes(f"/proc/self/fd/{there}", self.fd, access_list=self._keeps_list)

    def close(self) -> None:
        with contextlib.suppress(BufferError):
            self.memory.release()
            self._map.close()
        os.close(self.fd)
        self._directory.close()
        self._free_name()

    async def discard(self) -> None:
        self._drop()
        self.close()

    def _drop(self) -> None:
        """Removes the file, where it has its hidden name."""
        if self._hidden:
            self._directory.drop(self._hidden, self._known)


def check_output(path: str, overwrite: bool) -> None:
    """Raises UsageError where `path` cannot become the output."""
    what = f"--output {path}"
    if path.endswith("/"):
        raise UsageError(f"{what}: it ends in a slash: name the file")
    check_writable(os.path.dirname(os.path.abspath(path)), what)
    hidden_name(path)
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{what}: {error.strerror}") from None
    if os.path.exists(path) and stat.S_ISBLK(os.stat(path).st_mode):
        raise UsageError(
            f"{what}: it is a block device, and a guest lands in a file: name a file, and copy "
            "that to the device when it has arrived"
        )
    if not os.path.isfile(path):
        raise UsageError(
            f"{what}: it is no plain file, but {kind_of(mode)}, and cannot be replaced: name "
            "another path"
        )
    if not overwrite:
        raise UsageError(f"{what}: it exists: remove it or give --overwrite")
    check_replaceable(path, what)


def try_output(path: str, overwrite: bool, rights: Rights) -> None:
    """As check_output, and does once what the output will need there. Raises UsageError."""
    check_output(path, overwrite)
    try_directory(path, f"--output {path}", rights.give)


def _opened_by(path: str) -> list[tuple[int, str]]:
    """Other processes that have this very file open, as far as we may look: their numbers and
    names."""
    found = []
    try:
        ours = os.stat(path)
    except OSError:
        return []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if any(_same(fd, ours) for fd in (process / "fd").iterdir()):
                words = (process / "cmdline").read_bytes().split(b"\0")
                names = [os.path.basename(os.fsdecode(word)) for word in words[:2]]
                name = names[-1] if names[0].startswith("python") else names[0]
                found.append((int(process.name), "".join(c for c in name if c.isprintable())))
    return found


def _same(fd: Path, ours: os.stat_result) -> bool:
    with contextlib.suppress(OSError):
        there = fd.stat()
        return identity_of(there) == identity_of(ours)
    return False
