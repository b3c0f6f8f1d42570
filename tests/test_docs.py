"""The README and docs/: their links lead somewhere, and their examples run.

The program's own parser reads every command line of ours in them. The recipes run as they are
printed; only paths, ports and process numbers are replaced.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from migrate.cli.destination_options import destination_parser
from migrate.cli.migrate_ctl import control_parser
from migrate.cli.migrate_stream import stream_parser
from migrate.cli.resolve import resolve_parser
from migrate.cli.source_options import source_parser
from tests.programs import Program, free_port

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "proto/README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
COMMAND = re.compile(r"(?m)^ {4}(?:\$ )?(migrate-(?:src|dst|ctl|stream) .*)$")
PARSERS = {
    "migrate-src": source_parser,
    "migrate-dst": destination_parser,
    "migrate-ctl": control_parser,
    "migrate-stream": stream_parser,
}


def slug(heading: str) -> str:
    """Return the anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def commands() -> list[tuple[str, str]]:
    """Return (page, command line) for each command of ours, without the comment behind it."""
    found = []
    for page in PAGES:
        for line in COMMAND.findall(page.read_text()):
            command = re.split(r"  +", line)[0].strip()
            if not command.startswith("migrate-src: "):
                found.append((page.name, command))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", file.read_text())
            assert anchor in map(slug, headings), target


def test_readme_can_be_read_in_five_minutes() -> None:
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize(("page", "command"), commands())
def test_documented_commands_are_understood(page: str, command: str) -> None:
    name, *words = shlex.split(command)
    parser = PARSERS[name]()
    if words[:1] == ["resolve"]:
        parser, words = resolve_parser(name), words[1:]
    parser.parse_args(words)


def test_file_recipe(shm: Path) -> None:
    """The destination's file is what the writer had written when it was stopped."""
    destination, source = (
        command for page, command in commands() if page == "README.md" and "/dev/shm/db" in command
    )
    guest, output, done = shm / "db", shm / "there", shm / "done"
    guest.write_bytes(bytes(1 << 22))
    writes = (
        "import itertools, mmap, sys, time\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "memory = mmap.mmap(file.fileno(), 0)\n"
        "print(flush=True)\n"
        "for n in itertools.count():\n"
        "    memory[n * 4096 % len(memory)] = n % 251\n"
        "    time.sleep(0.001)\n"
    )
    port = str(free_port())
    with subprocess.Popen(
        [sys.executable, "-c", writes, str(guest)], stdout=subprocess.PIPE
    ) as writer:
        try:
            assert writer.stdout is not None
            writer.stdout.readline()
            words = destination.replace("/dev/shm/db", str(output)).replace("4444", port)
            words = words.replace("systemctl start db", f"touch {done}")
            receiver = Program(*shlex.split(words))
            receiver.read_line(r"listening on (\S+)")
            words = source.replace("/dev/shm/db", str(guest)).replace("1234", str(writer.pid))
            sender = Program(*shlex.split(words.replace("tcp:host:4444", f"tcp:localhost:{port}")))
            assert (sender.wait(60), receiver.wait(60)) == (0, 0), sender.err + receiver.err
            assert output.read_bytes() == guest.read_bytes()
            assert done.exists()
        finally:
            writer.kill()


def test_python_recipe(tmp_path: Path) -> None:
    """The array arrives, and the thread that writes it learns that it has moved."""
    section = README.partition("### An array in a Python program")[2].partition("\n### ")[0]
    sends, receives = (
        re.sub(r"(?m)^ {4}", "", block)
        for block in re.findall(r"(?m)^(?: {4}.*\n|\n(?= {4}))+", section)
    )
    port = str(free_port())
    receives = receives.replace("4444", port) + "print(array.sum())\n"
    sends = sends.replace("tcp:host:4444", f"tcp:localhost:{port}") + "print(array.sum())\n"
    programs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for code in (receives, sends)
    ]
    deadline = time.monotonic() + 60
    there, here = (
        program.communicate(timeout=deadline - time.monotonic())[0] for program in programs
    )
    assert [program.returncode for program in programs] == [0, 0]
    assert there == here
    assert float(there) > 0
