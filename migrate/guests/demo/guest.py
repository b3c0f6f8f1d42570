"""A demo guest at the source: the load generator of the seed, as a process of its own."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any

from migrate.errors import MigrationError, UsageError
from migrate.guests.demo.handle import DemoProcess
from migrate.guests.demo.layout import Command, DemoShape, Owner, State
from migrate.guests.guest import MemoryGuest, no_limit
from migrate.memory.dirty import DirtyTracker, MarkTracker
from migrate.units import parse_size
from proto.codec.kernel import PageEncoder

# What travels beside the memory: magic, hot, stride, rate, random, sweep, index.
STATE_FORMAT = struct.Struct(">4sQQdQQQ")
STATE_MAGIC = b"demo"
# Bounds for what a source sends.
MAX_STRIDE = 1 << 62
MAX_RATE = 1e18
# Between two looks whether the guest has filled its memory.
FILL_POLL_SECONDS = 0.005


def parse_demo(spec: str, page_size: int) -> DemoShape:
    """Parse `[SIZE][,hot=SIZE][,stride=BYTES][,rate=N][,fill=zero|random]`. Raises UsageError."""
    values: dict[str, str] = {}
    for position, item in enumerate(spec.split(",")) if spec else ():
        name, equals, value = item.partition("=")
        if not equals and position == 0:
            name, value = "size", item
        if name not in ("size", "hot", "stride", "rate", "fill") or not value or name in values:
            raise UsageError(
                f"guest demo: {item!r} is not understood: write demo[:SIZE][,hot=SIZE]"
                "[,stride=BYTES][,rate=N][,fill=zero|random]"
            )
        values[name] = value
    size = parse_size(values.get("size", "16m"), "guest demo: size")
    hot = parse_size(values.get("hot", str(size)), "guest demo: hot")
    stride = parse_size(values.get("stride", "1024"), "guest demo: stride")
    fill = values.get("fill", "zero")
    rate = values.get("rate", "0")
    if not rate.isdecimal() or len(rate) > 12:
        raise UsageError(f"guest demo: rate {rate!r} is not a number of writes per second")
    if fill not in ("zero", "random"):
        raise UsageError(f"guest demo: fill {fill!r} is neither zero nor random")
    if not 0 < hot <= size or stride == 0:
        raise UsageError(
            f"guest demo: hot={hot} and stride={stride} do not fit a guest of {size} bytes: "
            "hot must be 1 byte to the whole size, stride at least 1"
        )
    return DemoShape(size, hot, stride, float(rate), fill == "random", page_size)


def pack_state(shape: DemoShape, sweep: int, index: int) -> bytes:
    """Return the state of a demo guest as it travels."""
    return STATE_FORMAT.pack(
        STATE_MAGIC, shape.hot, shape.stride, shape.rate, shape.random, sweep, index
    )


def unpack_state(state: bytes, size: int, page_size: int) -> tuple[DemoShape, int, int]:
    """Return shape, sweep and index of a guest of `size` bytes, from what a source has sent.

    Raises MigrationError for a state that cannot be.
    """
    try:
        magic, hot, stride, rate, random, sweep, index = STATE_FORMAT.unpack(state)
    except struct.error:
        magic = b""
    if (
        magic != STATE_MAGIC
        or not 0 < hot <= size
        or not 0 < stride <= MAX_STRIDE
        or not 0 <= rate < MAX_RATE
        or random > 1
        or index >= -(-hot // stride)
    ):
        raise MigrationError("the state of the demo guest makes no sense")
    return DemoShape(size, hot, stride, rate, bool(random), page_size), sweep, index


class DemoGuest(MemoryGuest):
    """A demo guest at the source: started here, or attached to with `demo:pid=N`."""

    kind = "demo"
    marks = True
    can_throttle = True

    def __init__(self, process: DemoProcess) -> None:
        process.lock()
        self.process = process
        self.pid, self.start_time = process.pid, process.start_time
        self.description = f"demo guest, process {process.pid}"
        self.memory = process.content()

    @classmethod
    def open(cls, spec: str, page_size: int, start_time: str = "") -> DemoGuest:
        """Start the guest that `spec` describes, or attach to that of `pid=N`. Raises UsageError.

        start_time -- of the process in `pid=N`, if it is known
        """
        if spec.startswith("pid="):
            pid = spec.removeprefix("pid=")
            if not pid.isdecimal():
                raise UsageError(f"guest demo: {spec!r} does not name a process: write pid=1234")
            process = DemoProcess.attach(int(pid), start_time)
            if process.shape.page_size != page_size:
                raise UsageError(
                    f"the demo guest in process {pid} has pages of {process.shape.page_size} "
                    f"bytes: give --page-size {process.shape.page_size}"
                )
            return cls(process)
        return cls(DemoProcess.create(parse_demo(spec, page_size), paused=False))

    async def make_ready(self) -> None:
        """Wait until the guest has filled its memory, however large, and counts."""
        if self.process.owner != Owner.OURS:
            raise UsageError(
                f"the demo guest in process {self.pid} is not ours to move: it was given up to "
                "another machine (migrate-src resolve tells)"
            )
        while self.process.state == State.STARTING and self.process.alive():
            await asyncio.sleep(FILL_POLL_SECONDS)
        await self.process.run()

    def track(
        self, encoder: PageEncoder, downtime_limit: Callable[[], float] = no_limit
    ) -> DirtyTracker:
        return MarkTracker(self.process.marks, encoder.pages)

    async def pause(self) -> None:
        await self.process.pause()

    async def resume(self) -> None:
        await self.process.run()

    async def throttle(self, percent: int) -> None:
        self.process.throttle = percent

    def state(self) -> bytes:
        return pack_state(self.process.shape, *self.process.position)

    async def relinquish(self) -> None:
        self.process.throttle = 0  # should the guest come back, it must not be throttled
        self.process.owner = Owner.RELINQUISHED

    async def reclaim(self) -> None:
        self.process.owner = Owner.OURS

    async def release(self) -> None:
        self.process.command(Command.END)

    async def close(self) -> None:
        self.process.close()

    def facts(self) -> dict[str, Any]:
        return self.process.facts()

    @classmethod
    def reopen(cls, facts: dict[str, Any]) -> DemoGuest:
        """Return a guest that an earlier program relinquished. Raises MigrationError."""
        return cls(DemoProcess.from_facts(facts))
