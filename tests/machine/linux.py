"""A guest that is a real system: Debian's kernel, Redis with a load, and a checker of its memory.

    /init --+-- redis-server <--- redis-benchmark, again and again
            +-- checker MIB PACE: writes and checks its memory for ever, see linux/checker.c
            +-- each second: PING and INCR to Redis

The guest has no disk and no network but its own. Its kernel log goes to the serial port, and what
Redis answers and the checker finds is in that log. Under TCG it boots in 10 s of processor time.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

BUILD = Path(__file__).with_name("linux") / "build.sh"
# What follows random.trust_cpu spares an emulated processor work, most of it at boot.
ARGUMENTS = (
    "console=ttyS0 printk.devkmsg=on random.trust_cpu=on nokaslr mitigations=off tsc=reliable "
    "cryptomgr.notests=1 lsm=capability audit=0 ipv6.disable=1"
)
READY = b"Run /init as init process"
REDIS = re.compile(rb"redis: \+PONG +:(\d+)")
CHECKED = re.compile(rb"checker: (\d+) pages checked, (\d+) wrong")
TROUBLE = re.compile(
    rb".*(?:\bBUG\b|Oops|panic|\bstall|segfault|Call Trace|WARNING: CPU|WRONG|general protection"
    rb"|[Oo]ut of memory|hung task|blocked for more than).*"
)


class LinuxError(Exception):
    """The guest cannot be made here, or is not as it should be."""


@dataclass(frozen=True)
class Linux:
    """A Linux guest.

    place   -- where its kernel and initramfs are, see `build`
    size    -- bytes of its memory
    checked -- bytes that the checker owns
    pace    -- pages a second that it writes, 0: as many as it can
    """

    place: Path
    size: int
    checked: int
    pace: int

    def words(self) -> list[str]:
        """Return its arguments of QEMU, the same at the source and at the destination."""
        return [
            "-vga", "none", "-cpu", "qemu64,+rdrand", "-m", f"{self.size >> 20}M",
            "-kernel", f"{self.place}/kernel", "-initrd", f"{self.place}/initramfs",
            "-append", f"{ARGUMENTS} checker={self.checked >> 20},{self.pace}",
        ]  # fmt: skip


def build() -> Path:
    """Return where kernel and initramfs are; make them if that was never done.

    Raises LinuxError if it cannot be done.
    """
    done = subprocess.run([BUILD], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LinuxError(f"the Linux guest cannot be made: {done.stderr.strip()}")
    return Path(done.stdout.strip())


@dataclass(frozen=True)
class Report:
    """What the guest has said on its serial port.

    redis   -- Redis's last answer to INCR, 0 if there is none
    checked -- pages that the checker has checked
    trouble -- lines of the log that should not be there, and what Redis or the checker got wrong
    """

    redis: int
    checked: int
    trouble: tuple[str, ...]

    def went_on(self, before: Report, answers: int, pages: int) -> bool:
        """Return whether Redis and the checker have done as much as this since `before`."""
        return self.redis >= before.redis + answers and self.checked >= before.checked + pages


def read(serial: bytes) -> Report:
    """Read what came from the serial port, the whole of it, over all moves.

    A last line that is not complete yet is left for the next time.
    """
    serial = serial[: serial.rfind(b"\n") + 1]
    answers = [int(found[1]) for found in REDIS.finditer(serial)]
    checks = [(int(found[1]), int(found[2])) for found in CHECKED.finditer(serial)]
    log = serial.partition(READY)[2]
    trouble = [found[0].decode(errors="replace").strip() for found in TROUBLE.finditer(log)]
    if answers != list(range(1, len(answers) + 1)):
        trouble.append(f"Redis does not count: {answers}")
    if [pages for pages, _ in checks] != sorted({pages for pages, _ in checks}):
        trouble.append(f"the checker does not go on: {checks}")
    if any(wrong for _, wrong in checks):
        trouble.append(f"the checker has found {checks[-1][1]} wrong pages")
    return Report(len(answers), checks[-1][0] if checks else 0, tuple(trouble))
