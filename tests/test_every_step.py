"""A fault at any step: the guest has exactly one owner, or neither side says that it owns it.

Move a guest repeatedly, with the fault one step later each time, from the first step of `send` and
`receive` to their last. These tests check the library as the model of tests/test_ownership.py
checks the protocol.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import migrate
from migrate.ownership import ask as questions
from migrate.source import reconnection
from migrate.transport import connect
from migrate.transport.link import Link
from tests.stepping import AsyncioLoop, UvLoop, stepping

pytestmark = pytest.mark.kills

SIZE = 3 * 4096 + 5
WHOLE = bytes(range(256)) * (SIZE // 256) + b"guest"
# The time for a break to heal. A fault that does not heal makes each step last this long.
SECONDS = 0.1
# The same before the destination has accepted the guest. It is also the time of the first
# connection, which must succeed on a busy machine too.
CONNECT_SECONDS = 0.3
# The time to find out who owns the guest, if both sides can still talk. After a break that comes
# too late for the source to resolve, the destination waits this long.
RESOLVE_SECONDS = 2.0
LOOPS = {"asyncio": AsyncioLoop, "uvloop": UvLoop}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconnection, "CONNECT_AGAIN_SECONDS", (0.001, 0.01))
    monkeypatch.setattr(questions, "ASK_AGAIN_SECONDS", (0.001, 0.01))


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Switch the garbage collector off: memory must be freed without it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def send(
    guest: migrate.BufferGuest, receiver: asyncio.Task[migrate.Received],
    found: asyncio.Future[Any], channels: int, resolve_timeout: float,
) -> migrate.Statistics:  # fmt: skip
    """Send the guest as soon as there is an address."""
    await asyncio.wait({found, receiver}, return_when=asyncio.FIRST_COMPLETED)
    if not found.done():
        raise asyncio.CancelledError
    return await migrate.send(
        guest, str(found.result()), migrate.Parameters(channels=channels),
        retry=SECONDS, resolve_timeout=resolve_timeout, connect_timeout=CONNECT_SECONDS,
    )  # fmt: skip


class Move:
    """One migration of one guest."""

    def __init__(self) -> None:
        self.memory = bytearray(WHOLE)
        self.guest = migrate.BufferGuest(self.memory)
        self.address = ""
        self.sender: asyncio.Task[migrate.Statistics]
        self.receiver: asyncio.Task[migrate.Received]
        self.sent: Any = None
        self.received: Any = None

    async def run(self, channels: int, resolve_timeout: float) -> None:
        found: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.receiver = asyncio.create_task(
            migrate.receive(
                "127.0.0.1:0", listening=found.set_result, retry=SECONDS,
                resolve_timeout=resolve_timeout,
            )
        )  # fmt: skip
        self.sender = asyncio.create_task(
            send(self.guest, self.receiver, found, channels, resolve_timeout)
        )
        await asyncio.wait({self.sender})
        failed = self.sender.cancelled() or self.sender.exception() is not None
        _, waiting = await asyncio.wait({self.receiver}, timeout=SECONDS if failed else 10)
        if waiting:
            self.receiver.cancel()  # it would wait for another source
        self.sent, self.received = await asyncio.gather(
            self.sender, self.receiver, return_exceptions=True
        )
        self.address = str(found.result()) if found.done() else ""

    @property
    def here(self) -> bool:
        return self.guest.admits_writers

    @property
    def there(self) -> bool:
        return isinstance(self.received, migrate.Received)

    def check(self) -> None:
        """Check that there is one owner, and both say so; or none, and the source says so."""
        said = f"send: {self.sent!r}, receive: {self.received!r}"
        assert not (self.here and self.there), f"two owners; {said}"
        if isinstance(self.sent, migrate.HandOverUnknown):
            assert not self.here, f"it is here; {said}"
            assert self.sent.guest_is == "unknown"
        elif isinstance(self.sent, migrate.Statistics):
            assert self.there, f"it is not there; {said}"
        else:
            assert self.here, f"it is not here; {said}"
        if self.there:
            assert bytes(self.received.memory) == WHOLE

    async def settle(self) -> None:
        """Find out who owns the guest: the destination's program receives again, and answers."""
        found: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        again = asyncio.create_task(migrate.receive(self.address[4:], listening=found.set_result))
        await found
        try:
            runs = await migrate.resolve(self.guest)
            assert runs == ("there" if self.there else "here")
            assert self.here is not self.there
            assert self.guest.moved is self.there
        finally:
            again.cancel()
            await asyncio.gather(again, return_exceptions=True)


class Net:
    """All links so far, and whether new ones can be made."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.parted = False

    def cut(self) -> None:
        for link in self.links:
            link.abort()

    async def connect(self, *args: Any, **options: Any) -> Link:
        if self.parted:
            raise migrate.ConnectError("the network is parted")
        return await real_connect(*args, **options)


real_connect = connect.connect


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Net:
    net, made = Net(), Link.connection_made

    def connection_made(self: Link, transport: asyncio.BaseTransport) -> None:
        net.links.append(self)
        made(self, transport)

    monkeypatch.setattr(Link, "connection_made", connection_made)
    monkeypatch.setattr(connect, "connect", net.connect)
    return net


def cancel_send(move: Move, _net: Net) -> None:
    move.sender.cancel()


def cancel_receive(move: Move, _net: Net) -> None:
    move.receiver.cancel()


def cancel_both(move: Move, _net: Net) -> None:
    move.sender.cancel()
    move.receiver.cancel()


def cancel_repeatedly(move: Move, _net: Net) -> None:
    """Cancel both, and again while they clean up."""
    for task in (move.sender, move.receiver):
        for turns in (0, 1, 2, 4):
            _after(turns, task.cancel)


def _after(turns: int, call: Callable[[], object]) -> None:
    if turns:
        asyncio.get_running_loop().call_soon(_after, turns - 1, call)
    else:
        call()


def break_off(_move: Move, net: Net) -> None:
    net.cut()


def break_off_and_cancel(move: Move, net: Net) -> None:
    net.cut()
    move.sender.cancel()


def part(_move: Move, net: Net) -> None:
    net.parted = True
    net.cut()


def fail(_move: Move, _net: Net) -> None:
    raise RuntimeError("the work in a thread fails")


FAULTS = [
    cancel_send, cancel_receive, cancel_both, cancel_repeatedly, break_off,
    break_off_and_cancel, part, fail,
]  # fmt: skip


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("fault", FAULTS, ids=[one.__name__ for one in FAULTS])
@pytest.mark.parametrize("kind", LOOPS)
def test_one_owner_after_a_fault_at_any_step(
    kind: str, fault: Callable[[Move, Net], None], channels: int, net: Net, uncollected: None
) -> None:
    """Count steps; for `fail`, count calls in threads.

    Nothing may be left behind either: no task, no view of the memory, no unretrieved error.
    """
    complaints: list[Any] = []
    loop = stepping(LOOPS[kind])
    loop.set_exception_handler(lambda _loop, context: complaints.append(context))
    unknown: list[int] = []

    async def move_with_a_fault(at: int) -> bool:
        net.links.clear()
        net.parted = False
        move = Move()
        loop.steps.arm(at, functools.partial(fault, move, net), calls=fault is fail)
        await move.run(channels, SECONDS if fault is part else RESOLVE_SECONDS)
        over = loop.steps.over
        loop.steps.arm(0, lambda: None)
        net.parted = False
        net.links.clear()
        move.check()
        if isinstance(move.sent, migrate.HandOverUnknown):
            unknown.append(at)
            await move.settle()
        await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"left behind: {left}"
        memory = move.memory
        del move
        net.links.clear()
        memory.append(0)  # raises BufferError if a view of it is left
        return over

    try:
        for at in itertools.count(1):
            try:
                if loop.run_until_complete(move_with_a_fault(at)):
                    break
            except BaseException as error:
                error.add_note(f"{fault.__name__} at step {at} ({kind}, {channels} channels)")
                raise
    finally:
        loop.close()
    assert complaints == []
    assert at > (15 if fault is fail else 70)
    assert (fault is part) == bool(unknown)
