"""`make headline`: the seed's claim, that a guest which never arrives without xbzrle does with it.

A guest of 1 GiB writes one byte in each page of a hot set of 512 MiB, for ever, at full speed; the
link carries 117 MiB a second (1 Gbit/s). Both runs have the default downtime limit of 300 ms.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import Any

from tests.programs import Program, destination, end_guest, guest_pid, look_at

GUEST = "demo:1g,hot=512m,stride=4096,fill=random"


def run(*options: str) -> tuple[int, dict[str, Any], str]:
    receiver, address = destination()
    source = Program(
        "migrate-src", "--json", "--guest", GUEST, "--max-bandwidth", "117m", *options, address
    )
    status = source.wait(300)
    receiver.wait(60)
    verdict = "guest stays at the source"
    pid = guest_pid(receiver.out if status == 0 else source.err)
    before, after, wrong = look_at(pid, 0.5)
    if status == 0:
        verdict = "guest runs at the destination"
    if wrong >= 0 or after <= before:
        verdict = f"WRONG at byte {wrong}"
    end_guest(pid)
    return status, json.loads(source.out), verdict


def row(name: str, status: int, result: dict[str, Any], verdict: str) -> str:
    downtime = result.get("downtime")
    return (
        f"| {name} | {'completed' if status == 0 else 'given up'} "
        f"| {result['total-time'] / 1e3:.1f} s | {result['ram']['transferred'] / 2**20:.0f} MiB "
        f"| {result['ram']['dirty-sync-count']} | {result['expected-downtime']} ms "
        f"| {'-' if downtime is None else f'{downtime} ms'} | {verdict} |"
    )


def main() -> int:
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; guest {GUEST}")
    print("| | outcome | time | on the wire | rounds | predicted downtime | downtime | |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    failed = False
    for name, options in (
        ("xbzrle off", ["--capability", "xbzrle=off"]),
        ("xbzrle, cache 512m", ["--cache-size", "512m"]),
    ):
        status, result, verdict = run(*options)
        print(row(name, status, result, verdict), flush=True)
        if name == "xbzrle off":
            print(f"  {result.get('error-desc', 'it converged, against all expectation')}")
            failed |= status != 7
        else:
            failed |= status != 0
            failed |= not 0 < result.get("downtime", 0) < min(300, 2 * result["expected-downtime"])
        failed |= "WRONG" in verdict
    print("FAILED" if failed else "OK")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
