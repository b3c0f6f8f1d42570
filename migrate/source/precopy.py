"""The source of a guest whose memory can be read while the guest writes to it.

    setup      ACCEPT; what the destination holds after a break; CACHE_SIZE
    rounds     see rounds.py
    (then      the hand-over: see hand_over.py)

On any failure before the commit the dirty pages are put back and the guest runs on here. After a
break, the destination says what it holds, and only what differs from the guest is sent again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from migrate.errors import NoProgress, NotConvergedError, PeerError
from migrate.guests.guest import MemoryGuest
from migrate.memory.dirty import ScanTracker
from migrate.policy.parameters import Parameters
from migrate.policy.throttle import CAPABILITY as AUTO_CONVERGE
from migrate.source.attempt import Admission, Attempt
from migrate.source.convergence_control import ConvergenceControl
from migrate.source.migration import Migration
from migrate.source.options import DEFAULT_OPTIONS, SourceOptions
from migrate.source.page_sender import PageSender
from migrate.source.pause import GuestPause
from migrate.source.rounds import PageRounds
from migrate.source.transfer import Pause, Transfer, TransferContext
from migrate.transport.channels import Channels
from migrate.transport.link import Link
from migrate.units import format_size
from proto.codec.pageset import PageSet
from proto.wire import capabilities as caps
from proto.wire.messages import CacheSize, Held

# A destination may lose the guest this many times, for example when its program dies again and
# again.
MAX_RESTARTS = 5
# The round trip is the shortest of this many: the others have waited for a processor.
ROUND_TRIP_SAMPLES = 3


class Source(Migration):
    """Moves a guest whose memory can be read while the guest writes to it."""

    guest: MemoryGuest
    transfer: PageTransfer

    def __init__(
        self, guest: MemoryGuest, link: Link, parameters: Parameters | None = None,
        options: SourceOptions = DEFAULT_OPTIONS,
    ) -> None:  # fmt: skip
        make_transfer = partial(PageTransfer, guest)
        super().__init__(guest, link, parameters or Parameters(), options, make_transfer)


@dataclass(frozen=True)
class Precopy:
    """The state of a transfer of pages that outlives an attempt, from the first ACCEPT on."""

    sender: PageSender
    control: ConvergenceControl


class PageTransfer(Transfer):
    """Sends the pages of a guest, round after round."""

    optional = frozenset({caps.SPARSE})

    def __init__(self, guest: MemoryGuest, context: TransferContext) -> None:
        self._guest = guest
        self._context = context
        self._pausing = GuestPause(guest, context.telemetry)
        # None before the first ACCEPT.
        self.precopy: Precopy | None = None
        self._restarts = 0

    @property
    def pauses(self) -> int:
        return self._pausing.count

    @property
    def next_round(self) -> int:
        return 1 + (self.precopy.sender.round if self.precopy else 0)

    async def run(self, attempt: Attempt, admission: Admission) -> Pause:
        context, channels = self._context, attempt.channels
        if admission.held and not admission.resumes:
            raise PeerError("the destination holds pages of a guest that it was not asked to keep")
        trips = [await channels.link.round_trip() for _ in range(ROUND_TRIP_SAMPLES)]
        if self.precopy is None:
            self.precopy = self._begin(admission.agreement)
        sender, control = self.precopy.sender, self.precopy.control
        control.model.round_trip = min(trips)
        sender.digest.by_sum = admission.agreement.sparse
        # Marks are taken before memory is read: a page that is written meanwhile is marked again.
        await context.in_worker(sender.tracker.start)
        dirty = PageSet.full(sender.pages)
        if admission.resumes:
            dirty = await self._dirty_after_break(sender, channels, admission)
        await channels.link.send(CacheSize(context.settings.cache.size))
        attempt.begin()
        self._report_setup(sender, admission.agreement, len(dirty))
        rounds = PageRounds(self._guest, channels, sender, control, self._pausing, context)
        return await rounds.run(dirty)

    def _begin(self, agreement: caps.Agreement) -> Precopy:
        settings, telemetry = self._context.settings, self._context.telemetry
        sender = PageSender(self._guest, settings, self._context.seed, agreement)
        return Precopy(sender, ConvergenceControl(self._guest, sender, settings, telemetry))

    def _report_setup(self, sender: PageSender, agreement: caps.Agreement, dirty: int) -> None:
        parameters, telemetry = self._context.parameters, self._context.telemetry
        capabilities = agreement.reported
        if parameters.auto_converge:
            capabilities[AUTO_CONVERGE] = True
        telemetry.change(
            capabilities=capabilities,
            channels=parameters.channels,
            cache_size=self._context.settings.cache.size,
            remaining=sender.bytes_of(dirty),
        )
        if not sender.round:
            telemetry.change(setup_time=telemetry.elapsed)

    # -- after a break

    async def _dirty_after_break(
        self, sender: PageSender, channels: Channels, admission: Admission
    ) -> PageSet:
        """Return the pages that the destination lacks after an attempt that broke.

        The destination says what it holds, by the hash of each page; that is compared with the
        guest. The digest at the end proves it, whatever the destination has said.
        """
        context, pages = self._context, sender.pages
        notice = context.telemetry.notice
        if not admission.held:
            self._restarts += 1
            if self._restarts > MAX_RESTARTS:
                raise NoProgress(f"the destination has lost the guest {self._restarts} times")
            notice("the destination has kept nothing of the guest: beginning again")
            await context.in_worker(sender.encoder.forget)
            context.reconnection.note_held(0)
            return PageSet.full(pages)
        await self._adopt_held(sender, channels, sparse=admission.agreement.sparse)
        dirty = await context.in_worker(ScanTracker(self._guest.memory, sender.encoder).take)
        context.reconnection.note_held(pages - len(dirty))
        share = 100 * (pages - len(dirty)) // pages
        notice(f"resuming at {share} %: {format_size(sender.bytes_of(len(dirty)))} to go")
        return dirty

    async def _adopt_held(self, sender: PageSender, channels: Channels, *, sparse: bool) -> None:
        """Have the encoder know the pages that the destination says it holds.

        sparse -- HELD leaves out runs of pages that are zeros
        """
        encoder, pages, in_worker = sender.encoder, sender.pages, self._context.in_worker
        page = 0
        while page < pages:
            said = await channels.expect(Held)
            if said.first < page or (said.first > page and not sparse):
                raise PeerError(f"HELD begins at page {said.first}; expected {page}")
            if said.first + len(said.hashes) // 8 > pages:
                raise PeerError(f"HELD goes beyond the {pages} pages of the guest")
            if said.first > page:
                await in_worker(encoder.adopt_zeros, page, said.first - page)
            await in_worker(encoder.adopt, said.first, said.hashes)
            page = said.first + len(said.hashes) // 8

    # -- the end of an attempt

    async def undo(self) -> None:
        """Put back the dirty pages, and let the guest run here at full speed."""
        await self.release()
        await self._pausing.end()
        if self.precopy is not None:
            # In the worker: a `take` that was cancelled may still be running there.
            await self._context.in_worker(self.precopy.sender.put_back)

    async def release(self) -> None:
        if self.precopy is not None:
            await self.precopy.control.release()

    def check_time(self) -> None:
        if self.precopy is not None:
            self.precopy.control.check_time()
            return
        timeout, elapsed = self._context.parameters.limits.timeout, self._context.telemetry.elapsed
        if timeout and elapsed > timeout:
            raise NotConvergedError(
                f"the migration was given up: no destination took the guest in {elapsed:.0f} s "
                "(--timeout)"
            )

    def update(self) -> None:
        self._context.telemetry.refresh(**(self.precopy.sender.counters() if self.precopy else {}))

    def advise(self) -> tuple[str, ...]:
        if self.precopy is None:
            return ()
        self.precopy.sender.sample_heat()
        return self.precopy.control.advise()

    def close(self) -> None:
        if self.precopy is not None:
            self.precopy.control.close()
            self.precopy.sender.close()
