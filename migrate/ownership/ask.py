"""After a break, the source asks the destination which of them owns the guest.

    source                                destination
    ask()   --QUERY-->                    records.answer() looks for the migration
            <--OWNERSHIP: PREPARED--      it has the guest, and GO never came
            --GO-->                       it starts the guest
            <--RUNNING--
            --DONE-->

Any other answer ends the exchange: ANSWERS in proto.wire.ownership says what follows from each.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

from migrate.errors import HandOverUnknown, MigrationError
from migrate.ownership.journal import Journal, record
from migrate.transport.link import Link, expect
from proto import ErrorCode, ProtoError
from proto.wire.messages import Done, Error, Go, Ownership, Query, Running
from proto.wire.ownership import ANSWERS, FINAL, Claim, Event

ANSWER_SECONDS = 15.0
# The first pause between two attempts to ask, and the longest.
ASK_AGAIN_SECONDS = (0.1, 3.0)


async def ask(link: Link, journal: Journal) -> Claim:
    """Ask the destination at the other end of `link`; return the source's claim after its answer.

    DONE: the guest runs there. ABORTED: it is ours. COMMITTED: there is no record of it there.
    Raises PeerError, TimeoutError, ProtoError or JournalError if the owner is still unknown.
    """
    async with asyncio.timeout(ANSWER_SECONDS):
        await link.send(Query(journal.token))
        answer = await link.expect(Ownership)
        event = ANSWERS[answer.claim]
        if answer.claim is Claim.PREPARED:
            await link.send(Go())
            result = await link.receive_message()
            if isinstance(result, Error) and result.code is ErrorCode.NOT_STARTED:
                event = Event.NOT_STARTED
            else:
                expect(result, Running)
                event = Event.RUNNING
    await record(journal, event, must=False)
    if journal.claim is Claim.DONE:
        with contextlib.suppress(MigrationError, ProtoError):
            await link.send(Done())
    return journal.claim


async def ask_until_known(
    dials: Sequence[Callable[[], Awaitable[Link]]], journal: Journal, seconds: float
) -> str:
    """Ask over new connections until the owner is known, or the time is up.

    dials -- ways to connect, tried in turn

    Returns "" if the owner is known, or else why it is not.
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
        return f"asked for {seconds:g} s: {why}"


async def _ask_over(dial: Callable[[], Awaitable[Link]], journal: Journal) -> Claim:
    link = await dial()
    try:
        return await ask(link, journal)
    finally:
        await link.close()


async def decide(
    journal: Journal, dials: Sequence[Callable[[], Awaitable[Link]]], timeout: float, keep: str
) -> bool:
    """Return whether the destination owns the guest. Ask it if that is not known.

    timeout -- seconds to ask for
    keep    -- "here" or "there": an operator decides, so do not ask; "": ask

    Raises HandOverUnknown if there is no answer in time.
    """
    if journal.claim is Claim.COMMITTED and keep:
        journal.move(Event.KEEP_SOURCE if keep == "here" else Event.KEEP_DESTINATION)
    elif journal.claim is Claim.COMMITTED:
        why = await ask_until_known(dials, journal, timeout)
        if why:
            raise HandOverUnknown(f"it is still not known which side owns the guest: {why}")
    return journal.claim is Claim.DONE
