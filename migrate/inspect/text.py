"""The facts about a stream, as text for people."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from migrate.output import printable
from migrate.units import format_size
from proto.survey.facts import (
    DeltaFacts,
    Fault,
    Field,
    FrameFacts,
    ItemFact,
    QemuFacts,
    SectionFact,
)

# How many rows of each table are printed; of messages and items five times as many.
SHOWN = 20
# Characters of a value before it is cut.
VALUE_WIDTH = 64


def lines_of(facts: QemuFacts | FrameFacts, *, devices: bool = False) -> Iterator[str]:
    """Give the lines of text. Names come from the stream, so each line is made printable.

    devices -- also print the fields of each device
    """
    lines = _qemu(facts, devices) if isinstance(facts, QemuFacts) else _frames(facts)
    for line in lines:
        yield printable(line)


def _qemu(facts: QemuFacts, devices: bool) -> Iterator[str]:
    yield f"stream of QEMU, {_bytes(facts.size)}: {_state(facts)}"
    yield f"machine: {facts.machine or 'not told'}, pages of {facts.page_size} bytes"
    if facts.capabilities:
        yield f"capabilities told: {', '.join(facts.capabilities)}"
    if facts.postcopy:
        yield "postcopy was announced"
    yield f"description of the devices: {facts.description}"
    if facts.blocks:
        yield "blocks:"
        yield from _table(
            ["name", "bytes", "pages", "zero", "page", "xbzrle", "again", "most", "missing"],
            [
                [one.name, one.size, one.pages, one.zero, one.raw, one.delta, one.again,
                 f"{one.most}+" if one.most == 255 else one.most, one.missing]
                for one in facts.blocks
            ],
        )  # fmt: skip
    for one in facts.blocks:
        if one.gaps:
            runs = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in one.gaps)
            yield f"  never came of {one.name}: {runs}{', ...' if len(one.gaps) > 15 else ''}"
    if facts.rounds:
        yield "rounds, as the pages begin anew:"
        shown = facts.rounds[:SHOWN]
        yield from _table(
            ["round", "at", "zero", "page", "xbzrle", "its bytes"],
            [[one.number, one.at, one.zero, one.raw, one.delta, one.delta_bytes] for one in shown],
        )
        yield from _more(facts.rounds_seen - len(shown))
    yield from _deltas(facts.deltas)
    yield "bytes:"
    yield from _shares(vars_of(facts.bytes), facts.size)
    yield "sections:"
    yield from _sections(facts, devices)
    if facts.commands:
        yield "commands:"
        shown_commands = facts.commands[:SHOWN]
        yield from _table(
            ["at", "command", "data"],
            [[one.at, f"{one.name} ({one.number})", one.data or "-"] for one in shown_commands],
        )
        yield from _more(len(facts.commands) + facts.commands_left_out - len(shown_commands))
    yield from _end(facts)


def _frames(facts: FrameFacts) -> Iterator[str]:
    yield f"stream of xbmigrate, {_bytes(facts.size)}: {_state(facts)}"
    if facts.pages:
        came = "" if facts.received_pages < 0 else f", {facts.received_pages} of them came"
        yield f"guest: {facts.pages} pages of {facts.page_size} bytes{came}"
    yield "frames:"
    yield from _table(
        ["type", "channel", "frames", "bytes"],
        [[one.type, one.channel, one.count, one.bytes] for one in facts.frames],
    )
    if facts.rounds:
        yield "rounds:"
        yield from _table(
            ["round", "at", "frames", "bytes", "zero", "raw", "delta", "its bytes", "told"],
            [
                [one.number, one.at, one.frames, one.bytes, one.zero, one.raw, one.delta,
                 one.delta_bytes, "-" if one.told_pages < 0 else
                 f"{one.told_pages} pages{', last' if one.last else ''}"]
                for one in facts.rounds[:SHOWN]
            ],
        )  # fmt: skip
        yield from _more(len(facts.rounds[SHOWN:]) + facts.rounds_left_out)
    yield from _deltas(facts.deltas)
    if facts.messages:
        yield "messages:"
        for one in facts.messages[: 5 * SHOWN]:
            told = ", ".join(f"{name} {value}" for name, value in one.fields.items())
            yield f"  {one.at:>12}  {one.type}{f' on {one.channel}' if one.channel else ''}  {told}"
        yield from _more(len(facts.messages[5 * SHOWN :]) + facts.messages_left_out)
    if facts.blocks:
        yield "blocks of the QEMU that is carried:"
        yield from _table(["name", "pages"], [[one.name, one.pages] for one in facts.blocks])
    if facts.items:
        held = f", {facts.held_bytes} of them held until GO" if facts.held_bytes else ""
        yield f"items of its stream; {_bytes(facts.literal_bytes)} as they are{held}:"
        shown = facts.items[: 5 * SHOWN]
        yield from _table(["at", "type", "bytes", "holds"], [_item(one) for one in shown])
        yield from _more(len(facts.items) + facts.items_left_out - len(shown))
    yield from _end(facts)


def _item(item: ItemFact) -> list[object]:
    holds = f"{item.pages} pages" if item.type == "PAGES" else item.data[:VALUE_WIDTH]
    return [item.at, item.type + (" held" if item.held else ""), item.size, holds]


def _state(facts: QemuFacts | FrameFacts) -> str:
    if facts.whole:
        return "whole"
    return "cut off, or damaged: see the end"


def _bytes(count: int) -> str:
    return f"{count} bytes" + (f" ({format_size(count)})" if count >= 1024 else "")


def _deltas(deltas: DeltaFacts) -> Iterator[str]:
    if not deltas.count:
        return
    yield (
        f"deltas: {deltas.count} of {_bytes(deltas.bytes)}, {deltas.average:.1f} each, for "
        f"{_bytes(deltas.changed)} that changed; encoding rate {deltas.encoding_rate:.1f}"
    )
    yield (
        f"  empty {deltas.empty}, of pages that had not come {deltas.baseless}, "
        f"broken {deltas.broken}"
    )
    for one in deltas.faults[:SHOWN]:
        yield f"  broken at {one.at}, page {one.page} of {one.block}: {one.what}"
    yield from _more(deltas.broken - len(deltas.faults[:SHOWN]))


def _sections(facts: QemuFacts, devices: bool) -> Iterator[str]:
    """Give the table of sections. Consecutive parts of a section share a line."""
    rows: list[list[object]] = []
    fields: dict[int, SectionFact] = {}
    for (kind, number), run in itertools.groupby(
        facts.sections, lambda one: (one.kind, one.id if one.kind == "part" else one.at)
    ):
        every = list(run)
        first = every[0]
        label = kind if len(every) == 1 else f"{len(every)} parts"
        good = all(one.whole for one in every)
        rows.append(
            [first.at, sum(one.size for one in every), label, first.id, first.name,
             first.instance, first.version, "" if good else "broken"]
        )  # fmt: skip
        fields[len(rows)] = first
        del number
    titles = ["at", "bytes", "kind", "id", "name", "instance", "version", ""]
    for line_number, line in enumerate(_table(titles, rows)):
        yield line
        if devices and line_number in fields:
            yield from _fields(fields[line_number].fields or [], "      ")
    yield from _more(facts.sections_left_out)


def _fields(fields: list[Field], indent: str) -> Iterator[str]:
    for one in fields:
        if one.fields is not None:
            yield f"{indent}{one.name} ({one.type}, {one.size} bytes):"
            yield from _fields(one.fields, indent + "  ")
            continue
        value = str(one.value)
        if len(value) > VALUE_WIDTH:
            value = value[: VALUE_WIDTH - 3] + "..."
        yield f"{indent}{one.name} ({one.type}, {one.size}) = {value}"


def _end(facts: QemuFacts | FrameFacts) -> Iterator[str]:
    for note in facts.notes:
        yield f"note: {note}"
    for fault in facts.faults:
        yield f"byte {fault.at}: {_told(fault)}"
    yield from _more(facts.faults_left_out)


def _told(fault: Fault) -> str:
    told = fault.what
    if fault.expected:
        told += f"; expected: {fault.expected}"
    if fault.found:
        told += f"; found: {fault.found}"
    if fault.skipped:
        told += f"; skipped: {fault.skipped} bytes"
    return told


def vars_of(facts: object) -> dict[str, int]:
    return {name: getattr(facts, name) for name in facts.__struct_fields__}  # type: ignore[attr-defined]


def _shares(shares: dict[str, int], size: int) -> Iterator[str]:
    for name, count in shares.items():
        if count:
            label = name.replace("_", " ")
            yield f"  {label:<12} {count:>14}  {100 * count / max(size, 1):5.1f} %"


def _more(count: int) -> Iterator[str]:
    if count > 0:
        yield f"  ... and {count} more"


def _table(titles: list[str], rows: list[list[object]]) -> Iterator[str]:
    """Give the lines of a table: numbers flush right, other columns flush left."""
    cells = [titles, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(titles))]
    right = [all(isinstance(row[i], int) for row in rows) for i in range(len(titles))]
    for row in cells:
        parts = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        yield ("  " + "  ".join(parts)).rstrip()
