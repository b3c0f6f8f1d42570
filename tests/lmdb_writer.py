"""Write to an LMDB database forever: python -m tests.lmdb_writer DIRECTORY."""

from __future__ import annotations

import itertools
import sys

import lmdb


def main() -> None:
    environment = lmdb.open(sys.argv[1], map_size=32 << 20, writemap=True, sync=False)
    for turn in itertools.count():
        with environment.begin(write=True) as transaction:
            for key in range(20):
                number = (turn * 20 + key) % 5000
                transaction.put(b"%06d" % number, b"%06d:%012d" % (number, turn) * 20)
            transaction.put(b"turn", b"%d" % turn)
        if turn == 300:
            print("busy", flush=True)


if __name__ == "__main__":
    main()
