"""QEMU's refusals of commands, with advice for the user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from migrate.errors import QemuError
from migrate.output import printable

# A part of QEMU's refusal, and what the user can do about it.
ADVICE = (
    ("migration process in progress", "wait until that migration has ended, or cancel it"),
    ("paused due to previous migration", "the guest has moved; `cont` would let it run here again"),
    ("not finalized yet", "wait until that migration has ended"),
    ("waiting for an incoming migration", "no guest is here yet: this QEMU is a destination"),
    ("'-incoming' was not specified", "start that QEMU with -incoming defer"),
    ("migration has already been started", "start that QEMU anew, with -incoming defer"),
    ("valid migration protocol", "write unix:PATH or tcp:HOST:PORT"),
    ("Reset", "`system_reset` must come before it can run again"),
)


def refusal(command: str, error: Mapping[str, Any], version: tuple[int, int, int]) -> QemuError:
    """Return the error of a refused command.

    error   -- QEMU's: its class and its description
    version -- of QEMU: (major, minor, micro)
    """
    kind, desc = str(error.get("class", "")), printable(str(error.get("desc", "")))
    sentence = f"{command}: QEMU says: {desc}"
    if kind == "CommandNotFound":
        sentence += f": QEMU {'.'.join(map(str, version))} is too old, or too new, for it"
    else:
        sentence += next((f": {advice}" for part, advice in ADVICE if part in desc), "")
    return QemuError(sentence, command, desc, kind)
