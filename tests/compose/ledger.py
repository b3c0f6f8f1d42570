"""The program of the second demo: a ledger of transfers in an LMDB database, which is one file that
the database maps into memory. It knows nothing of being moved.

    ledger.py write DIRECTORY ACKS      begins a ledger in DIRECTORY/db
    ledger.py go-on DIRECTORY ACKS      waits for DIRECTORY/db, checks it, and goes on with it
    ledger.py check ACKS_A ACKS_B       judges what the two have acknowledged

Each transfer follows from all before it, so what a ledger must hold after n transfers can be worked
out from n alone. A transfer is acknowledged in the file ACKS (which stands for whoever asked for
it) when it is committed. Nothing is lost if whoever goes on found at least what was acknowledged.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb

MAP_BYTES = 64 << 20
ACCOUNTS = 256
RATE = 1000
# What is there when the first acknowledgement is given: a database is never empty.
BULK = 100_000
PATIENCE = 60.0


class Sheet:
    """What the ledger must hold: the balance of each account, and the head of the chain."""

    def __init__(self) -> None:
        self.count = 0
        self.head = b""
        self.balances = [1_000_000] * ACCOUNTS

    def transfer(self) -> tuple[int, int]:
        """Does the next transfer; returns the two accounts that it touched."""
        self.count += 1
        self.head = hashlib.sha256(self.head + self.count.to_bytes(8)).digest()
        giver, taker, amount = self.head[0], self.head[1], int.from_bytes(self.head[2:4])
        self.balances[giver] -= amount
        self.balances[taker] += amount
        return giver, taker

    def line(self) -> str:
        return f"{self.count} {self.head.hex()}"


def account(number: int) -> bytes:
    return b"account %d" % number


def opened(directory: Path) -> Any:
    # writemap: the database writes through its mapping, as any program with a memory file does
    return lmdb.open(
        str(directory / "db"), subdir=False, map_size=MAP_BYTES, writemap=True, sync=False
    )


def commit(environment: Any, sheet: Sheet, transfers: int = 1) -> None:
    with environment.begin(write=True) as transaction:
        for _ in range(transfers):
            for number in sheet.transfer():
                transaction.put(account(number), str(sheet.balances[number]).encode())
            transaction.put(b"entry " + sheet.count.to_bytes(8), sheet.head)


def work(environment: Any, sheet: Sheet, acks: int) -> None:
    """Transfers for ever, at RATE a second. A commit is acknowledged when it is done."""
    due = time.monotonic()
    while True:
        commit(environment, sheet)
        os.write(acks, f"{sheet.line()}\n".encode())
        due = max(due + 1 / RATE, time.monotonic() - 0.1)
        time.sleep(max(0.0, due - time.monotonic()))


def verify(environment: Any) -> Sheet:
    """Reads the whole database and compares it with what it must hold."""
    with environment.begin() as transaction:
        held = dict(transaction.cursor())
    entries = sum(key.startswith(b"entry ") for key in held)
    sheet = Sheet()
    for number in range(ACCOUNTS):
        held.setdefault(account(number), b"1000000")
    for _ in range(entries):
        sheet.transfer()
        if held.pop(b"entry " + sheet.count.to_bytes(8), b"") != sheet.head:
            sys.exit(f"LOST: entry {sheet.count} of {entries} is not what it must be")
    expected = {account(n): str(balance).encode() for n, balance in enumerate(sheet.balances)}
    if held != expected:
        sys.exit("LOST: the balances do not add up to the entries")
    return sheet


def write(directory: Path, acks: int) -> None:
    environment, sheet = opened(directory), Sheet()
    commit(environment, sheet, BULK)
    new = directory / "pid.new"
    new.write_text(f"{os.getpid()}\n")
    new.rename(directory / "pid")
    print(f"ledger: writing in process {os.getpid()}", flush=True)
    work(environment, sheet, acks)


def go_on(directory: Path, acks: int) -> None:
    end = time.monotonic() + PATIENCE
    while not (directory / "db").exists():
        if time.monotonic() > end:
            sys.exit("the ledger never arrived")
        time.sleep(0.05)
    environment = opened(directory)
    sheet = verify(environment)
    os.write(acks, f"{sheet.line()}\n".encode())
    print(f"ledger: found {sheet.count} transfers, all as they must be; going on", flush=True)
    work(environment, sheet, acks)


def acknowledged(path: Path) -> list[tuple[int, str]]:
    """The whole lines of an acknowledgement file, each a count and a head."""
    text = path.read_text() if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [(int(count), head) for count, _, head in (line.partition(" ") for line in lines)]


def heads(count: int) -> Iterator[str]:
    sheet = Sheet()
    for _ in range(count):
        sheet.transfer()
        yield sheet.head.hex()


def check(here: Path, there: Path) -> None:
    end = time.monotonic() + PATIENCE
    while len(acknowledged(there)) < 2:
        if time.monotonic() > end:
            sys.exit("VERDICT: FAILED, nobody went on with the ledger")
        time.sleep(0.1)
    before = acknowledged(here)
    time.sleep(1)
    after, new = acknowledged(here), acknowledged(there)
    first, last = new[0][0], new[-1][0]
    print(
        f"ledger: node A acknowledged all up to transfer {before[-1][0] if before else 0}, "
        f"node B found {first} and is at {last} now",
        flush=True,
    )
    if after != before:
        sys.exit("VERDICT: FAILED, node A goes on: there are two owners")
    if not before or before[-1][0] > first:
        sys.exit("VERDICT: FAILED, what node A had acknowledged is lost")
    if last <= first:
        sys.exit("VERDICT: FAILED, node B does not go on")
    right = list(heads(last))
    if any(right[count - 1] != head for count, head in before + new):
        sys.exit("VERDICT: FAILED, an acknowledged transfer is not what it must be")


def main() -> None:
    command, first, second = sys.argv[1:]
    if command == "check":
        check(Path(first), Path(second))
        return
    acks = os.open(second, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    with contextlib.closing(os.fdopen(acks, "wb", buffering=0)):
        (write if command == "write" else go_on)(Path(first), acks)


if __name__ == "__main__":
    main()
