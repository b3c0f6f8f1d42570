"""The source of a guest that QEMU moves: its stream is carried, item by item, in order.

    QEMU --stream--> Intake -> item -> window -> channel -> destination
    QEMU <--return path-- BYTES <-----------------------------------------------------

QEMU decides what is sent and when the guest stops; what it has sent is ours to deliver. An item is
kept until the destination says TAKEN: after a broken connection those are sent again that it has
not taken. Its memory of what the destination holds is exact, so a delta is as good over another
connection.

When all is there the destination has QEMU load it, and asks QEMU whether that went well; so when
READY comes nothing is missing but the end of the stream, without which that QEMU does not run the
guest. GO lets it through. Our QEMU hears from us how it went: as long as we hold its socket, it
waits.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import xxhash

from migrate.advice import advice
from migrate.channels import Dial
from migrate.errors import HandOverUnknown, MigrationError, NotConvergedError, PeerError
from migrate.feeder import Counts
from migrate.journal import Journal
from migrate.link import Link
from migrate.migration import RESOLVE_SECONDS, Migration, Observer
from migrate.parameters import Parameters
from migrate.qemu.governor import Governor
from migrate.qemu.guest import QemuGuest
from migrate.qemu.intake import Item, StreamLost
from migrate.qemu.machine import MachineStatus
from migrate.quantities import format_size
from migrate.workingset import WorkingSet
from proto import capabilities as caps
from proto.frames import HEADER_BYTES, seal
from proto.kernel import PageEncoder, PageHashes
from proto.messages import (
    MAX_RETURNED,
    Blocks,
    Bytes,
    CacheSize,
    Complete,
    Message,
    MessageType,
    Ready,
    Taken,
)

UPDATE_SECONDS = 0.05
# So often it is looked whether QEMU still waits for its answer.
WATCH_SECONDS = 0.05
# What is sent and not taken: as much as the path holds, and what goes over it in so long, since it
# has to go before the guest can run there. Between these bounds, in bytes.
QUEUE_SECONDS = 0.03
LEAST_WINDOW = 3 << 20
MOST_WINDOW = 64 << 20
RATE_SECONDS = 0.5
# QEMU has the whole guest to load before READY comes; it may be slow, but it goes on.
LOAD_SECONDS = 120.0

_OVER = object()


class Window:
    """How much may be on its way: the rate at which the destination takes, and how long it takes.

    `most` is in bytes.
    """

    def __init__(self) -> None:
        self.most = LEAST_WINDOW
        self.rate = 0.0
        self._round_trip = 0.0
        self._sent: deque[tuple[int, float]] = deque()
        self._taken: deque[tuple[float, int]] = deque()

    def sent(self, size: int, now: float) -> None:
        self._sent.append((size, now))

    def taken(self, now: float) -> None:
        """The oldest that was sent has been taken."""
        size, at = self._sent.popleft()
        trip = now - at
        self._round_trip = min(self._round_trip or trip, trip)
        self._taken.append((now, size))
        while now - self._taken[0][0] > RATE_SECONDS:
            self._taken.popleft()
        began = self._taken[0][0]
        if now > began:
            self.rate = sum(size for _, size in self._taken) / (now - began)
            wanted = int(self.rate * (2 * self._round_trip + QUEUE_SECONDS))
            self.most = min(max(wanted, LEAST_WINDOW), MOST_WINDOW)

    def clear(self) -> None:
        """The connection broke: what was sent on it does not count."""
        self._sent.clear()
        self._round_trip = 0.0


class StreamSource(Migration):
    """Carries the stream of a QEMU. See Migration for the parameters."""

    guest: QemuGuest
    required = frozenset({caps.STREAM})

    def __init__(
        self, guest: QemuGuest, link: Link, parameters: Parameters | None = None,
        observer: Observer | None = None, dial: Dial | None = None,
        *, retry: float = 0.0, journal: str = "", earlier: Journal | None = None,
        resolve_timeout: float = RESOLVE_SECONDS, address: str = "",
    ) -> None:  # fmt: skip
        parameters = replace(parameters or Parameters(), page_size=guest.intake.parser.page_size)
        super().__init__(
            guest, link, parameters, observer, dial, retry=retry, journal=journal, earlier=None,
            resolve_timeout=resolve_timeout, address=address,
        )  # fmt: skip
        del earlier  # QEMU begins anew, so nothing that came is of use
        self._encoder: PageEncoder | None = None
        self._working = WorkingSet(self.parameters.page_size)
        self._looked_at = guest.intake.rounds
        self._items: Iterator[Item | None] | None = None
        self._turn: asyncio.Future[object] | None = None
        self._all_read = False
        self._unsent: deque[Item] = deque()  # made, and to be sent, perhaps once more
        self._kept: deque[Item] = deque()  # sent, and not taken
        self._kept_bytes = 0
        self._count = 0  # of all items that were sent
        self._lane = 0
        self._digest = xxhash.xxh3_128()
        self._window = Window()
        self._room = asyncio.Event()
        self._resuming = False
        self._returned = 0
        self._return: asyncio.Queue[bytes] = asyncio.Queue(MAX_RETURNED)
        self._next_update = 0.0
        self._rate_at = self._began, 0, 0

    # -- settings

    def set_parameters(self, parameters: Parameters) -> None:
        """The page size is QEMU's."""
        super().set_parameters(replace(parameters, page_size=self.parameters.page_size))

    # -- the transfer

    async def _transfer(self) -> None:
        self._set_status("setup")
        resumes = self._resuming = self._resumes
        agreement, accept = await self._greet()
        link = self.channels.link
        if self._encoder is None:
            self._make_encoder(agreement)
        if resumes:
            self._return = asyncio.Queue(MAX_RETURNED)  # the destination says it once more
            if not accept.held:
                raise MigrationError("the destination has lost the stream: begin again")
            taken = await self.channels.expect(Taken)
            await self._resume(taken)
            self._resuming = False
            if not taken.items:
                await link.send(Blocks(self.guest.blocks))
            await link.send(Taken(self._returned))
        else:
            await link.send(Blocks(self.guest.blocks))
        await link.send(CacheSize(self._cache.size))
        self._under_way = True
        self.statistics = self.statistics.with_(
            capabilities={"xbzrle": agreement.xbzrle}, channels=self.parameters.channels,
            cache_size=self._cache.size,
        )  # fmt: skip
        if not resumes:
            self.statistics = self.statistics.with_(setup_time=time.monotonic() - self._began)
        self._set_status("active" if self._paused_at is None else "device")
        beside = [asyncio.create_task(self._pass_back())]
        if self.guest.machine is not None:
            governor = Governor(self.guest.machine, self._limit, self._progress, self._hear_of)
            beside.append(asyncio.create_task(governor.run()))
        try:
            await self._carry()
            self.statistics = self.statistics.with_(dirty_sync_count=self.guest.intake.rounds)
            await self._prove()
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    def _limit(self) -> float:
        return self.parameters.limits.downtime_limit

    def _gone_by(self, *, zeros: bool = False) -> int:
        """Pages, but for those of zeros: they fly by, and what is dirty in the end is none."""
        encoder = self._encoder
        if encoder is None:
            return 0
        return encoder.unchanged + encoder.raw + encoder.delta + zeros * encoder.zero

    def _progress(self) -> tuple[int, int]:
        return self._gone_by(), self.guest.intake.received

    def _hear_of(self, status: MachineStatus, expected: float | None) -> None:
        """What QEMU knows."""
        if status.status == "active":
            self.statistics = self.statistics.with_(
                remaining=status.remaining, dirty_pages_rate=float(status.dirty_pages_rate),
                expected_downtime=expected or self.statistics.expected_downtime,
            )  # fmt: skip

    def _make_encoder(self, agreement: caps.Agreement) -> None:
        page_size, intake = self.parameters.page_size, self.guest.intake
        if agreement.xbzrle and self.parameters.cache_max:
            # What is hot shows when it comes again, and then its old content must be there: as
            # much of it as there may be. Memory is taken as pages come.
            size = self._cache.wanted = self._cache.useful(self.parameters.cache_max)
            self.parameters = replace(self.parameters, cache_size=size)
        hashes = PageHashes(self._pages, page_size, self._seed)
        self._encoder = self._new_encoder(hashes, agreement)
        self._encoder.begin_round(intake.rounds)
        intake.encoder = self._encoder
        self._items = intake.items()

    async def _resume(self, taken: Taken) -> None:
        """What the destination has not taken is sent again."""
        first = self._count - len(self._kept)
        if not first <= taken.items <= self._count:
            raise PeerError(f"{taken.items} items were taken, {first} to {self._count} were sent")
        for _ in range(taken.items - first):
            self._drop_oldest()
        self._took_stock(
            -taken.items
        )  # what is to go, QEMU alone knows: it counts down all the same
        self._window.clear()
        self._unsent.extendleft(reversed(self._kept))
        self._kept.clear()
        self._count, self._kept_bytes, self._lane = taken.items, 0, 0
        size = format_size(sum(item.size for item in self._unsent))
        self._notice(f"resuming: {size} of the stream are sent again")

    async def _carry(self) -> None:
        """Sends item after item; the next one is made while one goes out."""
        loop = asyncio.get_running_loop()
        await self._send()
        while not self._all_read:
            if self._turn is None:
                self._turn = loop.run_in_executor(self._worker, self._next)
            made = await asyncio.shield(self._turn)
            self._turn = None
            if made is _OVER:
                self._all_read = True
                break
            if isinstance(made, Item):
                self._unsent.append(made)
                self._turn = loop.run_in_executor(self._worker, self._next)
                await self._send()
            await self._look_around()

    def _next(self) -> object:
        """In the worker thread: the next item, None where none came yet, or that it is over."""
        assert self._items is not None
        if self.guest.intake.rounds > self._looked_at and self._encoder is not None:
            self._looked_at = self.guest.intake.rounds
            self._working.learn(*self._encoder.survey())
        self._cache.resize()
        item = next(self._items, _OVER)
        if isinstance(item, Item):
            self._digest.update(item.body if item.head is None else item.head[HEADER_BYTES:])
        return item

    async def _send(self) -> None:
        """What is not sent. At any moment an item is there, or kept: a break loses none."""
        while self._unsent:
            item = self._unsent[0]
            while self._kept_bytes and self._kept_bytes + item.size > self._window.most:
                self._room.clear()
                await self._room.wait()
            links, channel = self.channels.links, self._lane
            self._lane = (self._lane + 1) % len(links)
            self._kept.append(self._unsent.popleft())
            self._kept_bytes += item.size
            self._count += 1
            self._window.sent(item.size, time.monotonic())
            if item.head is not None and item.data is not None:
                seal(item.head, MessageType.PAGES, channel, len(item.data))
                await links[channel].send_batch(item.head, item.data)
            else:
                await links[channel].send(Bytes(item.body, item.held))

    async def _look_around(self) -> None:
        """What changed since the last item: the guest stands still, the cache's size, the time."""
        intake, now = self.guest.intake, time.monotonic()
        if intake.stopped_at is not None and self._paused_at is None:
            self._paused_at = intake.stopped_at
            self._sent_before_pause = self.sent_bytes
            self._set_status("device")
            self._observer("paused", self.statistics)
        await self._confirm_cache()
        if self._paused_at is None:
            self._check_time()
        if intake.rounds - 1 > self.statistics.dirty_sync_count:
            self.statistics = self.statistics.with_(dirty_sync_count=intake.rounds - 1)
            self._update()
            if self.guest.machine is not None:  # who says how much is dirty then
                self._observer("round", self.statistics)
            self._observer("pass", self.statistics)
        if now >= self._next_update:
            self._next_update = now + UPDATE_SECONDS
            self._update()
            self._observer("progress", self.statistics)

    async def _prove(self) -> None:
        """All is sent: returns when the QEMU over there has loaded it, and nothing is missing."""
        state = self._count.to_bytes(8, "big") + bytes([self.guest.intake.return_path])
        await self.channels.link.send(Complete(self._digest.digest(), state))
        ready = asyncio.ensure_future(self.channels.expect(Ready))
        until = time.monotonic() + LOAD_SECONDS
        try:
            while not ready.done():
                await asyncio.wait({ready}, timeout=WATCH_SECONDS)
                self.guest.check_alive()
                if time.monotonic() > until:
                    raise MigrationError(
                        f"the QEMU over there has not loaded the guest in {LOAD_SECONDS:g} s"
                    )
            ready.result()
        finally:
            ready.cancel()

    async def _done(self) -> None:
        try:
            if not self.guest.driven:
                self.guest.check_alive()
        except StreamLost as error:
            raise HandOverUnknown(
                f"the guest runs at the destination, but {error}: it may run here too. Stop one of "
                "them at once"
            ) from None
        await super()._done()

    def _check_time(self) -> None:
        limits, elapsed = self.parameters.limits, time.monotonic() - self._began
        why = ""
        if limits.timeout and elapsed > limits.timeout:
            why = f"QEMU was not through after {elapsed:.0f} s (--timeout)"
        elif limits.max_rounds and self.guest.intake.rounds > limits.max_rounds:
            why = f"QEMU was not through after {limits.max_rounds} rounds (--max-rounds)"
        if why:
            raise NotConvergedError(f"the migration was given up: {why}")

    # -- what the destination says

    def _aside(self, message: Message) -> bool:
        if isinstance(message, Taken) and not self._resuming:
            self._take(message.items)
            return True
        if isinstance(message, Bytes):
            try:
                self._return.put_nowait(message.data)
            except asyncio.QueueFull:
                raise PeerError("the return path carries more than QEMU takes") from None
            return True
        return super()._aside(message)

    def _take(self, items: int) -> None:
        first = self._count - len(self._kept)
        if not first < items <= self._count:
            raise PeerError(f"{items} items were taken, {first} to {self._count} were sent")
        now = time.monotonic()
        for _ in range(items - first):
            self._drop_oldest()
            self._window.taken(now)
        self._fewest_left = -items
        self._progressed()
        self._room.set()

    def _drop_oldest(self) -> None:
        self._kept_bytes -= self._kept.popleft().size

    async def _pass_back(self) -> None:
        """What the QEMU over there says, ours hears."""
        while True:
            await asyncio.shield(self._say(await self._return.get()))
            await self.channels.link.send(Taken(self._returned))

    async def _say(self, data: bytes) -> None:
        await self.guest.say(data)
        self._returned += 1

    # -- the end

    async def _keep_guest(self) -> None:
        """Nothing: QEMU waits, and lets its guest go on when its stream is closed."""

    async def _undo(self) -> None:
        pass

    async def _let_go(self) -> None:
        pass

    def _failure(self, error: BaseException) -> MigrationError | None:
        if self._paused_at is not None and not self.committed:
            self._paused_at = None
            self._observer("resumed", self.statistics)  # as soon as this is over
        self.resumable = False  # QEMU begins anew
        return super()._failure(error)

    def _advise(self) -> None:
        if self._encoder is not None and self.guest.intake.rounds > 2:
            found = advice(self.statistics, self._working, cache_max=self.parameters.cache_max)
            self.statistics = self.statistics.with_(advice=found)

    def _update(self) -> None:
        encoder, s = self._encoder, self.statistics
        if encoder is not None:
            s = s.with_(
                **Counts.of(encoder)._asdict(),
                xbzrle_active=encoder.active,
                evictions=self._cache.evictions,
            )
            if self.guest.machine is None or not s.remaining:  # nobody says what is dirty
                s = s.with_(remaining=max(s.total - self._gone_by(zeros=True) * s.page_size, 0))
        now, sent, pages = time.monotonic(), self.sent_bytes, self._gone_by()
        at, sent_then, pages_then = self._rate_at
        if now - at >= UPDATE_SECONDS:
            s = s.with_(
                mbps=(sent - sent_then) * 8 / (now - at) / 1e6,
                pages_per_second=(pages - pages_then) / (now - at),
            )
            self._rate_at = now, sent, pages
        self.statistics = s
        super()._update()
