"""Where migrate-dst puts the guest that a source describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from migrate.cli.destination_options import DestinationConfig
from migrate.files.partial_output import PartialOutput
from proto.wire.ownership import Claim

if TYPE_CHECKING:
    from migrate.guests.place import Place
    from migrate.ownership.journal import Journal
    from migrate.ownership.records import Records
    from proto.wire.messages import GuestInfo


class Places:
    """Makes the place of a guest, as the command line says.

    warn -- called with a sentence for the user
    last -- the place that was made last, or None
    """

    def __init__(
        self, config: DestinationConfig, records: Records, warn: Callable[[str], None]
    ) -> None:
        self.last: Place | None = None
        self._config = config
        self._records = records
        self._warn = warn

    def make(self, info: GuestInfo) -> Place:
        """Return a place for the described guest. Raises NoPlaceError."""
        self.last = place = self._make(info)
        return place

    def _make(self, info: GuestInfo) -> Place:
        from migrate.destination.greeting import NoPlaceError
        from migrate.guests.demo.place import DemoPlace

        config = self._config
        if info.kind == "qemu" or config.qemu is not None or config.to_directory:
            return self._qemu_place(info)
        if info.kind == "file":
            if not config.output:
                raise NoPlaceError("this is a file guest: start migrate-dst with --output PATH")
            return self._file_place(info)
        if info.kind == "demo":
            if config.output:
                raise NoPlaceError(
                    "a demo guest runs in a process of its own: start migrate-dst without --output"
                )
            return DemoPlace.create(info)
        raise NoPlaceError(
            f"migrate-dst cannot receive a {info.kind} guest: a Python program can, with "
            "migrate.receive()"
        )

    def _file_place(self, info: GuestInfo) -> Place:
        from migrate.guests.file_place import FilePlace

        config = self._config
        place = FilePlace(
            info, config.output, config.overwrite, self._partial_file(info), config.rights
        )
        for sentence in place.notices():
            self._warn(f"warning: {sentence}")
        return place

    def _qemu_place(self, info: GuestInfo) -> Place:
        from migrate.destination.greeting import NoPlaceError
        from migrate.qemu.place import QemuPlace

        config = self._config
        if info.kind != "qemu":
            raise NoPlaceError(
                f"this migrate-dst receives the guest of a QEMU, not a {info.kind} guest"
            )
        if config.to_directory:
            from migrate.qemu.snapshot.place import SnapshotPlace

            return SnapshotPlace(config.output, overwrite=config.overwrite)
        if config.qemu is None:
            raise NoPlaceError(
                "this is the guest of a QEMU: start migrate-dst with --guest qemu:qmp=PATH, or "
                "with --guest qemu --output DIR to receive it into a directory"
            )
        return QemuPlace(config.qemu.address, config.qemu.qmp)

    # -- guests that were received in part

    def partial(self) -> list[Journal]:
        """Return the journals of guests of which a part has come to the output."""
        if not self._config.output:
            return []
        return [
            journal
            for journal in self._records.attempts()
            if self._config.is_output(journal.facts["place"].get("path", ""))
        ]

    def _partial_file(self, info: GuestInfo) -> PartialOutput | None:
        """Return the file with the part of this guest that has come; remove those of others."""
        attempt, file = self._records.attempt(info.resume), None
        if attempt is not None:
            found = attempt.partial_output
            same_size = attempt.facts["place"].get("size") == info.size
            ours = found is not None and self._config.is_output(found.path)
            if found is not None and ours and same_size and found.exists:
                file = found
            elif attempt.claim is not Claim.NONE:
                attempt.remove_output()
        for journal in self.partial():
            same = file is not None and journal.partial_output == file
            if not same or not journal.is_of(info.resume):
                journal.forget(keep_output=same)
        return file
