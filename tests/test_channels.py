"""Further channels, each end against one that is driven by hand: what is refused, and what holds.

The other end here speaks with links and the kernel alone, step by step, so that it can do what no
honest peer does.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import pytest
import xxhash

import migrate
from migrate import destination as destination_module
from migrate import migration as migration_module
from migrate.address import Address
from migrate.destination import Destination, NoPlaceError
from migrate.dialing import connect
from migrate.errors import (
    CancelledByPeer,
    MismatchError,
    NotStartedError,
    PeerError,
    PeerLost,
    UsageError,
)
from migrate.guests.buffer import BufferPlace
from migrate.link import SEND_HIGH, Link
from migrate.listening import Listener, listen
from migrate.source import Source
from proto import ErrorCode, RemoteError, capabilities
from proto.errors import FrameError, MessageError
from proto.frames import HEADER_BYTES, seal
from proto.kernel import PageDecoder, PageEncoder, PageHashes
from proto.messages import (
    BATCH_BYTES,
    Accept,
    CacheSize,
    Complete,
    Error,
    Go,
    GuestInfo,
    Hello,
    Join,
    Joined,
    MessageType,
    Ready,
    Round,
    RoundAck,
    Running,
    unpack,
)
from proto.pageset import PageSet

PAGE = 4096
# A source of ours by hand deals out stripes of so many pages.
WIDTH = 256
SIZE = 4 * WIDTH * PAGE + 5
PAGES = 4 * WIDTH + 1
CONTENT = random.Random(7).randbytes(SIZE) + bytes(PAGES * PAGE - SIZE)
SEED = bytes(range(16))


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.005)


class Place(BufferPlace):
    discarded = False

    async def discard(self) -> None:
        self.discarded = True


class HandSource:
    """A source that does what a test says, towards a Destination that runs."""

    def __init__(self, listener: Listener, near: Link, far: Link, accepts: bool) -> None:
        self.listener = listener
        self.links = [near]
        self.places: list[Place] = []
        self.token = b""
        accept = listener.accept if accepts else None
        self.destination = Destination(far, self._placer, accept=accept)
        self.running = asyncio.create_task(self.destination.run())
        hashes = PageHashes(PAGES, PAGE, SEED)
        self.hashes = hashes
        self.encoder = PageEncoder(hashes, headroom=HEADER_BYTES, room=BATCH_BYTES)

    def _placer(self, info: GuestInfo) -> Place:
        self.places.append(Place(info))
        return self.places[-1]

    async def describe(self, channels: int) -> None:
        main = self.links[0]
        await main.send(capabilities.offer(capabilities.OPTIONAL))
        assert isinstance(await main.receive_message(), Hello)
        await main.send(GuestInfo("buffer", SIZE, PAGE, SEED, channels))
        answer = await main.receive_message()
        assert isinstance(answer, Accept), answer
        self.token = answer.token

    async def knock(self, message: Any) -> tuple[Link, Any]:
        """What a new connection with this first message is answered."""
        lane = await connect(self.listener.address)
        await lane.send(message)
        if isinstance(message, Join):
            lane.session.channel = message.channel
        return lane, await lane.receive_message()

    async def join(self, channel: int) -> None:
        lane, answer = await self.knock(Join(self.token, channel))
        assert answer == Joined()
        self.links.append(lane)

    def batch(self, number: int, pages: range, channel: int) -> tuple[memoryview, memoryview]:
        self.encoder.begin_round(number)
        page = pages.start
        while page < pages.stop:
            snapshot, numbers = self.encoder.space()
            count = min(len(numbers), pages.stop - page)
            for i in range(count):
                numbers[i] = page + i
            snapshot[: count * PAGE] = CONTENT[page * PAGE : (page + count) * PAGE]
            self.encoder.feed(count, PageSet.full(PAGES).bits)
            page += count
        head, data = self.encoder.take()
        seal(head, MessageType.PAGES, channel, len(data))
        return head, data

    async def send_pages(self, number: int = 1, to: int | None = None) -> None:
        """All pages, each over its channel, or a stripe over the channel that is named."""
        step = WIDTH // 8  # many channels take short batches
        start, stop = (0, PAGES) if to is None else (to * WIDTH, min((to + 1) * WIDTH, PAGES))
        for first in range(start, stop, step):
            pages = range(first, min(first + step, PAGES))
            channel = first // WIDTH % len(self.links) if to is None else to
            await self.links[channel].send_batch(*self.batch(number, pages, channel))

    async def end_round(self, number: int, last: bool = False) -> None:
        for lane in reversed(self.links):
            await lane.send(Round(number, 0, 0, last))

    async def complete(self) -> None:
        """The rest of a migration that nothing has disturbed."""
        main = self.links[0]
        await self.send_pages()
        await self.end_round(1)
        ack = await main.receive_message()
        assert isinstance(ack, RoundAck)
        assert (ack.number, ack.stale_pages) == (1, 0)
        await self.end_round(2, last=True)
        await main.send(Complete(xxhash.xxh3_128_digest(self.hashes.table), b""))
        assert isinstance(await main.receive_message(), RoundAck)
        assert isinstance(await main.receive_message(), Ready)
        await main.send(Go())
        assert await main.receive_message() == Running()
        await self.running
        assert bytes(self.places[0].received) == CONTENT[:SIZE]

    async def refused(self, kind: type[Exception], match: str, exit_code: int = 4) -> str:
        """The destination gives up, saying this to everybody, and keeps nothing."""
        with pytest.raises(migrate.MigrationError, match=match) as raised:
            await self.running
        assert isinstance(raised.value.__cause__ or raised.value, kind)
        assert raised.value.exit_code == exit_code
        assert self.places[0].discarded
        if kind is not PeerLost:
            for lane in self.links:
                with contextlib.suppress(PeerLost):
                    answer = await lane.receive_message()
                    while not isinstance(answer, Error):
                        answer = await lane.receive_message()
                    assert answer.reason == str(raised.value)
        return str(raised.value)


@contextlib.asynccontextmanager
async def hand_source(channels: int = 3, *, accepts: bool = True, describe: bool = True):
    async with asyncio.timeout(60):
        listener = await listen(Address("127.0.0.1", 0))
        near = await connect(listener.address)
        hand = HandSource(listener, near, await listener.accept(), accepts)
        try:
            if describe:
                await hand.describe(channels)
            yield hand
        finally:
            hand.running.cancel()
            await asyncio.wait([hand.running])
            for lane in hand.links:
                lane.abort()
                await lane.close()
            await listener.close()


# ---------------------------------------------------------------- joining


@pytest.mark.asyncio
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 64])
async def test_a_migration_by_hand_over_many_channels(channels):
    async with hand_source(channels) as hand:
        order = list(range(1, channels))
        random.Random(1).shuffle(order)
        for channel in order:
            await hand.join(channel)
        hand.links[1:] = sorted(hand.links[1:], key=lambda lane: lane.session.channel)
        await hand.complete()
        assert hand.destination.arrival.received >= SIZE


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("visitor", "says"),
    [
        (lambda hand: Join(bytes(16), 2), "no channel of the migration that goes on here"),
        (
            lambda hand: Join(hand.token[:-1] + bytes([hand.token[-1] ^ 1]), 2),
            "no channel of the migration",
        ),
        (lambda hand: Join(hand.token, 1), "channel 1 is not to be had"),
        (lambda hand: Join(hand.token, 3), "channel 3 is not to be had"),
        (lambda hand: Join(hand.token, 63), "channel 63 is not to be had"),
        (lambda hand: Hello(1, ("page-hash-nh",), ()), "no channel of the migration"),
    ],
    ids=["another-token", "nearly-the-token", "taken", "one-too-many", "far-too-many", "hello"],
)
async def test_who_is_no_channel_is_told_so_and_the_migration_completes(visitor, says):
    async with hand_source(3) as hand:
        await hand.join(1)
        stranger, answer = await hand.knock(visitor(hand))
        assert answer.code is ErrorCode.PROTOCOL
        assert says in answer.reason
        with pytest.raises(PeerLost):
            await stranger.receive_message()
        await stranger.close()
        await hand.join(2)
        await hand.complete()


@pytest.mark.asyncio
async def test_strangers_that_say_nothing_or_nonsense_do_not_keep_channels_out():
    async with hand_source(3) as hand:
        writers = []
        for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"XBM1"):
            address = hand.listener.address
            _, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(words)
            writers.append(writer)
        await hand.join(1)
        await hand.join(2)
        await hand.complete()
        for writer in writers:
            writer.close()


@pytest.mark.asyncio
async def test_a_channel_that_asks_an_idle_destination_is_refused_and_the_next_source_is_not():
    async with hand_source(describe=False) as hand:
        await hand.links[0].send(Join(bytes(16), 1))
        answer = await hand.links[0].receive_message()
        assert isinstance(answer, Error)
        assert answer.code is ErrorCode.PROTOCOL
        assert "Join came where Hello was due" in answer.reason
        with pytest.raises(PeerError, match="Join came where Hello was due"):
            await hand.running
        assert not hand.destination.started
        assert hand.places == []


@pytest.mark.asyncio
async def test_a_destination_that_serves_one_connection_says_so_before_there_is_a_place():
    async with hand_source(accepts=False, describe=False) as hand:
        main = hand.links[0]
        await main.send(capabilities.offer(capabilities.OPTIONAL))
        await main.receive_message()
        await main.send(GuestInfo("buffer", SIZE, PAGE, SEED, 2))
        answer = await main.receive_message()
        assert isinstance(answer, Error)
        assert (answer.code, hand.places) == (ErrorCode.NO_PLACE, [])
        with pytest.raises(NoPlaceError, match="over one connection here"):
            await hand.running


@pytest.mark.asyncio
@pytest.mark.parametrize("came", [0, 1])
async def test_channels_that_never_come_are_waited_for_no_longer_than_that(came, monkeypatch):
    monkeypatch.setattr(destination_module, "HANDSHAKE_SECONDS", 0.5)
    async with hand_source(3) as hand:
        for channel in range(1, came + 1):
            await hand.join(channel)
        text = f"only {came} of 2 further channels came within 0.5 s"
        await hand.refused(migrate.MigrationError, text, exit_code=1)


@pytest.mark.asyncio
@pytest.mark.parametrize("politely", [True, False])
async def test_a_source_that_gives_up_while_channels_are_awaited_is_heard(politely):
    """At once, not when the time for them is up; and it is heard why."""
    async with hand_source(3) as hand:
        await hand.join(1)
        began = asyncio.get_running_loop().time()
        if politely:
            await hand.links[0].send(Error(ErrorCode.CANCELLED, "cancelled at the source"))
        await hand.links[0].close()
        if politely:
            await hand.refused(CancelledByPeer, "cancelled at the source", exit_code=8)
        else:
            await hand.refused(PeerLost, "closed the connection", exit_code=1)
        assert asyncio.get_running_loop().time() - began < 5


# ---------------------------------------------------------------- rounds on many channels


@contextlib.asynccontextmanager
async def three_channels():
    async with hand_source(3) as hand:
        await hand.join(1)
        await hand.join(2)
        yield hand


@pytest.mark.asyncio
async def test_a_round_is_confirmed_when_it_has_ended_on_every_channel():
    async with three_channels() as hand:
        await hand.send_pages()
        main = hand.links[0]
        heard = asyncio.create_task(main.receive_message())
        for lane in (main, hand.links[2], hand.links[1]):
            await asyncio.sleep(0.1)
            assert not heard.done()
            await lane.send(Round(1, PAGES, 0))
        ack = await heard
        assert isinstance(ack, RoundAck)
        assert ack.number == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("number", [2, 7])
async def test_a_batch_of_another_round_on_a_further_channel_is_refused(number):
    async with three_channels() as hand:
        await hand.send_pages(number, to=1)
        await hand.links[1].send(Round(1, 0, 0))
        await hand.refused(PeerError, f"a batch of round {number} came in round 1")


@pytest.mark.asyncio
async def test_a_batch_after_the_end_of_its_round_is_refused():
    async with three_channels() as hand:
        await hand.links[1].send(Round(1, 0, 0))
        await hand.send_pages(1, to=1)
        await hand.refused(PeerError, "a batch came after the end of round 1 on its channel")


@pytest.mark.asyncio
@pytest.mark.parametrize("numbers", [(2,), (1, 1), (1, 2), (1, 3)])
async def test_a_round_out_of_turn_on_a_further_channel_is_refused(numbers):
    """Skipped, ended twice, or ended before the one in progress was confirmed."""
    async with three_channels() as hand:
        for number in numbers:
            await hand.links[2].send(Round(number, 0, 0))
        await hand.refused(PeerError, f"channel 2: round {numbers[-1]} ended while 1 went on")


@pytest.mark.asyncio
@pytest.mark.parametrize("numbers", [(2,), (1, 2)])
async def test_a_round_out_of_turn_on_the_first_channel_is_refused(numbers):
    async with three_channels() as hand:
        await hand.send_pages()
        for number in numbers:
            await hand.links[0].send(Round(number, 0, 0))
        if numbers == (1, 2):
            # it still waits for the others to end round 1: nothing is confirmed out of turn
            await asyncio.sleep(0.2)
            assert not hand.running.done()
            await hand.links[1].send(Round(1, 0, 0))
            await hand.links[2].send(Round(1, 0, 0))
            assert isinstance(await hand.links[0].receive_message(), RoundAck)
            await asyncio.sleep(0.1)
            assert not hand.running.done()
            return
        await hand.refused(PeerError, "round 2 ended while 1 went on")


@pytest.mark.asyncio
async def test_a_message_that_a_further_channel_does_not_carry_is_refused():
    async with three_channels() as hand:
        lane = hand.links[1]
        lane._write_now(_frame(CacheSize(4096), 1))
        await hand.refused(MessageError, "the source sent CACHE_SIZE in state LANE")


def _frame(message: Any, channel: int) -> bytearray:
    from proto.messages import TYPE_OF, pack

    frame = pack(message, HEADER_BYTES)
    seal(frame, TYPE_OF[type(message)], channel)
    return frame


@pytest.mark.asyncio
@pytest.mark.parametrize("named", [0, 2, 5])
async def test_a_frame_that_names_another_channel_ends_the_migration(named):
    async with three_channels() as hand:
        hand.links[1]._write_now(_frame(Round(1, 0, 0), named))
        await hand.refused(FrameError, f"ROUND: channel {named} on the connection of 1")


@pytest.mark.asyncio
@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize("when", ["joined", "pages", "round"])
async def test_a_channel_that_breaks_ends_the_migration(cut, when):
    async with three_channels() as hand:
        if when != "joined":
            await hand.send_pages()
        if when == "round":
            await hand.end_round(1)
            assert isinstance(await hand.links[0].receive_message(), RoundAck)
        hand.links[cut].abort()
        await hand.refused(PeerLost, "closed the connection|broke", exit_code=1)


@pytest.mark.asyncio
@pytest.mark.parametrize("channel", [0, 1, 2])
async def test_the_reason_of_a_source_is_heard_on_whichever_channel_it_comes(channel):
    async with three_channels() as hand:
        await hand.send_pages()
        await hand.links[channel].send(Error(ErrorCode.CANCELLED, "cancelled at the source"))
        with pytest.raises(CancelledByPeer, match="cancelled at the source"):
            await hand.running
        assert hand.places[0].discarded


@pytest.mark.asyncio
@pytest.mark.parametrize("behind", [0, 1, 2])
async def test_the_reason_of_a_source_is_heard_however_late_a_channel_is(behind):
    """It says so on each and hangs up; what is still to be read on one of them hides nothing."""
    async with three_channels() as hand:
        for _ in range(3 if behind == 1 else 0):
            await hand.links[behind].send_batch(
                *hand.batch(1, range(WIDTH, WIDTH + WIDTH // 8), behind)
            )
        for lane in hand.links:
            await lane.give_reason(ErrorCode.CANCELLED, "cancelled at the source")
        for lane in hand.links:
            await lane.close()
        with pytest.raises(CancelledByPeer, match="cancelled at the source"):
            await hand.running
        assert hand.places[0].discarded


@pytest.mark.asyncio
async def test_a_page_that_never_came_over_any_channel_is_missed():
    async with three_channels() as hand:
        await hand.send_pages(to=1)
        await hand.end_round(1, last=True)
        await hand.links[0].send(Complete(bytes(16), b""))
        await hand.refused(MismatchError, f"only {WIDTH} of {PAGES} pages came", exit_code=6)


# ---------------------------------------------------------------- the source


class HandDestination:
    """A destination that does what a test says, towards a Source that runs."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.links: list[Link] = []
        self.memory = bytearray(PAGES * PAGE)
        self.info: GuestInfo | None = None
        self.seen: list[tuple[int, str, int]] = []
        self.capable = capabilities.OPTIONAL

    async def accept(self, capable: frozenset[str] | None = None) -> None:
        await self.accept_as(Accept(bytes(16)), capable)

    async def accept_as(self, answer: Accept, capable: frozenset[str] | None = None) -> None:
        capable = self.capable if capable is None else capable
        main = await self.listener.accept()
        self.links.append(main)
        hello = await main.receive_message()
        assert isinstance(hello, Hello)
        await main.send(capabilities.answer(hello, capable)[0])
        info = await main.receive_message()
        assert isinstance(info, GuestInfo)
        self.info = info
        self.decoder = PageDecoder(PageHashes(PAGES, PAGE, info.hash_seed), SIZE)
        await main.send(answer)

    async def admit(self) -> None:
        lane = await self.listener.accept()
        join = await lane.receive_message()
        assert isinstance(join, Join)
        assert (join.token, join.channel) == (bytes(16), len(self.links))
        lane.session.channel = join.channel
        self.links.append(lane)
        await lane.send(Joined())

    async def admit_all(self) -> None:
        assert self.info is not None
        while len(self.links) < self.info.channels:
            await self.admit()

    async def take_round(self, channel: int) -> Round:
        """Applies what comes on a channel up to the end of a round."""
        while True:
            frame = await self.links[channel].receive()
            if frame.type is MessageType.PAGES:
                number, _ = self.decoder.check(frame.head, len(frame.data))
                first = int.from_bytes(frame.head[4:12], "big")
                self.seen.append((channel, f"batch {number}", first))
                self.decoder.apply(frame.head, frame.data, self.memory)
                frame.release()
                continue
            message = unpack(frame.type, frame.head)
            frame.release()
            if isinstance(message, Round):
                self.seen.append((channel, "round", message.number))
                return message
            assert isinstance(message, CacheSize)

    async def take_rounds(self) -> Round:
        ended = await asyncio.gather(*map(self.take_round, range(len(self.links))))
        assert len(set(ended)) == 1, "every channel says the same of a round"
        return ended[0]

    async def acknowledge(self, number: int) -> None:
        await self.links[0].send(RoundAck(number, 0.0, 0.0, 0, 0))

    async def finish(self) -> Complete:
        while True:
            ended = await self.take_rounds()
            await self.acknowledge(ended.number)
            if ended.last:
                break
        complete = await self.links[0].receive_message()
        assert isinstance(complete, Complete)
        await self.links[0].send(Ready(0.0))
        assert await self.links[0].receive_message() == Go()
        return complete


@contextlib.asynccontextmanager
async def hand_destination(channels: int = 3, **options: Any):
    async with asyncio.timeout(60):
        listener = await listen(Address("127.0.0.1", 0))
        buffer = bytearray(CONTENT[:SIZE])
        guest = migrate.BufferGuest(buffer)
        near = await connect(listener.address)
        parameters = migrate.Parameters(channels=channels, **options)
        address = listener.address
        source = Source(guest, near, parameters, dial=lambda: connect(address))
        hand = HandDestination(listener)
        running = asyncio.create_task(source.run())
        try:
            yield hand, source, running
        finally:
            running.cancel()
            await asyncio.wait([running])
            for lane in hand.links:
                lane.abort()
                await lane.close()
            await listener.close()


async def assert_kept(source: Source) -> None:
    """The guest is the source's, and its writers get in."""
    assert not source.committed
    async with source.guest.writing():
        source.guest.memory.view[0] ^= 1


@pytest.mark.asyncio
@pytest.mark.parametrize("channels", [2, 3, 4, 7])
async def test_each_page_goes_over_one_channel_and_each_channel_has_its_share(channels):
    async with hand_destination(channels) as (hand, _, running):
        await hand.accept()
        assert hand.info.channels == channels
        await hand.admit_all()
        await hand.finish()
        await hand.links[0].send(Running())
        statistics = await running
        assert hand.memory == CONTENT
        batches = [(channel, first) for channel, what, first in hand.seen if what[0] == "b"]
        assert {channel for channel, _ in batches} == set(range(channels))
        assert len({first for _, first in batches}) == len(batches)
        assert statistics.channels == channels
        assert statistics.channel_bytes == sum(lane.received_bytes for lane in hand.links[1:])
        assert statistics.transferred == sum(lane.received_bytes for lane in hand.links)


@pytest.mark.asyncio
async def test_no_batch_of_the_next_round_is_sent_before_the_last_one_is_confirmed():
    async with hand_destination(3, limits=migrate.Limits(downtime_limit=1e-9)) as (hand, source, _):
        await hand.accept()
        await hand.admit_all()
        for number in range(1, 4):
            assert (await hand.take_rounds()).number == number
            async with source.guest.writing():
                source.guest.memory.view[:: 64 * PAGE] = bytes([number]) * (-(-SIZE // 64 // PAGE))
            waiting = [asyncio.create_task(lane.receive()) for lane in hand.links]
            await asyncio.sleep(0.1)
            assert not any(task.done() for task in waiting)
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
            await hand.acknowledge(number)
        batches = [what for _, what, _ in hand.seen if what.startswith("batch")]
        assert {"batch 1", "batch 2", "batch 3"} == set(batches)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Error(ErrorCode.PROTOCOL, "channel 1 is not to be had"), "channel 1 is not to be had"),
        (None, "does not answer within 0.5 s"),
        ("hang up", "closed the connection|broke"),
    ],
    ids=["refused", "silent", "gone"],
)
async def test_a_source_whose_channel_does_not_open_keeps_its_guest(answer, says, monkeypatch):
    monkeypatch.setattr(migration_module, "HANDSHAKE_SECONDS", 0.5)
    async with hand_destination(2) as (hand, source, running):
        await hand.accept()
        lane = await hand.listener.accept()
        hand.links.append(lane)
        await lane.receive_message()
        if isinstance(answer, Error):
            await lane.send(answer)
        elif answer:
            lane.abort()
        with pytest.raises(migrate.MigrationError, match=says):
            await running
        await assert_kept(source)


@pytest.mark.asyncio
async def test_several_channels_need_a_way_to_connect_again():
    async with hand_destination(2) as (hand, source, running):
        source.channels._dial = None
        await hand.accept()
        with pytest.raises(UsageError, match="a way to connect again"):
            await running
        answer = await hand.links[0].receive_message()
        assert isinstance(answer, Error)
        await assert_kept(source)


@pytest.mark.asyncio
@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize("rounds", [0, 1])
async def test_a_source_that_loses_a_channel_keeps_its_guest(cut, rounds):
    slow = migrate.Limits(downtime_limit=1e-9)
    async with hand_destination(3, limits=slow) as (hand, source, running):
        await hand.accept()
        await hand.admit_all()
        for number in range(1, rounds + 1):
            await hand.take_rounds()
            await hand.acknowledge(number)
        hand.links[cut].abort()
        with pytest.raises(PeerLost):
            await running
        await assert_kept(source)
        for lane in hand.links:
            await until(lambda lane=lane: lane._fault is not None)


@pytest.mark.asyncio
@pytest.mark.parametrize("channel", [0, 1, 2])
async def test_the_reason_of_a_destination_is_heard_on_whichever_channel_it_comes(channel):
    async with hand_destination(3) as (hand, source, running):
        await hand.accept()
        await hand.admit_all()
        await hand.links[channel].send(Error(ErrorCode.CANCELLED, "cancelled at the destination"))
        with pytest.raises(CancelledByPeer, match="cancelled at the destination"):
            await running
        await assert_kept(source)


@pytest.mark.asyncio
async def test_a_cancelled_source_says_so_on_every_channel():
    async with hand_destination(3) as (hand, source, running):
        await hand.accept()
        await hand.admit_all()
        await until(lambda: source.statistics.status == "active")
        running.cancel()
        for lane in hand.links:
            frame = await lane.receive()
            while frame.type is not MessageType.ERROR:
                frame.release()
                frame = await lane.receive()
            message = unpack(frame.type, frame.head)
            assert message == Error(ErrorCode.CANCELLED, "cancelled at the source")
            frame.release()
        with pytest.raises(asyncio.CancelledError):
            await running
        await assert_kept(source)


@pytest.mark.asyncio
async def test_a_destination_that_confirms_on_a_further_channel_is_refused():
    async with hand_destination(2) as (hand, source, running):
        await hand.accept()
        await hand.admit_all()
        await hand.take_rounds()
        hand.links[1]._write_now(_frame(RoundAck(1, 0.0, 0.0, 0, 0), 1))
        with pytest.raises(PeerError, match="the destination sent ROUND_ACK in state LANE") as info:
            await running
        assert isinstance(info.value.__cause__, RemoteError)
        await assert_kept(source)


@pytest.mark.asyncio
@pytest.mark.parametrize("gone", ["go", "running"])
async def test_further_channels_mean_nothing_once_the_guest_is_handed_over(gone):
    """Their end may be seen before RUNNING is, since it comes another way."""
    async with hand_destination(3) as (hand, source, running):
        await hand.accept()
        await hand.admit_all()
        await hand.finish()
        if gone == "running":
            await hand.links[0].send(Running())
        for lane in hand.links[1:]:
            lane.abort()
        if gone == "go":
            await asyncio.sleep(0.2)
            assert not running.done()
            await hand.links[0].send(Running())
        assert (await running).status == "completed"
        assert source.committed


@pytest.mark.asyncio
async def test_a_guest_that_was_not_started_comes_back_whichever_channel_says_so_first():
    """The destination says why on all channels: only the first one may end the hand-over."""
    async with hand_destination(3) as (hand, source, running):
        taken_back = asyncio.Event()

        async def take_back() -> None:
            await asyncio.sleep(0.1)
            taken_back.set()

        source.guest.take_back = take_back
        await hand.accept()
        await hand.admit_all()
        await hand.finish()
        for lane in reversed(hand.links):
            await lane.send(Error(ErrorCode.NOT_STARTED, "no"))
        with pytest.raises(NotStartedError):
            await running
        assert taken_back.is_set()
        await assert_kept(source)


@pytest.mark.asyncio
@pytest.mark.parametrize("channels", [1, 4])
async def test_what_waits_to_be_sent_is_bounded_over_all_channels(channels):
    """Nobody reads at the other end: the queues grow no further than their bounds."""
    async with hand_destination(channels) as (hand, source, running):
        source.guest = migrate.BufferGuest(bytearray(b"x") * (96 << 20))
        source._pages = (96 << 20) // PAGE
        await hand.accept()
        await hand.admit_all()

        def queued() -> list[int]:
            return [lane._transport.get_write_buffer_size() for lane in source.channels.links]

        await until(lambda: not any(lane._writable.is_set() for lane in source.channels.links))
        each = SEND_HIGH // channels + BATCH_BYTES // channels + 100
        before = 0
        while source.sent_bytes - before > 1000:  # the kernel takes some; then pings, nothing else
            before = source.sent_bytes
            await asyncio.sleep(0.5)
            assert max(queued()) <= each
            assert sum(queued()) <= channels * each
        assert source.sent_bytes < 64 << 20
        running.cancel()
