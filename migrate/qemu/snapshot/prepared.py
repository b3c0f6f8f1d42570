"""A saved snapshot that waits for its name, and the directory that it replaces.

    .NAME.TOKEN.xbmigrate            the snapshot, until GO
    NAME                             an older snapshot, with --overwrite; then this one
    .NAME.TOKEN.xbmigrate.before     the older one, from GO on, until it is removed

Another user may own the directory above, and exchange names in it at any moment (renameat2 with
RENAME_EXCHANGE). So no decision is made by a name alone: what is replaced is opened once, checked
through that descriptor, and known by its device and inode from then on.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from dataclasses import dataclass
from typing import Any

from migrate.errors import MigrationError, UsageError
from migrate.files.directory import Directory
from migrate.files.filesystem import (
    check_writable,
    hidden_name,
    is_mount_point,
    kind_of,
    try_directory,
)
from migrate.files.identity import Identity, identity_of, parse_identity
from migrate.files.partial_output import PartialOutput
from migrate.files.reservation import Reservation
from migrate.guests.place import Place
from migrate.qemu.snapshot.files import ASIDE
from migrate.qemu.snapshot.layout import FACTS_FILE, Snapshot
from migrate.runtime.threads import in_thread
from migrate.units import format_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """The destination of a snapshot: a name in an open directory.

    overwrite -- whether it may replace a snapshot
    """

    path: str
    above: Directory
    overwrite: bool

    @property
    def name(self) -> str:
        return os.path.basename(os.path.abspath(self.path))

    @property
    def option(self) -> str:
        """The option and its value, which messages begin with."""
        return f"--output {self.path}"

    def open_existing(self) -> Directory | None:
        """Open the directory that has the name; return None if nothing has it.

        It is opened without following a link, and every check is made through that descriptor. Only
        the identity of the directory that is returned may be moved aside and removed.

        Raises UsageError if it must not be replaced, and OSError.
        """
        name = self.name or "."  # of the root directory
        try:
            mode = self.above.lstat(name).st_mode
            found = self.above.open_directory(name)
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            kind = kind_of(mode)
            raise UsageError(f"{self.option}: there is {kind}, and it is no directory") from None
        try:
            self._check(found, os.path.join(self.above.path, name))
        except BaseException:
            found.close()
            raise
        return found

    def _check(self, found: Directory, path: str) -> None:
        elsewhere = os.fstat(found.fd).st_dev != os.fstat(self.above.fd).st_dev
        if elsewhere or is_mount_point(path):
            raise UsageError(
                f"{self.option}: something is mounted there, and a machine cannot take its place: "
                "name a directory in it"
            )
        if not found.names():
            return
        if not self.overwrite:
            raise UsageError(f"{self.option}: it is not empty: remove it or give --overwrite")
        if not _has_facts(found):
            raise UsageError(f"{self.option}: it holds no saved machine, and is not overwritten")


def _has_facts(directory: Directory) -> bool:
    """Return whether an open directory holds a snapshot. A damaged one counts too."""
    with contextlib.suppress(OSError):
        return stat.S_ISREG(directory.lstat(FACTS_FILE).st_mode)
    return False


def check_snapshot_output(path: str, overwrite: bool) -> None:
    """Raise UsageError if a snapshot cannot be saved at `path`."""
    where = os.path.dirname(os.path.abspath(path))
    check_writable(where, f"--output {path}")
    hidden_name(path, spare=len(ASIDE))
    try:
        with Directory(where) as above:
            found = Output(path, above, overwrite).open_existing()
    except OSError as error:
        raise UsageError(f"--output {path}: {error.strerror}") from None
    if found is not None:
        found.close()


def try_snapshot_output(path: str, overwrite: bool) -> None:
    """As `check_snapshot_output`; also try, with a small file, what saving will need.

    Raises UsageError.
    """
    check_snapshot_output(path, overwrite)
    try_directory(path, f"--output {path}", mapped=False)


class PreparedSnapshot(Place):
    """A snapshot that is whole, under a hidden name, until `start` gives it its own.

    left        -- the directory that it is in
    identity    -- the id of the snapshot
    size        -- bytes of its memory
    before      -- the directory that it may replace, as it was checked and locked before the stream
                   came; None: nothing had the name then
    directory   -- the one above, which is closed by `close`
    reservation -- of the name; None: it is made by `start`

    The replaced directory is removed by `close`, after the guest has started: that may take long.

    Raises OSError.
    """

    runs = False

    def __init__(
        self, left: PartialOutput, identity: str, size: int, *, overwrite: bool,
        directory: Directory | None = None, before: Identity | None = None,
        reservation: Reservation | None = None,
    ) -> None:  # fmt: skip
        self.path = left.path
        self.identity = identity
        self._left = left
        self._size = size
        self._directory = directory or Directory(left.directory)
        self._output = Output(left.path, self._directory, overwrite)
        self._before = before
        self._reservation = reservation
        self._started = False

    @property
    def temporary(self) -> str:
        return os.path.join(self._left.directory, self._left.name)

    @property
    def _aside(self) -> str:
        """The name that the replaced directory gets."""
        return f"{self._left.name}{ASIDE}"

    def facts(self) -> dict[str, Any]:
        return {
            "kind": "snapshot", "path": self.path, "temporary": self.temporary,
            "identity": self.identity, "overwrite": self._output.overwrite,
            "inode": list(self._left.identity), "before": list(self._before or ()),
        }  # fmt: skip

    @classmethod
    def reopen(cls, facts: dict[str, Any]) -> PreparedSnapshot:
        """Return what an earlier program had prepared. Raises MigrationError if it is gone."""
        try:
            left = PartialOutput.from_facts(facts)
            before = parse_identity(facts["before"]) if facts.get("before") else None
            place = cls(
                left, str(facts["identity"]), 0, overwrite=bool(facts["overwrite"]), before=before
            )
        except (ValueError, KeyError, OSError):
            raise MigrationError("what was prepared is gone, or never was") from None
        if not place._find():
            place.close()
            raise MigrationError(f"what was prepared for {place.path} is gone")
        return place

    def _find(self) -> bool:
        """Return whether the snapshot is there, under either of its names; read its size."""
        for name in (self._left.name, self._output.name):
            with (
                contextlib.suppress(OSError, UsageError),
                self._directory.open_directory(name) as inner,
            ):
                if inner.identity == self._left.identity:
                    found = Snapshot.read_in(inner)
                    self._size = found.memory
                    return found.id == self.identity
        return False

    async def start(self, state: bytes = b"") -> str:
        """Give the snapshot its name."""
        del state
        await in_thread(self._put_in_place)
        return f"the machine is in {self.path}, {format_size(self._size)} of memory"

    def _put_in_place(self) -> None:
        directory, left = self._directory, self._left
        if not directory.entry_is(self._output.name, left.identity):
            try:
                with contextlib.ExitStack() as until_named:
                    if self._reservation is None:
                        until_named.callback(Reservation(self.path).close)
                    with directory.open_directory(left.name) as inner:
                        Snapshot.read_in(inner)
                    self._rename()
            except OSError as error:
                raise MigrationError(f"--output {self.path}: {error.strerror}") from None
        # It has its name now. Nothing below may tell the source that it was not started.
        self._started = True
        with contextlib.suppress(OSError):
            directory.sync()

    def _rename(self) -> None:
        """Give the snapshot its name; move the one that it replaces aside first."""
        directory, left, name = self._directory, self._left, self._output.name
        replaced = self._replaced()
        if replaced is None:
            # rename(2) replaces an empty directory, and no other one
            directory.rename(left.identity, left.name, name, overwrite=True)
            return
        try:
            directory.rename(replaced, name, self._aside, overwrite=False)
            directory.rename(left.identity, left.name, name, overwrite=False)
        except OSError as error:
            self._move_back(error)
            raise
        logger.debug("%s: the snapshot that was there is %s now", self.path, self._aside)

    def _replaced(self) -> Identity | None:
        """Return the identity of the directory to move aside; None if there is none, or an empty
        one. Raises OSError if it is not the one that was there before the stream came."""
        found = self._output.open_existing()
        if found is None:
            return None
        with found:
            if not found.names():
                return None
            if found.identity != self._before:
                raise OSError(
                    errno.ESTALE,
                    "it was replaced while the machine was being saved: leave the directory alone "
                    "until the machine is there",
                )
            return found.identity

    def _move_back(self, error: OSError) -> None:
        """Give what was moved aside its name again: it may be another directory, one that took the
        name in the instant before. Raises OSError, which says where it is, if that fails."""
        directory = self._directory
        with contextlib.suppress(FileNotFoundError):
            known = identity_of(directory.lstat(self._aside))
            try:
                directory.rename(known, self._aside, self._output.name, overwrite=False)
            except OSError:
                aside = os.path.join(directory.path, self._aside)
                reason = f"{error.strerror}; what was there before is in {aside}"
                raise OSError(error.errno, reason) from None

    def close(self) -> None:
        """May be called again."""
        if self._started and self._before is not None:
            self._directory.remove_later(self._aside, self._before)
        self._started = False
        self._directory.close()
        if self._reservation is not None:
            self._reservation.close()

    async def discard(self) -> None:
        await in_thread(self._directory.remove_tree, self._left.name, self._left.identity)
        self.close()
