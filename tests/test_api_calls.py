"""What the library's calls promise, besides moving a buffer."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import inspect
import os
import pydoc
import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest

import migrate
from migrate import errors
from migrate.guests.buffer import BufferPlace
from migrate.ownership.custody import Custody
from migrate.ownership.journal import Journal
from proto.wire.messages import GuestInfo
from proto.wire.ownership import Claim, Event, Role

NOWHERE = "tcp:127.0.0.1:1"
SIZE = 100_001


async def move(guest: migrate.BufferGuest, **options: Any) -> tuple[Any, Any]:
    """Return what `send` and `receive` return, or raise."""
    found = asyncio.get_running_loop().create_future()
    receiver = asyncio.create_task(
        migrate.receive("127.0.0.1:0", listening=found.set_result, **options)
    )
    sent = (await asyncio.gather(migrate.send(guest, str(await found)), return_exceptions=True))[0]
    if not isinstance(sent, migrate.Statistics):
        await asyncio.wait({receiver}, timeout=1)
        receiver.cancel()
    return sent, (await asyncio.gather(receiver, return_exceptions=True))[0]


async def is_open(guest: migrate.BufferGuest) -> bool:
    try:
        async with asyncio.timeout(5), guest.writing():
            return True
    except migrate.GuestMoved:
        return False


# ---------------------------------------------------------------- arguments

SENT = {
    "no-guest": lambda guest: migrate.send(guest.memory.view, NOWHERE),
    "a-port": lambda guest: migrate.send(guest, 4444),
    "a-path": lambda guest: migrate.send(guest, "/run/guest"),
    "a-dict": lambda guest: migrate.send(guest, NOWHERE, {"channels": 2}),
    "no-observer": lambda guest: migrate.send(guest, NOWHERE, observer=5),
    "no-time": lambda guest: migrate.send(guest, NOWHERE, retry=float("nan")),
    "before": lambda guest: migrate.send(guest, NOWHERE, connect_timeout=-1),
    "for-ever": lambda guest: migrate.send(guest, NOWHERE, resolve_timeout=float("inf")),
    "a-word": lambda guest: migrate.send(guest, NOWHERE, retry="60s"),
    "a-directory": lambda guest: migrate.send(guest, NOWHERE, credentials="/etc/pki"),
}
RECEIVED = {
    "a-number": lambda: migrate.receive(4444),
    "no-buffer": lambda: migrate.receive("0", into="text"),
    "read-only": lambda: migrate.receive("0", into=bytes(10)),
    "read-only-view": lambda: migrate.receive("0", into=memoryview(bytearray(9)).toreadonly()),
    "every-other": lambda: migrate.receive("0", into=numpy.zeros(10)[::2]),
    "fortran": lambda: migrate.receive("0", into=numpy.zeros((3, 3), order="F")),
    "objects": lambda: migrate.receive("0", into=numpy.zeros(10, dtype=object)),
    "times": lambda: migrate.receive("0", into=numpy.zeros(10, dtype="M8[s]")),
    "no-size": lambda: migrate.receive("0", max_size=0),
    "no-listener": lambda: migrate.receive("0", listening=5),
    "no-network": lambda: migrate.receive("0", allow="10.0.0.0/99"),
}
GUESTS = {
    "read-only": lambda: migrate.BufferGuest(b"bytes"),
    "frozen": lambda: migrate.BufferGuest(frozen()),
    "objects": lambda: migrate.BufferGuest(numpy.zeros(10, dtype=object)),
    "times": lambda: migrate.BufferGuest(numpy.zeros(10, dtype="M8[s]")),
    "a-date": lambda: migrate.BufferGuest(datetime.datetime.now()),
    "state": lambda: migrate.BufferGuest(bytearray(10), state=b"bytes"),
    "pages": lambda: migrate.BufferGuest(bytearray(10), page_size=1000),
}


def frozen() -> Any:
    array = numpy.zeros(10)
    array.flags.writeable = False
    return array


@pytest.mark.asyncio
@pytest.mark.parametrize("call", SENT.values(), ids=SENT)
async def test_send_refuses_wrong_arguments_before_it_connects(
    call: Callable[[Any], Any],
) -> None:
    guest = migrate.BufferGuest(bytearray(10))
    with pytest.raises(migrate.UsageError) as raised:
        await call(guest)
    assert raised.value.guest_is == "here"
    assert await is_open(guest)


@pytest.mark.asyncio
@pytest.mark.parametrize("call", RECEIVED.values(), ids=RECEIVED)
async def test_receive_refuses_wrong_arguments_before_it_listens(
    call: Callable[[], Any],
) -> None:
    with pytest.raises(migrate.UsageError):
        await call()


@pytest.mark.parametrize("make", GUESTS.values(), ids=GUESTS)
def test_buffer_guest_refuses_wrong_arguments(make: Callable[[], Any]) -> None:
    with pytest.raises(migrate.UsageError):
        make()


@pytest.mark.asyncio
async def test_page_size_that_differs_from_the_marks_is_refused() -> None:
    guest = migrate.BufferGuest(bytearray(10), marks=True, page_size=1024)
    with pytest.raises(migrate.UsageError, match="marks pages of 1024 bytes"):
        await migrate.send(guest, NOWHERE)


@pytest.mark.asyncio
async def test_larger_buffer_receives_the_guest_at_its_beginning() -> None:
    there = bytearray(b"?" * (SIZE + 5000))
    _, received = await move(migrate.BufferGuest(bytearray(b"x" * SIZE)), into=there)
    assert there == b"x" * SIZE + b"?" * 5000
    assert len(received.memory) == SIZE
    assert received.memory.obj is there


# ---------------------------------------------------------------- the door


@pytest.mark.asyncio
async def test_coroutines_write_during_a_migration_and_learn_that_the_guest_moved() -> None:
    memory = bytearray(1 << 20)
    guest = migrate.BufferGuest(memory)

    async def work(at: int) -> str:
        with contextlib.suppress(migrate.GuestMoved):
            while True:
                async with guest.writing():
                    memory[at] = (memory[at] + 1) % 256
                    await asyncio.sleep(0)
                    memory[-at] = memory[at]
                await asyncio.sleep(0)
        return "moved"

    writers = [asyncio.create_task(work(at)) for at in (1, 2, 3)]
    sent, received = await move(guest)
    assert sent.status == "completed"
    assert await asyncio.gather(*writers) == ["moved"] * 3
    assert bytes(received.memory) == memory
    assert all(memory[at] == memory[-at] for at in (1, 2, 3)), "the guest was stopped in a write"


@pytest.mark.asyncio
async def test_plain_with_in_a_loop_warns_and_never_stops_the_loop() -> None:
    guest = migrate.BufferGuest(bytearray(10))
    with pytest.warns(RuntimeWarning, match="write `async with guest.writing"), guest.writing():
        pass
    with guest.writing():
        pass  # it is said once
    await guest.pause()
    with pytest.raises(RuntimeError, match="would stop the event loop"), guest.writing():
        pass
    await guest.resume()
    assert await is_open(guest)


@pytest.mark.asyncio
@pytest.mark.parametrize("threads", [False, True])
async def test_writer_inside_may_enter_again_during_a_pause(
    threads: bool,
) -> None:
    guest = migrate.BufferGuest(bytearray(10))
    inside, deeper = threading.Event(), threading.Event()

    def in_a_thread() -> None:
        with guest.writing():
            inside.set()
            deeper.wait()
            with guest.writing():
                pass

    async def in_a_task() -> None:
        async with guest.writing():
            inside.set()
            while not deeper.is_set():
                await asyncio.sleep(0.001)
            async with guest.writing():
                pass

    writer = asyncio.ensure_future(asyncio.to_thread(in_a_thread) if threads else in_a_task())
    while not inside.is_set():
        await asyncio.sleep(0.001)
    pausing = asyncio.create_task(guest.pause())
    await asyncio.sleep(0.01)
    assert not pausing.done()
    deeper.set()
    async with asyncio.timeout(5):
        await asyncio.gather(writer, pausing)


@pytest.mark.asyncio
async def test_cancelled_waiting_writer_leaves_the_lock_unchanged() -> None:
    guest = migrate.BufferGuest(bytearray(10))
    await guest.pause()
    waiting = asyncio.create_task(is_open(guest))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await guest.resume()
    await guest.pause()
    await guest.resume()
    assert await is_open(guest)


@pytest.mark.asyncio
async def test_writers_may_keep_all_threads_of_the_loop_busy() -> None:
    """The README's writer uses asyncio.to_thread; a migration needs none of those threads."""
    memory, stop = bytearray(1 << 20), threading.Event()
    guest = migrate.BufferGuest(memory)

    def work() -> None:
        with contextlib.suppress(migrate.GuestMoved):
            while True:
                with guest.writing():
                    memory[7] = (memory[7] + 1) % 256
                stop.wait(0.001)

    threads = min(32, (os.cpu_count() or 1) + 4)
    jobs = [asyncio.create_task(asyncio.to_thread(work)) for _ in range(2 * threads)]
    await asyncio.sleep(0.05)
    try:
        sent, received = await move(guest)
    finally:
        await guest.release()
        await asyncio.gather(*jobs)
    assert sent.status == "completed"
    assert bytes(received.memory) == memory


# ---------------------------------------------------------------- callbacks


def wrong() -> Any:
    raise LookupError("the callback is wrong")


async def fine() -> None:
    pass


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"state": wrong}, "LookupError: the callback is wrong"),
        ({"state": lambda: "text"}, "state= returned str: it has to be bytes"),
        ({"state": lambda: bytes(2 << 20)}, "no more than 1048576 travel"),
        ({"pause": wrong, "resume": fine}, "LookupError: the callback is wrong"),
        ({"pause": wrong, "resume": wrong}, "resume= raised LookupError"),
    ],
)
async def test_callback_that_raises_fails_the_migration_and_the_guest_stays(
    options: dict[str, Any], said: str
) -> None:
    guest = migrate.BufferGuest(bytearray(b"x" * SIZE), **options)
    sent, received = await move(guest)
    assert isinstance(sent, migrate.MigrationError)
    assert said in str(sent)
    assert sent.guest_is == "here"
    assert isinstance(received, migrate.MigrationError)
    assert received.guest_is == "there"
    assert await is_open(guest)


@pytest.mark.asyncio
async def test_pause_and_resume_may_be_plain_functions() -> None:
    calls: list[str] = []
    guest = migrate.BufferGuest(
        bytearray(b"x" * SIZE), pause=lambda: calls.append("pause"),
        resume=lambda: calls.append("resume"),
    )  # fmt: skip
    sent, _ = await move(guest)
    assert sent.status == "completed"
    assert calls == ["pause"]


@pytest.mark.asyncio
async def test_guest_that_cannot_be_started_is_reclaimed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def start(self: BufferPlace, state: bytes) -> str:
        raise TypeError("nobody has thought of this")

    monkeypatch.setattr(BufferPlace, "start", start)
    guest = migrate.BufferGuest(bytearray(b"x" * SIZE))
    sent, received = await move(guest)
    assert isinstance(sent, migrate.NotStartedError)
    assert "TypeError: nobody has thought of this" in str(sent)
    assert await is_open(guest)
    assert isinstance(received, migrate.NotStartedError)


@pytest.mark.asyncio
async def test_guest_that_may_have_been_started_is_not_reclaimed() -> None:
    class Irrevocable(BufferPlace):
        irrevocable = True

        async def start(self, state: bytes) -> str:
            raise TypeError("after it was told to go on")

    place = Irrevocable(GuestInfo("buffer", 10, 4096, bytes(16)))
    custody = Custody(place, Journal(Role.DESTINATION, bytes(16)))
    await custody.prepare()
    for _ in range(2):
        with pytest.raises(migrate.MigrationError, match="whether the guest was started"):
            await custody.take_over(Event.GO)
        assert custody.journal.claim is Claim.OWNER


# ---------------------------------------------------------------- what is returned, and raised


@pytest.mark.asyncio
async def test_guest_that_has_moved_cannot_be_sent_again() -> None:
    guest = migrate.BufferGuest(bytearray(b"x" * SIZE))
    await move(guest)
    with pytest.raises(migrate.UsageError, match="has moved") as raised:
        await migrate.send(guest, NOWHERE)
    assert raised.value.guest_is == "there"
    with pytest.raises(migrate.UsageError, match="nothing is open here"):
        await migrate.resolve(guest)


@pytest.mark.asyncio
@pytest.mark.parametrize("keep", ["here", "there"])
async def test_resolve_accepts_the_answer_of_a_person(
    keep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: object) -> str:
        return "nobody is there"

    monkeypatch.setattr("migrate.source.hand_over.ask_until_known", fails)
    monkeypatch.setattr("migrate.ownership.ask.ask_until_known", fails)
    monkeypatch.setattr("migrate.source.hand_over.HandOver._say_go", _break_off)
    guest = migrate.BufferGuest(bytearray(b"x" * SIZE))
    sent, _ = await move(guest, resolve_timeout=0.1)
    assert isinstance(sent, migrate.HandOverUnknown)
    assert sent.guest_is == "unknown"
    with pytest.raises(migrate.UsageError, match="has moved, or may have") as raised:
        await migrate.send(guest, NOWHERE)
    assert raised.value.guest_is == "unknown"
    with pytest.raises(migrate.HandOverUnknown, match="still not known"):
        await migrate.resolve(guest, timeout=0.1)
    with pytest.raises(migrate.UsageError, match="it is 'here' or 'there'"):
        await migrate.resolve(guest, keep="both")  # type: ignore[arg-type]
    assert await migrate.resolve(guest, keep=keep) == keep  # type: ignore[arg-type]
    assert await is_open(guest) == (keep == "here")
    if keep == "here":
        monkeypatch.undo()
        sent, received = await move(guest)
        assert sent.status == "completed"
        assert bytes(received.memory) == b"x" * SIZE


async def _break_off(self: Any) -> None:
    self._channels.link.abort()
    raise migrate.PeerLost("the connection broke")


def test_all_exceptions_are_public_and_documented() -> None:
    raised = {
        name for name, one in vars(errors).items()
        if inspect.isclass(one) and issubclass(one, Exception) and one.__module__ == errors.__name__
    }  # fmt: skip
    of_programs = {"JournalError", "QemuError", "OnCompleteError"}
    assert raised - of_programs <= set(migrate.__all__)
    assert migrate.__doc__ is not None
    for name in (*raised - of_programs, "MemoryInUse", "GuestMoved"):
        assert f"{name} " in migrate.__doc__, name


def test_public_names_are_listed_by_dir() -> None:
    assert set(migrate.__all__) <= set(dir(migrate))
    text = pydoc.render_doc("migrate", renderer=pydoc.plaintext)
    for name in migrate.__all__:
        assert name in text.split("DESCRIPTION")[1], name
        assert getattr(migrate, name) is not None
