"""Line editing at the prompt of migrate-ctl: a history that is kept, and completion of names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from migrate.cli.control import Control
from migrate.errors import UsageError
from migrate.files.directory import Directory
from migrate.files.filesystem import write_whole
from migrate.files.trusted_places import make_trusted
from migrate.ownership.journal_directory import is_of_another, state_directory

HISTORY = "history"
HISTORY_LINES = 1000
MAX_HISTORY = 1 << 20  # characters


@contextlib.contextmanager
def line_editing(control: Control) -> Iterator[None]:
    """Give the prompt a history, which is kept in a file, and completion of names."""
    if is_of_another(os.environ.get("HOME", "")):
        os.environ["INPUTRC"] = os.devnull  # another user's ~/.inputrc could bind keys to commands
    import readline

    names = _names(control)

    def complete(text: str, state: int) -> str | None:
        begun = readline.get_line_buffer()[: readline.get_endidx()]
        found = [name for name in names if name.startswith(begun)]
        return found[state][len(begun) - len(text) :] + " " if state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
    for line in _read_history():
        readline.add_history(line)
    try:
        yield
    finally:
        last = readline.get_current_history_length()
        numbers = range(max(last - HISTORY_LINES, 0) + 1, last + 1)
        _write_history([readline.get_history_item(number) or "" for number in numbers])


def _names(control: Control) -> list[str]:
    """Return the names to complete: of commands, and of the subjects of `info`.

    Only printable names: they are inserted into the line that is edited.
    """
    names = [one.split()[:1] for one in control.say("help").splitlines()]
    names += [one.split()[:2] for one in control.say("info").splitlines()]
    return [name for words in names if words and (name := " ".join(words)).isprintable()]


def _read_history() -> list[str]:
    """Return the lines of earlier sessions, if they are in a trusted directory."""
    with (
        contextlib.suppress(OSError, UsageError),
        Directory(state_directory(), trusted=True) as here,
        here.reading(HISTORY) as fd,
        open(fd, errors="surrogateescape", closefd=False) as file,
    ):
        return file.read(MAX_HISTORY).splitlines()[-HISTORY_LINES:]
    return []


def _write_history(lines: list[str]) -> None:
    """Keep these lines for later sessions, if there is a trusted directory."""
    text = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
    with contextlib.suppress(OSError, UsageError):
        make_trusted(state_directory()).close()
        write_whole(os.path.join(state_directory(), HISTORY), text, HISTORY, mode=0o600)
