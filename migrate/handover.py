"""The hand-over beyond one connection: what is asked after a break, and what is answered.

    source                                      destination
    Source  --COMMITTED, GO--> (break)          Custody: PREPARED, waits
    ask()   --QUERY-->                          Records.find(name) -> Custody
            <--OWNERSHIP--                      Custody.standing()
            --GO-->                             Custody.take_over(): OWNER, the guest starts
            <--RUNNING--

What each side may do is in proto.ownership; what it has written is in its Journal, and each of the
steps here is written there before it is taken. A Custody does one thing at a time, whoever asks.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from migrate.cancellation import finished
from migrate.errors import MigrationError, NotStartedError, PeerError, PeerLost, peer_error
from migrate.guests.guest import Place
from migrate.journal import Journal, JournalError, journals, name_of, settled, stored
from migrate.link import Link
from migrate.threads import in_thread
from proto import ErrorCode, ProtoError
from proto.messages import Done, Error, Go, Ownership, Query, Running
from proto.ownership import ANSWERS, FINAL, Claim, Event, Role

ANSWER_SECONDS = 15.0
# Over one connection; who has more to ask connects again.
MAX_QUESTIONS = 64
# A program that receives guest after guest remembers so many.
MAX_KNOWN = 1024
# Between two attempts to ask: the first pause, and the longest.
ASK_AGAIN_SECONDS = (0.1, 3.0)

T = TypeVar("T")


async def written(journal: Journal, event: Event, *, must: bool = True, **facts: Any) -> None:
    """Journal.move, not in the loop's thread; a cancellation waits for it. Raises JournalError."""
    await finished(in_thread(journal.move, event, must=must, **facts))


async def ask(link: Link, journal: Journal) -> Claim:
    """Asks the destination at the other end of `link`; returns the claim of the source then.

    DONE: the guest runs over there. ABORTED: it is ours. COMMITTED: nobody there knows of it.
    Raises PeerError, PeerLost, TimeoutError, ProtoError, JournalError: nothing is known then.
    """
    async with asyncio.timeout(ANSWER_SECONDS):
        await link.send(Query(journal.token))
        answer = await link.receive_message()
        if isinstance(answer, Error):
            raise peer_error(answer)
        if not isinstance(answer, Ownership):
            raise PeerError(f"{type(answer).__name__} came where OWNERSHIP was due")
        event = ANSWERS[answer.claim]
        if answer.claim is Claim.PREPARED:
            await link.send(Go())
            result = await link.receive_message()
            if isinstance(result, Running):
                event = Event.RUNNING
            elif isinstance(result, Error) and result.code is ErrorCode.NOT_STARTED:
                event = Event.NOT_STARTED
            elif isinstance(result, Error):
                raise peer_error(result)
            else:
                raise PeerError(f"{type(result).__name__} came where RUNNING was due")
    await written(journal, event, must=False)
    if journal.claim is Claim.DONE:
        with contextlib.suppress(PeerLost, ProtoError):
            await link.send(Done())
    return journal.claim


async def ask_until_known(
    dials: Sequence[Callable[[], Awaitable[Link]]], journal: Journal, seconds: float
) -> str:
    """Asks over new connections, until it is known whose the guest is, or the time is over.

    dials -- the ways to connect, each of which is tried in turn

    Returns "", or why it is not known after so many seconds.
    """
    why = "nobody has answered"
    pause, longest = ASK_AGAIN_SECONDS
    try:
        async with asyncio.timeout(seconds):
            while True:
                for dial in dials:
                    try:
                        claim = await _ask_over(dial, journal)
                    except (MigrationError, ProtoError, TimeoutError, OSError) as error:
                        why = str(error) or "no answer came"
                        continue
                    if claim in FINAL:
                        return ""
                    why = "there is no record of this migration there"
                await asyncio.sleep(pause)
                pause = min(pause * 2, longest)
    except TimeoutError:
        return f"it was asked for {seconds:g} s: {why}"


async def _ask_over(dial: Callable[[], Awaitable[Link]], journal: Journal) -> Claim:
    link = await dial()
    try:
        return await ask(link, journal)
    finally:
        await link.close()


class Custody:
    """A guest that is whole at the destination, until it is decided whose it is.

    `decided` is set when it is: `journal.claim` is OWNER or ABORTED then. `told` is set when the
    source has said that it knows. `running` is the place's sentence on the guest that runs.
    """

    def __init__(self, place: Place, journal: Journal, state: bytes = b"") -> None:
        self.place = place
        self.journal = journal
        self.running = ""
        self.doubt = ""
        """Why nobody knows whether the guest was started."""
        self.on_taken: Callable[[Custody], None] = lambda _custody: None
        """Told when the guest has been started."""
        self.place_kept = False
        """It was given up, and its pages are to be gone on with."""
        self.decided = asyncio.Event()
        self.told = asyncio.Event()
        self._state = state
        self._let_go = False
        self._lock = asyncio.Lock()

    async def prepare(self, **facts: Any) -> None:
        """PREPARED: written before READY. Raises MigrationError."""
        async with self._lock:
            await written(self.journal, Event.VERIFIED, place=self.place.facts(), **facts)
            self.place.secure()

    async def take_over(self, event: Event = Event.GO) -> str:
        """GO: the guest is ours, and is started, once. Returns the sentence on it.

        Raises NotStartedError: it never will be. Raises JournalError: nothing is decided; nor is it
        where there is a doubt (MigrationError).
        """
        taken: str = await finished(self._take_over(event))
        return taken

    async def _take_over(self, event: Event) -> str:
        async with self._lock:
            if self.journal.claim not in (Claim.PREPARED, Claim.OWNER):
                raise NotStartedError("the guest was given up here before GO came")
            if self.running:
                return self.running
            if self.doubt:
                raise MigrationError(self.doubt)
            await written(self.journal, event)
            if self.place.irrevocable:
                await in_thread(self.journal.mark_begun)
            try:
                running = await self.place.start(self._state)
            except Exception as error:
                raise await self._not_started(error) from error
            self.running = running
            with contextlib.suppress(JournalError):  # it would only be started once more, or asked
                self.journal.mark_started()
            self.decided.set()
            self.on_taken(self)
            return running

    async def _not_started(self, error: Exception) -> MigrationError:
        """What the source is told. What no place of ours raises leaves one in doubt that may have
        started the guest all the same."""
        why = (
            str(error) if isinstance(error, MigrationError) else f"{type(error).__name__}: {error}"
        )
        if self.place.irrevocable and not isinstance(error, MigrationError):
            self.doubt = f"whether the guest was started is not known: {why}"
            return MigrationError(self.doubt)
        await written(self.journal, Event.NOT_STARTED)
        try:
            await self.place.discard()
        finally:
            self.decided.set()
        return NotStartedError(why)

    async def give_up(self, event: Event = Event.GIVE_UP, *, keep_place: bool = False) -> bool:
        """ABORTED, where it is not ours already; whether it is given up. Raises JournalError.

        keep_place -- the source resumes, under another name: the pages are still of use
        """
        gone: bool = await finished(self._give_up(event, keep_place))
        return gone

    async def _give_up(self, event: Event, keep_place: bool) -> bool:
        async with self._lock:
            if self.journal.claim is Claim.PREPARED:
                await written(self.journal, event)
                self.place_kept = keep_place
                if not keep_place:
                    await self.place.discard()
                self.decided.set()
            return self.journal.claim is Claim.ABORTED

    def let_go(self) -> None:
        """Has the place let go of what only served to receive the guest, where it runs, once."""
        if self.running and not self._let_go:
            self._let_go = True
            self.place.close()

    def rest(self) -> None:
        """The guest runs here, or does not come: it is no concern any more."""
        self.place, self._state = GonePlace(), b""

    async def decide(self, *, runs: bool) -> None:
        """A person has looked, and answers for it: ends a doubt."""
        async with self._lock:
            if runs:
                self.journal.mark_started()
                self.running = "it was started by an earlier program"
            else:
                await written(self.journal, Event.NOT_STARTED)
            self.doubt = ""

    async def standing(self) -> Claim:
        """What is to be answered to QUERY. A guest that is ours is started before it is said so.

        Raises MigrationError where there is a doubt.
        """
        if self.journal.claim is Claim.OWNER and not self.running:
            with contextlib.suppress(NotStartedError):
                await self.take_over()
        return self.journal.claim


class Records:
    """All migrations that a destination knows of: those of this program, and those on disk.

    reopen -- gives the place that an earlier program has prepared, from its facts; raises
              MigrationError where it is gone
    """

    def __init__(
        self, directory: str = "", reopen: Callable[[dict[str, Any]], Place] | None = None
    ) -> None:
        self.directory = directory
        self.on_taken: Callable[[Custody], None] = lambda _custody: None
        """Told of a guest that an earlier program had prepared, when it is started."""
        self._reopen = reopen
        self._known: dict[str, Custody] = {}
        self._attempts: dict[str, Journal] = {}
        self._expiring: list[asyncio.Task[None]] = []

    def journal(self, token: bytes) -> Journal:
        """A new journal."""
        return Journal(Role.DESTINATION, token, self.directory)

    def keep(self, custody: Custody) -> None:
        self._known[custody.journal.name] = custody

    def rest(self) -> None:
        """Of what is decided, only whose it is need be known; of old ones, not even that."""
        for custody in [one for one in self._known.values() if one.decided.is_set()]:
            custody.rest()
        for name in [*self._known][:-MAX_KNOWN]:
            if self._known[name].decided.is_set():
                del self._known[name]

    async def find(self, name: str) -> Custody | None:
        """By the name of the migration; None where there is no record. Raises JournalError."""
        if name not in self._known:
            journal = stored(Role.DESTINATION, name, self.directory)
            if journal is None or journal.claim is Claim.NONE:
                return None
            journal.open(create=False)
            self.keep(await self._reopened(journal))
        return self._known.get(name)

    def attempts(self) -> list[Journal]:
        """Journals of attempts that broke off, whose pages are still here."""
        every = journals(Role.DESTINATION, self.directory) if self.directory else ()
        return [one for one in every if one.claim is Claim.NONE and one.left is not None]

    def attempt(self, token: bytes) -> Journal | None:
        """That of one attempt, locked; None where there is none. Raises JournalError."""
        name = name_of(token)
        if name not in self._attempts:
            journal = stored(Role.DESTINATION, name, self.directory)
            if journal is not None and journal.claim is Claim.NONE and journal.left is not None:
                journal.open(create=False)
                self._attempts[name] = journal
        return self._attempts.get(name)

    async def resume(self, token: bytes) -> Journal | None:
        """As `attempt`, where the source says that it goes on: also for a guest that was whole.

        That source has never said GO, so it is given up, under this name.
        """
        custody = self._known.get(name_of(token))
        if (
            custody is not None
            and custody.journal.claim is Claim.PREPARED
            and custody.place.lasting
        ):
            await finished(self._reclaim(custody))
        return self.attempt(token)

    async def _reclaim(self, custody: Custody) -> None:
        if await custody.give_up(keep_place=True):
            custody.place.close()
            self._attempts[custody.journal.name] = custody.journal

    async def _reopened(self, journal: Journal) -> Custody:
        """What an earlier program has left. A guest that is gone was never run: it is given up."""
        place: Place = GonePlace()
        running = doubt = ""
        if journal.claim is Claim.OWNER and journal.started:
            running = "it was started by an earlier program"
        elif journal.claim is Claim.OWNER and journal.begun:
            doubt = _doubt(journal)
        elif journal.claim in (Claim.PREPARED, Claim.OWNER):
            try:
                if self._reopen is None:
                    raise MigrationError("no place can be opened again here")
                place = self._reopen(journal.facts["place"])
            except (MigrationError, KeyError):
                if journal.claim is Claim.PREPARED:
                    await written(journal, Event.GIVE_UP)
        custody = Custody(place, journal)
        custody.running, custody.doubt = running, doubt
        custody.on_taken = self.on_taken
        return custody

    async def finish(self, patience: float) -> list[str]:
        """Goes on with what earlier programs have left; sentences on it.

        What they had taken over is started. What they had prepared is given up after `patience`
        seconds, unless its source comes and asks.
        """
        said = []
        for journal in list(journals(Role.DESTINATION, self.directory)):
            if settled(journal):
                continue
            try:
                custody = await self.find(journal.name)
                assert custody is not None
                if custody.journal.claim is Claim.OWNER:
                    said.append(f"migration {journal.name}: {await custody.take_over()}")
                elif custody.journal.claim is Claim.PREPARED:
                    self._expiring.append(asyncio.create_task(_expire(custody, patience)))
                    said.append(
                        f"migration {journal.name}: a guest that is whole waits for its source, "
                        f"{patience:g} s at most"
                    )
            except MigrationError as error:
                said.append(f"migration {journal.name}: {error}")
        self.let_go()
        return said

    def let_go(self) -> None:
        """See Custody.let_go: it was said of each guest that runs."""
        for custody in self._known.values():
            custody.let_go()

    def close(self) -> None:
        for task in self._expiring:
            task.cancel()
        for custody in self._known.values():
            custody.journal.close()


def _doubt(journal: Journal) -> str:
    where = journal.facts.get("place", {}).get("address", "its socket")
    return (
        f"an earlier migrate-dst has died as it gave the guest to the QEMU at {where}: look "
        "whether it runs there, and say so where migrate-dst is: migrate-dst resolve "
        f"{journal.name} --keep destination; or, if it does not and never will, --keep source "
        "--force"
    )


async def _expire(custody: Custody, patience: float) -> None:
    await asyncio.sleep(patience)
    with contextlib.suppress(MigrationError):
        await custody.give_up()


class GonePlace(Place):
    """Where there is nothing any more."""

    async def start(self, state: bytes) -> str:
        raise MigrationError("the memory of the guest is gone")

    async def discard(self) -> None:
        pass


async def answer(link: Link, records: Records) -> None:
    """Serves a connection that began with QUERY, to its end."""
    code, reason = ErrorCode.PROTOCOL, ""
    try:
        custody: Custody | None = None
        for _ in range(MAX_QUESTIONS):
            async with asyncio.timeout(ANSWER_SECONDS):
                message = await link.receive_message()
            if isinstance(message, Query):
                custody = await records.find(name_of(message.token))
                claim = await custody.standing() if custody else Claim.NONE
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
    except NotStartedError as error:
        code, reason = ErrorCode.NOT_STARTED, str(error)
    except MigrationError as error:
        code, reason = ErrorCode.INTERNAL, str(error)
    except ProtoError as error:
        code, reason = getattr(error, "code", ErrorCode.PROTOCOL), str(error)
    except TimeoutError:
        reason = "nothing was asked"
    finally:
        records.let_go()
        if reason:
            await link.give_reason(code, reason)
        await link.close()
