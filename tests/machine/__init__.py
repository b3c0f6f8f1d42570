"""Real QEMUs whose guest counts in its memory, and checks of the guest after a migration."""

from tests.machine.qemu import Machine, MachineError, compare
from tests.machine.sweep import Sweep, SweepError

__all__ = ["Machine", "MachineError", "Sweep", "SweepError", "compare"]
