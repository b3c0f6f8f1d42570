"""The shared memory of a demo guest.

It is a memfd that the guest's process, the source and the destination map:

    control block (4096 bytes) | dirty marks, one byte per page | guest memory

    word  control block (64-bit, native order)
    0     command: see Command
    1     state: see State
    2, 3  position: sweeps done, index of the next increment
    4     owner: see Owner
    5..11 magic, size, hot, stride, rate (bits of a float), fill, page size
    12    throttle: the percentage of its time that the guest loses, 0 to 99

A program that pauses the guest holds a lock (flock) on the memfd. The kernel drops that lock when
the program dies, however it dies. A paused guest that can take the lock then runs on if it is ours
(Owner.OURS). It ends if it is INCOMPLETE, because no program will ever own half a guest. It stays
paused if it is RELINQUISHED or COMPLETE, because a journal tells who owns it. So a killed source
never leaves a stopped guest of its own behind, a killed destination never creates a second one, and
two sources cannot move the same guest. A throttled guest looks at the lock too: it runs at full
speed once no program holds it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

MAGIC = 0x58424D44454D4F31
CONTROL_BYTES = 4096
# Huge pages, where the kernel has them for memfds, begin at such offsets.
MEMORY_ALIGN = 2 << 20
# The words that describe the guest: SHAPE, the magic first.
SHAPE = 5
SHAPE_WORDS = 7


class Word(IntEnum):
    """Words of the control block by index. migrate.memory._memory.run_load knows them too."""

    COMMAND = 0
    STATE = 1
    SWEEP = 2
    INDEX = 3
    OWNER = 4
    THROTTLE = 12


class Command(IntEnum):
    """What the guest is to do."""

    RUN = 1
    PAUSE = 2
    END = 3


class State(IntEnum):
    """What the guest does. STARTING: it fills its memory."""

    STARTING = 0
    RUNNING = 1
    PAUSED = 2


class Owner(IntEnum):
    """Who owns the guest."""

    OURS = 0
    # Handed to a destination: the guest never runs here again.
    RELINQUISHED = 1
    # Some of its memory has come.
    INCOMPLETE = 2
    # All of it has come; the journal tells whether it is ours.
    COMPLETE = 3


@dataclass(frozen=True)
class DemoShape:
    """What a demo guest is: `size` bytes, some of which the guest increments.

    hot, stride -- the bytes at multiples of `stride` below `hot` are incremented
    rate        -- increments per second; 0: full speed
    random      -- whether the other bytes have a fixed pattern; else they are zero
    page_size   -- bytes per dirty mark
    """

    size: int
    hot: int
    stride: int
    rate: float = 0.0
    random: bool = False
    page_size: int = 4096

    @property
    def pages(self) -> int:
        return -(-self.size // self.page_size)

    @property
    def marks(self) -> int:
        """Bytes of dirty marks: a whole number of words."""
        return (self.pages + 7) // 8 * 8

    @property
    def memory_offset(self) -> int:
        """Where guest memory begins."""
        return -(-(CONTROL_BYTES + self.marks) // MEMORY_ALIGN) * MEMORY_ALIGN

    @property
    def padded(self) -> int:
        """Bytes of guest memory in whole pages."""
        return self.pages * self.page_size

    @property
    def total(self) -> int:
        """Bytes of the shared memory."""
        return self.memory_offset + self.padded

    def pack(self) -> memoryview:
        """Return the words that describe the guest, the magic first."""
        packed = struct.pack(
            "4QdQQ", MAGIC, self.size, self.hot, self.stride, self.rate, self.random, self.page_size
        )
        return memoryview(packed).cast("Q")

    @classmethod
    def unpack(cls, words: bytes | memoryview) -> DemoShape:
        """Read what `pack` made. Raises ValueError for another magic; checks nothing else."""
        magic, size, hot, stride, rate, random, page_size = struct.unpack("4QdQQ", words)
        if magic != MAGIC:
            raise ValueError("no demo guest")
        return cls(size, hot, stride, rate, bool(random), page_size)


def shape_words(words: memoryview) -> memoryview:
    """Return the words of a control block that describe the guest."""
    return words[SHAPE : SHAPE + SHAPE_WORDS]
