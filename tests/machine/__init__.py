"""Real machines: QEMUs whose guest counts in its memory, and what must hold of them when moved."""

from tests.machine.qemu import Machine, MachineError, compare
from tests.machine.sweep import Sweep, SweepError

__all__ = ["Machine", "MachineError", "Sweep", "SweepError", "compare"]
