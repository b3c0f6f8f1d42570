"""The middle of a long bad line: hands Ethernet frames from one TAP interface to the other, later.

    python wire.py LEFT RIGHT SECONDS LOST TWICE LATE

Each frame is held for SECONDS; LOST, TWICE and LATE are the shares of frames, 0 to 1, that are
dropped, delivered twice, and held for LATE_SECONDS longer, so that others pass them. It does what
tc's netem would, of which not every kernel has a copy (the ones this is tested on have none), and
rolls the same dice in each run. It says "ready", and ends with its standard input.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
LATE_SECONDS = 0.01
# As many frames are taken before those that are due go out.
MANY = 64
FRAME = 1 << 16


def attach(name: str) -> int:
    """The file descriptor of a TAP interface that is there."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return tap


def run(left: int, right: int, seconds: float, lost: float, twice: float, late: float) -> None:
    """Hands on until standard input ends."""
    chance = random.Random(4444)
    other = {left: right, right: left}
    held: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        wait = max(0.0, held[0][0] - time.monotonic()) if held else None
        ready, _, _ = select.select((left, right, 0), (), (), wait)
        if 0 in ready:
            return
        for end in ready:
            for _ in range(MANY):
                try:
                    frame = os.read(end, FRAME)
                except BlockingIOError:
                    break
                due = time.monotonic() + seconds
                for _ in range(1 + (chance.random() < twice)):
                    if chance.random() >= lost:
                        count += 1
                        later = LATE_SECONDS if chance.random() < late else 0.0
                        heapq.heappush(held, (due + later, count, other[end], frame))
        now = time.monotonic()
        while held and held[0][0] <= now:
            _, _, end, frame = heapq.heappop(held)
            try:
                os.write(end, frame)
            except OSError:  # the queue behind it is full, or the interface is down: it is lost
                pass


def main() -> None:
    left, right, *numbers = sys.argv[1:]
    try:
        os.nice(-10)  # a line does not wait for the programs at its ends
    except PermissionError:
        pass
    ends = attach(left), attach(right)
    print("ready", flush=True)
    run(*ends, *map(float, numbers))


if __name__ == "__main__":
    main()
