"""`python -m tests.bench`: runs the parts, prints tables, writes bench.json and plots."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from tests.bench import machine, plots
from tests.bench.processes import ProgramError
from tests.bench.registry import PARTS
from tests.bench.report import LeftOutError, Options, Part, Table

BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "part", nargs="*", metavar="PART", help=f"which to run: {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="smaller guests, one run")
    parser.add_argument(
        "--runs", type=int, default=0, metavar="N", help="how often each measurement is repeated"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("build/bench"), metavar="DIR",
        help="where bench.json and the plots go (default: build/bench)",
    )  # fmt: skip
    parser.add_argument(
        "--write", type=Path, metavar="FILE",
        help="also put the tables between the two benchmark marks of FILE; not with --quick",
    )  # fmt: skip
    args = parser.parse_args(words)
    unknown = [name for name in args.part if name not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}: there are {', '.join(PARTS)}")
    if args.runs < 0:
        parser.error(f"--runs {args.runs}: once is the least")
    return args


def main(words: list[str]) -> int:
    args = arguments(words)
    signal.signal(signal.SIGTERM, _end)
    args.output.mkdir(parents=True, exist_ok=True)
    facts = machine.describe()
    print(f"# Benchmark\n\n{machine.sentence(facts)}", flush=True)
    options = Options(args.quick, args.runs)
    parts: list[Part] = []
    failed = False
    for name in args.part or PARTS:
        print(f"\n{name}:", file=sys.stderr, flush=True)
        try:
            part = PARTS[name].run(options)
        except LeftOutError as error:
            print(f"\n{name} is left out: {error}", flush=True)
            continue
        except (ProgramError, OSError) as error:
            print(f"\n{name} failed: {error}", flush=True)
            failed = True
            continue
        print(f"\n{part.text()}", flush=True)
        parts.append(part)
        write(args.output, facts, options, parts)
    draw(args.output, parts)
    if args.write and parts and not args.quick:
        rewrite(args.write, args.output / "bench.json")
    return int(failed)


def write(directory: Path, facts: dict[str, str], options: Options, parts: list[Part]) -> None:
    """All numbers so far: an interrupted benchmark keeps what it has."""
    everything = {
        "machine": facts,
        "quick": options.quick,
        "parts": {part.name: as_json(part) for part in parts},
    }
    (directory / "bench.json").write_text(json.dumps(everything, indent=1) + "\n")


def as_json(part: Part) -> dict[str, Any]:
    tables = [
        {"title": table.title, "head": list(table.head), "rows": [list(row) for row in table.rows]}
        for table in part.tables
    ]
    return {
        "title": part.title,
        "method": part.method,
        "notes": list(part.notes),
        "tables": tables,
        "data": part.data,
    }


def rewrite(page: Path, results: Path) -> None:
    """Replace the sections between the marks of a page; parts that were not run keep theirs.

    Raises ProgramError if the page has no marks.
    """
    everything = json.loads(results.read_text())
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not end:
        raise ProgramError(f"{page} has no marks {BEGIN} and {END}")
    sections = dict(re.findall(r"(?ms)^<!-- part: (\w+) -->\n(.*?)(?=^<!-- part: |\Z)", old))
    for name, part in everything["parts"].items():
        sections[name] = _section(part, everything["machine"])
    pieces = [f"<!-- part: {name} -->\n{sections[name]}" for name in PARTS if name in sections]
    page.write_text(f"{before}{begin}\n{''.join(pieces)}{end}{after}")


def _section(part: dict[str, Any], facts: dict[str, str]) -> str:
    tables = [Table(one["head"], one["rows"], one["title"]) for one in part["tables"]]
    pieces = [f"### {part['title']}", part["method"], *(table.markdown() for table in tables)]
    if part["notes"]:
        pieces.append("\n".join(f"- {note}" for note in part["notes"]))
    pieces.append(f"Measured on {machine.sentence(facts)}")
    return "\n\n".join(pieces) + "\n\n"


def draw(directory: Path, parts: list[Part]) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("\nThere are no plots: matplotlib is not installed (pip install '.[bench]').")
        return
    for part in parts:
        path = plots.save(part.name, part.data, directory)
        if path is not None:
            print(f"\nplot: {path}")


def _end(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)  # through every finally: nothing is left behind


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
