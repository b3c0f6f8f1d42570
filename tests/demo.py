"""`make demo`: a busy guest moves between two processes over TCP, and the verdict."""

from __future__ import annotations

import sys

from tests.programs import Program, destination, end_guest, guest_pid, look_at

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
    before, after, wrong = look_at(pid, 1.0)
    end_guest(pid)
    if wrong >= 0 or after <= before:
        print(f"VERDICT: FAILED, sweeps {before} to {after}, first wrong byte {wrong}")
        return 1
    print(
        f"the guest goes on at the destination: sweep {before}, a second later sweep {after}\n"
        "VERDICT: OK, every one of its 268435456 bytes is right"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
