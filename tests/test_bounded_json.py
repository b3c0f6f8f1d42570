"""JSON from another program is bounded before it is parsed."""

from __future__ import annotations

import pytest

from migrate.runtime import bounded_json


def test_small_json_is_parsed() -> None:
    assert bounded_json.loads(b'{"a": [1, 2.5, "b"]}') == {"a": [1, 2.5, "b"]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'"' + b"a" * bounded_json.MAX_BYTES + b'"', "more than 16777216 bytes"),
        (b"[" + b"0," * 1000 + b"0]", "more than 1000 values"),
        (b"[" * 900 + b"{" * 101, "more than 1000 values"),
        (b"{", "Expecting property name"),
    ],
)
def test_json_over_a_bound_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        bounded_json.loads(text, max_values=1000)


def test_json_that_is_nested_too_deeply_is_refused() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        bounded_json.loads(b"[" * 100_000)
