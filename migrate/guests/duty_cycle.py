"""The duty cycle of a throttled guest: it runs for a while, then stops for a while, as in QEMU."""

from __future__ import annotations

# QEMU's CPU_THROTTLE_TIMESLICE_NS: 10 ms.
RUN_SECONDS = 0.01


def stopped_seconds(percentage: int) -> float:
    """Return how long the guest stops after each RUN_SECONDS to lose `percentage` (0 to 99)."""
    return RUN_SECONDS * percentage / (100 - percentage)
