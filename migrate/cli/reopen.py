"""Open guests and places that an earlier program has left, from the facts in its journal."""

from __future__ import annotations

from typing import Any

from migrate.errors import MigrationError
from migrate.guests.guest import Guest
from migrate.guests.place import Place


def reopen_guest(facts: dict[str, Any]) -> Guest:
    """Return a guest that was handed over. Raises MigrationError if it is gone."""
    from migrate.guests.demo.guest import DemoGuest
    from migrate.guests.file import FileGuest

    if facts.get("kind") == "demo":
        return DemoGuest.reopen(facts)
    if facts.get("kind") == "file":
        return FileGuest.reopen(facts)
    if facts.get("kind") == "qemu":
        from migrate.qemu.orphan import OrphanGuest

        return OrphanGuest(facts)
    if facts.get("kind") == "snapshot":
        from migrate.qemu.snapshot.guest import SnapshotGuest

        return SnapshotGuest(facts["path"])
    raise MigrationError("that guest was memory of the program that moved it, and ended with it")


def reopen_place(facts: dict[str, Any]) -> Place:
    """Return the place of a prepared guest. Raises MigrationError if it is gone."""
    from migrate.guests.demo.place import DemoPlace
    from migrate.guests.file_place import PreparedFilePlace

    if facts.get("kind") == "demo":
        return DemoPlace.reopen(facts)
    if facts.get("kind") == "file":
        return PreparedFilePlace.reopen(facts)
    if facts.get("kind") == "snapshot":
        from migrate.qemu.snapshot.prepared import PreparedSnapshot

        return PreparedSnapshot.reopen(facts)
    if facts.get("kind") == "qemu":
        raise MigrationError("the QEMU that waited for that guest has ended with the stream")
    raise MigrationError("that guest was memory of the program that received it")
