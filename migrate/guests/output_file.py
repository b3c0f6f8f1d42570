"""The file of an output: complete and verified under its name, or not there at all.

It has no name at first, if the file system can do that (O_TMPFILE), so that nothing is left behind
by a program that dies. It gets a hidden name once that name is in the journal, and its own name
once the guest is complete and ours.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from migrate.errors import MigrationError, UsageError
from migrate.files.directory import Directory
from migrate.files.filesystem import (
    check_replaceable,
    check_writable,
    hidden_name,
    kind_of,
    try_directory,
)
from migrate.files.identity import Identity, identity_of
from migrate.files.partial_output import PartialOutput
from migrate.files.reservation import NameTaken, Reservation
from migrate.guests.rights import Rights, keep_attributes
from migrate.units import format_size

logger = logging.getLogger(__name__)


class Stage(Enum):
    """Which name the file has."""

    UNNAMED = auto()
    HIDDEN = auto()
    NAMED = auto()


@dataclass(kw_only=True)
class OutputFile:
    """The file that becomes the output.

    path             -- of the output
    overwrite        -- whether the file may replace another one
    size             -- bytes of the complete file
    directory        -- that both names are in; closed with the file
    fd               -- open to read and write, unless the file has its name already
    hidden           -- the name until the guest is ours
    asked            -- mode and owner that the user asks for
    rights           -- mode and owner that the file gets: settled by `complete`
    keep_access_list -- whether the access list of a replaced file is kept
    """

    path: str
    overwrite: bool
    size: int
    directory: Directory
    fd: int
    hidden: str
    stage: Stage
    asked: Rights
    rights: Rights
    keep_access_list: bool
    _reservation: Reservation | None = field(default=None, repr=False)

    @classmethod
    def create(cls, path: str, size: int, *, overwrite: bool, rights: Rights) -> OutputFile:
        """Create the file. Raises OSError, and UsageError if no hidden name fits.

        rights -- those that the user asks for
        """
        hidden = os.path.basename(hidden_name(path))
        with contextlib.ExitStack() as undo:
            directory = undo.enter_context(Directory(os.path.dirname(os.path.abspath(path))))
            fd, stage = directory.create_unnamed_file(), Stage.UNNAMED
            if fd < 0:
                fd, stage = directory.create_file(hidden), Stage.HIDDEN
            undo.pop_all()
        return cls(
            path=path, overwrite=overwrite, size=size, directory=directory, fd=fd, hidden=hidden,
            stage=stage, asked=rights, rights=rights, keep_access_list=rights == Rights(),
        )  # fmt: skip

    @classmethod
    def resume(
        cls, path: str, size: int, partial: PartialOutput, *, overwrite: bool, rights: Rights
    ) -> OutputFile:
        """Reopen what an earlier program has received of the guest.

        Raises OSError, and NameTaken if another program receives a guest for `path`: what was
        received then stays as it is.
        """
        with contextlib.ExitStack() as undo:
            reservation = undo.enter_context(contextlib.closing(Reservation(path)))
            directory = undo.enter_context(Directory(os.path.dirname(os.path.abspath(path))))
            fd = directory.reopen_file(partial.name, partial.identity)
            undo.pop_all()
        return cls(
            path=path, overwrite=overwrite, size=size, directory=directory, fd=fd,
            hidden=partial.name, stage=Stage.HIDDEN, asked=rights, rights=rights,
            keep_access_list=rights == Rights(), _reservation=reservation,
        )  # fmt: skip

    @classmethod
    def reopen(cls, facts: dict[str, Any]) -> OutputFile:
        """Reopen a complete file that an earlier program has prepared: see `facts`.

        Raises MigrationError if it is gone.
        """
        try:
            partial = PartialOutput.from_facts(facts)
            overwrite, size = bool(facts["overwrite"]), int(facts["size"])
        except (ValueError, KeyError, TypeError):
            raise MigrationError("its journal does not say where it is") from None
        rights, name = Rights.read(facts.get("rights")), os.path.basename(partial.path)
        try:
            with contextlib.ExitStack() as undo:
                directory = undo.enter_context(Directory(partial.directory))
                if directory.entry_is(name, partial.identity):
                    # It has its name already, and maybe a mode that forbids us to open it.
                    stage = Stage.NAMED
                    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=directory.fd)
                else:
                    stage = Stage.HIDDEN
                    fd = directory.reopen_file(partial.name, partial.identity, rights.uid)
                undo.pop_all()
        except OSError:
            raise MigrationError(f"what was prepared for {partial.path} is gone") from None
        file = cls(
            path=partial.path, overwrite=overwrite, size=size, directory=directory, fd=fd,
            hidden=partial.name, stage=stage, asked=rights, rights=rights,
            keep_access_list=facts.get("keeps_list") is True,
        )  # fmt: skip
        if stage is Stage.HIDDEN:
            with contextlib.suppress(NameTaken):  # `deliver` tries again
                file.reserve()
        return file

    @property
    def name(self) -> str:
        return os.path.basename(os.path.abspath(self.path))

    @property
    def identity(self) -> Identity:
        return identity_of(os.fstat(self.fd))

    def facts(self) -> dict[str, Any]:
        """Return what a journal keeps of the file: see `reopen`."""
        return {
            "kind": "file", "path": os.path.join(self.directory.path, self.name),
            "temporary": os.path.join(self.directory.path, self.hidden),
            "overwrite": self.overwrite, "size": self.size, "inode": list(self.identity),
            "rights": [self.rights.mode, self.rights.uid, self.rights.gid],
            "keeps_list": self.keep_access_list,
        }  # fmt: skip

    def reserve(self) -> None:
        """Keep other programs from receiving a guest for `path`. Raises NameTaken."""
        if self._reservation is None:
            self._reservation = Reservation(self.path)

    def persist(self) -> None:
        """Give an unnamed file its hidden name. Raises MigrationError."""
        if self.stage is Stage.UNNAMED:
            try:
                self.directory.link(self.fd, self.hidden)
            except OSError as error:
                raise self._failure(error) from None
            self.stage = Stage.HIDDEN
            logger.debug("output %s is at %s until it is complete", self.path, self.hidden)

    def check_present(self) -> None:
        """Raise MigrationError if the file has lost its hidden name."""
        if self.stage is not Stage.HIDDEN or self.directory.entry_is(self.hidden, self.identity):
            return
        hidden = os.path.join(self.directory.path, self.hidden)
        raise MigrationError(
            f"--output {self.path}: what had come of the guest, {hidden}, was removed or "
            "replaced meanwhile: leave the directory alone until the guest is there"
        )

    def complete(self, guests: Rights) -> None:
        """Cut the file to its size, bring it to the disk, and settle its rights.

        guests -- rights of the guest's own file, for what the user does not ask

        Raises MigrationError.
        """
        with self._replaced() as replaced:
            before = guests if replaced is None else Rights.of(os.fstat(replaced))
        self.rights = self.asked.over(before)
        try:
            os.ftruncate(self.fd, self.size)
            os.fsync(self.fd)
        except OSError as error:
            raise self._failure(error) from None

    def deliver(self) -> str:
        """Give the complete file its rights and its name. Return a sentence for the user.

        Raises NameTaken and MigrationError; the file does not have its name then.
        """
        not_set: list[str] = []
        if self.stage is not Stage.NAMED:
            self.reserve()
            try:
                not_set = self._set_rights()
                self.directory.rename(
                    self.identity, self.hidden, self.name, overwrite=self.overwrite
                )
            except OSError as error:
                raise self._failure(error) from None
            self.stage = Stage.NAMED
            logger.debug("output %s has its name", self.path)
        # The file has its name: nothing below may report that the guest was not started.
        with contextlib.suppress(OSError):
            self.directory.sync()
        return "; ".join([f"{self.path} is complete, {format_size(self.size)}", *not_set])

    @contextlib.contextmanager
    def _replaced(self) -> Iterator[int | None]:
        """Open (O_PATH) the file that is replaced; None if there is none to be trusted.

        Its rights pass to ours if root, we or the owner of the directory have put it there. If
        others can write in the directory, it must belong to one of these.
        """
        with contextlib.ExitStack() as stack:
            found = None
            with contextlib.suppress(OSError):
                fd = os.open(self.name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self.directory.fd)
                stack.callback(os.close, fd)
                status, above = os.fstat(fd), os.fstat(self.directory.fd)
                private = not above.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
                trusted = private or status.st_uid in (
                    0, os.geteuid(), above.st_uid, self.directory.owner,
                )  # fmt: skip
                if self.overwrite and stat.S_ISREG(status.st_mode) and trusted:
                    found = fd
            yield found

    def _set_rights(self) -> list[str]:
        """Set rights and attributes. Return sentences on what could not be set."""
        sentences, not_kept = [], []
        if self.overwrite:
            # The access list names users. It comes after the owner, and before the mode.
            Rights(uid=self.rights.uid, gid=self.rights.gid).give(self.fd)
            not_kept = self._keep_attributes()
        if not_kept:
            sentences.append(f"not kept of the file before: {', '.join(not_kept)}")
        if why := self.rights.give(self.fd):
            sentences.append(why)
        return sentences

    def _keep_attributes(self) -> list[str]:
        """Copy the attributes of the file that is replaced. Return those that were not copied."""
        with self._replaced() as replaced:
            if replaced is None:
                return []
            path = f"/proc/self/fd/{replaced}"
            return keep_attributes(path, self.fd, access_list=self.keep_access_list)

    def remove(self) -> None:
        """Remove the file, unless it has its name."""
        if self.stage is Stage.HIDDEN:
            self.directory.remove_file(self.hidden, self.identity)

    def close(self) -> None:
        """Close the file and its directory, and let other programs have its name."""
        os.close(self.fd)
        self.directory.close()
        if self._reservation is not None:
            self._reservation.close()
            self._reservation = None

    def _failure(self, error: OSError) -> MigrationError:
        return MigrationError(f"--output {self.path}: {error.strerror}")


def check_output(path: str, overwrite: bool) -> None:
    """Raise UsageError if `path` cannot become the output."""
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
            f"{what}: it is a block device, and a guest arrives in a file: name a file, and copy "
            "that to the device when it has arrived"
        )
    if not os.path.isfile(path):
        raise UsageError(
            f"{what}: it is not a regular file, but {kind_of(mode)}, and cannot be replaced: name "
            "another path"
        )
    if not overwrite:
        raise UsageError(f"{what}: it exists: remove it or give --overwrite")
    check_replaceable(path, what)


def try_output(path: str, overwrite: bool, rights: Rights) -> None:
    """Check an output, and try once all that it needs of its directory. Raises UsageError."""
    check_output(path, overwrite)
    try_directory(path, f"--output {path}", rights.give)
