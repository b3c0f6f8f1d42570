"""The duty cycle of a guest that is slowed: it runs for a while, then stands still, as in QEMU."""

from __future__ import annotations

RUN_SECONDS = 0.01


def stopped_seconds(percentage: int) -> float:
    """How long it stands still after each RUN_SECONDS, to be slowed by so much (0 to 99)."""
    return RUN_SECONDS * percentage / (100 - percentage)
