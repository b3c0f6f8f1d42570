"""The program migrate-stream: shows what a captured migration stream contains.

migrate-stream FILE                        a stream of QEMU or of migrate-src; - is standard input
migrate-stream FILE --pages pc.ram:256     the records of a page, with their places
migrate-stream FILE --extract pc.ram=RAM   the memory as the stream leaves it
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

from migrate.cli.options import VERSION, Parser
from migrate.errors import MigrationError, UsageError
from migrate.files.identity import identity_of
from migrate.output import say
from migrate.output.run import run_program
from migrate.runtime import core_dumps

# Records of --pages that are kept for --json.
MAX_RECORDS = 1_000_000

EPILOG = """exit codes:
    0 the stream is whole    2 usage
    1 it is damaged or cut off, or cannot be read, or the output cannot be written

examples:
  migrate-stream guest.stream
  migrate-stream guest.stream --devices | less
  migrate-stream guest.stream --json | jq .deltas
  zstdcat guest.stream.zst | migrate-stream -
  migrate-stream guest.stream --pages pc.ram:256-511
  migrate-stream guest.stream --extract pc.ram=guest.memory
"""


def stream_parser() -> Parser:
    """Return the parser of migrate-stream."""
    parser = Parser(
        prog="migrate-stream",
        description="Shows what is in a captured migration stream: of QEMU, or of migrate-src.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"migrate-stream {VERSION}")
    parser.add_argument("file", metavar="FILE", help="the stream; - for standard input")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.add_argument(
        "--devices", action="store_true",
        help="print the fields of each device, decoded with the stream's own description",
    )  # fmt: skip
    parser.add_argument(
        "--pages", default="", metavar="BLOCK[:FIRST[-LAST]]",
        help="list the records of a block's pages instead: place, page, kind and length (only for "
        "streams of QEMU)",
    )  # fmt: skip
    parser.add_argument(
        "--extract", action="append", default=[], metavar="BLOCK=FILE",
        help="write the memory of a block, as the stream leaves it, to a file; repeatable (only "
        "for streams of QEMU)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="let --extract overwrite files")
    return parser


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    if path == "-":
        yield sys.stdin.buffer.raw if hasattr(sys.stdin.buffer, "raw") else sys.stdin.buffer
        return
    with open(path, "rb", buffering=0) as file:
        yield file


class Progress:
    """Shows on a terminal how much of a large stream has been read."""

    def __init__(self, file: BinaryIO) -> None:
        self._size = os.fstat(file.fileno()).st_size
        self._shown = False

    def __call__(self, read: int) -> None:
        if read > (64 << 20) and sys.stderr.isatty():
            share = f" of {self._size >> 20}" if self._size else ""
            print(f"\r{read >> 20}{share} MiB ", end="", file=sys.stderr, flush=True)
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = False


def survey(args: argparse.Namespace) -> int:
    """Read the stream and print what it contains; return the exit code."""
    import msgspec

    from migrate.inspect.pages import BlockImage, PageList, PageRecord
    from migrate.inspect.reading import Reader, read
    from migrate.inspect.text import lines_of
    from proto.survey.facts import QemuFacts
    from proto.survey.qemu import QemuSurvey

    records: list[PageRecord] = []
    left_out = 0

    def tell(record: PageRecord) -> None:
        nonlocal left_out
        if not args.json:
            print(f"{record.at:>14}  {record.page:>10}  {record.kind:<6}  {record.length}")
        elif len(records) < MAX_RECORDS:
            records.append(record)
        else:
            left_out += 1

    pages = PageList(args.pages, tell) if args.pages else None
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_opened(args.file))
        there = os.fstat(file.fileno())
        inode = identity_of(there)
        images = [BlockImage(one, inode, overwrite=args.overwrite) for one in args.extract]
        _check_files([image.path for image in images])
        for image in images:
            stack.callback(image.close)
        made = QemuSurvey([*images, *([pages] if pages else [])])
        progress = Progress(file)
        stack.callback(progress.clear)
        facts = read(Reader(file, progress), lambda: made)
        progress.clear()
        wanted = [image.block for image in images] + ([pages.block] if pages else [])
        if wanted and not isinstance(facts, QemuFacts):
            raise UsageError("--pages and --extract are for streams of QEMU")
        _check_blocks(wanted, [one.name for one in facts.blocks])
        for image in images:
            image.open(made.parser)
            image.finish()
    if args.json:
        told: dict[str, Any] = msgspec.to_builtins(facts)
        if pages:
            told |= {"records": msgspec.to_builtins(records), "records_left_out": left_out}
        # In ASCII: names in a stream may contain sequences that a terminal would obey.
        sys.stdout.write(json.dumps(told, separators=(",", ":")) + "\n")
    elif not pages:
        for line in lines_of(facts, devices=args.devices):
            print(line)
    else:
        for fault in facts.faults:
            say(f"migrate-stream: byte {fault.at}: {fault.what}")
    sys.stdout.flush()
    return 0 if facts.whole else 1


def _check_files(paths: list[str]) -> None:
    real = [os.path.realpath(path) for path in paths]
    for path, at in zip(paths, real, strict=True):
        if real.count(at) > 1:
            raise UsageError(f"--extract: two blocks cannot be written to one file: {path}")


def _check_blocks(wanted: list[str], there: list[str]) -> None:
    for name in wanted:
        if name not in there:
            listed = ", ".join(there) if there else "none: the list of blocks is missing"
            raise UsageError(f"the stream has no block {name!r}; it has: {listed}")


def run(words: list[str] | None = None) -> int:
    """Run the program; return its exit code.

    words -- the command line without the program's name; None: this process's own
    """
    parser = stream_parser()
    try:
        args = parser.parse_args(words)
        core_dumps.disable()
        return survey(args)
    except MigrationError as error:
        say(f"migrate-stream: {error}")
        return error.exit_code
    except BrokenPipeError:
        return 1
    except MemoryError:
        say("migrate-stream: no memory for a guest of that size")
        return 1
    except OSError as error:
        why = f"{error.strerror or error}"
        say(f"migrate-stream: {error.filename or args.file}: {why}")
        return 1
    except KeyboardInterrupt:
        return 130


def main() -> None:
    run_program("migrate-stream", run, waits=True)


if __name__ == "__main__":
    main()
