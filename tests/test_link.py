"""The connection: frames in order, bounded both ways, and what a peer can do to it."""

import asyncio
import contextlib
import itertools
import os
import socket
import stat
import weakref
from types import SimpleNamespace

import pytest

from migrate import link
from migrate.address import Address
from migrate.dialing import connect
from migrate.errors import ConnectError, PeerLost
from migrate.link import (
    EARLY_AHEAD_BYTES,
    MAX_ASIDE,
    RECEIVE_AHEAD,
    RECEIVE_AHEAD_BYTES,
    SEND_HIGH,
    Link,
    RateLimit,
)
from migrate.listening import MAX_WAITING, listen
from proto import LocalError, RemoteError, capabilities
from proto.frames import HEADER_BYTES, seal
from proto.kernel import PageEncoder, PageHashes
from proto.messages import (
    BATCH_BYTES,
    MAX_BODY,
    MAX_CONTROL,
    PROBE_BYTES,
    TYPE_OF,
    Accept,
    CacheSize,
    Error,
    ErrorCode,
    GuestInfo,
    Hello,
    Join,
    Joined,
    Message,
    MessageType,
    Ping,
    Pong,
    Probe,
    Round,
    pack,
)
from proto.pageset import PageSet
from proto.session import Role

LOCAL = Address("127.0.0.1", 0)
MIB = 1 << 20


@contextlib.asynccontextmanager
async def pair(address=LOCAL, **options):
    """A source's and a destination's link, joined; no test may hang."""
    async with asyncio.timeout(60):
        listener = await listen(address, **options)
        source = await connect(listener.address, timeout=10, **options)
        destination = await listener.accept()
        try:
            yield source, destination
        finally:
            source.abort()
            await source.close()
            await destination.close()
            await listener.close()


TOKEN = bytes(range(16))


async def greet(source: Link, destination: Link) -> None:
    """Brings both sides to where pages may be sent."""
    hello = capabilities.offer(frozenset({"xbzrle"}))
    await source.send(hello)
    assert await destination.receive_message() == hello
    answer, _ = capabilities.answer(hello, frozenset({"xbzrle"}))
    await destination.send(answer)
    assert await source.receive_message() == answer
    await source.send(GuestInfo("demo", 64 * MIB, 4096, bytes(16)))
    assert isinstance(await destination.receive_message(), GuestInfo)
    await destination.send(Accept(TOKEN))
    assert await source.receive_message() == Accept(TOKEN)


def batch(data: bytes, channel: int = 0) -> tuple[memoryview, memoryview]:
    """A batch of which nothing but its data is looked at here."""
    frame = bytearray(HEADER_BYTES) + b"records"
    seal(frame, MessageType.PAGES, channel, len(data))
    return memoryview(frame), memoryview(data)


def framed(message: Message) -> bytearray:
    kind = TYPE_OF[type(message)]
    frame = pack(message, HEADER_BYTES)
    seal(frame, kind)
    return frame


@contextlib.asynccontextmanager
async def raw_peer():
    """A link of a source to a bare server: what the test writes is what the link hears."""
    came: asyncio.Queue = asyncio.Queue()

    async def serve(reader, writer):
        await came.put((reader, writer))

    async with asyncio.timeout(60):
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        address = Address(*server.sockets[0].getsockname()[:2])
        source = await connect(address, peer_timeout=20)
        reader, writer = await came.get()
        try:
            yield source, reader, writer
        finally:
            source.abort()
            await source.close()
            writer.transport.abort()
            server.close()


async def until(condition, busy: asyncio.Task | None = None) -> None:
    """Waits for what must come true, while a task that brings it about goes on."""
    while not condition():
        if busy is not None and busy.done():
            await busy
            raise AssertionError(
                "it came to its end, and what it should bring about did not happen"
            )
        await asyncio.sleep(0.005)


def blocked(source: Link) -> bool:
    """Whether the queue is so full that the sender waits."""
    return not source._writable.is_set()


# ---------------------------------------------------------------- frames


@pytest.mark.asyncio
async def test_messages_and_batches_arrive_whole_and_in_order(tmp_path):
    for address in (LOCAL, Address(path=str(tmp_path / "socket"))):
        async with pair(address) as (source, destination):
            await greet(source, destination)
            sizes = [0, 1, 100, MIB, 70_000, MAX_BODY - 7, 3] * 4

            async def send(source=source, sizes=sizes):
                for number, size in enumerate(sizes, 1):
                    await source.send_batch(*batch(bytes([number]) * size))
                    await source.send(Round(number, size, 0))

            sender = asyncio.create_task(send())
            for number, size in enumerate(sizes, 1):
                frame = await destination.receive()
                assert frame.type is MessageType.PAGES
                assert frame.head == b"records"
                assert frame.data == bytes([number]) * size
                frame.release()
                assert await destination.receive_message() == Round(number, size, 0)
            await sender
            assert source.sent_bytes == destination.received_bytes
            assert destination.sent_bytes == source.received_bytes


@pytest.mark.asyncio
async def test_a_message_out_of_turn_is_ours_to_see_before_it_is_sent():
    async with pair() as (source, _):
        with pytest.raises(LocalError, match="PAGES cannot be sent in state START"):
            await source.send_batch(*batch(b""))
        with pytest.raises(LocalError, match="ROUND cannot be sent in state START"):
            await source.send(Round(1, 0, 0))
        assert source.sent_bytes == 0


@pytest.mark.asyncio
async def test_an_encoded_batch_is_private_memory_until_the_transport_is_done_with_it():
    """Live memory changes, and new batches are made, while old ones wait in a queue.

    A transport keeps a reference to what it is given. The receiver reads nothing until the queue
    is full, so that most of it is still in this process while the next batches are encoded.
    """
    pages = 200
    async with pair() as (source, destination):
        await greet(source, destination)
        encoder = PageEncoder(PageHashes(pages, 4096, bytes(16)), headroom=HEADER_BYTES)
        everything = PageSet.full(pages).bits
        sent = []

        async def send():
            for number in range(1, 41):
                encoder.begin_round(number)
                done = 0
                while done < pages:
                    snapshot, numbers = encoder.space()
                    count = min(len(numbers), pages - done)
                    for i in range(count):
                        numbers[i] = done + i
                    snapshot[: count * 4096] = bytes([number, 7]) * (count * 2048)
                    encoder.feed(count, everything)
                    done += count
                head, data = encoder.take()
                seal(head, MessageType.PAGES, 0, len(data))
                sent.append((bytes(head[HEADER_BYTES:]), bytes(data)))
                assert len(data) == pages * 4096
                await source.send_batch(head, data)
                del head, data

        sender = asyncio.create_task(send())
        await until(lambda: blocked(source), sender)
        for number in range(40):
            frame = await destination.receive()
            assert (bytes(frame.head), bytes(frame.data)) == sent[number]
            assert frame.data == bytes([number + 1, 7]) * (pages * 2048)
            frame.release()
        await sender


# ---------------------------------------------------------------- back-pressure


@pytest.mark.asyncio
async def test_a_lost_connection_gives_its_memory_back_though_the_link_is_kept():
    async with pair() as (source, destination):
        await source.send(capabilities.offer(frozenset()))
        await destination.receive_message()
        arena = weakref.ref(destination.session.reader._arena)
        source.abort()
        await destination._closed.wait()
        assert arena() is None


@pytest.mark.asyncio
async def test_a_stranger_may_have_little_waiting():
    async with pair() as (source, destination):
        await source.send(capabilities.offer(frozenset({capabilities.PROBE})))
        await destination.receive_message()
        await destination.send(capabilities.offer(frozenset({capabilities.PROBE})))
        await source.receive_message()
        for _ in range(RECEIVE_AHEAD):
            await source.send(Probe(bytes(PROBE_BYTES)))
        await until(lambda: not destination._reading)
        assert destination._ahead < EARLY_AHEAD_BYTES + MAX_CONTROL
        destination.share_receiving(1)
        for _ in range(RECEIVE_AHEAD):
            assert await destination.receive_message() == Probe(bytes(PROBE_BYTES))


@pytest.mark.asyncio
async def test_a_slow_reader_bounds_the_senders_queue(tmp_path):
    async with pair(Address(path=str(tmp_path / "socket"))) as (source, destination):
        await greet(source, destination)
        destination.share_receiving(1)
        count, largest, sent = 64, 0, 0

        async def send():
            nonlocal largest, sent
            for number in range(count):
                await source.send_batch(*batch(bytes([number]) * MIB))
                largest = max(largest, source._transport.get_write_buffer_size())
                sent += 1

        sender = asyncio.create_task(send())
        await until(lambda: blocked(source), sender)
        await until(lambda: destination._ahead >= RECEIVE_AHEAD_BYTES, sender)
        await asyncio.sleep(0.1)
        assert not sender.done()
        assert source._transport.get_write_buffer_size() <= SEND_HIGH + MIB + HEADER_BYTES
        assert destination._ahead < RECEIVE_AHEAD_BYTES + BATCH_BYTES
        assert sent <= count // 2, "more was sent than queues and socket may hold"
        for number in range(count):
            frame = await destination.receive()
            assert bytes(frame.data[:1]) == bytes([number])
            assert destination._ahead < RECEIVE_AHEAD_BYTES + BATCH_BYTES
            frame.release()
        await sender
        assert largest <= SEND_HIGH + MIB + HEADER_BYTES


@pytest.mark.asyncio
async def test_a_sender_that_waits_hears_that_the_peer_is_gone():
    async with pair() as (source, destination):
        await greet(source, destination)

        async def send():
            while True:
                await source.send_batch(*batch(bytes(MIB)))

        sender = asyncio.create_task(send())
        await until(lambda: blocked(source), sender)
        destination.abort()
        with pytest.raises(PeerLost):
            await sender
        with pytest.raises(PeerLost):
            await source.send(CacheSize(4096))


@pytest.mark.asyncio
async def test_small_messages_pass_the_rate_limit_and_batches_keep_to_it(monkeypatch):
    """Time is passed in: ten batches at 1 MiB/s go out evenly, whatever this machine does."""
    now, asked = 1000.0, []

    async def wait(_limit: RateLimit, seconds: float) -> None:
        nonlocal now
        assert seconds > 0
        now += seconds
        asked.append(seconds)

    monkeypatch.setattr(link, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(RateLimit, "_wait", wait)
    limit = RateLimit(MIB)
    went = []
    for _ in range(10):
        await limit.take(MIB // 4)
        went.append(now - 1000.0)
    assert went[-1] == pytest.approx(10 / 4, abs=2 * RateLimit.BURST_SECONDS)
    gaps = [b - a for a, b in itertools.pairwise(went)]
    assert gaps == pytest.approx([0.25] * 9)

    now += 3600  # an idle hour earns no more than a short burst
    began = now
    for _ in range(4):
        await limit.take(MIB // 4)
    assert now - began >= 1 - RateLimit.BURST_SECONDS - 1e-6

    limit.rate = 4 * MIB
    began = now
    for _ in range(4):
        await limit.take(MIB)
    assert now - began == pytest.approx(1, abs=2 * RateLimit.BURST_SECONDS)

    limit.rate = 0
    asked.clear()
    await limit.take(1 << 40)
    assert asked == []


@pytest.mark.asyncio
async def test_a_new_rate_holds_for_those_who_wait_too():
    """A batch that would have taken seventeen minutes goes at once; the next obey the new rate."""
    for rate in (0, 1024 * MIB):
        limit = RateLimit(1024)
        waiting = [asyncio.create_task(limit.take(MIB)) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in waiting)
        limit.rate = rate
        async with asyncio.timeout(60):
            await asyncio.gather(*waiting)


@pytest.mark.asyncio
async def test_a_limited_link_still_delivers_everything():
    async with pair() as (source, destination):
        await greet(source, destination)
        source.limit.rate = 20 * MIB
        began = asyncio.get_running_loop().time()

        async def send():
            for number in range(8):
                await source.send_batch(*batch(bytes([number]) * (MIB // 2)))

        sender = asyncio.create_task(send())
        for number in range(8):
            frame = await destination.receive()
            assert frame.data == bytes([number]) * (MIB // 2)
            frame.release()
        await sender
        # 4 MiB at 20 MiB/s cannot take less than 0.2 s, whatever the machine; half is generous
        assert asyncio.get_running_loop().time() - began > 0.1


# ---------------------------------------------------------------- a peer that fails


@pytest.mark.asyncio
@pytest.mark.parametrize("cut", [1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 3])
async def test_a_peer_that_closes_inside_a_frame_is_lost(cut):
    async with raw_peer() as (source, reader, writer):
        await source.send(capabilities.offer(frozenset()))
        await reader.readexactly(source.sent_bytes)
        writer.write(framed(Hello(1, (), ()))[:cut])
        writer.close()
        with pytest.raises(PeerLost, match="closed the connection"):
            await source.receive()
        with pytest.raises(PeerLost):
            await source.receive()


@pytest.mark.asyncio
async def test_what_came_before_the_peer_closed_is_still_given():
    """The last word of a peer is often the reason why it hangs up."""
    async with raw_peer() as (source, reader, writer):
        await source.send(capabilities.offer(frozenset()))
        await reader.readexactly(source.sent_bytes)
        hello, error = Hello(1, ("page-hash-nh",), ()), Error(ErrorCode.NO_PLACE, "no place here")
        for message in (hello, error):
            writer.write(framed(message))
        writer.close()
        await until(lambda: source._fault is not None)
        assert await source.receive_message() == hello
        assert await source.receive_message() == error
        with pytest.raises(PeerLost):
            await source.receive()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "garbage",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(100),
        b"\xff" * (20 * MIB),
        bytes(framed(Hello(1, (), ()))[:-1]) + b"\x01",
        bytes(framed(Accept(TOKEN))),
    ],
    ids=["ssh", "http", "zeros", "flood", "flipped", "out-of-turn"],
)  # fmt: skip
async def test_garbage_from_the_peer_is_a_remote_error(garbage):
    faults = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context))
    async with raw_peer() as (source, _, writer):
        await source.send(capabilities.offer(frozenset()))
        writer.write(garbage)
        await until(lambda: source._fault is not None)
        await asyncio.sleep(0.05)  # more of it comes before anybody looks
        for _ in range(2):
            with pytest.raises(RemoteError):
                await source.receive()
    assert faults == [], "the loop was left with an exception of ours"


@pytest.mark.asyncio
async def test_a_silent_peer_is_lost():
    async with asyncio.timeout(60):
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = Address(*server.getsockname()[:2])
            source = await connect(address, peer_timeout=0.2)
            with pytest.raises(PeerLost, match="has said nothing"):
                await source.receive()
            with pytest.raises(PeerLost):
                await source.send(capabilities.offer(frozenset()))
            await source.close()


@pytest.mark.asyncio
async def test_a_living_peer_with_nothing_to_say_is_not_lost():
    """Both sides ping. Two peer timeouts pass; were there no pings, both links would have ended."""
    async with pair(peer_timeout=1.0) as (source, destination):
        await greet(source, destination)
        before = source.received_bytes
        await asyncio.sleep(2.0)
        assert source.received_bytes > before
        await source.send(CacheSize(4096))
        assert await destination.receive_message() == CacheSize(4096)


class Timer:
    def cancel(self) -> None:
        pass


class Clock:
    """Time that passes when somebody sleeps; `at` says what happens when."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        self.at: list = []
        self.due: list = []
        loop = SimpleNamespace(call_later=lambda *call: self.due.append(call) or Timer())
        monkeypatch.setattr(link, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(link, "asyncio", SimpleNamespace(get_running_loop=lambda: loop))

    def run(self, lone: Link) -> None:
        """Lets the heart of a link beat until it stops."""
        lone._ping_at = self.now + lone.peer_timeout / link.BEATS
        lone._wait_for_beat()
        while self.due:
            seconds, call, *args = self.due.pop()
            self.sleep(seconds)
            call(*args)

    def sleep(self, seconds: float) -> None:
        end = self.now + max(seconds, 0.0)
        while self.at and self.at[0][0] <= end:
            self.now, happens = self.at.pop(0)
            happens()
        self.now = max(end, self.now)


def unconnected(peer_timeout: float) -> tuple[Link, list[float]]:
    """A link without a connection, and the times at which it says that it lives."""
    lone = Link(Role.SOURCE, peer_timeout)
    pings: list[float] = []
    lone._ping = lambda: pings.append(link.time.monotonic() - 1000)  # type: ignore[method-assign]
    return lone, pings


@pytest.mark.parametrize("last_word", [0.0, 0.1, 2.5, 7.4, 9.9])
def test_a_silence_is_noticed_the_moment_it_is_too_long(last_word, monkeypatch):
    """Whenever the last word came: not at the next ping, which may be a quarter later."""
    lone, pings = unconnected(10)
    clock = Clock(monkeypatch)
    lone._heard_at = clock.now
    clock.at = [(1000 + last_word, lambda: setattr(lone, "_heard_at", clock.now))]
    clock.run(lone)
    assert clock.now - 1000 - last_word == pytest.approx(10)
    assert isinstance(lone._fault, PeerLost)
    assert "has said nothing for 10 s" in str(lone._fault)
    assert pings[:3] == pytest.approx([2.5, 5.0, 7.5])


def test_who_was_stopped_itself_reads_first_what_the_peer_has_said(monkeypatch):
    """SIGSTOP, or a machine that stood still: an hour passes in one sleep, and nobody is lost."""
    lone, _ = unconnected(10)
    clock = Clock(monkeypatch)
    lone._heard_at = clock.now
    sleep = clock.sleep
    clock.sleep = lambda seconds: sleep(3600 if clock.now == 1000 else seconds)
    clock.run(lone)
    assert clock.now == pytest.approx(1000 + 3600 + 10)


def test_who_does_not_read_says_all_the_same_that_it_lives(monkeypatch):
    """Silence that we do not listen to is no silence; ours would be one to the peer."""
    lone, pings = unconnected(10)
    clock = Clock(monkeypatch)
    lone._heard_at, lone._reading = clock.now, False

    def read_again() -> None:
        lone._reading, lone._heard_at = True, clock.now

    clock.at = [(1000 + 100, read_again)]
    clock.run(lone)
    assert clock.now - 1000 == pytest.approx(110)
    assert pings[:40] == pytest.approx([2.5 * n for n in range(1, 41)])


@pytest.mark.asyncio
async def test_the_kernel_is_told_to_watch_too():
    async with pair(peer_timeout=30) as ends:
        for end in ends:
            sock = end._transport.get_extra_info("socket")
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            found = {
                name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                for name in ("TCP_USER_TIMEOUT", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
            }
            assert found == {
                "TCP_USER_TIMEOUT": 30_000, "TCP_KEEPIDLE": 7, "TCP_KEEPINTVL": 7, "TCP_KEEPCNT": 3
            }  # fmt: skip
            with contextlib.suppress(OSError):  # a kernel that does not have it
                assert sock.getsockopt(socket.IPPROTO_TCP, link.TCP_RTO_MAX_MS) == 7500


@pytest.mark.asyncio
async def test_many_channels_to_a_peer_that_takes_nothing_are_closed_in_a_second():
    """One after the other, they would keep the program for as many seconds."""
    async with contextlib.AsyncExitStack() as stack:
        pairs = [await stack.enter_async_context(pair()) for _ in range(6)]
        for source, destination in pairs:
            await greet(source, destination)
            destination._transport.pause_reading()
            while not blocked(source):
                source.session.send_pages()
                for part in batch(bytes(MIB)):
                    source._write_now(part)
        began = asyncio.get_running_loop().time()
        await link.close_all([source for source, _ in pairs])
        assert asyncio.get_running_loop().time() - began < 4


@pytest.mark.asyncio
async def test_a_peer_that_is_lost_is_not_waited_for():
    async with pair() as (source, destination):
        await greet(source, destination)
        destination._transport.pause_reading()
        while not blocked(source):
            source.session.send_pages()
            for part in batch(bytes(MIB)):
                source._write_now(part)
        source._fail(PeerLost("it has said nothing"))
        await source.close()
        assert source._transport.is_closing()
        assert source._closed.is_set()
        source.bound_sending(MIB)  # of no more use, and no error


@pytest.mark.asyncio
async def test_silence_of_a_peer_that_we_do_not_read_does_not_count():
    """While the destination is busy with what came, it does not read, and cannot hear pings."""
    async with pair(peer_timeout=0.4) as (source, destination):
        await greet(source, destination)
        for _ in range(RECEIVE_AHEAD + 2):
            await source.send_batch(*batch(b"x" * 1000))
        await until(lambda: not destination._reading)
        await asyncio.sleep(1.0)
        for _ in range(RECEIVE_AHEAD + 2):
            (await destination.receive()).release()


@pytest.mark.asyncio
async def test_a_round_trip_is_measured_by_ping_and_pong():
    async with pair() as (source, destination):
        await greet(source, destination)
        assert 0 < await source.round_trip() < 30
        assert 0 < await destination.round_trip() < 30


@pytest.mark.asyncio
async def test_a_round_trip_ends_where_the_peer_dies():
    async with raw_peer() as (source, reader, writer):
        await source.send(capabilities.offer(frozenset()))
        hello = Hello(1, ("page-hash-nh",), ())
        writer.write(framed(hello))
        assert await source.receive_message() == hello
        trip = asyncio.create_task(source.round_trip())
        ping = framed(Ping(1))
        await reader.readuntil(bytes(ping[:5]))
        # an answer to something that was not asked is no answer
        writer.write(framed(Pong(99)))
        writer.close()
        with pytest.raises(PeerLost):
            await trip


async def hear_only(source: Link, word: Message) -> None:
    while True:
        assert await source.receive_message() == word


@pytest.mark.asyncio
@pytest.mark.parametrize("word", [Ping(1), Pong(1), CacheSize(4096)])
async def test_a_peer_that_says_too_much_that_moves_nothing_is_heard_no_more(word):
    """Tens of thousands come with one look at the socket: nobody else had his turn meanwhile."""
    async with raw_peer() as (source, _, writer):
        await source.send(capabilities.offer(frozenset()))
        hello, accept = Hello(1, ("page-hash-nh",), ()), Accept(bytes(16))
        writer.write(framed(hello))
        assert await source.receive_message() == hello
        await source.send(GuestInfo("file", MIB, 4096, bytes(16)))
        writer.write(framed(accept))
        assert await source.receive_message() == accept
        writer.write(framed(word) * (MAX_ASIDE + 1))
        with pytest.raises(RemoteError, match=f"one of more than {MAX_ASIDE} in a second"):
            await hear_only(source, word)


@pytest.mark.asyncio
async def test_what_moves_nothing_may_be_said_now_and_then(monkeypatch):
    monkeypatch.setattr(link, "MAX_ASIDE", 4)
    async with pair() as (source, destination):
        await greet(source, destination)
        for _ in range(3):
            source._aside_since -= 1
            destination._aside_since -= 1
            for _ in range(3):
                await source.round_trip()


# ---------------------------------------------------------------- connecting and listening


@pytest.mark.asyncio
async def test_port_0_picks_a_free_port_and_says_which():
    listener = await listen(LOCAL)
    assert listener.address.host == "127.0.0.1"
    assert listener.address.port > 0
    await listener.close()
    anywhere = await listen(Address("", 0))
    assert anywhere.address.port > 0
    await anywhere.close()


@pytest.mark.asyncio
async def test_a_unix_socket_is_there_while_somebody_listens(tmp_path):
    path = tmp_path / "socket"
    async with pair(Address(path=str(path))) as (source, destination):
        assert path.is_socket()
        await greet(source, destination)
    assert not path.exists()


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_nobody_listening_is_an_error_within_the_timeout(kind, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    address = Address("127.0.0.1", port) if kind == "tcp" else Address(path=str(tmp_path / "no"))
    async with asyncio.timeout(60):
        with pytest.raises(ConnectError, match="is migrate-dst listening there") as error:
            await connect(address, timeout=0.3)
    assert str(address) in str(error.value)


@pytest.mark.asyncio
async def test_a_destination_that_starts_late_is_waited_for(tmp_path):
    address = Address(path=str(tmp_path / "socket"))
    async with asyncio.timeout(60):
        connecting = asyncio.create_task(connect(address, timeout=15))
        await asyncio.sleep(0.15)
        listener = await listen(address)
        source = await connecting
        destination = await listener.accept()
        for end in (source, destination, listener):
            await end.close()


@pytest.mark.asyncio
async def test_a_host_that_does_not_exist_is_an_error_at_once():
    async with asyncio.timeout(60):
        with pytest.raises(ConnectError, match=r"cannot connect to tcp:nowhere\.invalid:1"):
            await connect(Address("nowhere.invalid", 1), timeout=1000)


@pytest.mark.asyncio
async def test_an_address_that_is_taken_cannot_be_listened_on(tmp_path):
    listener = await listen(LOCAL)
    with pytest.raises(ConnectError, match="cannot listen on"):
        await listen(listener.address)
    await listener.close()
    with pytest.raises(ConnectError, match="cannot listen on"):
        await listen(Address(path=str(tmp_path / "no" / "socket")))


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
async def test_a_unix_socket_of_a_busy_program_is_not_taken_from_it(tmp_path, kind):
    """Its queue is full: nothing that connects gets an answer."""
    path = str(tmp_path / "socket")
    with contextlib.ExitStack() as stack:
        busy = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
        busy.bind(path)
        if kind == socket.SOCK_STREAM:
            busy.listen(0)
            with contextlib.suppress(BlockingIOError):
                while True:
                    waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                    waiting.setblocking(False)
                    waiting.connect(path)
        with pytest.raises(ConnectError, match="cannot listen on unix:.*: another program listens"):
            await listen(Address(path=path))


@pytest.mark.asyncio
async def test_a_unix_socket_is_for_its_owner_whatever_the_umask(tmp_path):
    path = tmp_path / "socket"
    umask = os.umask(0)
    try:
        listener = await listen(Address(path=str(path)))
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.unlink()
    path.write_text("another's")
    await listener.close()
    assert path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a while")
@pytest.mark.asyncio
@pytest.mark.parametrize("whose", ["root's", "the listener's"])
async def test_a_unix_socket_that_a_stranger_listens_on_gets_no_guest(tmp_path, whose):
    """In /tmp he may have been there first; his own directory is named by who trusts him."""
    tmp_path.chmod(0o777)
    if whose == "the listener's":
        os.chown(tmp_path, 65534, 65534)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/s")
        os.seteuid(65534)
        try:
            listener.listen()
        finally:
            os.seteuid(0)
        if whose == "root's":
            with pytest.raises(ConnectError, match="user 65534 listens there, who is neither"):
                await connect(Address(path=f"{tmp_path}/s"), timeout=5)
        else:
            link = await connect(Address(path=f"{tmp_path}/s"), timeout=5)
            await link.close()


@pytest.mark.asyncio
async def test_a_unix_socket_of_a_dead_program_is_taken(tmp_path):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        dead.listen()
    listener = await listen(Address(path=path))
    await listener.close()


@pytest.mark.asyncio
async def test_so_many_wait_and_the_next_is_turned_away():
    async with asyncio.timeout(60):
        listener = await listen(LOCAL)
        waiting = []
        for number in range(MAX_WAITING):
            waiting.append(await connect(listener.address))
            await until(lambda number=number: listener._links.qsize() == number + 1)
        one_more = await connect(listener.address)
        with pytest.raises(PeerLost):
            await one_more.receive()
        destination = await listener.accept()
        await greet(waiting[0], destination)
        await listener.close()
        for left in waiting[1:]:
            with pytest.raises(PeerLost):
                await left.receive()
        for end in (*waiting, one_more, destination):
            await end.close()


# ---------------------------------------------------------------- further channels


@contextlib.asynccontextmanager
async def lane_pair(channel: int):
    """The two ends of a further channel."""
    async with pair() as (source, destination):
        await source.send(Join(TOKEN, channel))
        source.session.channel = channel
        assert await destination.receive_message() == Join(TOKEN, channel)
        destination.session.channel = channel
        await destination.send(Joined())
        assert await source.receive_message() == Joined()
        yield source, destination


@pytest.mark.asyncio
@pytest.mark.parametrize("channel", [1, 63])
async def test_a_further_channel_carries_batches_rounds_and_pings(channel):
    async with lane_pair(channel) as (source, destination):
        sender = asyncio.create_task(source.send_batch(*batch(b"x" * MIB, channel)))
        frame = await destination.receive()
        assert (frame.type, bytes(frame.data)) == (MessageType.PAGES, b"x" * MIB)
        frame.release()
        await sender
        await source.send(Round(1, 2, 3))
        assert await destination.receive_message() == Round(1, 2, 3)
        assert 0 < await source.round_trip() < 30
        assert 0 < await destination.round_trip() < 30
        with pytest.raises(LocalError, match="CACHE_SIZE cannot be sent in state LANE"):
            await source.send(CacheSize(4096))


@pytest.mark.asyncio
async def test_a_batch_sealed_for_another_channel_is_refused():
    async with lane_pair(1) as (source, destination):
        await source.send_batch(*batch(b"x", 2))
        with pytest.raises(RemoteError, match="PAGES: channel 2 on the connection of 1"):
            await destination.receive()


@pytest.mark.asyncio
@pytest.mark.parametrize("most", [MIB, SEND_HIGH])
async def test_the_bound_of_what_a_channel_queues_can_be_lowered(most):
    async with lane_pair(1) as (source, _):
        source.bound_sending(most)
        largest = 0

        async def send():
            nonlocal largest
            while True:
                await source.send_batch(*batch(bytes(MIB), 1))
                largest = max(largest, source._transport.get_write_buffer_size())

        sender = asyncio.create_task(send())
        await until(lambda: blocked(source), sender)
        await asyncio.sleep(0.05)
        assert source._transport.get_write_buffer_size() <= most + MIB + 100
        assert largest <= most + MIB + 100
        sender.cancel()


@pytest.mark.asyncio
async def test_the_end_is_seen_without_receiving():
    async with pair() as (source, destination):
        await greet(source, destination)
        waiting = asyncio.create_task(destination.ended())
        await source.send(CacheSize(4096))
        await until(lambda: destination._frames)
        await asyncio.sleep(0.02)
        assert not waiting.done()
        await source.give_reason(ErrorCode.CANCELLED, "enough")
        await source.close()
        await waiting
        assert await destination.receive_message() == CacheSize(4096)
        assert await destination.receive_message() == Error(ErrorCode.CANCELLED, "enough")
        with pytest.raises(PeerLost):
            await destination.receive()


@pytest.mark.asyncio
async def test_who_gives_its_reason_hears_the_peer_hang_up_behind_all_that_is_unread():
    """What the peer still says must not reset the connection: the reason would be lost with it."""
    async with pair() as (source, destination):
        await greet(source, destination)
        for _ in range(2 * link.RECEIVE_AHEAD):
            await destination.send(CacheSize(4096))
        await source.give_reason(ErrorCode.CANCELLED, "enough")
        waiting = asyncio.create_task(source.hung_up(60))
        await destination.send(CacheSize(8192))
        assert await destination.receive_message() == Error(ErrorCode.CANCELLED, "enough")
        assert not waiting.done()
        await destination.close()
        await waiting


@pytest.mark.asyncio
async def test_a_peer_that_does_not_hang_up_is_not_waited_for_any_longer():
    async with pair() as (source, destination):
        await greet(source, destination)
        await source.hung_up(0.01)
        assert destination._fault is None


@pytest.mark.asyncio
@pytest.mark.parametrize("seconds", [30.0, 1e9, 1e15])
async def test_any_peer_timeout_a_user_may_write_can_be_set(seconds):
    async with pair(peer_timeout=seconds) as (source, destination):
        await greet(source, destination)
