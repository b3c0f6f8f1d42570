"""The journal of one migration on one side: what it claims, on disk before it acts on it.

    DIRECTORY/NAME.source    DIRECTORY/NAME.destination

A journal is a file of lines (migrate.ownership.journal_lines). A line records a claim
(proto.wire.ownership), facts, or both. The last claim holds. The facts are what a later program
needs to go on with the guest: its path, its processes, the address it was sent to. A program that
writes a journal keeps it locked, so that two programs cannot decide on the same guest.

NAME is a hash of the migration's token. A peer that has the token may take the guest over, and
other users can see names.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import hmac
import os
from typing import Any

from migrate.errors import JournalError
from migrate.files.directory import Directory
from migrate.files.identity import identity_of
from migrate.files.partial_output import PartialOutput
from migrate.files.trusted_places import make_trusted
from migrate.ownership.journal_directory import ELSEWHERE
from migrate.ownership.journal_lines import encode_line, read_lines
from migrate.runtime.cancellation import finish
from migrate.runtime.threads import in_thread
from proto.wire.ownership import FINAL, Claim, Event, Role, after

NAME_BYTES = 16


def name_of(token: bytes) -> str:
    """Return the name of a migration. It does not reveal the token."""
    return hashlib.blake2b(token, digest_size=NAME_BYTES, person=b"xbmigrate").hexdigest()


class Journal:
    """The claim of one side of one migration, and the facts.

    token     -- of the migration; b"" if it is not known. A destination does not store it: the
                 source proves its right by it
    directory -- "" keeps the journal in memory, for a guest that ends with this program
    """

    def __init__(self, role: Role, token: bytes, directory: str = "", name: str = "") -> None:
        self.role = role
        self.token = token
        self.name = name or name_of(token)
        self.claim = Claim.NONE
        self.facts: dict[str, Any] = {}
        # The guest may have been started (see Place.irrevocable).
        self.begun = False
        # The guest was started.
        self.started = False
        self._fd = -1
        self._path = os.path.join(directory, f"{self.name}.{role.value}") if directory else ""

    def __str__(self) -> str:
        return f"{self.role.value} of migration {self.name}: {self.claim.name}"

    @property
    def directory(self) -> str:
        """The directory that the journal is in; "" if it is in memory."""
        return os.path.dirname(self._path)

    @property
    def settled(self) -> bool:
        """Whether nothing is left to do on this side."""
        if self.role is Role.DESTINATION and self.claim is Claim.OWNER:
            return self.started
        if self.role is Role.SOURCE and self.claim is Claim.NONE:
            # A program that crashed may have left its guest paused.
            return not self.facts or "ended" in self.facts
        return self.claim in FINAL or self.claim is Claim.NONE

    @property
    def partial_output(self) -> PartialOutput | None:
        """The unfinished output that the facts name, if there is one."""
        with contextlib.suppress(ValueError):
            return PartialOutput.from_facts(self.facts.get("place", {}))
        return None

    def is_of(self, token: bytes) -> bool:
        """Return whether a token belongs to this migration."""
        return hmac.compare_digest(self.name, name_of(token))

    def written_at(self) -> float:
        """Return when the file was last written, in seconds since 1970; 0.0 if it is gone."""
        with contextlib.suppress(OSError):
            return os.stat(self._path).st_mtime
        return 0.0

    # -- reading

    def open(self, *, create: bool = True) -> None:
        """Lock the file and read it. Raises JournalError."""
        if not self._path or self._fd >= 0:
            return
        try:
            with (
                make_trusted(self.directory) if create else Directory(self.directory, trusted=True)
            ) as directory:
                flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
                name = os.path.basename(self._path)
                self._fd = os.open(name, flags | os.O_NOFOLLOW, 0o600, dir_fd=directory.fd)
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                directory.sync()
            length = self.read(self._fd)
        except BlockingIOError:
            self._unlock()
            raise JournalError(f"migration {self.name} is in use by another program here") from None
        except OSError as error:
            self._unlock()
            raise JournalError(f"journal {self._path}: {error.strerror}: {ELSEWHERE}") from None
        except JournalError:
            self._unlock()
            raise
        if length < os.fstat(self._fd).st_size:
            # A crash cut off the last line. A line after it would make it look like damage.
            os.ftruncate(self._fd, length)

    def read(self, fd: int, *, trusted: bool = True) -> int:
        """Take claim and facts from an open file; see `read_lines`.

        Returns the length of its complete lines in bytes. Raises JournalError.
        """
        entries, length = read_lines(fd, self._path, trusted=trusted)
        for entry in entries:
            if "claim" in entry:
                self.claim = Claim[entry["claim"]]
            self.begun |= entry.get("begun", False)
            self.started |= entry.get("started", False)
            self.facts |= entry.get("facts", {})
        with contextlib.suppress(ValueError):
            token = bytes.fromhex(self.facts.get("token", ""))
            if self.is_of(token):
                self.token = token
        return length

    # -- writing

    def begin(self, **facts: Any) -> None:
        """Write facts before anything is claimed, for the program that comes after a crash.

        Raises JournalError, also if the migration has a journal already. Then its token is not
        random: the other side chose one that it knew.
        """
        if self.role is Role.SOURCE:
            facts["token"] = self.token.hex()
        self.open()
        if self.facts or self.claim is not Claim.NONE:
            self.close()
            raise JournalError(f"there is a migration {self.name} already")
        self._append({"claim": self.claim.name, "facts": facts})
        self.facts |= facts

    def move(self, event: Event, *, must: bool = True, **facts: Any) -> None:
        """Write the claim that follows from an event. On return it outlasts a crash.

        must -- False lets the claim hold even if it cannot be written, because a later program
                can find it out by asking

        Raises JournalError: nothing has changed then, and the caller may not act.
        """
        following = after(self.role, self.claim, event)
        if following is None:
            raise JournalError(
                f"migration {self.name}: {event.name} cannot follow {self.claim.name}"
            )
        if following is not self.claim or facts:
            try:
                self._append({"claim": following.name, "event": event.name, "facts": facts})
            except JournalError:
                if must:
                    raise
            self.claim = following
            self.facts |= facts

    def mark_begun(self) -> None:
        """Write that the guest is about to be started: a later program cannot know if it was."""
        self._append({"begun": True})
        self.begun = True

    def mark_started(self) -> None:
        """Write that the guest was started, so that no later program starts it again."""
        self._append({"started": True})
        self.started = True

    def _append(self, entry: dict[str, Any]) -> None:
        if not self._path:
            return
        self.open()
        self._check_there()
        line = encode_line(entry)
        end = os.lseek(self._fd, 0, os.SEEK_END)
        try:
            if os.write(self._fd, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, end)
                os.fsync(self._fd)
            raise JournalError(f"journal {self._path}: {error.strerror}") from None

    def _check_there(self) -> None:
        """Raise JournalError if the file has lost its name: lines written to it would be lost."""
        with contextlib.suppress(OSError):
            if identity_of(os.stat(self._path)) == identity_of(os.fstat(self._fd)):
                return
        raise JournalError(f"journal {self._path}: it was removed or replaced meanwhile")

    # -- closing

    def close(self, *, keep: bool = False) -> None:
        """Unlock the file, and remove it if it claims nothing.

        keep -- leave it: the attempt may be resumed
        """
        if self._fd >= 0:
            if keep and self.role is Role.SOURCE:
                with contextlib.suppress(JournalError):
                    self._append({"facts": {"ended": True}})
            if self.claim is Claim.NONE and not keep:
                self._remove()
            self._unlock()

    def forget(self, *, keep_output: bool = False) -> None:
        """Remove the file, and the unfinished output if nothing is claimed; not if it is in use.

        keep_output -- another journal names the same output
        """
        try:
            self.open(create=False)
        except JournalError:
            return
        if self.claim is Claim.NONE and not keep_output:
            self.remove_output()
        self._remove()
        self._unlock()

    def remove_output(self) -> None:
        """Remove the unfinished output of a guest that was given up."""
        if self.partial_output is not None:
            self.partial_output.remove()

    def _remove(self) -> None:
        """Remove the open file, unless another file has its name by now."""
        with contextlib.suppress(OSError), Directory(self.directory) as directory:
            directory.remove_file(os.path.basename(self._path), identity_of(os.fstat(self._fd)))

    def _unlock(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


async def record(journal: Journal, event: Event, *, must: bool = True, **facts: Any) -> None:
    """Run `journal.move` in a thread of its own, because it waits for the disk.

    A cancellation is raised after it has ended. Raises JournalError.
    """
    await finish(in_thread(journal.move, event, must=must, **facts))
