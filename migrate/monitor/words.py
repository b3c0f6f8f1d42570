"""The words of a line for the monitor, and back: blanks, quotes and escapes as QEMU's has them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from migrate.errors import UsageError

# What QEMU's monitor takes for blank; a line that comes over a network ends in CR LF.
BLANK = " \t\r\n\v\f"
_WORD = re.compile(rf'[{BLANK}]*(?:"((?:[^"\\]|\\.)*)"|([^{BLANK}"][^{BLANK}]*))', re.DOTALL)
_ESCAPED = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}


def words_of(line: str) -> list[str]:
    """The words of a line, blanks between them. One in double quotes may have blanks, and a quote
    behind a backslash (and \\n, \\r, \\\\), as in QEMU's monitor. Raises UsageError."""

    def escaped(found: re.Match[str]) -> str:
        if found[1] not in _ESCAPED:
            raise UsageError(f"unsupported escape code: '{found[0]}'")
        return _ESCAPED[found[1]]

    words, at, end = [], 0, len(line.rstrip(BLANK))
    while at < end:
        found = _WORD.match(line, at, end)
        if found is None:
            raise UsageError("unterminated string: a word that begins with a quote ends with one")
        at = found.end()
        quoted = found[1]
        words.append(found[2] if quoted is None else re.sub(r"\\(.)", escaped, quoted, flags=re.S))
    return words


def line_of(words: Sequence[str]) -> str:
    """A line that has these words: see words_of."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    if word and not word.startswith('"') and not set(word) & set(BLANK):
        return word
    for plain, behind in (("\\", "\\"), ('"', '"'), ("\n", "n"), ("\r", "r")):
        word = word.replace(plain, f"\\{behind}")
    return f'"{word}"'
