"""What is done with an input, by target. Whatever must hold is asserted; all else may only be an
error of the kind that is documented.

    frames   a peer's bytes, in pieces of any size, through Session and unpack
    pages    batches of pages into a small guest: the kernel against its twin
    delta    one delta, and many, into pages: the same
    rounds   a source and a destination: what arrives is what was there
    text     control socket, monitor, journals, addresses, sizes and times
"""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz.delta import delta
from tests.fuzz.frames import frames
from tests.fuzz.pages import pages
from tests.fuzz.rounds import rounds
from tests.fuzz.text import text

TARGETS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each for each in (frames, pages, delta, rounds, text)
}


def target(name: str) -> Callable[[bytes], None]:
    return TARGETS[name]
