"""The second stage: compress batches on their way to the channels, where that pays.

    encoder --batch--> choose a level --> one of the threads --> channel
                            |                                       ^
                            +------------ as it is -----------------+

Batches keep their order. While a batch is compressed, the next ones are encoded and compressed too:
`depth` of them at most.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from migrate.policy.advice import compression_notice
from migrate.policy.compression import CompressionPolicy, Kind, LinkMeter
from migrate.source.settings import Settings
from migrate.transport.link import Link
from proto.wire import capabilities as caps
from proto.wire.compressed import BatchCompressor
from proto.wire.frames import seal
from proto.wire.messages import MessageType

# More threads than this take the processors of the guest and of others.
MAX_THREADS = 4
# A compressed batch must be at most this share of what it was; else it is sent as it was.
WORTH_SENDING = 0.97
NOTHING = memoryview(b"")


class Trial(NamedTuple):
    """What it took to compress a batch: sizes in bytes."""

    kind: Kind
    level: int
    before: int
    after: int
    seconds: float


def try_level(
    compressor: BatchCompressor, kind: Kind, level: int, head: memoryview, data: memoryview
) -> tuple[bytearray, Trial]:
    """Compress a batch; return the head of its frame, not sealed, and what it took."""
    began = time.perf_counter()
    frame = compressor.compress(head, data)
    seconds = time.perf_counter() - began
    return frame, Trial(kind, level, len(head) + len(data), len(frame), seconds)


class Batch(NamedTuple):
    """A sealed PAGES frame and its raw pages; they are as compressed if `compressed` is set."""

    head: memoryview
    data: memoryview
    compressed: bool = False
    trial: Trial | None = None

    @property
    def size(self) -> int:
        """Bytes on the wire."""
        return len(self.head) + len(self.data)


def usable_threads() -> int:
    """Return how many threads compress at the same time."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


class SecondStage:
    """Compresses the batches of one migration.

    depth                -- batches that may wait until they are compressed; 0 without compression
    pages, size, content -- compressed batches: their pages, and their bytes after and before
    batches, busy        -- compressed batches, and how many of them their sender has waited for
    """

    def __init__(self, settings: Settings, agreement: caps.Agreement) -> None:
        threads = usable_threads()
        self.depth = threads if agreement.zstd else 0
        self.pages = self.size = self.content = 0
        self.batches = self.busy = 0
        self.policy = CompressionPolicy(threads, settings.parameters.compress_level)
        self.meter = LinkMeter()
        self._settings = settings
        self._told: int | None = None
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        # One for each thread and level: two threads must not use the same one.
        self._compressors: dict[tuple[int, int], BatchCompressor] = {}

    @property
    def bandwidth(self) -> float:
        """Bytes per second that the link carries, or may carry; 0.0 when that is unknown."""
        limit = float(self._settings.parameters.limits.max_bandwidth)
        measured = self.meter.bandwidth
        return min(limit, measured) if limit and measured else limit or measured

    def begin_round(self) -> None:
        self.policy.begin_round()
        self.meter.pause()

    def start(
        self, head: memoryview, data: memoryview, channel: int, *, paused: bool = False
    ) -> asyncio.Future[Batch]:
        """Begin to compress a sealed batch, if that pays. Its memory belongs to us now.

        paused -- the guest is paused: there is nothing to encode meanwhile
        """
        loop = asyncio.get_running_loop()
        kind = Kind.of(head, data)
        level = None
        if self.depth:
            size = len(head) + len(data)
            level = self.policy.choose(kind, size, self.bandwidth, paused=paused)
        if level is None:
            done: asyncio.Future[Batch] = loop.create_future()
            done.set_result(Batch(head, data))
            return done
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, "compress")
        return loop.run_in_executor(self._pool, self._compress, kind, level, head, data, channel)

    def _compress(
        self, kind: Kind, level: int, head: memoryview, data: memoryview, channel: int
    ) -> Batch:
        """Return the batch as it is to be sent. Runs in a thread of the pool."""
        key = threading.get_ident(), level
        compressor = self._compressors.get(key) or BatchCompressor(level)
        self._compressors[key] = compressor
        frame, trial = try_level(compressor, kind, level, head, data)
        if trial.after > WORTH_SENDING * trial.before:
            return Batch(head, data, trial=trial)
        seal(frame, MessageType.PAGES, channel, compressed=True)
        return Batch(memoryview(frame), NOTHING, True, trial)

    async def finish(self, coming: asyncio.Future[Batch]) -> Batch:
        """Wait until a batch is compressed. A cancellation leaves the batch to another caller."""
        if not coming.done():
            self.busy += 1
            await asyncio.wait({coming})
        return coming.result()

    async def send(self, link: Link, batch: Batch, pages: int, channels: int) -> None:
        """Send a batch that is compressed, or as it was.

        pages    -- that it holds
        channels -- how many channels there are
        """
        if batch.trial is not None:
            self.policy.learn(*batch.trial)
        began = time.perf_counter()
        await link.send_batch(batch.head, batch.data)
        now = time.perf_counter()
        self.meter.add(now, batch.size, now - began, channels)
        if batch.compressed and batch.trial is not None:
            self.batches += 1
            self.pages += pages
            self.size += batch.size
            self.content += batch.trial.before

    def notice(self) -> str:
        """Return a sentence if compression has begun or ended since this was last asked, or ""."""
        level, ratio = self.policy.in_use()
        if (level is None) == (self._told is None):
            return ""
        self._told = level
        return compression_notice(level, ratio)

    @property
    def saved(self) -> int:
        """Bytes that compression has saved."""
        return self.content - self.size

    def counters(self) -> dict[str, int]:
        """Return the counters for the statistics."""
        return {
            "compression_pages": self.pages,
            "compression_busy": self.busy,
            "compression_batches": self.batches,
            "compressed_size": self.size,
            "compressed_content": self.content,
        }

    def close(self) -> None:
        """Let the threads end."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
