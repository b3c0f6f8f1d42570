"""Words of a monitor's line: any of them can be written, and comes back as it was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import UsageError
from migrate.monitor.words import line_of, words_of


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", []), (" \t\r\n", []), ("a b", ["a", "b"]), ("  a \t  b\r\n", ["a", "b"]),
        ('""', [""]), ('a "b  c" d', ["a", "b  c", "d"]), (r'"\"\\\'\n\r"', ["\"\\'\n\r"]),
        ('x"y z"', ['x"y', 'z"']), ('"a"b', ["a", "b"]), ("a\u00a0b", ["a\u00a0b"]),
        (r"a\n", [r"a\n"]),
    ],
)  # fmt: skip
def test_split_words(line, words):
    assert words_of(line) == words


@pytest.mark.parametrize("line", ['"', 'a "b', '"a\\"', '"\\x"', 'a "'])
def test_wrong_quotes_and_escapes(line):
    with pytest.raises(UsageError, match="unterminated string|unsupported escape"):
        words_of(line)


@given(st.lists(st.text()))
def test_quoted_words_split_again(words):
    assert words_of(line_of(words)) == words


@given(st.text())
def test_split_any_line(line):
    try:
        assert all(isinstance(word, str) for word in words_of(line))
    except UsageError:
        pass
