"""What the guest of guest.S does to its memory, and what must be true of it at any moment.

The guest increments one byte in each `stride` bytes, in order, over and over. While it is paused,
the swept bytes in order are

    v v v v ... v  v-1 v-1 ... v-1        (modulo 256)
                 ^ the sweep was interrupted here

and v follows from the number of sweeps that the guest has written to its serial port. A page that
is stale, or in the place of another, breaks this.
"""

from __future__ import annotations

import functools
import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("guest.S")
LINE = re.compile(rb"[0-9a-f]{8}\n")
PARAMETERS = struct.Struct("<8I")
PARAMETERS_AT = 8
IMAGE_SIZE = 1 << 16
IMAGE_AT = 0xF0000
CLOCK = 1193182
BASE = 1 << 20


class SweepError(AssertionError):
    """The guest's memory or count is not that of a guest that was never disturbed."""


@dataclass(frozen=True)
class Sweep:
    """Increments in [start, start + size); each `every` sweeps a count goes to the serial port.

    stride -- 4096 is one increment in a page. With more increments, QEMU before 9.0 (TCG) may miss
              the last of them; guest.S has it look again once each sweep (`forget`).
    fill   -- bytes from `start` on that are pseudo-random before the first sweep, apart from the
              swept ones: no page is zero, or equal to another; 0 leaves them as they are
    rate   -- increments a second at most, in steps of 1000; 0: full speed
    """

    size: int
    start: int = BASE
    stride: int = 4096
    every: int = 64
    fill: int = 0
    rate: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.stride <= self.size:
            raise ValueError(f"a stride of {self.stride} does not fit a sweep of {self.size} bytes")
        if self.start < BASE or self.start % 4 or self.fill % 4 or self.fill < 0:
            raise ValueError("a sweep starts at 1 MiB or above, and both it and its fill in words")
        if not 0 < self.every < 255:
            raise ValueError(f"every {self.every} sweeps: more than 254 do not show in a byte")
        if self.rate < 0 or self.rate % 1000:
            raise ValueError(f"a rate of {self.rate} is not a number of whole thousands a second")

    @property
    def end(self) -> int:
        """The first byte of memory that the guest does not touch."""
        return self.start + max(self.size, self.fill)

    def image(self) -> bytes:
        """Return the firmware of the machine."""
        content = bytearray(assembled())
        PARAMETERS.pack_into(
            content, PARAMETERS_AT, self.start, self.start + self.size, self.stride, self.every,
            self.start, self.start + self.fill, self.rate // 1000, CLOCK // 1000,
        )  # fmt: skip
        return bytes(content)

    def check(self, memory: bytes, counts: Sequence[int] = ()) -> int:
        """Raise SweepError unless [start, start + size) is as it must be; return v, see above.

        memory -- those bytes, of a paused guest
        counts -- what that guest has counted
        """
        if len(memory) != self.size:
            raise ValueError(f"{len(memory)} bytes of memory for a sweep of {self.size}")
        swept = memory[:: self.stride]
        value = swept[0]
        before = (value - 1) % 256
        turn = len(swept) - len(swept.lstrip(bytes([value])))
        rest = swept[turn:].lstrip(bytes([before]))
        if rest:
            address = self.start + (len(swept) - len(rest)) * self.stride
            raise SweepError(
                f"the byte at {address:#x} is {rest[0]}: of those before it {turn} are {value}, "
                f"and the others {before}"
            )
        if counts and (value - counts[-1]) % 256 > self.every:
            raise SweepError(
                f"the swept bytes are {value} after {counts[-1]} sweeps ({counts[-1] % 256}) or at "
                f"most {self.every} more: memory and processor are of different times"
            )
        return value

    def counted(self, serial: bytes) -> list[int]:
        """Return the counts that the guest has written to its serial port; 0 is the first.

        serial -- for a guest that has moved: the output of its machines, one after the other. The
                  last line may be incomplete.

        Raises SweepError if a count, or a part of one, is missing, repeated, or out of order.
        """
        whole = serial[: serial.rfind(b"\n") + 1]
        lines = whole.splitlines(keepends=True)
        for number, line in enumerate(lines):
            if not LINE.fullmatch(line) or int(line, 16) != number * self.every % (1 << 32):
                told = b"".join(lines[max(number - 2, 0) : number + 2])
                raise SweepError(
                    f"the guest counts {told!r} where {number * self.every:08x} is due"
                )
        return [int(line, 16) for line in lines]


@functools.cache
def assembled() -> bytes:
    """Return guest.S as a firmware image, with all parameters 0. Raises RuntimeError."""
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory, "guest")
        done = subprocess.run(
            [
                "gcc", "-m64", "-nostdlib", "-static", "-x", "assembler", str(SOURCE),
                f"-Wl,-Ttext={IMAGE_AT:#x},--oformat=binary,--build-id=none", "-o", str(image),
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"gcc failed on {SOURCE.name}: {done.stderr.strip()}")
        content = image.read_bytes()
    if len(content) != IMAGE_SIZE:
        raise RuntimeError(f"{SOURCE.name} is {len(content)} bytes: the image has {IMAGE_SIZE}")
    return content


def differing(ours: Sequence[bytes], theirs: Sequence[bytes], first: int, page: int) -> list[int]:
    """Return the addresses of pages whose hashes differ, in two memories from `first` on."""
    pairs = itertools.zip_longest(ours, theirs)
    return [first + number * page for number, (one, other) in enumerate(pairs) if one != other]
