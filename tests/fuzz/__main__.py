"""Fuzzes: builds what is to be fuzzed, and runs libFuzzer on each target for some time.

    python -m tests.fuzz [TARGET...] [--seconds N]

The corpus stays in build/fuzz/corpus for the next run; what is found is written to build/fuzz/found
and printed. When it is understood it becomes a file in tests/fuzz/cases/TARGET, which tests replay.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.fuzz.build import BUILD, FUZZER, ROOT, TREE, build
from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS

HERE = Path(__file__).parent
LENGTHS = {
    "frames": 4096, "pages": 4096, "delta": 4096, "rounds": 1500, "stream": 4096, "records": 2048,
    "text": 1024, "compressed": 8192,
}  # fmt: skip
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:handle_abort=1"
    ":malloc_context_size=2:quarantine_size_mb=16",  # Python allocates all the time
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
LINES = {"frames", "stream", "text", "compressed"}  # whose Python code is under test, too
MEGABYTES = 1500


def _files(target: str) -> list[Path]:
    """The corpus, the seeds and the cases, as directories that are there."""
    corpus, start = BUILD / "corpus" / target, BUILD / "seeds" / target
    for directory in (corpus, start, BUILD / "found"):
        directory.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(target)):
        (start / f"{number:03}").write_bytes(seed)
    cases = HERE / "cases" / target
    return [corpus, start, *([cases] if cases.is_dir() else [])]


def fuzz(target: str, seconds: float) -> tuple[int, str]:
    """Runs one target; (exit code, the end of what libFuzzer said)."""
    environment = {**os.environ, **ENVIRONMENT, "FUZZ_TARGET": target, "FUZZ_TREE": f"{TREE}/"}
    if target in LINES:
        environment["FUZZ_LINES"] = "1"
    command = [
        str(FUZZER), *map(str, _files(target)), f"-dict={HERE / 'dictionary.txt'}",
        f"-max_total_time={seconds:.0f}", f"-max_len={LENGTHS[target]}", "-timeout=30",
        f"-rss_limit_mb={MEGABYTES}", f"-artifact_prefix={BUILD}/found/{target}-",
        "-print_final_stats=1", "-use_value_profile=1", "-reload=0",
    ]  # fmt: skip
    with open(BUILD / f"{target}.log", "w+b") as log:
        done = subprocess.run(command, cwd=ROOT, env=environment, stderr=log, check=False)
        log.seek(0)
        return done.returncode, log.read().decode(errors="replace")


def _figures(said: str, seconds: float) -> str:
    runs = re.search(r"number_of_executed_units: (\d+)", said)
    found = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", said)
    if runs is None or not found:
        return "no figures"
    cov, ft, corpus = found[-1]
    return (
        f"{int(runs[1]):,} inputs in {seconds:.0f} s, {cov} edges and {ft} features, "
        f"{corpus} inputs in the corpus"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=60, help="on each target (default: 60)")
    args = parser.parse_args()
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"no target {', '.join(unknown)}: there are {', '.join(TARGETS)}")
    began = time.monotonic()
    build()
    print(f"built in {time.monotonic() - began:.0f} s", flush=True)
    status = 0
    for target in args.targets or TARGETS:
        began = time.monotonic()
        code, said = fuzz(target, args.seconds)
        print(f"{target}: {_figures(said, time.monotonic() - began)}", flush=True)
        if code:
            status = 1
            print("\n".join(said.splitlines()[-60:]), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
