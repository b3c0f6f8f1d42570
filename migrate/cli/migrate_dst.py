"""The program migrate-dst.

    deferred (no --listen) --migrate_incoming--+
                                               v
    settle what earlier programs have left --> listen --> receive a guest --> print the result
                                                                |                  |
                            a peer breaks the protocol: again --+     --on-complete, --stay

The parts stand in modules of their own: destination_options (the command line),
destination_places (where a guest is put), destination_monitor (commands and their answers),
destination_output (what is printed), on_complete.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from typing import TYPE_CHECKING, Any

from migrate.cli.destination_monitor import DestinationMonitor
from migrate.cli.destination_options import destination_config, destination_parser
from migrate.cli.destination_output import DestinationOutput
from migrate.cli.destination_places import Places
from migrate.cli.on_complete import run_on_complete
from migrate.cli.program import monitored, run
from migrate.cli.stop import StopRequests, this_task
from migrate.errors import ConnectError, MigrationError
from migrate.events import DestinationEvent
from migrate.output.run import run_program
from migrate.ownership.stored_journals import damaged
from migrate.runtime.threads import in_thread
from migrate.views.options import DestinationViews
from proto.wire.ownership import Role

if TYPE_CHECKING:
    from migrate.destination.acceptor import Acceptor
    from migrate.destination.destination import Destination
    from migrate.destination.greeting import Introduction
    from migrate.destination.receiver import Arrival, Receiver
    from migrate.monitor.terminal import Terminal
    from migrate.ownership.custody import Custody


class DestinationProgram:
    """One run of migrate-dst. The constructor raises MigrationError for wrong arguments.

    Made in a running loop.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        from migrate.cli.reopen import reopen_place
        from migrate.ownership.records import Records

        self.config = destination_config(args)
        self.stop = StopRequests()
        self.output = DestinationOutput(args, self.config.resolve_timeout)
        self.monitor = DestinationMonitor(self.config, self.stop)
        self.records = Records(self.config.journal, reopen_place)
        self.places = Places(self.config, self.records, self.output.visit)
        self.views = DestinationViews(args, lambda: self.monitor.arrival, self.output.progress)
        self._args = args
        # The guest that an earlier program had prepared for our output, once it runs.
        self._earlier: asyncio.Future[Custody] = asyncio.get_running_loop().create_future()
        self.records.on_taken = self._take_earlier
        # No more commands can come.
        self._silent = False
        # The guest is here, and --on-complete is done.
        self._completed = asyncio.Event()

    async def run(self) -> int:
        """Receive a guest, and stay if the program is to; return the exit code."""
        task = this_task()

        def cancel() -> str:
            destination = self.monitor.destination
            if self._earlier.done() or (destination is not None and destination.is_ours):
                return "migrate-dst: too late to cancel: the guest is ours"
            task.cancel()
            return ""

        self.stop.handle_with(cancel)
        watch = None
        try:
            async with monitored(self._args, self.monitor) as terminal:
                if terminal is not None and self.config.deferred and not self._args.qmp:
                    watch = asyncio.create_task(self._end_with(terminal))
                return await self._serve()
        finally:
            if watch is not None:
                watch.cancel()
            self.output.close()
            self.records.close()
            self.views.close()

    async def _end_with(self, terminal: Terminal) -> None:
        """End the program when the terminal is closed, after what its commands asked for.

        The terminal is the only way to give a command.
        """
        await terminal.closed.wait()
        self._silent = True
        if self.monitor.has_address:
            await self._completed.wait()
        if not self.stop.signal:  # else `quit` was the last command
            self.stop.request()

    async def _serve(self) -> int:
        try:
            acceptor = await (self._open_deferred() if self.config.deferred else self._open())
        except asyncio.CancelledError:
            return self._cancelled()
        async with acceptor:
            try:
                destination = await self._receive(acceptor)
            except asyncio.CancelledError:
                return self._cancelled()
            self.monitor.arrived()
            if destination is None:
                return await self._finish_earlier(self._earlier.result())
            return await self._finish(destination)

    def _cancelled(self) -> int:
        self.output.fail("cancelled; nothing is left of the guest here")
        return self.stop.exit_code

    # -- listening

    async def _open_deferred(self) -> Acceptor:
        """Listen where a command says. If that fails, wait for another address.

        Raises ConnectError if no more commands can come.
        """
        while True:
            await self.monitor.wait_for_address()
            try:
                return await self._open()
            except ConnectError as error:
                if self._silent:
                    raise
                self.output.fail(str(error))
                self.monitor.listen_failed(str(error))

    async def _open(self) -> Acceptor:
        """Settle what earlier programs have left, then listen. Raises ConnectError."""
        from migrate.destination.acceptor import Acceptor
        from migrate.transport import listen

        config, progress = self.config, self.output.progress
        for sentence in await self.records.settle_earlier(config.resolve_timeout):
            progress(sentence)
        for wrong in damaged(Role.DESTINATION, config.journal):
            progress(f"ignored: {wrong}")
        for file in {one.facts["place"]["temporary"] for one in self.places.partial()}:
            progress(f"a part of a guest is here ({file}): its source can resume")
        listener = await listen.listen(
            self.monitor.address, peer_timeout=config.peer_timeout,
            credentials=config.credentials, allow=config.allow, refused=self.output.refused,
        )  # fmt: skip
        progress(f"listening on {listener}")
        if config.qemu and config.qemu.qmp and not os.path.exists(config.qemu.qmp):
            progress(
                f"no QEMU has a socket at {config.qemu.qmp} yet: it must be there when a guest "
                "comes (-incoming defer -qmp unix:PATH,server=on,wait=off)"
            )
        self.monitor.listening(listener.addresses)
        acceptor = Acceptor(
            listener, self.records, lambda introduction: self._destination(introduction, acceptor),
            switches=lambda: self.monitor.parameters.wire_switches, refused=self.output.refused,
            probed=self.output.probed,
        )  # fmt: skip
        return acceptor

    # -- receiving

    async def _receive(self, acceptor: Acceptor) -> Destination | None:
        """Receive a guest; return what has received it.

        Returns None if a guest that an earlier program had prepared for our output runs instead.
        Raises MigrationError if a guest that was accepted does not arrive.
        """
        while True:
            coming = asyncio.ensure_future(acceptor.guest())
            waiting: set[asyncio.Future[Any]] = {coming, self._earlier}
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if self._earlier.done():
                    return None
                self.monitor.destination = destination = coming.result()
            finally:
                coming.cancel()
            try:
                await destination.run()
                return destination
            except MigrationError as error:
                if not destination.was_refused(error):
                    raise
                self.output.refused(destination.link.peer_name, error)
                self.monitor.destination = None

    def _destination(self, introduction: Introduction, acceptor: Acceptor) -> Destination:
        """Return what receives the guest that a source has described."""
        from migrate.destination.destination import Destination
        from migrate.destination.options import DestinationOptions

        def observe(event: DestinationEvent, arrival: Arrival) -> None:
            self.views.observe()
            self.output.observe(event, arrival, destination)
            self.monitor.observe(event, arrival, destination)

        config = self.config
        stream_receiver: type[Receiver] | None = None
        if config.qemu or config.to_directory:
            from migrate.qemu.incoming import StreamReceiver

            stream_receiver = StreamReceiver
        destination = Destination(introduction, DestinationOptions(
            self.places.make, observe, acceptor.channel, self.records, config.retry,
            config.resolve_timeout, stream_receiver,
        ))  # fmt: skip
        return destination

    def _take_earlier(self, custody: Custody) -> None:
        """End if a guest that an earlier program prepared runs now, and it was for our output."""
        path = custody.journal.facts.get("place", {}).get("path", "")
        if self.config.is_output(path) and not self._earlier.done():
            self._earlier.set_result(custody)

    # -- the guest is here

    async def _finish(self, destination: Destination) -> int:
        """Print the result, run --on-complete, and stay; return the exit code."""
        arrival, place = destination.arrival, self.places.last
        self.output.result(arrival.running, self.monitor.query_migrate())
        status = await self._on_complete(arrival.info.kind)
        if self._stays:
            await self.stop.stay(*(place.pid, place.start_time) if place else (0, ""))
        elif not destination.acknowledged:
            timeout = self.config.resolve_timeout
            self.output.progress(
                "the source may not know yet that its guest runs here: waiting for it, for at "
                f"most {timeout:g} s"
            )
            await self.stop.wait_for(destination.until_acknowledged(), timeout)
        return status

    async def _finish_earlier(self, custody: Custody) -> int:
        """Do what the earlier program would have done; return the exit code."""
        self.output.result(custody.running)
        status = await self._on_complete("qemu" if self.config.to_directory else "file")
        if self._stays:
            await self.stop.stay(0, "")
        else:
            await self.stop.wait_for(custody.told.wait(), self.config.resolve_timeout)
        return status

    @property
    def _stays(self) -> bool:
        return self.config.stay or self.config.deferred

    async def _on_complete(self, kind: str) -> int:
        try:
            return await run_on_complete(self.config, self.stop, kind)
        finally:
            self._completed.set()


async def _run(args: argparse.Namespace) -> int:
    from migrate.guests.command import check_command

    await in_thread(check_command, args.on_complete, "--on-complete")
    return await DestinationProgram(args).run()


def _main() -> int:
    if sys.argv[1:2] == ["resolve"]:
        from migrate.cli import resolve

        return resolve.main("migrate-dst", sys.argv[2:])
    return run(destination_parser(), _run)


def main() -> None:
    run_program("migrate-dst", _main)
