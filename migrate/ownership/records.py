"""All guests that a destination knows of, in this program and in journals on disk.

QUERY, GO -> answer() -> Records.find(name) -> Custody
at the start of a destination -> Records.settle_earlier()
a source that resumes -> Records.resume(token) -> Journal
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from migrate.errors import MigrationError, NotStartedError
from migrate.guests.place import Place
from migrate.ownership.custody import STARTED_EARLIER, Custody, GonePlace
from migrate.ownership.journal import Journal, name_of, record
from migrate.ownership.stored_journals import find_journal, journals
from migrate.runtime.cancellation import finish
from migrate.transport.link import Link
from proto import ErrorCode, ProtoError
from proto.wire.messages import Done, Go, Ownership, Query, Running
from proto.wire.ownership import Claim, Event, Role

QUESTION_SECONDS = 15.0
# Over one connection. A source with more questions connects again.
MAX_QUESTIONS = 64
# Of guests that are decided, in a program that receives one after another.
MAX_KNOWN = 1024


class Records:
    """The migrations that a destination knows of.

    directory -- of the journals; "" keeps them in memory
    reopen    -- returns the place that an earlier program prepared, from its facts; raises
                 MigrationError if it is gone
    """

    def __init__(
        self, directory: str = "", reopen: Callable[[dict[str, Any]], Place] | None = None
    ) -> None:
        self.directory = directory
        # Called when a guest that an earlier program prepared has been started.
        self.on_taken: Callable[[Custody], None] = lambda _custody: None
        self._reopen = reopen
        self._known: dict[str, Custody] = {}
        self._attempts: dict[str, Journal] = {}
        self._expiring: list[asyncio.Task[None]] = []

    def journal(self, token: bytes) -> Journal:
        """Return a new journal."""
        return Journal(Role.DESTINATION, token, self.directory)

    def keep(self, custody: Custody) -> None:
        """Answer for a guest from now on."""
        self._known[custody.journal.name] = custody

    def release_memory(self) -> None:
        """Free the memory of guests that are decided, and forget the oldest of them."""
        for custody in self._known.values():
            if custody.decided.is_set():
                custody.release_memory()
        for name in [*self._known][:-MAX_KNOWN]:
            if self._known[name].decided.is_set():
                del self._known[name]

    async def find(self, name: str) -> Custody | None:
        """Return the guest of a migration, or None if there is no record. Raises JournalError."""
        if name not in self._known:
            journal = find_journal(Role.DESTINATION, name, self.directory)
            if journal is None or journal.claim is Claim.NONE:
                return None
            return await self.reopen(journal)
        return self._known[name]

    async def reopen(self, journal: Journal) -> Custody:
        """Return the guest of a journal on disk, which is locked from now on.

        A prepared guest whose place is gone is given up: it has never run. Raises JournalError.
        """
        if journal.name not in self._known:
            journal.open(create=False)
            self.keep(await self._reopened(journal))
        return self._known[journal.name]

    async def _reopened(self, journal: Journal) -> Custody:
        place: Place = GonePlace()
        running = doubt = ""
        if journal.claim is Claim.OWNER and journal.started:
            running = STARTED_EARLIER
        elif journal.claim is Claim.OWNER and journal.begun:
            doubt = _doubt(journal)
        elif journal.claim in (Claim.PREPARED, Claim.OWNER):
            try:
                if self._reopen is None:
                    raise MigrationError("no place can be opened again here")
                place = self._reopen(journal.facts["place"])
            except (MigrationError, KeyError):
                if journal.claim is Claim.PREPARED:
                    await record(journal, Event.GIVE_UP)
        custody = Custody(place, journal, running=running, doubt=doubt)
        custody.on_taken = self.on_taken
        return custody

    def attempts(self) -> list[Journal]:
        """Return the journals of interrupted attempts whose pages are still here."""
        return [one for one in journals(Role.DESTINATION, self.directory) if _interrupted(one)]

    def attempt(self, token: bytes) -> Journal | None:
        """Return the journal of an interrupted attempt, locked; None if there is none.

        Raises JournalError.
        """
        name = name_of(token)
        if name not in self._attempts:
            journal = find_journal(Role.DESTINATION, name, self.directory)
            if journal is not None and _interrupted(journal):
                journal.open(create=False)
                self._attempts[name] = journal
        return self._attempts.get(name)

    async def resume(self, token: bytes) -> Journal | None:
        """Return the journal of the attempt that a source resumes, as `attempt` does.

        If the guest was complete, it is given up under this name first: a source that resumes never
        said GO.
        """
        custody = self._known.get(name_of(token))
        if (
            custody is not None
            and custody.journal.claim is Claim.PREPARED
            and custody.place.persistent
        ):
            await finish(self._reclaim(custody))
        return self.attempt(token)

    async def _reclaim(self, custody: Custody) -> None:
        if await custody.give_up(keep_place=True):
            custody.place.close()
            self._attempts[custody.journal.name] = custody.journal

    async def settle_earlier(self, seconds: float) -> list[str]:
        """Go on with the guests that earlier programs left; return a sentence on each.

        A guest that is ours is started. A prepared one is given up after `seconds`, unless its
        source asks for it.
        """
        sentences = []
        for journal in list(journals(Role.DESTINATION, self.directory)):
            if journal.settled:
                continue
            try:
                custody = await self.reopen(journal)
                if custody.journal.claim is Claim.OWNER:
                    sentences.append(f"migration {journal.name}: {await custody.take_over()}")
                elif custody.journal.claim is Claim.PREPARED:
                    self._expiring.append(asyncio.create_task(_expire(custody, seconds)))
                    sentences.append(
                        f"migration {journal.name}: a complete guest waits for its source, "
                        f"{seconds:g} s at most"
                    )
            except MigrationError as error:
                sentences.append(f"migration {journal.name}: {error}")
        self.close_places()
        return sentences

    def close_places(self) -> None:
        """Free what was needed to receive the guests that run; see Custody.close_place."""
        for custody in self._known.values():
            custody.close_place()

    def close(self) -> None:
        """Unlock the journals, and stop waiting for sources."""
        for task in self._expiring:
            task.cancel()
        for custody in self._known.values():
            custody.journal.close()


def _interrupted(journal: Journal) -> bool:
    return journal.claim is Claim.NONE and journal.partial_output is not None


def _doubt(journal: Journal) -> str:
    address = journal.facts.get("place", {}).get("address", "its socket")
    return (
        f"an earlier migrate-dst died while it gave the guest to the QEMU at {address}: look "
        "whether the guest runs there; if it does, run here: migrate-dst resolve "
        f"{journal.name} --keep destination; if it does not and never will: --keep source --force"
    )


async def _expire(custody: Custody, seconds: float) -> None:
    await asyncio.sleep(seconds)
    with contextlib.suppress(MigrationError):
        await custody.give_up()


async def answer(link: Link, records: Records) -> None:
    """Serve a connection that begins with QUERY, and close it."""
    code, reason = ErrorCode.PROTOCOL, ""
    try:
        custody: Custody | None = None
        for _ in range(MAX_QUESTIONS):
            async with asyncio.timeout(QUESTION_SECONDS):
                message = await link.receive_message()
            if isinstance(message, Query):
                custody = await records.find(name_of(message.token))
                claim = await custody.answer() if custody else Claim.NONE
                await link.send(Ownership(claim))
            elif isinstance(message, Go):
                if custody is None:
                    raise NotStartedError("there is no record of that migration here")
                await custody.take_over()
                await link.send(Running())
            else:
                if isinstance(message, Done) and custody is not None:
                    custody.told.set()
                return
        reason = f"it was asked {MAX_QUESTIONS} times"
    except MigrationError as error:
        code, reason = error.code, str(error)
    except ProtoError as error:
        code, reason = getattr(error, "code", ErrorCode.PROTOCOL), str(error)
    except TimeoutError:
        reason = "nothing was asked"
    finally:
        records.close_places()
        if reason:
            await link.give_reason(code, reason)
        await link.close()
