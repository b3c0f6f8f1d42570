"""Text for people: one line at a time, and nothing in it that a terminal obeys."""

from __future__ import annotations

import sys


def printable(text: str, limit: int = 0) -> str:
    r"""Return `text` as one line that a terminal shows and does not obey.

    Control characters, line ends, marks of text direction and other unprintable characters are
    escaped as in Python: \x1b, \n, \u202e. So are bytes of a file name that are no text: \xff.

    limit -- the most characters to return, with escapes; longer text ends in "..."; 0: no limit
    """
    shown = text if text.isprintable() else "".join(map(_escaped, text))
    if limit and len(shown) > limit:
        shown = shown[: limit - 3] + "..."
    return shown


def _escaped(char: str) -> str:
    if char.isprintable():
        return char
    if "\udc80" <= char <= "\udcff":  # a byte that is no text, as Python keeps it (PEP 383)
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


def say(text: str) -> None:
    """Print a sentence to standard error, on a line of its own."""
    print(printable(text), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a result to standard output, on a line of its own."""
    print(printable(text), flush=True)
