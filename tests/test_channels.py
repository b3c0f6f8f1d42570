"""Further channels: each end of a migration against a peer that the test plays step by step.

The peer uses links and the kernel alone (tests/by_hand.py), so that it can do what no honest one
does.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import pytest

import migrate
from migrate.destination import channels as channels_module
from migrate.destination.destination import Destination
from migrate.destination.greeting import NoPlaceError
from migrate.errors import (
    CancelledByPeer,
    MismatchError,
    NotConvergedError,
    NotStartedError,
    PeerError,
    PeerLost,
    UsageError,
)
from migrate.source import attempt as attempt_module
from migrate.transport.link import SEND_HIGH
from proto import ErrorCode, RemoteError
from proto.wire import capabilities
from proto.wire.errors import FrameError, MessageError
from proto.wire.frames import HEADER_BYTES, seal
from proto.wire.messages import (
    BATCH_BYTES,
    CacheSize,
    Complete,
    Error,
    Go,
    GuestInfo,
    Hello,
    Join,
    MessageType,
    Round,
    RoundAck,
    Running,
    unpack,
)
from proto.wire.session import State
from tests.by_hand import (
    CONTENT,
    PAGE,
    PAGES,
    SEED,
    SIZE,
    WIDTH,
    assert_kept,
    hand_destination,
    hand_source,
    until,
)

# ---------------------------------------------------------------- joining


@pytest.mark.exhaustive
@pytest.mark.asyncio
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 64])
async def test_migration_over_many_channels(channels):
    async with hand_source(channels) as hand:
        order = list(range(1, channels))
        random.Random(1).shuffle(order)
        for channel in order:
            await hand.join(channel)
        hand.links[1:] = sorted(hand.links[1:], key=lambda link: link.session.channel)
        await hand.complete()
        assert hand.destinations[0].arrival.received >= SIZE


@pytest.mark.exhaustive
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
async def test_invalid_join_is_refused_and_migration_completes(visitor, says):
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
async def test_silent_or_malformed_connections_do_not_block_channels():
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
async def test_join_without_migration_is_refused_and_next_source_accepted():
    async with hand_source(describe=False) as hand:
        await hand.links[0].send(Join(bytes(16), 1))
        answer = await hand.links[0].receive_message()
        assert isinstance(answer, Error)
        assert answer.code is ErrorCode.PROTOCOL
        assert "unexpected Join; expected Hello" in answer.reason
        with pytest.raises(PeerError, match="unexpected Join; expected Hello"):
            await hand.running
        assert hand.places == hand.destinations == []


@pytest.mark.asyncio
async def test_single_connection_destination_refuses_channels_before_allocating():
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
async def test_wait_for_missing_channels_times_out(came, monkeypatch):
    monkeypatch.setattr(channels_module, "HANDSHAKE_SECONDS", 0.5)
    async with hand_source(3) as hand:
        for channel in range(1, came + 1):
            await hand.join(channel)
        text = f"only {came} of 2 further channels came within 0.5 s"
        await hand.refused(migrate.MigrationError, text, exit_code=1)


@pytest.mark.asyncio
@pytest.mark.parametrize("politely", [True, False])
async def test_source_abort_is_heard_while_awaiting_channels(politely):
    """The destination does not wait for the channels any longer, and reports the reason."""
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
async def test_round_is_acknowledged_after_it_ends_on_every_channel():
    async with three_channels() as hand:
        await hand.send_pages()
        main = hand.links[0]
        heard = asyncio.create_task(main.receive_message())
        for link in (main, hand.links[2], hand.links[1]):
            await asyncio.sleep(0.1)
            assert not heard.done()
            await link.send(Round(1, PAGES, 0))
        ack = await heard
        assert isinstance(ack, RoundAck)
        assert ack.number == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("number", [2, 7])
async def test_batch_of_another_round_is_refused(number):
    async with three_channels() as hand:
        await hand.send_pages(number, to=1)
        await hand.links[1].send(Round(1, 0, 0))
        await hand.refused(PeerError, f"a batch of round {number} came in round 1")


@pytest.mark.asyncio
async def test_batch_after_end_of_its_round_is_refused():
    async with three_channels() as hand:
        await hand.links[1].send(Round(1, 0, 0))
        await hand.send_pages(1, to=1)
        await hand.refused(PeerError, "a batch came after the end of round 1 on its channel")


@pytest.mark.asyncio
@pytest.mark.parametrize("numbers", [(2,), (1, 1), (1, 2), (1, 3)])
async def test_round_out_of_order_on_a_further_channel_is_refused(numbers):
    """Skipped, ended twice, or ended before the round in progress was acknowledged."""
    async with three_channels() as hand:
        for number in numbers:
            await hand.links[2].send(Round(number, 0, 0))
        await hand.refused(PeerError, f"channel 2: round {numbers[-1]} ended while 1 went on")


@pytest.mark.asyncio
@pytest.mark.parametrize("numbers", [(2,), (1, 2)])
async def test_round_out_of_order_on_the_first_channel_is_refused(numbers):
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
async def test_control_message_on_a_further_channel_is_refused():
    async with three_channels() as hand:
        link = hand.links[1]
        link._write_now(_frame(CacheSize(4096), 1))
        await hand.refused(MessageError, "the source sent CACHE_SIZE in state CHANNEL")


def _frame(message: Any, channel: int) -> bytearray:
    from proto.wire.messages import TYPE_OF, pack

    frame = pack(message, HEADER_BYTES)
    seal(frame, TYPE_OF[type(message)], channel)
    return frame


@pytest.mark.asyncio
@pytest.mark.parametrize("named", [0, 2, 5])
async def test_frame_with_wrong_channel_number_ends_the_migration(named):
    async with three_channels() as hand:
        hand.links[1]._write_now(_frame(Round(1, 0, 0), named))
        await hand.refused(FrameError, f"ROUND: channel {named} on the connection of 1")


@pytest.mark.asyncio
@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize("when", ["joined", "pages", "round"])
async def test_lost_channel_ends_the_attempt(cut, when):
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
async def test_source_error_is_heard_on_any_channel(channel):
    async with three_channels() as hand:
        await hand.send_pages()
        await hand.links[channel].send(Error(ErrorCode.CANCELLED, "cancelled at the source"))
        with pytest.raises(CancelledByPeer, match="cancelled at the source"):
            await hand.running
        assert hand.places[0].discarded


@pytest.mark.asyncio
@pytest.mark.parametrize("behind", [0, 1, 2])
async def test_source_error_is_heard_while_another_channel_is_behind(behind):
    """The source sends ERROR on each channel and hangs up. Unread data on one must not hide it."""
    async with three_channels() as hand:
        for _ in range(3 if behind == 1 else 0):
            await hand.links[behind].send_batch(
                *hand.batch(1, range(WIDTH, WIDTH + WIDTH // 8), behind)
            )
        for link in hand.links:
            await link.give_reason(ErrorCode.CANCELLED, "cancelled at the source")
        for link in hand.links:
            await link.close()
        with pytest.raises(CancelledByPeer, match="cancelled at the source"):
            await hand.running
        assert hand.places[0].discarded


@pytest.mark.asyncio
async def test_page_missing_on_all_channels_is_detected():
    async with three_channels() as hand:
        await hand.send_pages(to=1)
        await hand.end_round(1, last=True)
        await hand.links[0].send(Complete(bytes(16), b""))
        await hand.refused(MismatchError, f"only {WIDTH} of {PAGES} pages came", exit_code=6)


# ---------------------------------------------------------------- the source


@pytest.mark.asyncio
@pytest.mark.parametrize("channels", [2, 3, 4, 7])
async def test_pages_are_divided_among_channels(channels):
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
        assert statistics.channel_bytes == sum(link.received_bytes for link in hand.links[1:])
        assert statistics.transferred == sum(link.received_bytes for link in hand.links)


@pytest.mark.asyncio
async def test_next_round_is_not_sent_before_round_ack():
    async with hand_destination(3, limits=migrate.Limits(downtime_limit=1e-9)) as (hand, source, _):
        await hand.accept()
        await hand.admit_all()
        for number in range(1, 4):
            assert (await hand.take_rounds()).number == number
            async with source.guest.writing():
                source.guest.memory.view[:: 64 * PAGE] = bytes([number]) * (-(-SIZE // 64 // PAGE))
            waiting = [asyncio.create_task(link.receive()) for link in hand.links]
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
async def test_source_keeps_guest_when_a_channel_does_not_open(answer, says, monkeypatch):
    monkeypatch.setattr(attempt_module, "HANDSHAKE_SECONDS", 0.5)
    async with hand_destination(2) as (hand, source, running):
        await hand.accept()
        link = await hand.listener.accept()
        hand.links.append(link)
        await link.receive_message()
        if isinstance(answer, Error):
            await link.send(answer)
        elif answer:
            link.abort()
        with pytest.raises(migrate.MigrationError, match=says):
            await running
        await assert_kept(source)


@pytest.mark.asyncio
async def test_several_channels_without_dial_are_refused():
    async with hand_destination(2, dials=False) as (hand, source, running):
        await hand.accept()
        with pytest.raises(UsageError, match="a way to connect again"):
            await running
        answer = await hand.links[0].receive_message()
        assert isinstance(answer, Error)
        await assert_kept(source)


@pytest.mark.asyncio
@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize("rounds", [0, 1])
async def test_source_keeps_guest_when_a_channel_is_lost(cut, rounds):
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
        for link in hand.links:
            await until(lambda link=link: link._fault is not None)


@pytest.mark.asyncio
@pytest.mark.parametrize("channel", [0, 1, 2])
async def test_destination_error_is_heard_on_any_channel(channel):
    async with hand_destination(3) as (hand, source, running):
        await hand.accept()
        await hand.admit_all()
        await hand.links[channel].send(Error(ErrorCode.CANCELLED, "cancelled at the destination"))
        with pytest.raises(CancelledByPeer, match="cancelled at the destination"):
            await running
        await assert_kept(source)


@pytest.mark.asyncio
async def test_cancelled_source_sends_error_on_every_channel():
    async with hand_destination(3) as (hand, source, running):
        await hand.accept()
        await hand.admit_all()
        await until(lambda: source.statistics.status == "active")
        running.cancel()
        for link in hand.links:
            frame = await link.receive()
            while frame.type is not MessageType.ERROR:
                frame.release()
                frame = await link.receive()
            message = unpack(frame.type, frame.head)
            assert message == Error(ErrorCode.CANCELLED, "cancelled at the source")
            frame.release()
        with pytest.raises(asyncio.CancelledError):
            await running
        await assert_kept(source)


@pytest.mark.asyncio
async def test_round_ack_on_a_further_channel_is_refused():
    async with hand_destination(2) as (hand, source, running):
        await hand.accept()
        await hand.admit_all()
        await hand.take_rounds()
        hand.links[1]._write_now(_frame(RoundAck(1, 0.0, 0.0, 0, 0), 1))
        with pytest.raises(
            PeerError, match="the destination sent ROUND_ACK in state CHANNEL"
        ) as info:
            await running
        assert isinstance(info.value.__cause__, RemoteError)
        await assert_kept(source)


@pytest.mark.asyncio
@pytest.mark.parametrize("gone", ["go", "running"])
async def test_channels_lost_after_handover_are_ignored(gone):
    """The end of a channel may be seen before RUNNING, which comes over another connection."""
    async with hand_destination(3) as (hand, source, running):
        await hand.accept()
        await hand.admit_all()
        await hand.finish()
        if gone == "running":
            await hand.links[0].send(Running())
        for link in hand.links[1:]:
            link.abort()
        if gone == "go":
            await asyncio.sleep(0.2)
            assert not running.done()
            await hand.links[0].send(Running())
        assert (await running).status == "completed"
        assert source.committed


@pytest.mark.asyncio
async def test_guest_that_was_not_started_is_returned_on_error_from_any_channel():
    """The destination sends ERROR on all channels; only the first one may end the hand-over."""
    async with hand_destination(3) as (hand, source, running):
        taken_back = asyncio.Event()

        async def reclaim() -> None:
            await asyncio.sleep(0.1)
            taken_back.set()

        source.guest.reclaim = reclaim
        await hand.accept()
        await hand.admit_all()
        await hand.finish()
        for link in reversed(hand.links):
            await link.send(Error(ErrorCode.NOT_STARTED, "no"))
        with pytest.raises(NotStartedError):
            await running
        assert taken_back.is_set()
        await assert_kept(source)


@pytest.mark.exhaustive
@pytest.mark.asyncio
@pytest.mark.parametrize("channels", [1, 4])
async def test_send_buffers_of_all_channels_are_bounded(channels):
    """The peer does not read: the queues stay within their bounds."""
    async with hand_destination(channels, content=b"x" * (96 << 20)) as (hand, source, running):
        await hand.accept()
        await hand.admit_all()

        def queued() -> list[int]:
            return [link._transport.get_write_buffer_size() for link in source.channels.links]

        await until(lambda: not any(link._writable.is_set() for link in source.channels.links))
        each = SEND_HIGH // channels + BATCH_BYTES // channels + 100
        before = 0
        while source.sent_bytes - before > 1000:  # the kernel takes some; then pings, nothing else
            before = source.sent_bytes
            await asyncio.sleep(0.5)
            assert max(queued()) <= each
            assert sum(queued()) <= channels * each
        assert source.sent_bytes < 64 << 20
        running.cancel()


@pytest.mark.asyncio
async def test_destination_that_never_confirms_a_round_is_given_up() -> None:
    """It answers PINGs, so it is not lost; --timeout holds all the same."""
    async with hand_destination(1, limits=migrate.Limits(timeout=1.0)) as (hand, source, running):
        await hand.accept()
        await hand.links[0].receive_message()
        await hand.take_round(0)
        with pytest.raises(NotConvergedError, match="--timeout"):
            await running
        await assert_kept(source)


@pytest.mark.asyncio
async def test_cancellation_while_a_peer_is_refused_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail, failing = Destination._fail, asyncio.Event()

    async def slowly(self: Destination, error: BaseException) -> BaseException | None:
        failing.set()
        await asyncio.sleep(0.1)
        return await fail(self, error)

    monkeypatch.setattr(Destination, "_fail", slowly)
    async with hand_source(1) as hand:
        main = hand.links[0]
        main.session.state = State.PREPARED  # or it would not let us say GO
        await main.send(Go())
        await failing.wait()
        hand.running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hand.running
