"""Write to a database for ever: python -m tests.database_writers lmdb|sqlite FILE NUMBER BYTES.

Several such programs may write to one database; NUMBER tells them apart. Each says "busy" when the
database has about BYTES of data. What each transaction leaves true, `check` checks:

    lmdb    all records of one program were written in the same turn
    sqlite  the balances of the accounts of one program have the sum 0
"""

from __future__ import annotations

import itertools
import random
import sqlite3
import sys
from pathlib import Path

import lmdb

RECORDS = 200
RECORD = 2000
ACCOUNTS = 500
BALLAST = 1 << 20
MIB = 1 << 20


def write_lmdb(path: str, number: int, size: int) -> None:
    environment = lmdb.open(path, map_size=4 * size + 64 * MIB, subdir=False, writemap=True,
                            sync=False)  # fmt: skip
    chance = random.Random(number)
    with environment.begin(write=True) as transaction:
        for piece in range(size // BALLAST):
            transaction.put(b"ballast %d %06d" % (number, piece), chance.randbytes(BALLAST))
    for turn in itertools.count():
        with environment.begin(write=True) as transaction:
            for key in range(RECORDS):
                transaction.put(b"%d %06d" % (number, key), b"%012d" % turn * (RECORD // 12))
        if turn == 10:
            print("busy", flush=True)


def check_lmdb(path: str, programs: int) -> None:
    with (
        lmdb.open(path, subdir=False, readonly=True, lock=False) as environment,
        environment.begin() as transaction,
    ):
        for number in range(programs):
            values = {transaction.get(b"%d %06d" % (number, key)) for key in range(RECORDS)}
            assert len(values) == 1
            chance, piece = random.Random(number), 0
            while ballast := transaction.get(b"ballast %d %06d" % (number, piece)):
                assert ballast == chance.randbytes(BALLAST)
                piece += 1
            assert piece


def write_sqlite(path: str, number: int, size: int) -> None:
    database = sqlite3.connect(path, timeout=60, isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=OFF")
    database.execute(f"PRAGMA mmap_size={1 << 34}")
    database.execute("PRAGMA wal_autocheckpoint=100")
    database.execute("BEGIN IMMEDIATE")
    database.execute(f"CREATE TABLE account{number} (id INTEGER PRIMARY KEY, balance, filling)")
    filling = size // ACCOUNTS
    database.executemany(
        f"INSERT INTO account{number} VALUES (?, 0, randomblob(?))",
        [(account, filling) for account in range(ACCOUNTS)],
    )
    database.execute("COMMIT")
    for turn in itertools.count():
        one, other = random.sample(range(ACCOUNTS), 2)
        amount = random.randrange(1000)
        database.execute("BEGIN IMMEDIATE")
        change = f"UPDATE account{number} SET balance = balance + ? WHERE id = ?"
        database.execute(change, (amount, one))
        database.execute(change, (-amount, other))
        database.execute("COMMIT")
        if turn == 50:
            print("busy", flush=True)


def check_sqlite(path: str, programs: int) -> None:
    database = sqlite3.connect(path)
    try:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        for number in range(programs):
            count, total = database.execute(
                f"SELECT count(*), sum(balance) FROM account{number}"
            ).fetchone()
            assert (count, total) == (ACCOUNTS, 0)
    finally:
        database.close()


def companion(kind: str, path: Path) -> Path | None:
    """Return the file beside a database that holds a part of it; None if there is none."""
    return path.with_name(f"{path.name}-wal") if kind == "sqlite" else None


def check(kind: str, path: Path, programs: int) -> None:
    """Raise AssertionError unless what the programs leave true is true."""
    (check_lmdb if kind == "lmdb" else check_sqlite)(str(path), programs)


if __name__ == "__main__":
    write = write_lmdb if sys.argv[1] == "lmdb" else write_sqlite
    write(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
