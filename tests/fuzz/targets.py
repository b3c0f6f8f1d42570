"""What is done with an input, by target. Whatever must hold is asserted; all else may only be an
error of the kind that is documented.

    frames      a peer's bytes, in pieces of any size, through Session and unpack
    pages       batches of pages into a small guest: the kernel against its twin
    delta       one delta, and many, into pages: the same
    rounds      a source and a destination: what arrives is what was there
    stream      a stream of QEMU's: cut into parts, the same however it comes
    records     its pages, into batches and out of them: the kernel against its twin, and a loader
    compressed  compressed batches
    text        control socket, monitor, journals, addresses, sizes and times
"""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz.batches import compressed
from tests.fuzz.delta import delta
from tests.fuzz.frames import frames
from tests.fuzz.pages import pages
from tests.fuzz.rounds import rounds
from tests.fuzz.stream import records, stream
from tests.fuzz.text import text

TARGETS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each
    for each in (frames, pages, compressed, delta, rounds, stream, records, text)
}


def target(name: str) -> Callable[[bytes], None]:
    return TARGETS[name]
