"""Places to print to that fail, and text that must not reach a terminal as it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# No text, a command to the terminal, a line end, and a mark that turns what follows around.
NASTY = b"\xff\x1b[2J\n\xe2\x80\xae"
SHOWN = r"\xff\x1b[2J\n\u202e"


@contextmanager
def full_pipe() -> Iterator[tuple[int, int]]:
    """Make a full pipe: (reading, writing). Writing to it would block."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while os.write(writing, b"x" * 4096):
            pass
    os.set_blocking(writing, True)
    try:
        yield reading, writing
    finally:
        os.close(reading)
        os.close(writing)
