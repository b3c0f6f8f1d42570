"""The names of one guest's attempts to get here.

Each attempt has a token of its own, which ACCEPT tells the source; its hash names the attempt's
journal. Only under that name can the guest be handed over. So a GO that was delayed on a connection
given up long ago cannot start a guest that has come further since: its name is no longer known.

    attempt 1   name a   breaks off
    attempt 2   name b   GUEST says: resumes a; both a and b are known ...
                         ... until the source has shown that it heard ACCEPT b: then a is dropped
"""

from __future__ import annotations

import os

from migrate.guests.place import Place
from migrate.ownership.journal import Journal
from migrate.ownership.records import Records
from migrate.runtime.cancellation import finish
from migrate.runtime.threads import in_thread
from proto.wire.messages import TOKEN_BYTES
from proto.wire.ownership import Claim


class AttemptJournals:
    """The journal of the current attempt, and that of the attempt which it resumes."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self.current: Journal | None = None
        self.resumed: Journal | None = None
        """Held until the source has surely heard the new name: until then it may come back and
        name the old one."""

    def is_resumed_by(self, token: bytes) -> bool:
        """Return whether a source that resumes this attempt may go on here.

        It may until GO: the claim is NONE, or PREPARED if it never said GO.
        """
        if self.current is not None and self.current.claim not in (Claim.NONE, Claim.PREPARED):
            return False
        return any(journal.is_of(token) for journal in self._all())

    async def begin(self, place: Place, resume: bytes) -> Journal:
        """Name a new attempt, which resumes the one with the token `resume`.

        If the place outlives this program, what a later one needs to go on is written down first.
        Raise JournalError, or what Place.persist raises.
        """
        journal = self._records.journal(os.urandom(TOKEN_BYTES))
        if place.persistent:
            try:
                await finish(in_thread(journal.begin, place=place.facts()))
                place.persist()
            except BaseException:
                journal.close()
                raise
        earlier, self.resumed = self._all(), None
        for one in earlier:
            if one.is_of(resume):
                self.resumed = one
            else:
                one.close()
        self.current = journal
        return journal

    def supersede(self) -> None:
        """Drop the resumed attempt: the current one has brought more, and the source knows it."""
        if self.resumed is not None and self.resumed.claim is Claim.NONE:
            self.resumed.close()
        self.resumed = None

    def close(self, *, keep: bool) -> None:
        """Close the journals of attempts that claim nothing.

        keep -- leave them on disk, for a later program to resume
        """
        for journal in self._all():
            if journal.claim is Claim.NONE:
                journal.close(keep=keep)

    def _all(self) -> list[Journal]:
        return [one for one in (self.current, self.resumed) if one is not None]
