"""Write all pages and completions below a directory, as they are installed below PREFIX/share."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from migrate.manual import bash, fish, man, zsh
from migrate.manual.parsers import Program, programs
from migrate.output.run import run_program


def files(date: str) -> Iterator[tuple[str, str]]:
    """Give (path below share, text) of each page and completion.

    date -- of the pages, YYYY-MM-DD
    """
    every = programs()
    pages = [page for program in every for page in (program, *program.subcommands)]
    for page in pages:
        others = [one.page for one in pages if one is not page]
        yield f"man/man1/{page.page}.1", man.page(page, others, date)
    for program in every:
        yield from completions(program)


def completions(program: Program) -> Iterator[tuple[str, str]]:
    """Give (path below share, text) of a program's completion for each shell."""
    yield f"bash-completion/completions/{program.name}", bash.script(program)
    yield f"zsh/site-functions/_{program.name}", zsh.script(program)
    yield f"fish/vendor_completions.d/{program.name}.fish", fish.script(program)


def write(directory: Path) -> list[Path]:
    """Write all files; return their paths, relative to `directory`.

    The pages have the date of SOURCE_DATE_EPOCH, else today's.
    """
    when = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH") or time.time()))
    written = []
    for name, text in files(time.strftime("%Y-%m-%d", when)):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(Path(name))
    return written


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m migrate.manual DIRECTORY")
    for path in write(Path(sys.argv[1])):
        print(path)


if __name__ == "__main__":
    run_program("migrate.manual", main, waits=True)
