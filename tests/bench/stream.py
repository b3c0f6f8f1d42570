"""Bytes through one TCP connection between two bare processes: the ceiling, and the plain pipe.

    python -m tests.bench.stream receive HOST PORT [FILE]     says "listening on PORT", then JSON
    python -m tests.bench.stream send HOST PORT SIZE          one warm buffer, again and again
    python -m tests.bench.stream send HOST PORT FILE          a file's content

Both ends use one buffer of 1 MiB. The receiver prints {"bytes": N, "seconds": S}: from the accepted
connection to its end.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import sys
import time

BUFFER = 1 << 20


def receive(host: str, port: int, path: str) -> None:
    buffer = memoryview(mmap.mmap(-1, BUFFER))  # page-aligned, which copies like best
    buffer[:] = bytes(BUFFER)  # warm: its pages are there
    total = 0
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "wb", buffering=0)) if path else None
        listener = stack.enter_context(socket.create_server((host, port)))
        print(f"listening on {listener.getsockname()[1]}", file=sys.stderr, flush=True)
        connection = stack.enter_context(listener.accept()[0])
        began = time.perf_counter()
        while got := connection.recv_into(buffer):
            total += got
            if file:
                file.write(buffer[:got])
        seconds = time.perf_counter() - began
    print(json.dumps({"bytes": total, "seconds": seconds}))


def send(host: str, port: int, what: str) -> None:
    buffer = memoryview(mmap.mmap(-1, BUFFER))
    buffer[:] = b"\xa5" * BUFFER
    with socket.create_connection((host, port)) as connection:
        if what.isdecimal():
            for offset in range(0, int(what), BUFFER):
                connection.sendall(buffer[: int(what) - offset])
            return
        descriptor = os.open(what, os.O_RDONLY)
        while got := os.readv(descriptor, [buffer]):
            connection.sendall(buffer[:got])


def main() -> None:
    role, host, port, *rest = sys.argv[1:]
    if role == "receive":
        receive(host, int(port), rest[0] if rest else "")
    else:
        send(host, int(port), rest[0])


if __name__ == "__main__":
    main()
