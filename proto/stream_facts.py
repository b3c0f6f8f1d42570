"""What a captured stream holds, as it is told: plain facts, bounded in number, for text and JSON.

QemuFacts is of a stream of QEMU's, FrameFacts of one of ours. Every `at` is a byte of the stream.
"""

from __future__ import annotations

import msgspec

MAX_LISTED = 10_000
MAX_FAULTS = 100
MAX_WORDS = 300


class Fault(msgspec.Struct):
    """Where it is not as it must be.

    expected -- what should stand there; found -- the bytes that do
    skipped  -- from there to where reading went on, where it had to be given up
    """

    at: int
    what: str
    expected: str = ""
    found: str = ""
    skipped: int = 0


class Field(msgspec.Struct, omit_defaults=True):
    """Of a device. value: an integer, a truth, or bytes in hexadecimal; several of an array."""

    name: str
    type: str
    size: int
    value: int | bool | str | list[int] | None = None
    fields: list[Field] | None = None


class SectionFact(msgspec.Struct, omit_defaults=True):
    """size: from its first byte to behind its footer.

    kind -- "start", "part", "end" or "full"
    whole -- its footer was found where it had to be
    decoded -- bytes of its body that the description explains
    """

    at: int
    size: int
    kind: str
    id: int
    name: str
    instance: int
    version: int
    whole: bool = False
    zero: int = 0
    raw: int = 0
    delta: int = 0
    body: int = 0
    decoded: int = 0
    fields: list[Field] | None = None


class CommandFact(msgspec.Struct):
    at: int
    number: int
    name: str
    data: str


class BlockFact(msgspec.Struct):
    """A RAM block.

    zero, raw, delta -- records
    came, again      -- pages that came at all, and more than once
    most             -- how often one came, 255: or more
    missing          -- pages that never came; gaps: the first runs of those, (first, last)
    """

    name: str
    size: int
    pages: int
    zero: int = 0
    raw: int = 0
    delta: int = 0
    delta_bytes: int = 0
    came: int = 0
    again: int = 0
    most: int = 0
    missing: int = 0
    gaps: list[tuple[int, int]] = []


class RoundFact(msgspec.Struct):
    """at: where its first page is."""

    at: int
    number: int
    zero: int
    raw: int
    delta: int
    delta_bytes: int


class BrokenDelta(msgspec.Struct):
    at: int
    block: str
    page: int
    what: str


class DeltaFacts(msgspec.Struct):
    """Of XBZRLE.

    bytes    -- of the deltas alone; wire_bytes: with their records' heads, without block names
    changed  -- bytes of pages that they bring
    average  -- bytes of one; encoding_rate: bytes of pages for each byte of deltas, as QEMU has it
    empty    -- of no bytes; baseless: the first that comes of their page
    broken   -- not as a delta must be; faults: the first ones
    """

    count: int = 0
    bytes: int = 0
    wire_bytes: int = 0
    changed: int = 0
    average: float = 0.0
    encoding_rate: float = 0.0
    empty: int = 0
    baseless: int = 0
    broken: int = 0
    faults: list[BrokenDelta] = []

    def finish(self, page_size: int) -> None:
        if self.count:
            self.average = self.bytes / self.count
        if self.bytes:
            self.encoding_rate = self.count * page_size / self.bytes


class QemuBytes(msgspec.Struct):
    """Each byte of the stream is in one of these.

    raw, zero, deltas -- what pages bring; page_heads: offsets, flags and names before that
    framing           -- heads and footers of sections, ends of them, the end
    """

    header: int = 0
    commands: int = 0
    framing: int = 0
    blocks: int = 0
    raw: int = 0
    zero: int = 0
    deltas: int = 0
    page_heads: int = 0
    devices: int = 0
    description: int = 0
    skipped: int = 0


class QemuFacts(msgspec.Struct):
    """description: "whole", "cut" or "absent"."""

    stream: str = "qemu"
    size: int = 0
    whole: bool = False
    faults: list[Fault] = []
    faults_left_out: int = 0
    machine: str = ""
    capabilities: list[str] = []
    page_size: int = 0
    postcopy: bool = False
    blocks: list[BlockFact] = []
    rounds: list[RoundFact] = []
    rounds_seen: int = 0
    deltas: DeltaFacts = msgspec.field(default_factory=DeltaFacts)
    bytes: QemuBytes = msgspec.field(default_factory=QemuBytes)
    sections: list[SectionFact] = []
    sections_left_out: int = 0
    commands: list[CommandFact] = []
    commands_left_out: int = 0
    description: str = "absent"
    notes: list[str] = []


class FrameKind(msgspec.Struct):
    """Frames of a type on a channel."""

    type: str
    channel: int
    count: int = 0
    bytes: int = 0


class MessageFact(msgspec.Struct):
    at: int
    type: str
    channel: int
    fields: dict[str, object]


class ItemFact(msgspec.Struct, omit_defaults=True):
    """Of a QEMU's stream that is carried: pages, or bytes as they are.

    data -- of those the first, in hexadecimal
    """

    at: int
    type: str
    size: int
    pages: int = 0
    held: bool = False
    data: str = ""


class FrameRound(msgspec.Struct):
    """at: its first frame. told_*: what the source said in ROUND, -1 where that did not come."""

    at: int
    number: int
    frames: int = 0
    bytes: int = 0
    zero: int = 0
    raw: int = 0
    delta: int = 0
    delta_bytes: int = 0
    told_pages: int = -1
    told_transferred: int = -1
    last: bool = False


class FrameFacts(msgspec.Struct):
    """received_pages: that came at least once, -1 where that cannot be known."""

    stream: str = "xbmigrate"
    size: int = 0
    whole: bool = False
    faults: list[Fault] = []
    faults_left_out: int = 0
    page_size: int = 0
    pages: int = 0
    received_pages: int = -1
    frames: list[FrameKind] = []
    messages: list[MessageFact] = []
    messages_left_out: int = 0
    rounds: list[FrameRound] = []
    rounds_left_out: int = 0
    deltas: DeltaFacts = msgspec.field(default_factory=DeltaFacts)
    blocks: list[BlockFact] = []
    items: list[ItemFact] = []
    items_left_out: int = 0
    literal_bytes: int = 0
    held_bytes: int = 0
    skipped: int = 0
    notes: list[str] = []


def add_fault(facts: QemuFacts | FrameFacts, fault: Fault) -> Fault:
    """Notes it, where there is room; the fault, to be told of what was skipped."""
    fault.what = fault.what[:MAX_WORDS]
    if len(facts.faults) < MAX_FAULTS:
        facts.faults.append(fault)
    else:
        facts.faults_left_out += 1
    return fault
