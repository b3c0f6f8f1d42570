"""What a captured stream holds: plain facts, bounded in number, to be shown as text or JSON.

QemuFacts describes a stream of QEMU, FrameFacts one of ours. Every `at` is a byte of the stream.
"""

from __future__ import annotations

import msgspec

MAX_LISTED = 10_000
MAX_FAULTS = 100
MAX_WORDS = 300


class Fault(msgspec.Struct):
    """A place where the stream is wrong.

    what     -- what is wrong there
    expected -- what should be there
    found    -- the first bytes that are there
    skipped  -- bytes from there to the place where reading went on
    """

    at: int
    what: str
    expected: str = ""
    found: str = ""
    skipped: int = 0


class Field(msgspec.Struct, omit_defaults=True):
    """A field of a device's state.

    value -- an integer, a boolean, bytes in hexadecimal, or a list of integers
    """

    name: str
    type: str
    size: int
    value: int | bool | str | list[int] | None = None
    fields: list[Field] | None = None


class SectionFact(msgspec.Struct, omit_defaults=True):
    """A section.

    size    -- bytes, with its head and its footer
    kind    -- "start", "part", "end" or "full"
    whole   -- its footer was found in its place
    body    -- bytes of its body
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

    zero, raw, delta -- records of each kind
    came, again      -- pages that came at least once, and more than once
    most             -- times that a page came at most; 255 means that or more
    missing          -- pages that never came
    gaps             -- the first runs of such pages, as (first, last)
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
    """A round. at: the byte at which its first page is."""

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
    """XBZRLE deltas.

    bytes         -- of the deltas alone
    wire_bytes    -- with the heads of their records, without block names
    changed       -- bytes of pages that they bring
    average       -- bytes of a delta
    encoding_rate -- bytes of pages for each byte of deltas, as QEMU computes it
    empty         -- deltas of no bytes
    baseless      -- deltas that come before any other record of their page
    broken        -- deltas that cannot be decoded; `faults` has the first ones
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
    """The bytes of the stream: each is counted in one of these.

    raw, zero, deltas -- the bodies of records of pages
    page_heads        -- offsets, flags and names before those bodies
    framing           -- heads, footers and end words of sections, and the end mark
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
    """A stream of QEMU. description: "whole", "cut" or "absent"."""

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
    """The frames of one type on one channel."""

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
    """An item of a QEMU stream that is carried: a batch of pages, or bytes as they are.

    data -- the first of these bytes, in hexadecimal
    """

    at: int
    type: str
    size: int
    pages: int = 0
    held: bool = False
    data: str = ""


class FrameRound(msgspec.Struct):
    """A round. at: its first frame. told_*: what the source said in ROUND, -1 without a ROUND."""

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


class CompressedFacts(msgspec.Struct):
    """Compressed batches: their bytes in the stream, and those of their content."""

    batches: int = 0
    bytes: int = 0
    content_bytes: int = 0


class FrameFacts(msgspec.Struct):
    """A stream of ours. received_pages: pages that came at least once, -1 if that is not known."""

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
    compressed: CompressedFacts = msgspec.field(default_factory=CompressedFacts)
    deltas: DeltaFacts = msgspec.field(default_factory=DeltaFacts)
    blocks: list[BlockFact] = []
    items: list[ItemFact] = []
    items_left_out: int = 0
    literal_bytes: int = 0
    held_bytes: int = 0
    skipped: int = 0
    notes: list[str] = []


def add_fault(facts: QemuFacts | FrameFacts, fault: Fault) -> Fault:
    """Add a fault if there is room, else count it. Return it, so that `skipped` can grow."""
    fault.what = fault.what[:MAX_WORDS]
    if len(facts.faults) < MAX_FAULTS:
        facts.faults.append(fault)
    else:
        facts.faults_left_out += 1
    return fault
