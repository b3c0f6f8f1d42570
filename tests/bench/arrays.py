"""A big array that moves between two Python programs, by the library: both ends hold warm memory.

    python -m tests.bench.arrays receive SIZE [CREDS]     says "listening on ADDRESS"
    python -m tests.bench.arrays send SIZE FILL ADDRESS [CHANNELS [CREDS]]

FILL is random or zero; CREDS is a directory with certificates, for TLS. `send` prints JSON.

The memory of both ends has been written before, so that nothing but the migration is measured:
memory that a virtual machine touches for the first time can cost it several times as much.
"""

from __future__ import annotations

import json
import mmap
import os
import sys

import uvloop

import migrate

PIECE = 1 << 20


def warm(size: int, fill: str) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    piece = os.urandom(PIECE) if fill == "random" else bytes(PIECE)
    for offset in range(0, size, PIECE):
        memory[offset : offset + PIECE] = piece
    return memory


def credentials(directory: str, role: migrate.Role) -> migrate.Credentials | None:
    return migrate.Credentials(directory, role) if directory else None


def receive(size: int, creds: str = "") -> None:
    memory = warm(size, "random")
    uvloop.run(
        migrate.receive(
            "127.0.0.1:0", into=memory,
            listening=lambda address: print(f"listening on {address}", file=sys.stderr, flush=True),
            credentials=credentials(creds, migrate.Role.DESTINATION),
        )
    )  # fmt: skip


def send(size: int, fill: str, address: str, channels: str = "1", creds: str = "") -> None:
    # It says itself what it writes, which is nothing: no scan looks for it.
    guest = migrate.BufferGuest(warm(size, fill), marks=True)
    parameters = migrate.Parameters(channels=int(channels))
    secret = credentials(creds, migrate.Role.SOURCE)
    statistics = uvloop.run(migrate.send(guest, address, parameters, credentials=secret))
    print(json.dumps({"bytes": size, "seconds": statistics.total_time}))


def main() -> None:
    role, size, *rest = sys.argv[1:]
    if role == "receive":
        receive(int(size), *rest)
    else:
        send(int(size), *rest)


if __name__ == "__main__":
    main()
