"""Split a line of the human monitor into words, and quote words: as QEMU's monitor does."""

from __future__ import annotations

import re
from collections.abc import Sequence

from migrate.errors import UsageError

# What QEMU's monitor treats as blank. CR is one: lines that come over a network end in CR LF.
BLANK = " \t\r\n\v\f"
_WORD = re.compile(rf'[{BLANK}]*(?:"((?:[^"\\]|\\.)*)"|([^{BLANK}"][^{BLANK}]*))', re.DOTALL)
_ESCAPED = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}


def words_of(line: str) -> list[str]:
    """Return the words of a line, which blanks separate.

    A word in double quotes may contain blanks, and the escapes \\", \\', \\n, \\r and \\\\. Raises
    UsageError.
    """

    def escaped(found: re.Match[str]) -> str:
        if found[1] not in _ESCAPED:
            raise UsageError(f"unsupported escape code: '{found[0]}'")
        return _ESCAPED[found[1]]

    words, at, end = [], 0, len(line.rstrip(BLANK))
    while at < end:
        found = _WORD.match(line, at, end)
        if found is None:
            raise UsageError("unterminated string: missing closing quote")
        at = found.end()
        quoted = found[1]
        words.append(found[2] if quoted is None else re.sub(r"\\(.)", escaped, quoted, flags=re.S))
    return words


def line_of(words: Sequence[str]) -> str:
    """Return a line of these words, which `words_of` splits into the same again."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    if word and not word.startswith('"') and not set(word) & set(BLANK):
        return word
    for plain, behind in (("\\", "\\"), ('"', '"'), ("\n", "n"), ("\r", "r")):
        word = word.replace(plain, f"\\{behind}")
    return f'"{word}"'
