"""`make demo`: a busy guest moves between two processes over TCP, and the verdict."""

from __future__ import annotations

import asyncio
import sys

from migrate.guests.demo.check import check
from tests.programs import Program, destination, end_guest, guest_pid

GUEST = "demo:256m,hot=64m,fill=random"


def main() -> int:
    print(f"starting migrate-dst, then migrate-src --guest {GUEST}", flush=True)
    receiver, address = destination()
    source = Program(
        "migrate-src", "--guest", GUEST, "--max-bandwidth", "117m", *sys.argv[1:], address,
        show=True,
    )  # fmt: skip
    status = source.wait(120)
    print(source.out)
    if status != 0 or receiver.wait(30) != 0:
        receiver.kill()
        print(f"VERDICT: FAILED, migrate-src ended with status {status}\n{receiver.err}")
        return 1
    print(f"migrate-dst: {receiver.out}", end="")
    pid = guest_pid(receiver.out)
    verdict = asyncio.run(check(pid))
    end_guest(pid)
    print(f"VERDICT: {'OK' if verdict.right else 'FAILED'}, {verdict}")
    return 0 if verdict.right else 1


if __name__ == "__main__":
    sys.exit(main())
