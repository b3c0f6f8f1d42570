"""The way is measured with a peer by hand, over loopback; and what a hostile one can do to it."""

import asyncio
import contextlib
import errno
import os
import time

import pytest

from migrate import destination as destination_module
from migrate import probe
from migrate.address import Address
from migrate.destination import Destination
from migrate.dialing import connect
from migrate.errors import MigrationError, PeerError, PeerLost, failure_of
from migrate.listening import listen
from proto import ErrorCode, capabilities
from proto.errors import CapabilityError
from proto.messages import MAX_PROBE, PROBE_BYTES, Error, Hello, Probe, Probed
from proto.session import State

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


def greeter(far, events=None):
    """A real destination, up to where a guest is described."""
    seen = [] if events is None else events
    return Destination(far, lambda _info: None, observer=lambda event, _arrival: seen.append(event))


@pytest.mark.asyncio
async def test_a_destination_answers_until_the_source_has_seen_enough():
    events = []
    async with pair() as (source, far):
        serving = asyncio.create_task(greeter(far, events).greet())
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
        assert await serving is False
    assert events == ["probed"]


@pytest.mark.asyncio
async def test_it_keeps_to_the_rate_limit():
    """The clock cannot be passed in here; it can only be later than it should."""
    async with pair() as (source, far):
        serving = asyncio.create_task(greeter(far).greet())
        await probe.greet(source, frozenset())
        source.limit.rate = 4 << 20
        began = time.monotonic()
        way = await probe.measure(source, 0.5)
        assert way.probed <= (time.monotonic() - began + 0.1) * (4 << 20)
        assert way.bandwidth < 1.3 * (4 << 20)
        await source.close()
        await serving


@pytest.mark.asyncio
async def test_a_small_rate_limit_is_measured_in_small_pieces():
    async with pair() as (source, far):
        serving = asyncio.create_task(greeter(far).greet())
        await probe.greet(source, frozenset())
        source.limit.rate = 2000
        way = await probe.measure(source, 0.5)
        assert 256 <= way.probed < 5000
        assert 0 < way.bandwidth < 3000
        await source.close()
        await serving


@pytest.mark.asyncio
async def test_no_more_is_on_the_way_than_was_answered_already():
    async with pair() as (source, far):
        source.session.state = far.session.state = State.OPEN
        measuring = asyncio.create_task(probe.measure(source, 0.5))
        received = 0
        for count in (2, 2, 4):  # twice as much each time, and then no more until it is answered
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
        ([Probed(PROBE_BYTES + 1)], PeerError, "PROBED 64001 came where 64000 was due"),
        ([Probed(PROBE_BYTES), Probed(PROBE_BYTES)], PeerError, "where 128000 was due"),
        ([Probed(PROBE_BYTES * i) for i in range(1, 9)], PeerError, "was due"),
        ([Error(ErrorCode.NO_PLACE, "busy")], MigrationError, "busy"),
        ([], PeerLost, "connection"),
    ],
)
async def test_a_destination_that_counts_wrong_is_not_believed(answers, raised, says):
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
async def test_a_destination_that_never_answers_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(probe, "PATIENCE_SECONDS", 0.2)
    async with pair() as (source, far):
        source.session.state = far.session.state = State.OPEN
        with pytest.raises(PeerLost, match="could not be measured in 0.2 s"):
            await probe.measure(source, 10)


@pytest.mark.asyncio
async def test_a_destination_that_never_greets_is_said_not_to_answer(monkeypatch):
    monkeypatch.setattr(probe, "PATIENCE_SECONDS", 0.2)
    async with pair() as (source, _far):
        with pytest.raises(PeerLost, match=r"127\.0\.0\.1:\d+ does not answer within 0\.2 s"):
            await probe.greet(source, frozenset())


def test_a_time_out_is_no_fault_of_the_guest():
    def sentence(error):
        return str(failure_of(error, "the memory cannot be read"))

    assert sentence(TimeoutError()) == "it took too long"
    assert sentence(OSError("the disk")) == "the memory cannot be read: the disk"
    assert sentence(OSError(errno.EIO, os.strerror(errno.EIO))).endswith(": Input/output error")
    assert sentence(OSError(errno.ETIMEDOUT, "timed out")).endswith("cannot be read: timed out")


@pytest.mark.asyncio
async def test_a_destination_that_does_not_know_the_word_is_told_of():
    async with pair() as (source, far):
        asking = asyncio.create_task(probe.greet(source, frozenset()))
        hello = await far.receive_message()
        assert "probe" in hello.required
        await far.send(Hello(1, tuple(sorted(capabilities.REQUIRED)), ()))
        with pytest.raises(CapabilityError, match="lacks capability 'probe'"):
            await asking


# ---------------------------------------------------------------- the destination's side


@pytest.mark.asyncio
async def test_a_source_that_never_ends_is_ended(monkeypatch):
    monkeypatch.setattr(destination_module, "MAX_PROBE", 3000)
    async with pair() as (source, far):
        serving = asyncio.create_task(greeter(far).greet())
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
async def test_a_source_that_takes_its_time_has_as_much_as_any_other(monkeypatch, reads):
    """Whether it sends a little now and then, or does not take the answers."""
    monkeypatch.setattr(destination_module, "HANDSHAKE_SECONDS", 0.3)
    async with pair() as (source, far):
        serving = asyncio.create_task(greeter(far).greet())
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
async def test_while_a_guest_comes_nobody_measures():
    async with pair() as (source, far):
        serving = asyncio.create_task(greeter(far).greet(busy=True))
        await source.send(capabilities.offer(frozenset(), frozenset({capabilities.PROBE})))
        with pytest.raises(MigrationError, match="another guest is being received"):
            await serving


def test_the_bounds_leave_room_for_a_fast_link():
    assert MAX_PROBE >= 100 * PROBE_BYTES
    assert probe.PATIENCE_SECONDS < destination_module.HANDSHAKE_SECONDS
