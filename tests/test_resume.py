"""The connection breaks, or a program dies, before the guest is handed over.

However often that happens, the guest keeps running at the source, pages that arrived are not sent
again, and the memories are equal at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import threading
import time
from array import array
from pathlib import Path
from typing import Any, cast

import pytest
import xxhash

import migrate
from migrate.destination.page_receiver import send_held
from migrate.errors import MigrationError, MismatchError, PeerError, PeerLost, UsageError
from migrate.memory.digest import Digest
from migrate.ownership.journal import Journal
from migrate.ownership.source_attempts import find_attempt, last_peer
from migrate.ownership.stored_journals import journals
from migrate.policy.compression import CompressionPolicy
from migrate.source.options import SourceOptions
from migrate.source.precopy import Source
from migrate.source.transfer import MAX_PAUSES
from migrate.transport import link
from migrate.transport.address import Address
from migrate.transport.connect import connect
from migrate.transport.listen import listen
from proto import ErrorCode
from proto.codec.kernel import PageDecoder, PageHashes
from proto.wire import capabilities
from proto.wire.messages import (
    HELD_PAGES,
    Accept,
    CacheSize,
    Complete,
    Error,
    GuestInfo,
    Held,
    MessageType,
    Running,
)
from proto.wire.ownership import Claim, Event, Role
from tests.by_hand import (
    CONTENT,
    PAGE,
    PAGES,
    SEED,
    SIZE,
    hand_destination,
)
from tests.programs import Program, destination, end_guest, ended_or_given_up, guest_pid, look_at
from tests.tap import Tap, is_last_round, of_kind

pytestmark = pytest.mark.kills

GUEST = "demo:24m,hot=6m,stride=1024,fill=random"


# ---------------------------------------------------------------- a destination by hand


async def again(hand: Any, held: bool = True) -> GuestInfo:
    """Accept the source again, and tell it that its pages are held."""
    del hand.links[:]
    old = hand.memory
    await hand.accept_as(Accept(b"\1" * 16, held))
    hand.memory = old
    hand.decoder.mark_received(0, PAGES, True)
    return hand.info


async def begin(hand: Any) -> None:
    await hand.accept()
    await hand.links[0].receive_message()
    hand.links[0].abort()


def truth(seed: bytes, memory: bytes) -> PageHashes:
    hashes = PageHashes(PAGES, PAGE, seed)
    hashes.hash_pages(array("Q", range(PAGES)), PAGES, memory)
    return hashes


@contextlib.asynccontextmanager
async def broken_off(capable: frozenset[str] = capabilities.OPTIONAL, **options: Any):
    """Run a source that has reconnected after one break."""
    retrying = SourceOptions(retry=20.0)
    async with hand_destination(1, options=retrying, **options) as (hand, source, running):
        hand.capable = capable
        await begin(hand)
        info = await again(hand)
        assert info.resume == bytes(16)
        yield hand, source, running, info


@pytest.mark.asyncio
@pytest.mark.parametrize("wrong", [[], [3], [0, 700, PAGES - 1]])
async def test_resume_sends_only_changed_pages(wrong):
    async with broken_off() as (hand, source, running, info):
        memory = bytearray(CONTENT)
        for page in wrong:
            memory[page * PAGE] ^= 1
        hand.memory[:] = memory
        table = truth(info.hash_seed, memory).table
        await hand.links[0].send(Held(0, bytes(table)))
        await hand.finish()
        await hand.links[0].send(Running())
        await running
        assert hand.memory == CONTENT
        assert hand.links[0].received_bytes < len(wrong) * PAGE + 2000
        assert source.statistics.reconnects == 1
        assert info.round in (1, 2), "the first may have been begun"


SPARSE = capabilities.OPTIONAL | {capabilities.SPARSE}


@pytest.mark.asyncio
@pytest.mark.parametrize("filled", [[], [0], [3, 4, 900], [PAGES - 1]])
async def test_pages_missing_from_held_count_as_zeros(filled):
    """The destination reports some pages; HELD ends with the last one, present or zero."""
    async with broken_off(capable=SPARSE) as (hand, source, running, info):
        memory = bytearray(len(CONTENT))
        for page in filled:
            memory[page * PAGE : (page + 1) * PAGE] = CONTENT[page * PAGE : (page + 1) * PAGE]
        hand.memory[:] = memory
        hashes = truth(info.hash_seed, memory)
        for page in sorted({*filled, PAGES - 1}):
            await hand.links[0].send(Held(page, bytes(hashes.part(page, 1))))
        complete = await hand.finish()
        assert complete.digest == truth(info.hash_seed, CONTENT).sum
        await hand.links[0].send(Running())
        await running
        assert hand.memory == CONTENT
        resent = hand.links[0].received_bytes
        assert resent < (PAGES - len(filled)) * PAGE + 20_000
        assert source.statistics.reconnects == 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("said", "why"),
    [
        ([Held(5, bytes(16)), Held(6, bytes(8))], "HELD begins at page 6; expected 7"),
        ([Held(PAGES, bytes(8))], f"HELD goes beyond the {PAGES} pages"),
        ([Held((1 << 32) - 1, bytes(8))], f"HELD goes beyond the {PAGES} pages"),
        ([Held(3, bytes(8)), Held(PAGES - 1, bytes(16))], "HELD goes beyond"),
    ],
)
async def test_held_out_of_order_is_refused(said, why):
    async with broken_off(capable=SPARSE) as (hand, _, running, _info):
        for one in said:
            await hand.links[0].send(one)
        with pytest.raises(PeerError, match=why):
            await running


@pytest.mark.asyncio
async def test_false_held_hashes_are_detected():
    """The destination reports a wrong hash for page 5; the final digest is of the true memory."""
    async with broken_off() as (hand, _, running, info):
        memory = bytearray(CONTENT)
        memory[5 * PAGE] ^= 1
        hand.memory[:] = memory
        await hand.links[0].send(Held(0, bytes(truth(info.hash_seed, CONTENT).table)))
        while not (ended := await hand.take_rounds()).last:
            await hand.acknowledge(ended.number)
        await hand.acknowledge(ended.number)
        complete = await hand.links[0].receive_message()
        assert isinstance(complete, Complete)
        right = xxhash.xxh3_128_digest(truth(info.hash_seed, CONTENT).table)
        ours = xxhash.xxh3_128_digest(truth(info.hash_seed, bytes(memory)).table)
        assert complete.digest == right != ours
        await hand.links[0].send(Error(ErrorCode.MISMATCH, "the memories differ"))
        with pytest.raises(MismatchError):
            await running


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("said", "why"),
    [
        ([Held(1, bytes(8))], "HELD begins at page 1; expected 0"),
        ([Held(0, bytes(16)), Held(1, bytes(16))], "HELD begins at page 1; expected 2"),
        ([Held(0, bytes(8 * PAGES + 8))], f"HELD goes beyond the {PAGES} pages"),
        ([Held(0, bytes(8 * (PAGES - 1))), Held(PAGES - 1, bytes(16))], "HELD goes beyond"),
    ],
)
async def test_reply_out_of_order_is_refused(said, why):
    async with broken_off() as (hand, _, running, _info):
        for one in said:
            await hand.links[0].send(one)
        with pytest.raises(PeerError, match=why):
            await running


@pytest.mark.asyncio
async def test_held_without_earlier_attempt_is_refused():
    async with hand_destination(1) as (hand, _, running):
        await hand.accept_as(Accept(bytes(16), True))
        with pytest.raises(PeerError, match="it was not asked to keep"):
            await running


@pytest.mark.asyncio
async def test_resume_without_held_pages_sends_everything():
    async with hand_destination(1, options=SourceOptions(retry=20.0)) as (hand, _, running):
        await hand.accept()
        ended = await hand.take_rounds()
        await hand.acknowledge(ended.number)
        hand.links[0].abort()
        del hand.links[:]
        hand.memory[:] = bytes(len(hand.memory))
        await hand.accept_as(Accept(b"\1" * 16))
        assert hand.info.round > 1
        await hand.finish()
        await hand.links[0].send(Running())
        await running
        assert hand.memory == CONTENT


@pytest.mark.asyncio
async def test_resume_with_other_capabilities_is_refused():
    async with hand_destination(1, options=SourceOptions(retry=20.0)) as (hand, _, running):
        await begin(hand)
        del hand.links[:]
        await hand.accept(frozenset())
        with pytest.raises(MigrationError, match="other capabilities"):
            await running


@pytest.mark.asyncio
async def test_retry_ends_after_its_time(monkeypatch):
    async with hand_destination(1, options=SourceOptions(retry=0.6)) as (hand, _, running):
        await begin(hand)
        await hand.listener.close()
        began = time.monotonic()
        with pytest.raises(PeerLost, match=r"no other connection in 0\.6 s"):
            await running
        assert time.monotonic() - began >= 0.6


@pytest.mark.asyncio
async def test_retry_ends_when_destination_accepts_and_hangs_up():
    """As a proxy does whose backend is dead."""
    async with hand_destination(1, options=SourceOptions(retry=1.0)) as (hand, _, running):
        await begin(hand)

        async def hang_up() -> None:
            while True:
                (await hand.listener.accept()).abort()

        hanging = asyncio.create_task(hang_up())
        with pytest.raises(PeerLost, match="no other connection in 1 s"):
            await running
        hanging.cancel()


async def hang_up(hand: Any) -> None:
    there = await hand.listener.accept()
    there.abort()
    await there.close()


@pytest.mark.asyncio
async def test_silent_hang_up_before_hello_is_retried():
    """A destination with too many unknown connections drops some; the source may be one."""
    heard: list[str] = []
    options = SourceOptions(lambda event, _s: heard.append(event), patience=20.0)
    async with hand_destination(1, options=options) as (hand, _, running):
        for _ in range(3):
            await hang_up(hand)
        await hand.accept()
        await hand.finish()
        await hand.links[0].send(Running())
        statistics = await running
        assert statistics.status == "completed"
        assert hand.memory == CONTENT
        assert statistics.reconnects == 3
    told = [event for event in heard if "connecting again" in event]
    assert len(told) == 1, "once, however often it is tried"
    assert "connecting again, for 20 s at most" in told[0]


@pytest.mark.asyncio
@pytest.mark.parametrize("retry", [0.0, 30.0])
async def test_repeated_silent_hang_up_is_given_up(retry):
    """A connection alone does not renew the time."""
    options = SourceOptions(patience=1.0, retry=retry)
    async with hand_destination(1, options=options) as (hand, source, running):

        async def for_ever() -> None:
            while True:
                await hang_up(hand)

        hanging, began = asyncio.create_task(for_ever()), time.monotonic()
        with pytest.raises(PeerLost, match=r"; so it went \d+ times in 1(\.\d+)? s"):
            await running
        hanging.cancel()
        assert time.monotonic() - began < 10
        assert source.statistics.reconnects > 2
        assert not source.committed


@pytest.mark.asyncio
@pytest.mark.parametrize("what", ["an error", "its hello", "nothing"])
async def test_hang_up_after_answer_or_timeout_is_not_retried(what, monkeypatch):
    seconds = 0.5 if what == "nothing" else 15.0
    monkeypatch.setattr("migrate.source.attempt.HANDSHAKE_SECONDS", seconds)
    async with hand_destination(1, options=SourceOptions(patience=20.0)) as (hand, source, running):
        there = await hand.listener.accept()
        if what == "an error":
            await there.give_reason(ErrorCode.NO_PLACE, "there is no room")
        elif what == "its hello":
            await there.receive_message()
            await there.send(capabilities.offer(capabilities.OPTIONAL))
        if what != "nothing":
            await there.close()
        says = {"an error": "there is no room", "its hello": "closed|broke"}
        with pytest.raises(PeerError, match=says.get(what, "does not answer within")):
            await running
        assert source.statistics.reconnects == 0
        there.abort()
        await there.close()


@pytest.mark.asyncio
async def test_early_error_is_not_taken_for_silent_hang_up():
    async with asyncio.timeout(60):
        listener = await listen(Address("127.0.0.1", 0))
        near = await connect(listener.address)
        there = await listener.accept()
        await there.give_reason(ErrorCode.NO_PLACE, "there is no room")
        await there.close()
        await near.ended()
        options = SourceOptions(dial=lambda: connect(listener.address), patience=20.0)
        source = Source(migrate.BufferGuest(bytearray(PAGE)), near, options=options)
        with pytest.raises(PeerError, match="there is no room"):
            await source.run()
        assert source.statistics.reconnects == 0
        await listener.close()


async def greet_and_break(hand: Any, held: bool) -> None:
    """Accept the source, and hang up before any page is acknowledged, every time."""
    while True:
        await again(hand, held)
        if held:
            await hand.links[0].send(Held(0, bytes(8 * PAGES)))
        assert isinstance(await hand.links[0].receive_message(), CacheSize)
        hand.links[0].abort()


@pytest.mark.asyncio
async def test_retry_ends_without_round_ack():
    async with hand_destination(1, options=SourceOptions(retry=1.0)) as (hand, source, running):
        await begin(hand)
        breaking = asyncio.create_task(greet_and_break(hand, held=True))
        with pytest.raises(
            PeerLost, match=r"nothing new has come through for .* s, and the connection broke \d+"
        ):
            await running
        breaking.cancel()
        assert source.resumable
        assert source.statistics.reconnects > 2


@pytest.mark.asyncio
async def test_destination_that_keeps_losing_pages_is_given_up():
    """Its program keeps dying, whatever it has acknowledged before."""

    async def acknowledge_and_die(hand: Any) -> None:
        while True:
            await again(hand, held=False)
            hand.memory[:] = bytes(len(hand.memory))
            hand.decoder = PageDecoder(PageHashes(PAGES, PAGE, hand.info.hash_seed), SIZE)
            await hand.acknowledge((await hand.take_rounds()).number)
            hand.links[0].abort()

    async with hand_destination(1, options=SourceOptions(retry=20.0)) as (hand, _, running):
        await begin(hand)
        dying = asyncio.create_task(acknowledge_and_die(hand))
        with pytest.raises(PeerLost, match="the destination has lost the guest 6 times"):
            await running
        dying.cancel()
        await asyncio.wait([dying])


@pytest.mark.asyncio
async def test_guest_is_not_paused_repeatedly():
    """The connection breaks in each pause, though rounds between the pauses make progress."""
    async with hand_destination(1, options=SourceOptions(retry=20.0)) as (hand, source, running):
        await hand.accept()
        pauses = 0
        while not running.done() and pauses < 9:
            ended = await hand.take_rounds()
            if ended.last:
                pauses += 1
                hand.links[0].abort()
                if pauses < MAX_PAUSES:
                    await again(hand)
                    table = truth(hand.info.hash_seed, bytes(hand.memory)).table
                    await hand.links[0].send(Held(0, bytes(table)))
                else:
                    await asyncio.wait([running])
            else:
                await hand.acknowledge(ended.number)
        with pytest.raises(PeerLost, match="the guest was stopped 3 times for nothing"):
            await running
        assert pauses == MAX_PAUSES
        assert source.resumable


@pytest.mark.asyncio
async def test_retry_prefers_the_machine_that_holds_the_pages():
    """A new connection to the name would reach another machine."""

    async def elsewhere() -> link.Link:
        raise AssertionError("another machine was asked")

    options = SourceOptions(dial=elsewhere, retry=20.0)
    async with hand_destination(1, options=options) as (hand, source, running):
        here = hand.listener.address
        source.channels.link.redial = lambda: connect(here)
        await begin(hand)
        info = await again(hand)
        await hand.links[0].send(Held(0, bytes(truth(info.hash_seed, CONTENT).table)))
        hand.memory[:] = CONTENT
        await hand.finish()
        await hand.links[0].send(Running())
        await running


@pytest.mark.asyncio
async def test_retry_tries_other_addresses_after_a_while():
    other = await listen(Address("127.0.0.1", 0))
    options = SourceOptions(dial=lambda: connect(other.address), retry=2.0)
    async with hand_destination(1, options=options) as (hand, source, running):
        gone = hand.listener
        source.channels.link.redial = lambda: connect(gone.address)
        await begin(hand)
        port = gone.address
        await gone.close()
        source.channels.link.redial = lambda: connect(port)
        hand.listener = other
        await again(hand, held=False)
        await hand.finish()
        await hand.links[0].send(Running())
        await running
        assert hand.memory == CONTENT
        await other.close()


# ---------------------------------------------------------------- a source by hand


@contextlib.asynccontextmanager
async def hand_source(offered: frozenset[str] = capabilities.OPTIONAL, **options: Any):
    async with asyncio.timeout(60):
        ready: asyncio.Future[Address] = asyncio.get_running_loop().create_future()
        received = asyncio.create_task(
            migrate.receive("127.0.0.1:0", listening=ready.set_result, **options)
        )
        made: list[link.Link] = []

        async def come(resume: bytes = b"", size: int = SIZE, seed: bytes = SEED) -> Any:
            peer = await connect(await asyncio.shield(ready))
            made.append(peer)
            await peer.send(capabilities.offer(offered))
            await peer.receive_message()
            await peer.send(GuestInfo("buffer", size, PAGE, seed, resume=resume))
            return peer, await peer.receive_message()

        try:
            yield come, received
        finally:
            received.cancel()
            await asyncio.wait([received])
            for peer in made:
                await peer.close()


async def held_by(peer: link.Link) -> bytes:
    table = b""
    while len(table) < 8 * PAGES:
        said = await peer.receive_message()
        assert isinstance(said, Held)
        assert said.first == len(table) // 8
        assert len(said.hashes) <= 8 * HELD_PAGES
        table += said.hashes
    return table


@pytest.mark.asyncio
@pytest.mark.parametrize("same_seed", [True, False])
async def test_new_connection_of_the_source_replaces_the_old_one(same_seed):
    """The old connection is silent but not known to be dead; the source knows better."""
    async with hand_source() as (come, _):
        old, accept = await come()
        seed = SEED if same_seed else bytes(16)
        new, answer = await come(accept.token, seed=seed)
        assert isinstance(answer, Accept)
        assert answer.held
        assert answer.token != accept.token
        assert await held_by(new) == PageHashes(PAGES, PAGE, seed).table, "zeros"
        with pytest.raises(PeerLost):
            await old.receive_message()


@pytest.mark.asyncio
async def test_held_of_a_zero_guest_is_one_message():
    """HELD then has only the last page, which ends it."""
    async with hand_source(SPARSE) as (come, _):
        _, accept = await come()
        new, answer = await come(accept.token, seed=bytes(16))
        assert answer.held
        said = await new.receive_message()
        assert said == Held(PAGES - 1, bytes(PageHashes(1, PAGE, bytes(16)).table))


@pytest.mark.asyncio
@pytest.mark.parametrize("sparse", [False, True])
async def test_held_with_and_without_zero_pages(sparse):
    pages, filled = 20_000, [*range(3, 9), 9000, 17_001, *range(18_000, 19_990)]
    hashes = PageHashes(pages, PAGE, SEED)
    content = bytes(range(256)) * (PAGE // 256)
    hashes.hash_pages(array("Q", filled), len(filled), content * len(filled))
    said: list[Held] = []

    class Wire:
        async def send(self, message: Held) -> None:
            said.append(message)

    await send_held(cast("Any", Wire()), hashes, sparse=sparse)
    table, page = b"", 0
    zero = bytes(PageHashes(1, PAGE, SEED).table)
    for one in said:
        assert one.first >= page
        assert len(one.hashes) <= 8 * HELD_PAGES
        table += zero * (one.first - page) + one.hashes
        page = one.first + len(one.hashes) // 8
    assert table == hashes.table
    told = sum(len(one.hashes) for one in said) // 8
    assert (told < 12_000) is sparse


@pytest.mark.asyncio
async def test_previous_token_is_valid_until_data_arrives():
    """ACCEPT with the newer token may have been lost with the connection."""
    async with hand_source() as (come, _):
        _, first = await come()
        _, second = await come(first.token)
        _, third = await come(first.token)
        assert third.held
        _, fourth = await come(third.token)
        assert fourth.held
        for stale in (first.token, second.token):
            _, refused = await come(stale)
            assert isinstance(refused, Error)
            assert "another guest is being received" in refused.reason


@pytest.mark.asyncio
@pytest.mark.parametrize("what", ["token", "size", "no token"])
async def test_resume_with_wrong_token_or_size_is_refused(what):
    async with hand_source() as (come, _):
        _, accept = await come()
        token = {"token": bytes(16), "size": accept.token, "no token": b""}[what]
        _, answer = await come(token, size=SIZE - PAGE * (what == "size"))
        assert isinstance(answer, Error)
        assert answer.code is ErrorCode.NO_PLACE


@pytest.mark.asyncio
async def test_wait_for_the_source_times_out():
    async with hand_source(retry=0.5) as (come, received):
        peer, _ = await come()
        await peer.send(CacheSize(0))
        await peer.round_trip()
        began = time.monotonic()
        peer.abort()
        with pytest.raises(PeerLost):
            await received
        assert time.monotonic() - began >= 0.5


@pytest.mark.asyncio
async def test_reconnecting_source_without_progress_times_out():
    async with hand_source(retry=1.0) as (come, received):
        peer, accept = await come()
        await peer.send(CacheSize(0))
        await peer.round_trip()

        async def come_back() -> None:
            last, said = peer, accept
            while isinstance(said, Accept):
                last.abort()
                last, said = await come(said.token)
                await last.send(CacheSize(0))
                await held_by(last)

        coming = asyncio.create_task(come_back())
        with pytest.raises(
            PeerLost, match=r"nothing new has come for .* s, and the connection broke \d+ times"
        ):
            await received
        coming.cancel()
        await asyncio.wait([coming])


@pytest.mark.asyncio
async def test_source_that_never_saw_accept_is_not_awaited():
    """It has no token to present, so the next source is accepted at once."""
    async with hand_source() as (come, _):
        first, accept = await come()
        assert isinstance(accept, Accept)
        first.abort()
        while True:
            _, answer = await come()
            if isinstance(answer, Accept):
                break
        assert answer.token != accept.token
        assert not answer.held


@pytest.mark.parametrize("moment", [MessageType.ACCEPT, MessageType.CACHE_SIZE])
def test_break_before_the_first_page_admits_another_source(moment: MessageType) -> None:
    receiver, address = destination("--retry", "30s")
    tap = Tap(address, of_kind(moment))

    def cut() -> None:
        raise OSError("cut")

    tap.act = cut
    source = Program("migrate-src", "--retry", "20s", "--guest", GUEST, tap.address)
    if moment is MessageType.ACCEPT:
        assert source.wait() == 1
        pid = guest_pid(source.err)
        source = Program("migrate-src", "--guest", f"demo:pid={pid}", tap.address)
    arrived(source, receiver)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("channels", "cache", "compress"),
    [(1, 1 << 26, False), (3, 1 << 14, False), (2, 1 << 26, True)],
)
async def test_migration_survives_twenty_breaks(channels, cache, compress, monkeypatch):
    """Migrate a bytearray under constant writes, over connections that break at random."""
    chance = random.Random(20 + channels)
    memory = bytearray(chance.randbytes(64 << 20))
    if compress:  # each batch, whether it pays or not
        memory[1::2] = bytes(32 << 20)
        monkeypatch.setattr(CompressionPolicy, "choose", lambda *_, **__: 1)
    guest = migrate.BufferGuest(memory)
    ready: asyncio.Future[Address] = asyncio.get_running_loop().create_future()
    receiving = asyncio.create_task(
        migrate.receive("127.0.0.1:0", listening=ready.set_result, retry=20)
    )
    tap = Tap(str(await ready), lambda *_: False)
    stop = threading.Event()

    def write() -> None:
        noise = random.Random(1)
        with contextlib.suppress(migrate.GuestMoved):
            while not stop.is_set():
                with guest.writing():
                    at = noise.randrange(len(memory) - 64)
                    memory[at : at + 64] = noise.randbytes(64)
                time.sleep(0.0002)

    writer = threading.Thread(target=write)
    writer.start()
    seen: list[str] = []
    limits = migrate.Limits(max_bandwidth=32 << 20)
    sending = asyncio.create_task(
        migrate.send(
            guest, tap.address,
            migrate.Parameters(cache_size=cache, channels=channels, limits=limits),
            observer=lambda event, _: seen.append(event), retry=20,
        )
    )  # fmt: skip
    try:
        while "pass" not in seen:  # a source that was never accepted is not awaited
            await asyncio.sleep(0.01)
        for _ in range(20):
            resumed = sum("resuming at" in event for event in seen)
            await asyncio.sleep(chance.uniform(0.02, 0.15))
            tap.cut()
            while not sending.done() and resumed == sum("resuming at" in event for event in seen):
                await asyncio.sleep(0.01)
            assert not sending.done()
        statistics = await sending
        arrived = await receiving
    finally:
        stop.set()
        await asyncio.to_thread(writer.join)
        sending.cancel()
        receiving.cancel()
    assert statistics.reconnects >= 20
    assert arrived.memory == memory


# ---------------------------------------------------------------- the programs


MOMENTS = {
    **{
        kind.name: of_kind(kind)
        for kind in (
            MessageType.PAGES, MessageType.ROUND, MessageType.ROUND_ACK, MessageType.COMPLETE,
            MessageType.READY,
        )
    },
    "LAST_ROUND": is_last_round,
}  # fmt: skip


def arrived(source: Program, receiver: Program) -> None:
    """Assert that the demo guest runs, intact, at the destination only."""
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0, receiver.err
    there = guest_pid(receiver.out)
    before, after, wrong = look_at(there, 0.2)
    end_guest(there)
    assert wrong == -1
    assert after > before
    assert ended_or_given_up(guest_pid(source.err))


@pytest.mark.parametrize("moment", MOMENTS)
def test_break_before_commit_is_resumed(moment: str) -> None:
    receiver, address = destination("--retry", "20s")
    tap = Tap(address, MOMENTS[moment])

    def cut() -> None:
        raise OSError("cut")

    tap.act = cut
    source = Program("migrate-src", "--retry", "20s", "--json", "--guest", GUEST, tap.address)
    arrived(source, receiver)
    assert tap.acted.is_set()
    assert "connecting again, for 20 s at most" in source.err
    assert re.search(r"resuming at \d+ %", source.err)
    assert json.loads(source.out)["reconnects"] == 1


def test_resume_after_destination_restart_without_pages() -> None:
    receiver, address = destination("--retry", "20s")
    source = Program(
        "migrate-src", "--retry", "20s", "--progress", "plain", "--max-bandwidth", "16m",
        "--guest", GUEST, address,
    )  # fmt: skip
    source.read_line("round 1")
    receiver.kill()
    receiver.wait()
    receiver, _ = destination(listen=address.removeprefix("tcp:"))
    arrived(source, receiver)
    assert "kept nothing of the guest: beginning again" in source.err


def half_way(shm: Path, *more: str, listen: str = "127.0.0.1:0") -> tuple[Program, Program, str]:
    """Migrate a file of 24 MiB at 8 MiB/s, of which a third has arrived."""
    memory, output = shm / "memory", shm / "output"
    if not memory.exists():
        memory.write_bytes(random.Random(24).randbytes(24 << 20))
    options = ["--journal", str(shm), *more]
    receiver, address = destination(*options, "--output", str(output), listen=listen)
    source = file_source(shm, address, options)
    until_came(shm)
    return receiver, source, address


def file_source(shm: Path, address: str, options: list[str]) -> Program:
    source = Program(
        "migrate-src", *options, "--guest", f"file:{shm / 'memory'}", "--max-bandwidth", "8m",
        address,
    )  # fmt: skip
    source.read_line("moving")
    return source


def until_came(shm: Path) -> None:
    """Wait until a third of the 24 MiB is in the partial output."""
    end = time.monotonic() + 60
    while not any(
        path.stat().st_blocks * 512 > 8 << 20
        for path in shm.iterdir()
        if path.name.endswith(".xbmigrate")
    ):
        assert time.monotonic() < end
        time.sleep(0.005)


def percent(text: str) -> int:
    found = re.search(r"resuming at (\d+) %", text)
    assert found, text
    return int(found[1])


def complete(shm: Path, source: Program, receiver: Program) -> None:
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0, receiver.err
    assert (shm / "output").read_bytes() == (shm / "memory").read_bytes()
    left = [name for name in os.listdir(shm) if name.endswith(".xbmigrate")]
    assert left == []
    for role in Role:
        [journal] = journals(role, str(shm))
        assert journal.settled


def test_file_resumes_after_destination_restart(shm: Path) -> None:
    receiver, source, address = half_way(shm, "--retry", "20s")
    receiver.kill()
    receiver.wait()
    (shm / "memory").touch()
    options = ["--journal", str(shm), "--retry", "20s", "--output", str(shm / "output")]
    receiver, _ = destination(*options, listen=address.removeprefix("tcp:"))
    assert "a part of a guest is here" in receiver.err
    complete(shm, source, receiver)
    assert percent(source.err) >= 10


def test_file_resumes_after_source_restart(shm: Path) -> None:
    """The source was killed while connected, and its file has changed since."""
    receiver, source, address = half_way(shm, "--retry", "20s")
    source.kill()
    source.wait()
    with open(shm / "memory", "r+b") as file:
        file.write(b"changed")
    source = file_source(shm, address, ["--journal", str(shm), "--retry", "20s"])
    complete(shm, source, receiver)
    assert 10 <= percent(source.err) < 100


def test_file_resumes_after_both_gave_up(shm: Path) -> None:
    """The network is down for longer than --retry; the next attempt uses the pages that arrived."""
    memory, output = shm / "memory", shm / "output"
    memory.write_bytes(random.Random(24).randbytes(24 << 20))
    options = ["--journal", str(shm), "--retry", "1s"]
    receiver, address = destination(*options, "--output", str(output))
    tap = Tap(address, lambda *_: False)
    source = file_source(shm, tap.address, options)
    until_came(shm)
    tap.close()
    assert source.wait() == 1
    assert "no other connection in 1 s" in source.err
    assert "run it again to resume" in source.err
    assert receiver.wait() == 1
    assert "run it again to resume" in receiver.err
    assert not output.exists()
    for role in Role:
        [journal] = journals(role, str(shm))
        assert journal.settled
    tap.open()
    receiver, _ = destination(
        *options, "--output", str(output), listen=address.removeprefix("tcp:")
    )
    source = file_source(shm, tap.address, options)
    complete(shm, source, receiver)
    assert percent(source.err) >= 10


def test_another_guest_replaces_partial_output(shm: Path) -> None:
    receiver, source, address = half_way(shm, "--retry", "20s")
    for program in (source, receiver):
        program.kill()
        program.wait()
    (shm / "second").write_bytes(b"another guest" * 100_000)
    options = ["--journal", str(shm), "--retry", "0"]
    receiver, address = destination(*options, "--output", str(shm / "output"))
    source = Program("migrate-src", *options, "--guest", f"file:{shm / 'second'}", address)
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0, receiver.err
    assert (shm / "output").read_bytes() == (shm / "second").read_bytes()
    assert [name for name in os.listdir(shm) if name.endswith(".xbmigrate")] == []


@pytest.mark.parametrize("side", ["source", "destination"])
def test_cancel_while_disconnected(shm: Path, side: str) -> None:
    receiver, source, _ = half_way(shm, "--retry", "30s")
    stopped, cancelled = (receiver, source) if side == "source" else (source, receiver)
    stopped.kill()
    stopped.wait()
    cancelled.read_line("connecting again|connection broke")
    cancelled.kill(signal.SIGTERM)
    assert cancelled.wait() == 143
    if side == "destination":
        assert [name for name in os.listdir(shm) if name.endswith(".xbmigrate")] == []


def test_prepared_guest_with_resumed_source_is_not_started(shm: Path) -> None:
    """READY was lost and the destination was killed. The next program finds a prepared guest, while
    the source, whose guest has run on, asks to resume."""
    memory, output = shm / "memory", shm / "output"
    memory.write_bytes(random.Random(24).randbytes(4 << 20))
    options = ["--journal", str(shm), "--retry", "20s"]
    receiver, address = destination(*options, "--output", str(output))
    tap = Tap(address, of_kind(MessageType.READY))

    def kill() -> None:
        receiver.kill()
        raise OSError("cut")

    tap.act = kill
    source = Program("migrate-src", *options, "--guest", f"file:{memory}", tap.address)
    receiver.wait()
    [journal] = journals(Role.DESTINATION, str(shm))
    assert journal.claim is Claim.PREPARED
    receiver, _ = destination(
        *options, "--output", str(output), listen=address.removeprefix("tcp:")
    )
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0, receiver.err
    assert percent(source.err) == 100
    assert output.read_bytes() == memory.read_bytes()
    claims = {one.name: one.claim for one in journals(Role.DESTINATION, str(shm))}
    assert claims.pop(journal.name) is Claim.ABORTED
    assert list(claims.values()) == [Claim.OWNER]


def test_journal_of_an_attempt_is_found_by_its_guest(tmp_path: Path) -> None:
    here = str(tmp_path)
    facts = {"kind": "file", "path": "/dev/shm/db", "pids": [[1, "2"]]}
    journal = Journal(Role.SOURCE, b"\7" * 16, here)
    journal.begin(guest=facts, address="tcp:there:4444", description="db", peer="10.0.0.2:4444")
    assert not journal.settled
    with pytest.raises(MigrationError, match="in use by another program"):
        find_attempt(facts, "tcp:there:4444", here)
    journal.close(keep=True)
    assert find_attempt({**facts, "path": "/dev/shm/other"}, "tcp:there:4444", here) is None
    assert last_peer("tcp:there:4444", here) == "10.0.0.2:4444"
    assert last_peer("tcp:elsewhere:4444", here) == last_peer("tcp:there:4444", "") == ""
    found = find_attempt({**facts, "pids": []}, "tcp:there:4444", here)
    assert found is not None
    assert found.token == journal.token
    assert found.settled
    found.close(keep=True)
    assert find_attempt(facts, "tcp:elsewhere:4444", here) is None
    assert find_attempt(facts, "tcp:there:4444", here) is None, "it went another way since"


def test_moved_guest_is_neither_migrated_nor_resumed(shm: Path) -> None:
    """Neither an older journal nor another migration may resume its stopped writer."""
    (shm / "memory").write_bytes(random.Random(24).randbytes(4 << 20))
    options = ["--journal", str(shm)]
    with subprocess.Popen(["sleep", "100"]) as writer:
        try:
            guest = ["--guest", f"file:{shm / 'memory'}", "--pid", str(writer.pid)]
            stale = Journal(Role.SOURCE, b"\7" * 16, str(shm))
            facts = {"kind": "file", "path": str(shm / "memory"), "pids": [], "resume_cmd": ""}
            stale.begin(guest=facts, address="tcp:127.0.0.1:9", description="db")
            receiver, address = destination(*options, "--output", str(shm / "output"))
            rival = Program("migrate-src", *options, *guest, address)
            assert rival.wait() == 1
            assert "in use by another program" in rival.err
            stale.close(keep=True)
            source = Program("migrate-src", *options, *guest, address)
            assert source.wait() == 0, source.err
            assert receiver.wait() == 0, receiver.err
            resolve = Program("migrate-src", "resolve", *options)
            assert resolve.wait() == 0
            assert "nothing to settle" in resolve.out
            receiver, address = destination(*options, "--output", str(shm / "output2"))
            again = Program("migrate-src", *options, *guest, address)
            assert again.wait() == 2
            assert "its writer here has been stopped since" in again.err
            receiver.kill()
            receiver.wait()
            state = Path(f"/proc/{writer.pid}/stat").read_text().rpartition(")")[2].split()[0]
            assert state == "T"
        finally:
            writer.kill()


@pytest.mark.asyncio
async def test_reconnect_while_destination_is_busy_is_accepted(monkeypatch):
    """It may be hashing, or waiting for its disk. It continues with the newest connection."""
    real, busy = Digest.settle, threading.Event()

    def slow(digest):
        busy.wait(10)
        return real(digest)

    async with hand_source() as (come, _):
        _, first = await come()
        monkeypatch.setattr(Digest, "settle", slow)
        _, second = await come(first.token)
        coming = [asyncio.create_task(come(second.token)) for _ in range(2)]
        await asyncio.sleep(0.3)
        busy.set()
        done, waiting = await asyncio.wait(coming, timeout=5)
        answers = [one.result()[1] for one in done if one.exception() is None]
        assert any(isinstance(one, Accept) and one.held for one in answers)
        assert not any(isinstance(one, Error) for one in answers)
        for one in waiting:
            one.cancel()


def test_guest_with_unresolved_handover_is_not_migrated_again(tmp_path) -> None:
    here, facts = str(tmp_path), {"kind": "file", "path": "/dev/shm/db", "pids": []}
    journal = Journal(Role.SOURCE, b"\7" * 16, here)
    journal.begin(guest=facts, address="tcp:there:4444", description="db")
    journal.move(Event.READY)
    journal.close()
    with pytest.raises(UsageError, match="not known whether it runs there"):
        find_attempt(facts, "tcp:elsewhere:4444", here)
    journal.move(Event.NOT_STARTED)
    journal.close()
    assert find_attempt(facts, "tcp:elsewhere:4444", here) is None
