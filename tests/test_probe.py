"""Probes of the network: measurements over loopback, and what a hostile peer can do to them."""

import asyncio
import contextlib
import errno
import os
import time

import pytest

from migrate.destination import greeting
from migrate.destination.greeting import greet
from migrate.errors import MigrationError, PeerError, PeerLost, failure_of
from migrate.transport import probe
from migrate.transport.address import Address
from migrate.transport.connect import connect
from migrate.transport.listen import listen
from proto import ErrorCode
from proto.wire import capabilities
from proto.wire.errors import CapabilityError
from proto.wire.messages import MAX_PROBE, PROBE_BYTES, Error, Hello, Probe, Probed
from proto.wire.session import State

LOCAL = Address("127.0.0.1", 0)


@contextlib.asynccontextmanager
async def pair():
    async with asyncio.timeout(60):
        listener = await listen(LOCAL)
        source = await connect(listener.address, timeout=10)
        far = await listener.accept()
        try:
            yield source, far
        finally:
            await source.close()
            await far.close()
            await listener.close()


@pytest.mark.asyncio
async def test_probe_measures_bandwidth():
    async with pair() as (source, far):
        serving = asyncio.create_task(greet(far, {}))
        agreement, hello = await probe.greet(source, frozenset({"xbzrle"}))
        assert agreement.xbzrle
        assert agreement.probe
        assert hello.max_pages > 0
        way = await probe.measure(source, 0.2)
        assert way.bandwidth > 1e6
        assert 0 < way.round_trip < 10
        assert way.probed % PROBE_BYTES == 0
        assert far.received_bytes > way.probed
        await source.close()
        assert await serving is None


@pytest.mark.asyncio
async def test_probe_keeps_to_the_rate_limit():
    """Uses the real clock, which can only run late, not early."""
    async with pair() as (source, far):
        serving = asyncio.create_task(greet(far, {}))
        await probe.greet(source, frozenset())
        source.limit.rate = 4 << 20
        began = time.monotonic()
        way = await probe.measure(source, 0.5)
        assert way.probed <= (time.monotonic() - began + 0.1) * (4 << 20)
        assert way.bandwidth < 1.3 * (4 << 20)
        await source.close()
        await serving


@pytest.mark.asyncio
async def test_probe_pieces_shrink_with_the_rate_limit():
    async with pair() as (source, far):
        serving = asyncio.create_task(greet(far, {}))
        await probe.greet(source, frozenset())
        source.limit.rate = 2000
        way = await probe.measure(source, 0.5)
        assert 256 <= way.probed < 5000
        assert 0 < way.bandwidth < 3000
        await source.close()
        await serving


@pytest.mark.asyncio
async def test_unanswered_probe_bytes_are_bounded():
    async with pair() as (source, far):
        source.session.state = far.session.state = State.OPEN
        measuring = asyncio.create_task(probe.measure(source, 0.5))
        received = 0
        for count in (2, 2, 4):  # doubled each time, then no more until the answer
            for _ in range(count):
                message = await far.receive_message()
                assert isinstance(message, Probe)
            await asyncio.sleep(0.05)
            assert not far._frames
            for _ in range(count):
                received += PROBE_BYTES
                await far.send(Probed(received))
        measuring.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await measuring


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("answers", "raised", "says"),
    [
        ([Probed(PROBE_BYTES + 1)], PeerError, "unexpected PROBED 64001; expected 64000"),
        ([Probed(PROBE_BYTES), Probed(PROBE_BYTES)], PeerError, "expected 128000"),
        ([Probed(PROBE_BYTES * i) for i in range(1, 9)], PeerError, "unexpected PROBED"),
        ([Error(ErrorCode.NO_PLACE, "busy")], MigrationError, "busy"),
        ([], PeerLost, "connection"),
    ],
)
async def test_wrong_probe_answer_is_refused(answers, raised, says):
    async with pair() as (source, far):
        source.session.state = far.session.state = State.OPEN
        measuring = asyncio.create_task(probe.measure(source, 0.5))
        await far.first_type()
        for answer in answers:
            await far.send(answer)
        if not answers:
            await far.close()
        with pytest.raises(raised, match=says):
            await measuring


@pytest.mark.asyncio
async def test_probe_without_answer_times_out(monkeypatch):
    monkeypatch.setattr(probe, "PATIENCE_SECONDS", 0.2)
    async with pair() as (source, far):
        source.session.state = far.session.state = State.OPEN
        with pytest.raises(PeerLost, match="could not be measured in 0.2 s"):
            await probe.measure(source, 10)


@pytest.mark.asyncio
async def test_destination_without_hello_is_reported_as_not_answering(monkeypatch):
    monkeypatch.setattr(probe, "PATIENCE_SECONDS", 0.2)
    async with pair() as (source, _far):
        with pytest.raises(PeerLost, match=r"127\.0\.0\.1:\d+ does not answer within 0\.2 s"):
            await probe.greet(source, frozenset())


def test_timeout_is_not_reported_as_unreadable_memory():
    def sentence(error):
        return str(failure_of(error, "the memory cannot be read"))

    assert sentence(TimeoutError()) == "it took too long"
    assert sentence(OSError("the disk")) == "the memory cannot be read: the disk"
    assert sentence(OSError(errno.EIO, os.strerror(errno.EIO))).endswith(": Input/output error")
    assert sentence(OSError(errno.ETIMEDOUT, "timed out")).endswith("cannot be read: timed out")


@pytest.mark.asyncio
async def test_destination_without_probe_capability_is_reported():
    async with pair() as (source, far):
        asking = asyncio.create_task(probe.greet(source, frozenset()))
        hello = await far.receive_message()
        assert "probe" in hello.required
        await far.send(Hello(1, tuple(sorted(capabilities.REQUIRED)), ()))
        with pytest.raises(CapabilityError, match="lacks capability 'probe'"):
            await asking


# ---------------------------------------------------------------- the destination's side


@pytest.mark.asyncio
async def test_probe_beyond_its_limit_is_refused(monkeypatch):
    monkeypatch.setattr(greeting, "MAX_PROBE", 3000)
    async with pair() as (source, far):
        serving = asyncio.create_task(greet(far, {}))
        await probe.greet(source, frozenset())
        for _ in range(3):
            await source.send(Probe(bytes(1000)))
        for _ in range(3):
            await source.receive_message()
        await source.send(Probe(b"x"))
        with pytest.raises(PeerError, match="more than 3000 bytes"):
            await serving


@pytest.mark.asyncio
@pytest.mark.parametrize("reads", [True, False])
async def test_slow_probe_gets_its_full_time(monkeypatch, reads):
    """Whether it sends slowly, or does not read the answers."""
    monkeypatch.setattr(greeting, "HANDSHAKE_SECONDS", 0.3)
    async with pair() as (source, far):
        serving = asyncio.create_task(greet(far, {}))
        await probe.greet(source, frozenset())

        async def dawdle():
            while True:
                await source.send(Probe(b"x"))
                if reads:
                    await source.receive_message()
                    await asyncio.sleep(0.01)

        dawdling = asyncio.create_task(dawdle())
        with pytest.raises(PeerLost, match="did not describe a guest in 0.3 s"):
            await serving
        dawdling.cancel()
        with contextlib.suppress(asyncio.CancelledError, PeerLost):
            await dawdling


@pytest.mark.asyncio
async def test_probe_is_refused_while_a_guest_is_received():
    async with pair() as (source, far):
        serving = asyncio.create_task(greet(far, {}, busy=True))
        await source.send(capabilities.offer(frozenset(), frozenset({capabilities.PROBE})))
        with pytest.raises(MigrationError, match="another guest is being received"):
            await serving


def test_probe_limits_suit_a_fast_link():
    assert MAX_PROBE >= 100 * PROBE_BYTES
    assert probe.PATIENCE_SECONDS < greeting.HANDSHAKE_SECONDS
