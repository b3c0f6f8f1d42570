"""The connection: frames in order, bounded queues both ways, and hostile peers."""

import asyncio
import contextlib
import itertools
import os
import socket
import stat
import weakref

import pytest

from migrate.errors import CancelledByPeer, ConnectError, PeerGaveUp, PeerLost
from migrate.transport import link, receive_queue
from migrate.transport.address import Address
from migrate.transport.connect import connect
from migrate.transport.keepalive import TCP_RTO_MAX_MS
from migrate.transport.link import (
    SEND_HIGH,
    Link,
)
from migrate.transport.listen import MAX_WAITING, listen
from migrate.transport.receive_queue import (
    EARLY_AHEAD_BYTES,
    MAX_ASIDE,
    RECEIVE_AHEAD,
    RECEIVE_AHEAD_BYTES,
)
from proto import LocalError, RemoteError
from proto.codec.kernel import PageEncoder, PageHashes
from proto.codec.pageset import PageSet
from proto.wire import capabilities
from proto.wire.frames import HEADER_BYTES, seal
from proto.wire.messages import (
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
from proto.wire.session import State
from tests.requirements import need_root

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
async def raw_peer(peer_timeout=20):
    """A link of a source to a bare server: what the test writes is what the link hears."""
    came: asyncio.Queue = asyncio.Queue()

    async def serve(reader, writer):
        await came.put((reader, writer))

    async with asyncio.timeout(60):
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        address = Address(*server.sockets[0].getsockname()[:2])
        source = await connect(address, peer_timeout=peer_timeout)
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
    return not source.is_writable


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
async def test_illegal_message_is_refused_before_it_is_sent():
    async with pair() as (source, _):
        with pytest.raises(LocalError, match="PAGES cannot be sent in state START"):
            await source.send_batch(*batch(b""))
        with pytest.raises(LocalError, match="ROUND cannot be sent in state START"):
            await source.send(Round(1, 0, 0))
        assert source.sent_bytes == 0


@pytest.mark.asyncio
async def test_sent_batch_is_not_reused_while_it_is_buffered():
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
                head, data = encoder.finish_batch()
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
async def test_lost_connection_releases_its_arena():
    async with pair() as (source, destination):
        await source.send(capabilities.offer(frozenset()))
        await destination.receive_message()
        arena = weakref.ref(destination.session.reader._arena)
        source.abort()
        await destination._closed.wait()
        assert arena() is None


@pytest.mark.asyncio
async def test_peer_that_is_not_admitted_is_read_little_ahead():
    async with pair() as (source, destination):
        await source.send(capabilities.offer(frozenset({capabilities.PROBE})))
        await destination.receive_message()
        await destination.send(capabilities.offer(frozenset({capabilities.PROBE})))
        await source.receive_message()
        for _ in range(RECEIVE_AHEAD):
            await source.send(Probe(bytes(PROBE_BYTES)))
        await until(lambda: not destination.is_reading)
        assert destination.waiting_bytes < EARLY_AHEAD_BYTES + MAX_CONTROL
        destination.share_receiving(1)
        for _ in range(RECEIVE_AHEAD):
            assert await destination.receive_message() == Probe(bytes(PROBE_BYTES))


@pytest.mark.asyncio
async def test_slow_receiver_stops_the_sender(tmp_path):
    async with pair(Address(path=str(tmp_path / "socket"))) as (source, destination):
        await greet(source, destination)
        destination.share_receiving(1)
        count, largest, sent = 64, 0, 0

        async def send():
            nonlocal largest, sent
            for number in range(count):
                await source.send_batch(*batch(bytes([number]) * MIB))
                largest = max(largest, source.write_buffer_size)
                sent += 1

        sender = asyncio.create_task(send())
        await until(lambda: blocked(source), sender)
        await until(lambda: destination.waiting_bytes >= RECEIVE_AHEAD_BYTES, sender)
        await asyncio.sleep(0.1)
        assert not sender.done()
        assert source.write_buffer_size <= SEND_HIGH + MIB + HEADER_BYTES
        assert destination.waiting_bytes < RECEIVE_AHEAD_BYTES + BATCH_BYTES
        assert sent <= count // 2, "more was sent than queues and socket may hold"
        for number in range(count):
            frame = await destination.receive()
            assert bytes(frame.data[:1]) == bytes([number])
            assert destination.waiting_bytes < RECEIVE_AHEAD_BYTES + BATCH_BYTES
            frame.release()
        await sender
        assert largest <= SEND_HIGH + MIB + HEADER_BYTES


@pytest.mark.asyncio
async def test_waiting_sender_raises_peer_lost():
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
async def test_rate_limited_link_delivers_everything():
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
async def test_peer_that_closes_inside_a_frame_is_lost(cut):
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
async def test_messages_before_the_end_are_received():
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
async def test_sender_whose_peer_has_given_up_gets_the_reason():
    """The ERROR waits to be received: what may not be sent any more is not our own mistake."""
    async with pair() as (source, destination):
        await greet(source, destination)
        await source.send(Error(ErrorCode.CANCELLED, "the user has changed her mind"))
        await until(lambda: destination.session.state is State.FAILED)
        with pytest.raises(CancelledByPeer, match="changed her mind"):
            await destination.send(CacheSize(MIB))
        assert isinstance(await destination.receive_message(), Error)


@pytest.mark.asyncio
async def test_batch_for_a_peer_that_has_given_up_raises_its_reason():
    async with pair() as (source, destination):
        await greet(source, destination)
        await destination.send(Error(ErrorCode.NO_PLACE, "the disk is full"))
        await until(lambda: source.session.state is State.FAILED)
        with pytest.raises(PeerGaveUp, match="the disk is full"):
            await source.send_batch(*batch(b""))
        await source.give_reason(ErrorCode.INTERNAL, "too late")


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
async def test_garbage_is_a_remote_error(garbage):
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
async def test_silent_peer_is_lost():
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
async def test_idle_peer_is_kept_by_pings():
    """Both sides ping. Two peer timeouts pass; were there no pings, both links would have ended."""
    async with pair(peer_timeout=1.0) as (source, destination):
        await greet(source, destination)
        before = source.received_bytes
        await asyncio.sleep(2.0)
        assert source.received_bytes > before
        await source.send(CacheSize(4096))
        assert await destination.receive_message() == CacheSize(4096)


@pytest.mark.asyncio
async def test_tcp_keepalive_options_are_set():
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
                assert sock.getsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS) == 7500


@pytest.mark.asyncio
async def test_channels_to_a_stuck_peer_close_at_the_same_time():
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
async def test_close_does_not_wait_for_a_lost_peer():
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
        source.limit_write_buffer(MIB)  # of no more use, and no error


@pytest.mark.asyncio
async def test_silence_does_not_count_while_we_do_not_read():
    """A destination that is busy with received data does not read, and cannot hear pings."""
    async with pair(peer_timeout=0.4) as (source, destination):
        await greet(source, destination)
        for _ in range(RECEIVE_AHEAD + 2):
            await source.send_batch(*batch(b"x" * 1000))
        await until(lambda: not destination.is_reading)
        await asyncio.sleep(1.0)
        for _ in range(RECEIVE_AHEAD + 2):
            (await destination.receive()).release()


@pytest.mark.asyncio
async def test_round_trip_is_measured():
    async with pair() as (source, destination):
        await greet(source, destination)
        assert 0 < await source.round_trip() < 30
        assert 0 < await destination.round_trip() < 30


@pytest.mark.asyncio
async def test_round_trip_raises_if_the_peer_is_lost():
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
async def test_flood_of_side_messages_is_refused(word):
    """One read of the socket can bring tens of thousands, before any other task runs."""
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
async def test_side_messages_now_and_then_are_accepted(monkeypatch):
    monkeypatch.setattr(receive_queue, "MAX_ASIDE", 4)
    async with pair() as (source, destination):
        await greet(source, destination)
        for _ in range(3):
            source._aside._since -= 1
            destination._aside._since -= 1
            for _ in range(3):
                await source.round_trip()


# ---------------------------------------------------------------- connecting and listening


@pytest.mark.asyncio
async def test_port_0_picks_a_free_port():
    listener = await listen(LOCAL)
    assert listener.address.host == "127.0.0.1"
    assert listener.address.port > 0
    await listener.close()
    anywhere = await listen(Address("", 0))
    assert anywhere.address.port > 0
    await anywhere.close()


@pytest.mark.asyncio
async def test_unix_socket_exists_while_it_is_listened_on(tmp_path):
    path = tmp_path / "socket"
    async with pair(Address(path=str(path))) as (source, destination):
        assert path.is_socket()
        await greet(source, destination)
    assert not path.exists()


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_connect_fails_within_the_timeout_if_nothing_listens(kind, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    address = Address("127.0.0.1", port) if kind == "tcp" else Address(path=str(tmp_path / "no"))
    async with asyncio.timeout(60):
        with pytest.raises(ConnectError, match="is migrate-dst listening there") as error:
            await connect(address, timeout=0.3)
    assert str(address) in str(error.value)


@pytest.mark.asyncio
async def test_connect_waits_for_a_destination_that_starts_late(tmp_path):
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
async def test_unknown_host_is_an_error_at_once():
    async with asyncio.timeout(60):
        with pytest.raises(ConnectError, match=r"cannot connect to tcp:nowhere\.invalid:1"):
            await connect(Address("nowhere.invalid", 1), timeout=1000)


@pytest.mark.asyncio
async def test_listening_on_an_address_in_use_is_an_error(tmp_path):
    listener = await listen(LOCAL)
    with pytest.raises(ConnectError, match="cannot listen on"):
        await listen(listener.address)
    await listener.close()
    with pytest.raises(ConnectError, match="cannot listen on"):
        await listen(Address(path=str(tmp_path / "no" / "socket")))


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
async def test_unix_socket_of_a_busy_program_is_not_replaced(tmp_path, kind):
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
async def test_unix_socket_is_private_whatever_the_umask(tmp_path):
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


@need_root("be another user for a while")
@pytest.mark.asyncio
@pytest.mark.parametrize("whose", ["anybody's", "root's", "the listener's"])
async def test_unix_socket_of_a_stranger_is_refused(tmp_path, whose):
    """In /tmp he may have been there first; his own directory is named by who trusts him, and in
    root's he was given the socket."""
    tmp_path.chmod(0o777 if whose != "root's" else 0o755)
    if whose == "the listener's":
        os.chown(tmp_path, 65534, 65534)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/s")
        os.seteuid(65534)
        try:
            listener.listen()
        finally:
            os.seteuid(0)
        if whose == "anybody's":
            with pytest.raises(ConnectError, match="user 65534 listens there, who is neither"):
                await connect(Address(path=f"{tmp_path}/s"), timeout=5)
        else:
            link = await connect(Address(path=f"{tmp_path}/s"), timeout=5)
            await link.close()


@pytest.mark.asyncio
async def test_unix_socket_of_a_dead_program_is_replaced(tmp_path):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        dead.listen()
    listener = await listen(Address(path=path))
    await listener.close()


@pytest.mark.asyncio
async def test_connection_beyond_the_accept_queue_is_closed():
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
async def channel_pair(channel: int):
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
async def test_further_channel_carries_batches_rounds_and_pings(channel):
    async with channel_pair(channel) as (source, destination):
        sender = asyncio.create_task(source.send_batch(*batch(b"x" * MIB, channel)))
        frame = await destination.receive()
        assert (frame.type, bytes(frame.data)) == (MessageType.PAGES, b"x" * MIB)
        frame.release()
        await sender
        await source.send(Round(1, 2, 3))
        assert await destination.receive_message() == Round(1, 2, 3)
        assert 0 < await source.round_trip() < 30
        assert 0 < await destination.round_trip() < 30
        with pytest.raises(LocalError, match="CACHE_SIZE cannot be sent in state CHANNEL"):
            await source.send(CacheSize(4096))


@pytest.mark.asyncio
async def test_batch_for_another_channel_is_refused():
    async with channel_pair(1) as (source, destination):
        await source.send_batch(*batch(b"x", 2))
        with pytest.raises(RemoteError, match="PAGES: channel 2 on the connection of 1"):
            await destination.receive()


@pytest.mark.asyncio
@pytest.mark.parametrize("most", [MIB, SEND_HIGH])
async def test_write_buffer_limit_can_be_lowered(most):
    async with channel_pair(1) as (source, _):
        source.limit_write_buffer(most)
        largest = 0

        async def send():
            nonlocal largest
            while True:
                await source.send_batch(*batch(bytes(MIB), 1))
                largest = max(largest, source.write_buffer_size)

        sender = asyncio.create_task(send())
        await until(lambda: blocked(source), sender)
        await asyncio.sleep(0.05)
        assert source.write_buffer_size <= most + MIB + 100
        assert largest <= most + MIB + 100
        sender.cancel()


@pytest.mark.asyncio
async def test_end_is_noticed_without_receiving():
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
async def test_reason_reaches_a_peer_that_is_still_sending():
    """What the peer still says must not reset the connection: the reason would be lost with it."""
    async with pair() as (source, destination):
        await greet(source, destination)
        for _ in range(2 * RECEIVE_AHEAD):
            await destination.send(CacheSize(4096))
        await source.give_reason(ErrorCode.CANCELLED, "enough")
        waiting = asyncio.create_task(source.until_peer_closes(60))
        await destination.send(CacheSize(8192))
        assert await destination.receive_message() == Error(ErrorCode.CANCELLED, "enough")
        assert not waiting.done()
        await destination.close()
        await waiting


@pytest.mark.asyncio
async def test_wait_for_the_peer_to_close_is_bounded():
    async with pair() as (source, destination):
        await greet(source, destination)
        await source.until_peer_closes(0.01)
        assert destination._fault is None


@pytest.mark.asyncio
@pytest.mark.parametrize("seconds", [30.0, 1e9, 1e15])
async def test_any_peer_timeout_can_be_set(seconds):
    async with pair(peer_timeout=seconds) as (source, destination):
        await greet(source, destination)


@pytest.mark.asyncio
async def test_peer_that_answers_no_ping_is_lost_though_it_speaks():
    async with raw_peer(peer_timeout=0.5) as (source, _, writer):
        await source.send(capabilities.offer(frozenset()))
        hello = Hello(1, ("page-hash-nh",), ())
        writer.write(framed(hello))
        assert await source.receive_message() == hello

        async def speak() -> None:
            for token in itertools.count():
                writer.write(framed(Ping(token)))
                await asyncio.sleep(0.1)

        speaking = asyncio.create_task(speak())
        with pytest.raises(PeerLost, match="has not answered a PING in 0.5 s"):
            await source.round_trip()
        speaking.cancel()
