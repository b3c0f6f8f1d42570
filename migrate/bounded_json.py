"""JSON that somebody else has written: what it may cost is bounded before it is read."""

from __future__ import annotations

import json
from typing import Any

# Each takes some 100 bytes of memory, and more as an object.
MOST_VALUES = 1_000_000
# A text with one character beyond the BMP in it takes four bytes for each.
MOST_BYTES = 16 << 20


def loads(text: bytes, most: int = MOST_VALUES) -> Any:
    """As json.loads, of MOST_BYTES and `most` values at most. Raises ValueError, also where it is
    nested too deeply."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > most:  # those in texts count too
        raise ValueError(f"it has more than {most} values")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
