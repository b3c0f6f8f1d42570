"""The place of a demo guest at the destination."""

from __future__ import annotations

from typing import Any

from migrate.errors import MigrationError
from migrate.guests.demo.guest import unpack_state
from migrate.guests.demo.handle import DemoProcess
from migrate.guests.demo.layout import Command, DemoShape, Owner
from migrate.guests.place import Place
from migrate.memory.memory import Memory
from proto.wire.messages import GuestInfo


class DemoPlace(Place):
    """A process that waits for its memory and its state.

    It is started before the first page comes, so that starting it costs the pause nothing.
    """

    def __init__(self, process: DemoProcess) -> None:
        self.process = process
        self.pid, self.start_time = process.pid, process.start_time
        self.memory = process.memory
        self.fd, self.fd_offset = process.fd, process.shape.memory_offset
        self.content = Memory(process.shape.size, process.memory)

    @classmethod
    def create(cls, info: GuestInfo) -> DemoPlace:
        """Start a process for a guest that comes. Raises UsageError."""
        # What it counts comes with its state, once the memory is complete.
        shape = DemoShape(info.size, 1, 1, page_size=info.page_size)
        return cls(DemoProcess.create(shape, paused=True))

    @classmethod
    def reopen(cls, facts: dict[str, Any]) -> DemoPlace:
        """Return a guest that an earlier program has prepared. Raises MigrationError."""
        place = cls(DemoProcess.from_facts(facts))
        if place.process.owner not in (Owner.COMPLETE, Owner.OURS):
            raise MigrationError(f"the guest in process {place.pid} was never whole")
        return place

    async def make_ready(self) -> None:
        await self.process.pause()

    async def prepare(self, state: bytes) -> None:
        shape = self.process.shape
        self.process.set_load(*unpack_state(state, shape.size, shape.page_size))

    def unprepare(self) -> None:
        self.process.owner = Owner.INCOMPLETE

    def mark_complete(self) -> None:
        self.process.owner = Owner.COMPLETE

    def facts(self) -> dict[str, Any]:
        return self.process.facts()

    async def start(self, state: bytes) -> str:
        if not self.process.alive():
            raise MigrationError(f"the demo guest (process {self.pid}) has ended")
        self.process.owner = Owner.OURS
        try:
            await self.process.run()
        except MigrationError:
            # The source is told that the guest was never started. A process that is merely slow
            # would run later, beside the source's guest.
            self.process.kill()
            raise
        sweep, index = self.process.position
        return f"demo guest runs in process {self.pid}, from sweep {sweep}, index {index} on"

    def close(self) -> None:
        self.process.close()

    async def discard(self) -> None:
        self.process.command(Command.END)
        self.process.close()
