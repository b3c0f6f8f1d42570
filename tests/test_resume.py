"""A connection that breaks, or a program that dies, before the guest is handed over.

What holds however often that happens: the guest runs at the source meanwhile, what came is not sent
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
from hypothesis import given, settings
from hypothesis import strategies as st

import migrate
from migrate import link
from migrate.address import Address
from migrate.dialing import connect
from migrate.errors import MigrationError, MismatchError, PeerError, PeerLost, UsageError
from migrate.journal import Journal, attempt, journals, last_peer, settled
from migrate.listening import listen
from migrate.migration import MAX_PAUSES
from migrate.reception import Pages
from proto import ErrorCode, capabilities
from proto.kernel import PageDecoder, PageHashes
from proto.messages import (
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
from proto.ownership import Claim, Event, Role
from tests.programs import Program, destination, end_guest, ended_or_given_up, guest_pid, look_at
from tests.tap import Tap, is_last_round, of_kind
from tests.test_channels import (
    CONTENT,
    PAGE,
    PAGES,
    SEED,
    SIZE,
    hand_destination,
)
from tests.test_pages import BOTH, Pair, counters, hashes_tell_the_content, touch
from tests.test_pages import SEED as KERNEL_SEED

GUEST = "demo:24m,hot=6m,stride=1024,fill=random"


# ---------------------------------------------------------------- the kernel


def break_off(pair: Pair) -> None:
    """What both ends do after a break: the destination says what it holds."""
    size = pair.size
    pair.decoder.hold(0, pair.encoder.pages, False)
    for page in range(pair.encoder.pages):
        if pair.there.stale[page >> 3] >> (page & 7) & 1:
            content = pair.memory[page * size : (page + 1) * size]
            pair.there.note_pages(array("Q", [page]), 1, content)
    pair.decoder.end_round()
    half = pair.encoder.pages // 2
    pair.encoder.adopt(0, pair.there.table[: 8 * half])
    pair.encoder.adopt(half, pair.there.table[8 * half :])


@given(
    seed=st.integers(0, 2**32),
    cache=st.sampled_from([0, 4, 64]),
    room=st.sampled_from([2000, 5000, 1 << 20]),
    merge=st.booleans(),
)
@settings(max_examples=150)
def test_batches_that_are_lost_are_made_good(seed, cache, room, merge):
    """Any batches of a round are lost, with one half made; a scan finds just what is missing."""
    noise, count, size = random.Random(seed), 20, 1024
    pairs = [Pair(each, pages=count, cache=cache, room=room, merge=merge) for each in BOTH]
    memory = {page: bytes(size) for page in range(count)}
    touched = list(memory)
    for now in range(1, 9):
        broken, kept = now % 2 == 0, noise.randint(0, 3)
        sent = []
        for pair in pairs:
            pair.encoder.begin_round(now)
            got = iter(range(kept)) if broken else iter(range(1000))
            receive = pair.receive

            def lossy(records, data, receive=receive, got=got):
                if next(got, None) is not None:
                    receive(records, data)

            pair.receive = lossy
            sent.append(pair.send({page: memory[page] for page in touched}))
            pair.receive = receive
        assert sent[0] == sent[1]
        if not broken:
            for page, content in memory.items():
                assert pairs[0].page(page) == content
        touched = touch(noise, memory, size)
        if not broken:
            continue
        whole = b"".join(memory[page] for page in range(count))
        found = []
        for pair in pairs:
            if touched:  # a batch that is half made when the connection breaks
                pair.encoder.begin_round(now)
                snapshot, numbers = pair.encoder.space()
                numbers[0] = touched[0]
                snapshot[:size] = memory[touched[0]]
                pair.encoder.feed(1, bytes(8))
            break_off(pair)
            assert not pair.encoder.pending
            changed = bytearray(8)
            pair.encoder.scan(0, count, whole, changed)
            found.append(bytes(changed))
        differ = [page for page in memory if pairs[0].page(page) != memory[page]]
        touched = [page for page in range(count) if found[0][page >> 3] >> (page & 7) & 1]
        assert found[0] == found[1]
        assert touched == differ
        assert counters(pairs[0].encoder) == counters(pairs[1].encoder)
        assert pairs[0].memory == pairs[1].memory
        if cache:
            for page in memory:
                kept_page = pairs[0].cache.get(page)
                assert kept_page == pairs[1].cache.get(page)
                assert kept_page in (None, pairs[0].page(page))
        hashes_tell_the_content(pairs)


@pytest.mark.parametrize("kernel", BOTH)
def test_a_source_forgets_a_destination_that_has_nothing(kernel):
    pair = Pair(kernel, pages=8, cache=4)
    pair.encoder.begin_round(1)
    contents = {page: bytes([page]) * pair.size for page in range(8)}
    first = pair.send(contents)
    pair.encoder.forget()
    assert len(pair.cache) == 0
    assert pair.hashes.table == kernel.PageHashes(8, pair.size, KERNEL_SEED).table
    pair.encoder.begin_round(2)
    again = pair.send(contents)
    assert [head[4:] for head, _ in again] == [head[4:] for head, _ in first]


@pytest.mark.parametrize("kernel", BOTH)
def test_hashes_outside_the_guest_are_refused(kernel):
    pair = Pair(kernel, pages=8)
    for first, hashes in [(0, bytes(72)), (8, bytes(8)), (1 << 62, bytes(8)), (0, bytes(7))]:
        with pytest.raises(ValueError, match="bytes of hashes from page"):
            pair.encoder.adopt(first, hashes)
    with pytest.raises(ValueError, match="outside the guest"):
        pair.decoder.hold(7, 2, True)


# ---------------------------------------------------------------- a destination by hand


async def again(hand: Any, held: bool = True) -> GuestInfo:
    """The source comes back, and is told that its pages are here."""
    del hand.links[:]
    old = hand.memory
    await hand.accept_as(Accept(b"\1" * 16, held))
    hand.memory = old
    hand.decoder.hold(0, PAGES, True)
    return hand.info


async def begin(hand: Any) -> None:
    await hand.accept()
    await hand.links[0].receive_message()
    hand.links[0].abort()


def truth(seed: bytes, memory: bytes) -> PageHashes:
    hashes = PageHashes(PAGES, PAGE, seed)
    hashes.note_pages(array("Q", range(PAGES)), PAGES, memory)
    return hashes


@contextlib.asynccontextmanager
async def broken_off(capable: frozenset[str] = capabilities.OPTIONAL, **options: Any):
    """A source whose connection has broken once, and that has come back."""
    async with hand_destination(1, **options) as (hand, source, running):
        source._retry = 20.0
        hand.capable = capable
        await begin(hand)
        info = await again(hand)
        assert info.resume == bytes(16)
        yield hand, source, running, info


@pytest.mark.asyncio
@pytest.mark.parametrize("wrong", [[], [3], [0, 700, PAGES - 1]])
async def test_only_what_differs_is_sent_again(wrong):
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
async def test_what_held_leaves_out_is_zeros(filled):
    """The destination has only some pages; it says so, and that the last one is there or zeros."""
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
        ([Held(5, bytes(16)), Held(6, bytes(8))], "HELD began at page 6 while 7 was due"),
        ([Held(PAGES, bytes(8))], f"HELD goes beyond the {PAGES} pages"),
        ([Held((1 << 32) - 1, bytes(8))], f"HELD goes beyond the {PAGES} pages"),
        ([Held(3, bytes(8)), Held(PAGES - 1, bytes(16))], "HELD goes beyond"),
    ],
)
async def test_what_is_left_out_in_disorder_is_refused(said, why):
    async with broken_off(capable=SPARSE) as (hand, _, running, _info):
        for one in said:
            await hand.links[0].send(one)
        with pytest.raises(PeerError, match=why):
            await running


@pytest.mark.asyncio
async def test_a_destination_that_lies_about_what_it_holds_is_found_out():
    """It says that page 5 is what it is not: the digest at the end is of the guest's own memory."""
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
        ([Held(1, bytes(8))], "HELD began at page 1 while 0 was due"),
        ([Held(0, bytes(16)), Held(1, bytes(16))], "HELD began at page 1 while 2 was due"),
        ([Held(0, bytes(8 * PAGES + 8))], f"HELD goes beyond the {PAGES} pages"),
        ([Held(0, bytes(8 * (PAGES - 1))), Held(PAGES - 1, bytes(16))], "HELD goes beyond"),
    ],
)
async def test_what_is_said_out_of_order_is_refused(said, why):
    async with broken_off() as (hand, _, running, _info):
        for one in said:
            await hand.links[0].send(one)
        with pytest.raises(PeerError, match=why):
            await running


@pytest.mark.asyncio
async def test_pages_that_nobody_asked_for_are_refused():
    async with hand_destination(1) as (hand, _, running):
        await hand.accept_as(Accept(bytes(16), True))
        with pytest.raises(PeerError, match="nobody told it to keep"):
            await running


@pytest.mark.asyncio
async def test_a_destination_that_has_kept_nothing_gets_everything():
    async with hand_destination(1) as (hand, source, running):
        source._retry = 20.0
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
async def test_a_destination_with_other_capabilities_is_another_one():
    async with hand_destination(1) as (hand, source, running):
        source._retry = 20.0
        await begin(hand)
        del hand.links[:]
        await hand.accept(frozenset())
        with pytest.raises(MigrationError, match="other capabilities"):
            await running


@pytest.mark.asyncio
async def test_it_is_tried_again_no_longer_than_that(monkeypatch):
    async with hand_destination(1) as (hand, source, running):
        source._retry = 0.6
        await begin(hand)
        await hand.listener.close()
        began = time.monotonic()
        with pytest.raises(PeerLost, match=r"no other connection in 0\.6 s"):
            await running
        assert time.monotonic() - began >= 0.6


@pytest.mark.asyncio
async def test_who_accepts_and_hangs_up_each_time_is_not_tried_for_ever():
    """A proxy whose other end is dead."""
    async with hand_destination(1) as (hand, source, running):
        source._retry = 1.0
        await begin(hand)

        async def hang_up() -> None:
            while True:
                (await hand.listener.accept()).abort()

        hanging = asyncio.create_task(hang_up())
        with pytest.raises(PeerLost, match="no other connection in 1 s"):
            await running
        hanging.cancel()


async def greet_and_break(hand: Any, held: bool) -> None:
    """Lets the source in, and hangs up before any page is confirmed, each time."""
    while True:
        await again(hand, held)
        if held:
            await hand.links[0].send(Held(0, bytes(8 * PAGES)))
        assert isinstance(await hand.links[0].receive_message(), CacheSize)
        hand.links[0].abort()


@pytest.mark.asyncio
async def test_who_lets_us_in_and_confirms_nothing_is_not_tried_for_ever():
    async with hand_destination(1) as (hand, source, running):
        source._retry = 1.0
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
async def test_a_destination_that_loses_the_guest_each_time_is_given_up():
    """Its program dies again and again, whatever it has confirmed before."""

    async def acknowledge_and_die(hand: Any) -> None:
        while True:
            await again(hand, held=False)
            hand.memory[:] = bytes(len(hand.memory))
            hand.decoder = PageDecoder(PageHashes(PAGES, PAGE, hand.info.hash_seed), SIZE)
            await hand.acknowledge((await hand.take_rounds()).number)
            hand.links[0].abort()

    async with hand_destination(1) as (hand, source, running):
        source._retry = 20.0
        await begin(hand)
        dying = asyncio.create_task(acknowledge_and_die(hand))
        with pytest.raises(PeerLost, match="the destination has lost the guest 6 times"):
            await running
        dying.cancel()
        await asyncio.wait([dying])


@pytest.mark.asyncio
async def test_a_guest_is_not_paused_again_and_again():
    """The connection breaks in each pause: rounds between them are no excuse."""
    async with hand_destination(1) as (hand, source, running):
        source._retry = 20.0
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
async def test_a_source_comes_back_to_the_machine_that_has_the_pages():
    """The address is a name, of which another machine is asked where one connects anew."""
    async with hand_destination(1) as (hand, source, running):

        async def elsewhere() -> link.Link:
            raise AssertionError("another machine was asked")

        source._retry = 20.0
        source._dial = elsewhere
        here = hand.listener.address
        source.channels.link.beside = lambda: connect(here)
        await begin(hand)
        info = await again(hand)
        await hand.links[0].send(Held(0, bytes(truth(info.hash_seed, CONTENT).table)))
        hand.memory[:] = CONTENT
        await hand.finish()
        await hand.links[0].send(Running())
        await running


@pytest.mark.asyncio
async def test_a_machine_that_is_gone_is_looked_for_elsewhere_in_the_end():
    async with hand_destination(1) as (hand, source, running):
        other = await listen(Address("127.0.0.1", 0))
        gone, there = hand.listener, other.address
        source._retry = 2.0
        source._dial = lambda: connect(there)
        source.channels.link.beside = lambda: connect(gone.address)
        await begin(hand)
        port = gone.address
        await gone.close()
        source.channels.link.beside = lambda: connect(port)
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
async def test_a_source_that_comes_back_is_believed_before_the_old_connection(same_seed):
    """The old one is silent, and not known to be dead: the source knows better."""
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
async def test_a_guest_of_zeros_is_said_in_one_word_where_zeros_are_left_out():
    """Its last page, which ends it."""
    async with hand_source(SPARSE) as (come, _):
        _, accept = await come()
        new, answer = await come(accept.token, seed=bytes(16))
        assert answer.held
        said = await new.receive_message()
        assert said == Held(PAGES - 1, bytes(PageHashes(1, PAGE, bytes(16)).table))


@pytest.mark.asyncio
@pytest.mark.parametrize("sparse", [False, True])
async def test_what_is_held_is_told_with_zeros_and_without(sparse):
    pages, filled = 20_000, [*range(3, 9), 9000, 17_001, *range(18_000, 19_990)]
    hashes = PageHashes(pages, PAGE, SEED)
    content = bytes(range(256)) * (PAGE // 256)
    hashes.note_pages(array("Q", filled), len(filled), content * len(filled))
    said: list[Held] = []

    class Wire:
        async def send(self, message: Held) -> None:
            said.append(message)

    await Pages._say_what_is_held(cast("Any", None), cast("Any", Wire()), hashes, sparse=sparse)
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
async def test_the_name_before_the_last_one_holds_until_something_has_come():
    """ACCEPT may have been lost with the connection."""
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
async def test_nobody_else_gets_the_pages(what):
    async with hand_source() as (come, _):
        _, accept = await come()
        token = {"token": bytes(16), "size": accept.token, "no token": b""}[what]
        _, answer = await come(token, size=SIZE - PAGE * (what == "size"))
        assert isinstance(answer, Error)
        assert answer.code is ErrorCode.NO_PLACE


@pytest.mark.asyncio
async def test_a_source_that_does_not_come_back_is_waited_for_no_longer_than_that():
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
async def test_a_source_that_comes_back_and_brings_nothing_is_not_waited_for_for_ever():
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
async def test_a_source_that_may_not_have_heard_of_its_attempt_is_not_waited_for():
    """It cannot say its name: the next one is let in at once."""
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
def test_a_break_before_the_first_page_keeps_nobody_out(moment: MessageType) -> None:
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
@pytest.mark.parametrize(("channels", "cache"), [(1, 1 << 26), (3, 1 << 14)])
async def test_twenty_breaks_in_one_migration_end_in_equal_memory(channels, cache):
    """A Python program's array, written all the time, over connections that break at random."""
    chance = random.Random(20 + channels)
    memory = bytearray(chance.randbytes(64 << 20))
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
        while "pass" not in seen:  # who has never been there is not waited for
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
    """The demo guest runs at the destination, whole, and no more at the source."""
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0, receiver.err
    there = guest_pid(receiver.out)
    before, after, wrong = look_at(there, 0.2)
    end_guest(there)
    assert wrong == -1
    assert after > before
    assert ended_or_given_up(guest_pid(source.err))


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_break_before_the_commit_is_no_failure(moment: str) -> None:
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


def test_a_destination_that_was_started_again_with_nothing_gets_it_all_again() -> None:
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
    """A file of 24 MiB on its way to another, at 8 MiB/s, of which a third has come."""
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
    """Wait until a third of the 24 MiB is in the file that becomes the output."""
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
        assert settled(journal)


def test_a_file_goes_on_after_a_restart_of_the_destination(shm: Path) -> None:
    receiver, source, address = half_way(shm, "--retry", "20s")
    receiver.kill()
    receiver.wait()
    (shm / "memory").touch()
    options = ["--journal", str(shm), "--retry", "20s", "--output", str(shm / "output")]
    receiver, _ = destination(*options, listen=address.removeprefix("tcp:"))
    assert "half-way" in receiver.err
    complete(shm, source, receiver)
    assert percent(source.err) >= 10


def test_a_file_goes_on_after_a_restart_of_the_source(shm: Path) -> None:
    """It was killed while it was connected; and its file has changed since."""
    receiver, source, address = half_way(shm, "--retry", "20s")
    source.kill()
    source.wait()
    with open(shm / "memory", "r+b") as file:
        file.write(b"changed")
    source = file_source(shm, address, ["--journal", str(shm), "--retry", "20s"])
    complete(shm, source, receiver)
    assert 10 <= percent(source.err) < 100


def test_a_file_goes_on_after_both_have_given_up(shm: Path) -> None:
    """The network is down for longer than --retry: what came is kept for who tries again."""
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
        assert settled(journal)
    tap.open()
    receiver, _ = destination(
        *options, "--output", str(output), listen=address.removeprefix("tcp:")
    )
    source = file_source(shm, tap.address, options)
    complete(shm, source, receiver)
    assert percent(source.err) >= 10


def test_another_guest_for_the_output_replaces_what_came_half_way(shm: Path) -> None:
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
def test_cancelling_while_the_connection_is_down(shm: Path, side: str) -> None:
    receiver, source, _ = half_way(shm, "--retry", "30s")
    stopped, cancelled = (receiver, source) if side == "source" else (source, receiver)
    stopped.kill()
    stopped.wait()
    cancelled.read_line("connecting again|connection broke")
    cancelled.kill(signal.SIGTERM)
    assert cancelled.wait() == 143
    if side == "destination":
        assert [name for name in os.listdir(shm) if name.endswith(".xbmigrate")] == []


def test_a_whole_guest_whose_source_resumes_is_not_run_under_its_old_name(shm: Path) -> None:
    """READY was lost, and the destination was killed: prepared, the next program is asked to go on
    with it by a source that has let its guest run on."""
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


def test_the_journal_of_an_attempt_is_found_by_its_guest(tmp_path: Path) -> None:
    here = str(tmp_path)
    facts = {"kind": "file", "path": "/dev/shm/db", "pids": [[1, "2"]]}
    journal = Journal(Role.SOURCE, b"\7" * 16, here)
    journal.begin(guest=facts, address="tcp:there:4444", description="db", peer="10.0.0.2:4444")
    assert not settled(journal)
    with pytest.raises(MigrationError, match="in the hands of another program"):
        attempt(facts, "tcp:there:4444", here)
    journal.close(keep=True)
    assert attempt({**facts, "path": "/dev/shm/other"}, "tcp:there:4444", here) is None
    assert last_peer("tcp:there:4444", here) == "10.0.0.2:4444"
    assert last_peer("tcp:elsewhere:4444", here) == last_peer("tcp:there:4444", "") == ""
    found = attempt({**facts, "pids": []}, "tcp:there:4444", here)
    assert found is not None
    assert found.token == journal.token
    assert settled(found)
    found.close(keep=True)
    assert attempt(facts, "tcp:elsewhere:4444", here) is None
    assert attempt(facts, "tcp:there:4444", here) is None, "it went another way since"


def test_a_guest_that_was_moved_is_neither_moved_again_nor_woken(shm: Path) -> None:
    """Its writer is stopped: an older journal, and another migration, must not wake it."""
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
            assert "in the hands of another program" in rival.err
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
            assert "its writer here is stopped since" in again.err
            receiver.kill()
            receiver.wait()
            state = Path(f"/proc/{writer.pid}/stat").read_text().rpartition(")")[2].split()[0]
            assert state == "T"
        finally:
            writer.kill()


@pytest.mark.asyncio
async def test_a_source_that_comes_again_while_the_destination_is_busy_is_let_in(monkeypatch):
    """It hashes, or waits for its disk: the last one that came is the one to go on with."""
    real, busy = Pages._take_stock, threading.Event()

    def slow(self, info):
        busy.wait(10)
        return real(self, info)

    async with hand_source() as (come, _):
        _, first = await come()
        monkeypatch.setattr(Pages, "_take_stock", slow)
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


def test_a_guest_that_was_handed_over_is_not_moved_again_before_that_is_settled(tmp_path) -> None:
    here, facts = str(tmp_path), {"kind": "file", "path": "/dev/shm/db", "pids": []}
    journal = Journal(Role.SOURCE, b"\7" * 16, here)
    journal.begin(guest=facts, address="tcp:there:4444", description="db")
    journal.move(Event.READY)
    journal.close()
    with pytest.raises(UsageError, match="not known whether it runs there"):
        attempt(facts, "tcp:elsewhere:4444", here)
    journal.move(Event.NOT_STARTED)
    journal.close()
    assert attempt(facts, "tcp:elsewhere:4444", here) is None
