"""The destination: receives one guest, verifies it, and runs it when it is told GO.

    setup   HELLO, GUEST -> a place for it, or a reason why not, before any page -> ACCEPT
    active  PAGES are checked, then applied, by a worker thread; ROUND is confirmed when all of
            the round is in memory, digested where it came to rest, and on its way to disk
    device  COMPLETE: the digest of the whole memory must match -> READY
    done    GO -> the guest is started -> RUNNING

Whatever fails before GO, the place is discarded: half a guest never runs. After GO the guest is
ours; if it cannot be started, ERROR NOT_STARTED says so, and it never will be.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from migrate.digest import ChunkDigests
from migrate.errors import (
    MigrationError,
    MismatchError,
    NotStartedError,
    PeerError,
    PeerLost,
    peer_error,
)
from migrate.guests.guest import Place
from migrate.link import Link
from proto import ErrorCode, ProtoError
from proto import capabilities as caps
from proto.frames import Frame
from proto.kernel import PageDecoder
from proto.messages import (
    DIGEST_CHUNK,
    Accept,
    CacheSize,
    Complete,
    Error,
    Go,
    GuestInfo,
    Hello,
    MessageType,
    Ready,
    Round,
    RoundAck,
    Running,
    unpack,
)

HANDSHAKE_SECONDS = 15.0

T = TypeVar("T")
Placer = Callable[[GuestInfo], Place]


@dataclass
class Arrival:
    """How far a guest has come. Sizes in bytes, counts in pages."""

    info: GuestInfo | None = None
    status: str = "setup"
    received: int = 0
    rounds: int = 0
    zero: int = 0
    raw: int = 0
    delta: int = 0
    cache_size: int = 0
    capabilities: dict[str, bool] = field(default_factory=dict)
    running: str = ""
    """The place's sentence on the guest that runs."""


Observer = Callable[[str, Arrival], None]


class NoPlaceError(MigrationError):
    """There is nowhere to put this guest."""

    exit_code = 2
    code = ErrorCode.NO_PLACE


class Destination:
    """Receives one guest over one link.

    placer -- gives a Place for a described guest, or raises MigrationError: it is refused
    """

    def __init__(
        self, link: Link, placer: Placer, capabilities: Mapping[str, bool] | None = None,
        observer: Observer | None = None,
    ) -> None:  # fmt: skip
        self.link = link
        self.arrival = Arrival()
        self.started = False
        self.owner = False
        self.place: Place | None = None
        self._placer = placer
        self._capabilities = capabilities or {}
        self._observer = observer or (lambda _event, _arrival: None)
        self._worker = ThreadPoolExecutor(1, "apply")
        self._apply_seconds = 0.0

    async def run(self) -> Arrival:
        """Receives the guest; returns when it runs here.

        Raises MigrationError or asyncio.CancelledError: then nothing is left of it here.
        `started` tells whether the peer got as far as describing a guest that we accepted.
        """
        try:
            await self._receive()
        except BaseException as error:
            failure = self._failure(error)
            await self._give_reason(error, failure)
            await self._drain_worker()
            if self.place is not None:
                await asyncio.shield(self.place.discard())
            if failure is None or failure is error:
                raise
            raise failure from error
        finally:
            await self._drain_worker()
            with contextlib.suppress(BaseException):
                await asyncio.shield(self.link.close())
        return self.arrival

    async def _drain_worker(self) -> None:
        await asyncio.to_thread(self._worker.shutdown)

    def _failure(self, error: BaseException) -> MigrationError | None:
        self.arrival.status = "failed"
        if isinstance(error, asyncio.CancelledError):
            self.arrival.status = "cancelled"
            return None
        if isinstance(error, MigrationError):
            return error
        if isinstance(error, ProtoError):
            return PeerError(str(error))
        return MigrationError(f"{type(error).__name__}: {error}")

    async def _give_reason(self, error: BaseException, failure: MigrationError | None) -> None:
        if isinstance(error, PeerLost):
            return
        code = ErrorCode.CANCELLED
        if isinstance(error, ProtoError):
            code = getattr(error, "code", ErrorCode.PROTOCOL)
        elif failure is not None:
            code = failure.code
        await self.link.give_reason(code, str(failure or "cancelled at the destination"))

    # -- setup

    async def _receive(self) -> None:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            try:
                hello = await self._expect(Hello)
                answer, agreement = caps.answer(hello, caps.switched_on(self._capabilities))
                await self.link.send(answer)
                info = await self._expect(GuestInfo)
            except TimeoutError:
                raise PeerLost(
                    f"{self.link.peer_name} did not describe a guest in {HANDSHAKE_SECONDS:g} s"
                ) from None
        self.arrival.capabilities = {"xbzrle": agreement.xbzrle}
        self.place = place = self._placer(info)
        self.arrival.info = info
        self.started = True
        decoder = PageDecoder(info.pages, info.page_size, DIGEST_CHUNK // info.page_size)

        def known_zero(first: int, count: int) -> bool:
            return not decoder.ever_written(first, count)

        digests = ChunkDigests(place.reads, info.page_size, known_zero, decoder.stale)
        await place.ready()
        await self.link.send(Accept())
        self.arrival.status = "active"
        self._observer("accepted", self.arrival)
        complete = await self._rounds(decoder, digests, place)
        await self._verify(decoder, digests, place, complete)
        await self._take_over(place, complete.state)

    async def _expect(self, kind: type[T]) -> T:
        message = await self.link.receive_message()
        if isinstance(message, Error):
            raise peer_error(message)
        if not isinstance(message, kind):
            raise PeerError(f"{type(message).__name__} came where {kind.__name__} was due")
        return message

    # -- rounds

    async def _rounds(self, decoder: PageDecoder, digests: ChunkDigests, place: Place) -> Complete:
        """Applies batches until COMPLETE comes."""
        loop = asyncio.get_running_loop()
        busy: asyncio.Future[None] | None = None
        number = 1
        apply_before = 0.0
        try:
            while True:
                frame = await self.link.receive()
                self.arrival.received = self.link.received_bytes
                if busy is not None:
                    await busy
                    busy = None
                if frame.type is MessageType.PAGES:
                    busy = loop.run_in_executor(
                        self._worker, self._apply, decoder, place, frame, number
                    )
                    continue
                message = unpack(frame.type, bytes(frame.body))
                frame.release()
                if isinstance(message, Complete):
                    return message
                if isinstance(message, CacheSize):
                    self.arrival.cache_size = message.size
                elif isinstance(message, Error):
                    raise peer_error(message)
                elif isinstance(message, Round):
                    if message.number != number:
                        raise PeerError(f"round {message.number} ended while {number} was going on")
                    await self._end_round(
                        decoder, digests, place, message, self._apply_seconds - apply_before
                    )
                    apply_before = self._apply_seconds
                    number += 1
        finally:
            if busy is not None:
                with contextlib.suppress(BaseException):
                    await asyncio.shield(busy)

    def _apply(self, decoder: PageDecoder, place: Place, frame: Frame, number: int) -> None:
        """In the worker thread: all of a batch, or nothing of it."""
        began = time.thread_time()
        try:
            fresh: list[tuple[int, int]] = []
            came = decoder.check(frame.body, fresh)
            if came != number:
                raise PeerError(f"a batch of round {came} came in round {number}")
            for first, count in fresh:
                place.make_room(first, count)
            decoder.apply(frame.body, place.memory)
            if decoder.delta and not self.arrival.capabilities["xbzrle"]:
                raise PeerError("a delta came, though xbzrle was not agreed on")
        finally:
            frame.release()
        self._apply_seconds += time.thread_time() - began

    async def _end_round(
        self, decoder: PageDecoder, digests: ChunkDigests, place: Place, message: Round,
        apply_seconds: float,
    ) -> None:  # fmt: skip
        """Digests what came to rest, and confirms the round."""
        loop = asyncio.get_running_loop()
        arrival = self.arrival
        arrival.rounds, arrival.zero = message.number, decoder.zero
        arrival.raw, arrival.delta = decoder.raw, decoder.delta
        began = time.perf_counter()
        settled = await loop.run_in_executor(
            self._worker, self._settle, digests, place, message.last
        )
        seconds = time.perf_counter() - began
        await self.link.send(
            RoundAck(
                message.number,
                apply_seconds,
                seconds,
                len(decoder.stale) - decoder.stale.count(0),
                settled,
            )
        )
        self._observer("round", arrival)

    def _settle(self, digests: ChunkDigests, place: Place, last: bool) -> int:
        """All stale chunks in the pause; before it, those that the last round left alone."""
        if last:
            return digests.settle()
        settled = digests.settle_quiet()
        place.sync()
        return settled

    # -- hand-over

    async def _verify(
        self, decoder: PageDecoder, digests: ChunkDigests, place: Place, complete: Complete
    ) -> None:
        loop = asyncio.get_running_loop()
        self.arrival.status = "device"
        if decoder.received_pages != decoder.pages:
            raise MismatchError(
                f"only {decoder.received_pages} of {decoder.pages} pages came: the guest is not "
                "complete"
            )
        began = time.perf_counter()
        digest = await loop.run_in_executor(self._worker, digests.digest)
        if digest != complete.digest:
            raise MismatchError(
                "the memories differ: the digest here is not the source's. If nothing stopped the "
                "guest's writer, it wrote during the last round"
            )
        await place.prepare(complete.state)
        await self.link.send(Ready(time.perf_counter() - began))

    async def _take_over(self, place: Place, state: bytes) -> None:
        await self._expect(Go)
        self.owner = True
        try:
            self.arrival.running = await place.start(state)
        except MigrationError as error:
            raise NotStartedError(str(error)) from error
        self.place = None
        self.arrival.status = "completed"
        with contextlib.suppress(PeerLost):
            await self.link.send(Running())
        place.close()
        self._observer("running", self.arrival)
