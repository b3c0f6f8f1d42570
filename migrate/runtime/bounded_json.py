"""JSON from another program: what it may cost is bounded before it is parsed."""

from __future__ import annotations

import json
from typing import Any

# Each value takes about 100 bytes of memory; an object takes more.
MAX_VALUES = 1_000_000
# Python stores a text with one character beyond the BMP in four bytes per character.
MAX_BYTES = 16 << 20


def loads(text: bytes, max_values: int = MAX_VALUES) -> Any:
    """Parse JSON of MAX_BYTES and `max_values` values at most.

    Raises ValueError for text that is no JSON, too large, or nested too deeply.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    # Separators inside strings count too: the bound errs on the safe side.
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > max_values:
        raise ValueError(f"it has more than {max_values} values")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
