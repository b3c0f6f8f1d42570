"""Guests and places that an earlier program has left, from the facts in its journal."""

from __future__ import annotations

from typing import Any

from migrate.errors import MigrationError
from migrate.guests.guest import Guest, Place


def reopen_guest(facts: dict[str, Any]) -> Guest:
    """A guest that was given up. Raises MigrationError where it is gone."""
    from migrate.guests.demo import DemoGuest
    from migrate.guests.file import FileGuest

    if facts.get("kind") == "demo":
        return DemoGuest.reopen(facts)
    if facts.get("kind") == "file":
        return FileGuest.reopen(facts)
    if facts.get("kind") == "qemu":
        from migrate.qemu.left import LeftGuest

        return LeftGuest(facts)
    if facts.get("kind") == "snapshot":
        from migrate.qemu.lifting import SnapshotGuest

        return SnapshotGuest(facts["path"])
    raise MigrationError("that guest was memory of the program that moved it, and ended with it")


def reopen_place(facts: dict[str, Any]) -> Place:
    """A guest that was prepared. Raises MigrationError where it is gone."""
    from migrate.guests.demo import DemoPlace
    from migrate.guests.output_file import FilePlace

    if facts.get("kind") == "demo":
        return DemoPlace.reopen(facts)
    if facts.get("kind") == "file":
        return FilePlace.reopen(facts)
    if facts.get("kind") == "snapshot":
        from migrate.qemu.landing import LandedPlace

        return LandedPlace.reopen(facts)
    if facts.get("kind") == "qemu":
        raise MigrationError("the QEMU that waited for that guest has ended with the stream")
    raise MigrationError("that guest was memory of the program that received it")
