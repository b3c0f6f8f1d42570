"""The load on a file: `python -m tests.bench.writer FILE HOT STRIDE RATE`.

Maps the file and adds one to a byte each STRIDE bytes below HOT, in order, for ever, RATE times a
second (0: as fast as it can). Says "writing" when it begins. After a stop (SIGSTOP) it does not
make up for the time.
"""

from __future__ import annotations

import mmap
import sys
import time

BATCH_SECONDS = 0.002


def main() -> None:
    path, (hot, stride, rate) = sys.argv[1], map(int, sys.argv[2:5])
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), hot) as memory:
        print("writing", file=sys.stderr, flush=True)
        offset, due = 0, time.monotonic()
        while True:
            for _ in range(max(1, round(rate * BATCH_SECONDS)) if rate else 10_000):
                memory[offset] = (memory[offset] + 1) & 0xFF
                offset += stride
                if offset >= hot:
                    offset = 0
            if not rate:
                continue
            due += BATCH_SECONDS
            ahead = due - time.monotonic()
            if ahead > 0:
                time.sleep(ahead)
            elif ahead < -1:
                due = time.monotonic()


if __name__ == "__main__":
    main()
