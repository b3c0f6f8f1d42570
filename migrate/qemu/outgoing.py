"""Carries the stream of a QEMU to the destination, item by item, in order.

    QEMU --stream--> Intake -> ItemSender -> channels -> destination
    QEMU <--return path-- ReturnedPieces <- BYTES <---------+

QEMU decides what is sent, and when the guest is paused. What it has sent cannot be asked for again,
so an item is kept until the destination says TAKEN; after a broken connection the others are sent
again. What the destination holds is known exactly, so deltas stay valid over another connection.

When all items are there, the destination's QEMU loads them and confirms that. So when READY comes,
only the end of the stream is missing, without which that QEMU does not run the guest; after GO it
gets the end. The source's QEMU waits for SHUT on its return path while its socket is open. We send
it, or close the socket, once it is known where the guest runs.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import partial

from migrate.errors import HandOverUnknown, MigrationError, NotConvergedError
from migrate.events import SourceEvent
from migrate.policy.advice import advice
from migrate.policy.parameters import Parameters
from migrate.qemu.guest import QemuGuest
from migrate.qemu.item_sender import ItemSender
from migrate.qemu.qmp.status import MachineStatus
from migrate.qemu.returned import ReturnedPieces
from migrate.qemu.stream.intake import StreamLost
from migrate.qemu.stream.return_path import LOAD_SECONDS
from migrate.qemu.switchover import SwitchoverControl
from migrate.runtime.cancellation import checked
from migrate.source.attempt import Admission, Attempt
from migrate.source.batches import PageCounts
from migrate.source.migration import Migration
from migrate.source.options import DEFAULT_OPTIONS, SourceOptions
from migrate.source.telemetry import UPDATE_SECONDS
from migrate.source.transfer import Pause, Transfer, TransferContext
from migrate.statistics import Status
from migrate.transport.channels import Channels
from migrate.transport.link import Link
from migrate.units import format_size
from proto.wire import capabilities as caps
from proto.wire.messages import Blocks, Bytes, CacheSize, Complete, Message, Ready, Taken

# The interval of our checks, before GO, that QEMU still waits for SHUT.
WATCH_SECONDS = 0.05


class QemuSource(Migration):
    """Carries the stream of a QEMU.

    The page size is QEMU's. An earlier attempt cannot be resumed: QEMU begins anew.
    """

    guest: QemuGuest

    def __init__(
        self, guest: QemuGuest, link: Link, parameters: Parameters | None = None,
        options: SourceOptions = DEFAULT_OPTIONS,
    ) -> None:  # fmt: skip
        parameters = replace(parameters or Parameters(), page_size=guest.intake.parser.page_size)
        options = replace(options, earlier=None)
        super().__init__(guest, link, parameters, options, partial(StreamTransfer, guest))

    def set_parameters(self, parameters: Parameters) -> None:
        super().set_parameters(replace(parameters, page_size=self.parameters.page_size))


class StreamTransfer(Transfer):
    """Sends the items of a stream, over one attempt after the other."""

    required = frozenset({caps.STREAM})
    outlives_program = False

    def __init__(self, guest: QemuGuest, context: TransferContext) -> None:
        self._guest = guest
        self._context = context
        self._telemetry = context.telemetry
        # None before the first ACCEPT.
        self._sender: ItemSender | None = None
        self._returned = ReturnedPieces(guest)
        # The next TAKEN says what the destination holds after a break; it is an answer.
        self._resuming = False
        self._pause: Pause | None = None
        # (time, bytes, pages) of the last measurement of the throughput.
        self._measured = time.monotonic(), 0, 0

    async def run(self, attempt: Attempt, admission: Admission) -> Pause:
        channels, telemetry, context = attempt.channels, self._telemetry, self._context
        agreement = admission.agreement
        if self._sender is None:
            self._sender = self._begin(agreement)
        sender = self._sender
        if admission.resumes:
            await self._resume(sender, channels, held=admission.held)
        else:
            self._resuming = False
            await channels.link.send(Blocks(self._guest.blocks))
        cache_size = context.settings.cache.size
        await channels.link.send(CacheSize(cache_size))
        attempt.begin()
        telemetry.change(
            capabilities=agreement.reported,
            channels=context.parameters.channels,
            cache_size=cache_size,
        )
        if not admission.resumes:
            telemetry.change(setup_time=telemetry.elapsed)
        telemetry.set_status(Status.ACTIVE if self._pause is None else Status.DEVICE)
        await self._carry_and_prove(sender, channels)
        return self._pause or self._note_pause(self._guest.intake.stopped_at or time.monotonic())

    def _begin(self, agreement: caps.Agreement) -> ItemSender:
        settings = self._context.settings
        if agreement.xbzrle and settings.parameters.cache_max:
            # A page shows that it is hot when it comes again, and then its old content must be in
            # the cache: so the cache holds as much as it may. It takes memory as pages come.
            size = settings.cache.wanted = settings.cache.useful(settings.parameters.cache_max)
            settings.parameters = replace(settings.parameters, cache_size=size)
        return ItemSender(self._guest.intake, self._context, agreement, self._check_unpaused)

    async def _resume(self, sender: ItemSender, channels: Channels, *, held: bool) -> None:
        """Go on after a break, from what the destination has taken."""
        if not held:
            raise MigrationError("the destination has lost the stream: begin again")
        self._returned.restart()
        taken = await channels.expect(Taken)
        left = sender.resume(taken.items)
        self._resuming = False
        self._context.reconnection.note_held(taken.items)
        self._telemetry.notice(f"resuming: {format_size(left)} of the stream are sent again")
        if not taken.items:
            await channels.link.send(Blocks(self._guest.blocks))
        await channels.link.send(Taken(self._returned.passed))

    async def _carry_and_prove(self, sender: ItemSender, channels: Channels) -> None:
        """Send the stream, and wait until the QEMU at the destination has loaded it."""
        beside = [asyncio.create_task(self._returned.run(channels.link))]
        if self._guest.machine is not None:
            control = SwitchoverControl(
                self._guest.machine, lambda: self._context.parameters.limits.downtime_limit,
                sender.pages_gone, self._hear_of,
            )  # fmt: skip
            beside.append(asyncio.create_task(control.run()))
        try:
            await sender.send_all(channels, partial(self._look_around, channels.link))
            self._telemetry.change(dirty_sync_count=self._guest.intake.rounds)
            await self._prove(sender, channels)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    def _hear_of(self, status: MachineStatus, expected: float | None, aim: float) -> None:
        """Take what QEMU knows of its migration; `expected` and `aim` are downtimes in seconds."""
        if status.status == "active":
            self._telemetry.change(
                remaining=status.remaining,
                dirty_pages_rate=float(status.dirty_pages_rate),
                expected_downtime=expected or self._telemetry.statistics.expected_downtime,
                downtime_aim=aim,
            )

    async def _look_around(self, link: Link) -> None:
        """Note what has changed since the last item: the guest, the cache, the time, the round."""
        intake, telemetry = self._guest.intake, self._telemetry
        if intake.stopped_at is not None and self._pause is None:
            self._note_pause(intake.stopped_at)
        await self._context.confirm_cache(link)
        self._check_unpaused()
        if intake.rounds - 1 > telemetry.statistics.dirty_sync_count:
            telemetry.change(dirty_sync_count=intake.rounds - 1)
            if self._sender is not None:
                self._sender.stage.begin_round()
            self.update()
            if self._guest.machine is not None:  # it says how much is dirty after the round
                telemetry.emit(SourceEvent.ROUND_DONE)
            telemetry.emit(SourceEvent.ROUND_BEGUN)
        if telemetry.update_is_due():
            self.update()
            if self._sender is not None and (notice := self._sender.stage.notice()):
                telemetry.notice(notice)
            telemetry.emit(SourceEvent.PROGRESS)

    def _note_pause(self, began: float) -> Pause:
        """Note that QEMU has stopped its guest."""
        pause = self._pause = Pause(began, self._telemetry.sent_bytes)
        self._telemetry.set_status(Status.DEVICE)
        self._telemetry.emit(SourceEvent.PAUSED)
        return pause

    async def _prove(self, sender: ItemSender, channels: Channels) -> None:
        """Say that all is sent, and wait until the QEMU at the destination has loaded it."""
        intake = self._guest.intake
        state = sender.count.to_bytes(8, "big") + bytes([intake.return_path])
        await channels.link.send(Complete(sender.digest, state))
        until = time.monotonic() + LOAD_SECONDS

        def check() -> None:
            self._guest.check_alive()
            if time.monotonic() > until:
                raise MigrationError(
                    f"the QEMU over there has not loaded the guest in {LOAD_SECONDS:g} s"
                )

        await checked(channels.expect(Ready), check, WATCH_SECONDS)
        check()

    def check_running(self) -> None:
        try:
            if not self._guest.driven:
                self._guest.check_alive()
        except StreamLost as error:
            raise HandOverUnknown(
                f"the guest runs at the destination, but {error}: it may run here too. Stop one of "
                "them at once"
            ) from None

    def _check_unpaused(self) -> None:
        if self._pause is None:
            self.check_time()

    def check_time(self) -> None:
        limits, elapsed = self._context.parameters.limits, self._telemetry.elapsed
        why = ""
        if limits.timeout and elapsed > limits.timeout:
            why = f"QEMU was not through after {elapsed:.0f} s (--timeout)"
        elif limits.max_rounds and self._guest.intake.rounds > limits.max_rounds:
            why = f"QEMU was not through after {limits.max_rounds} rounds (--max-rounds)"
        if why:
            raise NotConvergedError(f"the migration was given up: {why}")

    def hear(self, message: Message) -> bool:
        if isinstance(message, Taken) and self._sender is not None and not self._resuming:
            self._sender.note_taken(message.items)
            self._context.reconnection.note_held(message.items)
            return True
        if isinstance(message, Bytes):
            self._returned.put(message.data)
            return True
        return False

    # -- the end

    async def undo(self) -> None:
        """Prepare for another attempt.

        The guest needs nothing: QEMU waits, and lets it run on when its stream is closed.
        """
        self._resuming = True

    def failed(self, *, committed: bool) -> None:
        if self._pause is not None and not committed:
            self._pause = None
            self._telemetry.emit(SourceEvent.RESUMED)  # QEMU resumes as soon as we hang up

    def close(self) -> None:
        if self._sender is not None:
            self._sender.stage.close()

    def update(self) -> None:
        telemetry, sender = self._telemetry, self._sender
        changes: dict[str, float] = {}
        s = telemetry.statistics
        now, sent = time.monotonic(), telemetry.sent_bytes
        pages = 0
        if sender is not None:
            pages = sender.pages_gone()
            changes = {
                **PageCounts.of(sender.encoder)._asdict(),
                **sender.stage.counters(),
                "xbzrle_active": sender.encoder.active,
                "evictions": self._context.settings.cache.evictions,
            }
            if self._guest.machine is None or not s.remaining:  # no QEMU says what is dirty
                gone = sender.pages_gone(zeros=True) * s.page_size
                changes["remaining"] = max(s.total - gone, 0)
        at, sent_then, pages_then = self._measured
        if now - at >= UPDATE_SECONDS:
            changes["mbps"] = (sent - sent_then) * 8 / (now - at) / 1e6
            changes["pages_per_second"] = (pages - pages_then) / (now - at)
            self._measured = now, sent, pages
        telemetry.refresh(**changes)

    def advise(self) -> tuple[str, ...]:
        """Return advice from three rounds on: in the first two, the cache only fills."""
        if self._sender is None or self._guest.intake.rounds <= 2:
            return ()
        cache_max = self._context.parameters.cache_max
        return advice(self._telemetry.statistics, self._sender.working, cache_max=cache_max)
