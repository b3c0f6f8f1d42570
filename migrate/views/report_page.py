"""The page of `--report` as HTML: text and tables.

The page refers to nothing outside, so it can be mailed and kept. Text from outside (a guest's
description, an error) is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from migrate.statistics import Statistics, Status
from migrate.units import format_size
from migrate.views.history import History, RoundRecord

MAX_ROWS = 200
STYLE = (Path(__file__).parent / "report.css").read_text()


def milliseconds(seconds: float | None) -> str:
    """Return a time as people read it: 12.3 ms, 250 ms, 4.50 s."""
    if seconds is None:
        return "-"
    if seconds >= 10:
        return f"{seconds:.1f} s"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


def percent(share: float | None) -> str:
    """Return a share as people read it: 12.3%."""
    return "-" if share is None else f"{share:.1%}"


def verdict(s: Statistics) -> str:
    """Return the outcome in one sentence."""
    took = milliseconds(s.total_time)
    rounds = "1 round" if s.dirty_sync_count == 1 else f"{s.dirty_sync_count} rounds"
    if s.status is Status.COMPLETED:
        return (
            f"The guest of {format_size(s.total)} moved in {took} and {rounds}, was verified, and "
            f"was paused for {milliseconds(s.downtime)}."
        )
    if s.status is Status.CANCELLED:
        return (
            f"The migration was cancelled after {took} and {rounds}: the guest runs on at the "
            "source, if it ran before."
        )
    return f"The migration failed after {took} and {rounds}."


def slowed(s: Statistics) -> str:
    """Return a sentence on the throttle, or ""."""
    most = s.cpu_throttle_highest
    return f" The guest was slowed by up to {most} %." if most else ""


def tiles(s: Statistics) -> list[tuple[str, str, str]]:
    """Return the numbers to look at first: name, value, and what to compare it with."""
    predicted = f"{milliseconds(s.expected_downtime)} predicted"
    saved = s.xbzrle_pages * s.page_size - s.xbzrle_bytes
    return [
        ("downtime", milliseconds(s.downtime), predicted),
        ("total time", milliseconds(s.total_time), f"{milliseconds(s.setup_time)} of it setup"),
        ("on the wire", format_size(s.transferred), f"{_multiple(s)} the guest's size"),
        ("saved by deltas", format_size(max(saved, 0)), f"{s.xbzrle_pages} pages as deltas"),
        ("saved by compression", format_size(s.compression_saved),
         f"{s.compression_pages} pages, rate {s.compression_rate:.2f}"),
        ("cache hits", percent(_hits(s)), f"{s.cache_hits} of {s.cache_hits + s.cache_miss}"),
        ("left to move", format_size(s.remaining), f"of {format_size(s.total)}"),
    ]  # fmt: skip


def _multiple(s: Statistics) -> str:
    return f"{s.transferred / s.total:.2f} times" if s.total else "-"


def _hits(s: Statistics) -> float | None:
    return 1 - s.cache_miss_rate if s.cache_hits + s.cache_miss else None


def moved(s: Statistics) -> list[tuple[str, ...]]:
    """Return a row per kind of page: pages, their bytes in the guest, bytes on the wire."""
    size = s.page_size
    saved = s.compression_saved
    rest = s.transferred + saved - s.normal * size - s.xbzrle_bytes
    rest_name = "zero, and all framing"
    if s.status is not Status.COMPLETED:
        rest_name += ", and an incomplete batch"
    return [
        ("whole", f"{s.normal}", format_size(s.normal * size), format_size(s.normal * size)),
        ("delta", f"{s.xbzrle_pages}", format_size(s.xbzrle_pages * size),
         format_size(s.xbzrle_bytes)),
        (rest_name, f"{s.duplicate}", format_size(s.duplicate * size),
         format_size(max(rest, 0))),
        ("dirty, but equal: not sent", f"{s.skipped}", format_size(s.skipped * size), "0 B"),
        *([("saved by compression", f"{s.compression_pages}", "", f"-{format_size(saved)}")]
          if saved else []),
        ("total", f"{s.duplicate + s.normal + s.xbzrle_pages + s.skipped}",
         format_size((s.duplicate + s.normal + s.xbzrle_pages + s.skipped) * size),
         format_size(s.transferred)),
    ]  # fmt: skip


def round_row(r: RoundRecord) -> tuple[str, ...]:
    """Return the cells of ROUND_HEADS for a round."""
    name = f"{r.number}" if r.first == r.number else f"{r.first} to {r.number}"
    if r.paused or r.unfinished:
        name += " (unfinished)" if r.unfinished else " (pause)"
    if r.unfinished and not r.pages:
        name = "after them"
    return (
        name, milliseconds(r.seconds), format_size(r.wire_bytes), f"{r.mbps:.0f}", f"{r.zero}",
        f"{r.normal}", f"{r.delta}", f"{r.skipped}", percent(r.hit_ratio), f"{r.overflow}",
        format_size(r.remaining), f"{format_size(r.dirty_rate)}/s",
        milliseconds(r.expected_downtime),
    )  # fmt: skip


ROUND_HEADS = (
    "round", "time", "on the wire", "Mbit/s", "zero", "whole", "delta", "equal", "cache hits",
    "overflow", "left after it", "dirtied", "downtime predicted",
)  # fmt: skip


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], kind: str = "") -> str:
    cells = "".join(f"<th>{escape(head)}</th>" for head in heads)
    lines = ("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    body = "\n".join(lines)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{cells}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _rounds(records: list[RoundRecord]) -> str:
    """Return the table of rounds; of too many, the first and the last ones."""
    left_out = len(records) - MAX_ROWS
    note = ""
    if left_out > 0:
        half = MAX_ROWS // 2
        records = records[:half] + records[-half:]
        note = f"<p>{left_out} rows in the middle are left out.</p>"
    return note + _table(ROUND_HEADS, [round_row(r) for r in records], "rounds")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>" if body else ""


def _list(sentences: list[str]) -> str:
    items = "".join(f"<li>{escape(one)}</li>" for one in sentences)
    return f"<ul>{items}</ul>" if items else ""


def page(
    history: History, described: Mapping[str, str], figures: list[tuple[str, str]], now: str,
    missing: str = "",
) -> str:  # fmt: skip
    """Return the whole page.

    described -- what moved, by name (Views.describe)
    figures   -- title and SVG of each
    now       -- date and time, for the footer
    missing   -- why there are no figures, or ""
    """
    s = history.last
    records = history.rounds()
    heading = f"{described.get('guest', 'A guest')} → {described.get('destination', '')}"
    boxes = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<small>{escape(note)}</small></div>"
        for name, value, note in tiles(s)
    )
    plots = f"<p>{escape(missing)}</p>" if missing else ""
    plots += "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in figures
    )
    capabilities = {f"capability {k}": "on" if v else "off" for k, v in s.capabilities.items()}
    options = [(k, v) for k, v in {**described, **capabilities}.items()]
    return "\n".join([
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(f'Migration {s.status}: {heading}')}</title>",
        f"<style>{STYLE}</style></head><body><main>",
        f'<header><p class="what">{escape(heading)}</p>',
        f'<h1 class="{escape(s.status)}">{escape(verdict(s) + slowed(s))}</h1>',
        f'<p class="why">{escape(s.error)}</p></header>' if s.error else "</header>",
        f'<div class="tiles">{boxes}</div>',
        _section("Advice", _list(list(s.advice))),
        f'<div class="plots">{plots}</div>',
        _section("What moved", _table(("kind", "pages", "of the guest", "on the wire"), moved(s))),
        _section("Rounds", _rounds(records) if records else ""),
        _section("Options", _table(("name", "value"), options, "options")),
        _section("Notices", _list(history.notices)),
        f"<footer>xbmigrate, {escape(now)}</footer></main></body></html>\n",
    ])  # fmt: skip
