"""Compression in migrations: where it is used, what arrives, and what the numbers say."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import migrate
from migrate.policy.compression import CompressionPolicy
from migrate.qemu.item_sender import ItemSender
from migrate.qemu.stream.intake import Item
from migrate.source.settings import Settings
from migrate.statistics import info_migrate, query_migrate
from migrate.transport.rate_limit import RateLimit
from proto.codec.kernel import PageEncoder
from proto.codec.pageset import PageSet
from proto.wire.capabilities import Agreement
from proto.wire.compressed import BatchCompressor, BatchOpener
from proto.wire.frames import HEADER_BYTES
from tests.programs import Program, destination

SIZE = 24 << 20
# As much as a real guest: about a quarter is left at level 1.
TEXT = b"".join(
    b"%06d: what a database, or a log, or a program's heap may look like %x\n" % (n, n * 7919)
    for n in range(200_000)
)


def text(size: int = SIZE) -> bytearray:
    return bytearray((TEXT * (size // len(TEXT) + 1))[:size])


async def move(
    memory: bytearray, *, channels: int = 1, rate: int = 20 << 20, **parameters: Any
) -> migrate.Statistics:
    """Move a buffer over loopback, with `rate` bytes a second; check what arrives."""
    address = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        receiver = group.create_task(
            migrate.receive("127.0.0.1:0", listening=address.set_result)
        )  # fmt: skip
        statistics = await migrate.send(
            migrate.BufferGuest(memory), str(await address),
            migrate.Parameters(
                channels=channels, limits=migrate.Limits(max_bandwidth=rate), **parameters
            ),
        )  # fmt: skip
    assert receiver.result().memory == memory
    return statistics


@pytest.mark.asyncio
@pytest.mark.parametrize("channels", [1, 3])
async def test_text_over_a_slow_link_is_compressed(channels: int) -> None:
    statistics = await move(text(), channels=channels)
    assert statistics.compression_pages > 0.5 * SIZE / 4096
    assert statistics.compression_rate > 2
    # The first batches go before the link is known to be slow.
    assert statistics.transferred < 0.8 * SIZE
    assert statistics.normal == SIZE // 4096
    block = query_migrate(statistics)["compression"]
    assert block["pages"] == statistics.compression_pages
    assert block["compressed-size"] < statistics.transferred
    assert f"compression pages: {statistics.compression_pages} pages" in info_migrate(statistics)


@pytest.mark.asyncio
async def test_random_memory_is_sent_as_it_is() -> None:
    statistics = await move(bytearray(os.urandom(SIZE)))
    assert statistics.compression_pages == 0
    assert "compression" not in query_migrate(statistics)
    assert statistics.transferred > SIZE


@pytest.mark.asyncio
async def test_zstd_can_be_switched_off() -> None:
    statistics = await move(text(), capabilities={"zstd": False})
    assert statistics.compression_pages == 0
    assert not statistics.capabilities["zstd"]


@pytest.mark.asyncio
async def test_each_level_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches at all levels, mixed with some that are not compressed, while a thread writes."""
    levels = itertools.cycle([1, None, -7, -5, 3, 9, 19])
    monkeypatch.setattr(CompressionPolicy, "choose", lambda *_, **__: next(levels))
    monkeypatch.setattr(CompressionPolicy, "learn", lambda *_: None)
    memory = text(8 << 20)
    guest = migrate.BufferGuest(memory)
    address = asyncio.get_running_loop().create_future()
    stop = threading.Event()

    def write() -> None:
        try:
            for number in itertools.count():
                if stop.is_set():
                    return
                with guest.writing():
                    memory[number * 4093 % len(memory)] ^= 1
        except migrate.GuestMoved:
            pass

    thread = threading.Thread(target=write)
    thread.start()
    try:
        async with asyncio.TaskGroup() as group:
            receiver = group.create_task(
                migrate.receive("127.0.0.1:0", listening=address.set_result)
            )  # fmt: skip
            statistics = await migrate.send(
                guest, str(await address), migrate.Parameters(channels=2)
            )  # fmt: skip
    finally:
        stop.set()
        await asyncio.to_thread(thread.join)
    assert statistics.compression_pages > 0
    assert receiver.result().memory == memory


@pytest.mark.programs
@pytest.mark.parametrize("off", ["source", "destination"])
def test_either_side_can_switch_it_off(tmp_path: Path, off: str) -> None:
    guest = tmp_path / "guest"
    guest.write_bytes(text())
    switch = {off: ["--capability", "zstd=off"]}
    receiver, address = destination(
        "--output", str(tmp_path / "there"), *switch.get("destination", [])
    )
    source = Program(
        "migrate-src", "--json", "--max-bandwidth", "20m", "--guest", f"file:{guest}",
        *switch.get("source", []), address,
    )  # fmt: skip
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0, receiver.err
    assert "compression" not in json.loads(source.out)
    assert ("no zstd: it is not used" in source.err) == (off == "destination")
    assert (tmp_path / "there").read_bytes() == guest.read_bytes()


@pytest.mark.programs
def test_a_wrong_level_is_refused() -> None:
    for level, says in (("20", "it is -7 to 19"), ("fast", "'fast' is no number")):
        source = Program("migrate-src", "--compress-level", level, "tcp:127.0.0.1:1")
        assert source.wait() == 2
        assert says in source.err


class Stream:
    """Stands for a QEMU's stream: some batches of pages, and nothing behind them."""

    rounds = 1
    stopped_at = None

    def __init__(self, count: int) -> None:
        self._count = count

    def items(self, encoder: PageEncoder) -> Iterator[Item]:
        memory, dirty = memoryview(text(self._count * 4096)), PageSet.full(self._count).bits
        for page in range(self._count):
            encoder.feed_memory(memory, dirty, page, page + 1, 1)
            yield Item(*encoder.finish_batch())


class Sink:
    """Stands for a link, and notes what goes over it."""

    def __init__(self) -> None:
        self.batches: list[tuple[bytes, bytes]] = []

    async def send_batch(self, head: memoryview, data: memoryview) -> None:
        self.batches.append((bytes(head), bytes(data)))


@pytest.mark.asyncio
async def test_the_last_batches_of_a_stream_are_sent_though_they_are_still_compressed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compress = BatchCompressor.compress

    def slowly(self: BatchCompressor, head: memoryview, data: memoryview) -> bytearray:
        time.sleep(0.05)
        return compress(self, head, data)

    monkeypatch.setattr(BatchCompressor, "compress", slowly)
    monkeypatch.setattr(CompressionPolicy, "choose", lambda *_, **__: 1)
    count = 7
    limit = RateLimit()
    settings = Settings(count * 4096, migrate.Parameters(), limit, lambda _text: None)
    with ThreadPoolExecutor(1) as worker:
        context: Any = SimpleNamespace(
            settings=settings, parameters=settings.parameters, seed=bytes(16),
            in_worker=lambda work: asyncio.get_running_loop().run_in_executor(worker, work),
        )  # fmt: skip
        stream: Any = Stream(count)
        agreement = Agreement(frozenset({"xbzrle", "zstd"}))
        sender = ItemSender(stream, context, agreement, lambda: None)
        sink: Any = Sink()
        channels: Any = SimpleNamespace(links=[sink])
        await sender.send_all(channels, lambda: asyncio.sleep(0))
        sender.stage.close()
    assert len(sink.batches) == sender.count == count
    opener = BatchOpener()
    bodies = [memoryview(head)[HEADER_BYTES:] for head, _ in sink.batches]
    pages = b"".join(bytes(opener.decompress(body)[1]) for body in bodies)
    assert pages == text(count * 4096)
