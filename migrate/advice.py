"""What the numbers of a migration mean, in sentences that name the option to change.

    statistics, working set, what a page cost, limits -> sentences, none where nothing is worth it

Each is about one thing that another setting would have made better: a cache that is too small, or
far too large; deltas that cost more than they save; more written than the link carries. `obstacle`
says what a pause would be spent with, where it never gets short enough.

Nothing here knows clocks, guests or terminals.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from migrate.quantities import format_size, option_size

if TYPE_CHECKING:
    from migrate.deltas import DeltaSwitch
    from migrate.rounds import Cause, DowntimeModel, Limits, Pending
    from migrate.statistics import Statistics
    from migrate.workingset import WorkingSet

# Fewer pages than this say nothing.
TELLING_PAGES = 1024
MANY_MISSES = 0.1
# A larger cache is named where it would have hit so much more.
GAIN = 0.1
# A cache of at least so much, and so many times what was needed, is worth a word.
LARGE_CACHE = 256 << 20
FAR_TOO_LARGE = 8
# Deltas that save less than this of the bytes of their pages are not worth making.
LITTLE_SAVED = 0.1
# What is written must be so much more than what the link carries.
ABOVE = 1.05
# A limit that is proposed is so many times what the pause would take: no two are alike.
ROOM = 1.5
# Bytes per second, above which deltas may cost more than they save.
FAST_LINK = 400e6


def advice(
    s: Statistics, working: WorkingSet, deltas: DeltaSwitch | None = None, *,
    cache_max: int = 0, bandwidth: float = 0.0,
) -> tuple[str, ...]:  # fmt: skip
    """What to change the next time, of a migration that has ended, or makes no progress.

    deltas    -- what switched them off and on again, where they were in use at all
    cache_max -- what `--cache-max` allows where the cache finds its size itself, else 0
    bandwidth -- what the link carries, in bytes per second
    """
    if s.xbzrle:
        found = _cost_of_deltas(s, deltas) or _cache(s, working, cache_max)
    else:
        found = _no_deltas(s, working, bandwidth)
    return (found,) if found else ()


def _no_deltas(s: Statistics, working: WorkingSet, bandwidth: float) -> str:
    """Said of a failure alone: who switched it off had a reason, and it arrived."""
    if s.status == "completed" or working.pages < TELLING_PAGES or bandwidth > FAST_LINK:
        return ""
    size = working.fitting(_whole(s))
    return (
        f"the working set is about {format_size(working.size)}, and xbzrle is off: with it on both "
        f"sides (--capability xbzrle=on) and --cache-size {option_size(size)} these pages could "
        "be sent as deltas"
    )


def _cost_of_deltas(s: Statistics, deltas: DeltaSwitch | None) -> str:
    if deltas is not None and deltas.settled and not deltas.active:
        return (
            f"xbzrle costs more than it saves here: a page took {deltas.with_deltas * 1e6:.1f} us "
            f"with deltas and {deltas.without * 1e6:.1f} us without: use --capability xbzrle=off"
        )
    tried = s.cache_hits + s.overflow_skipped
    overflows = s.overflow + s.overflow_skipped
    if tried < TELLING_PAGES or s.cache_miss > tried:
        return ""
    spent = s.xbzrle_bytes + overflows * s.page_size
    saved = 1 - spent / (tried * s.page_size)
    if saved >= LITTLE_SAVED:
        return ""
    return (
        f"xbzrle costs more than it saves here: {overflows * 100 // tried} % of the deltas would "
        f"be larger than their page, and {max(saved, 0) * 100:.0f} % of the bytes are saved: use "
        "--capability xbzrle=off"
    )


def _cache(s: Statistics, working: WorkingSet, cache_max: int) -> str:
    looked_up = s.cache_hits + s.cache_miss
    if looked_up < TELLING_PAGES:
        return ""
    wanted = working.fitting(_whole(s))
    about = f"the working set is about {format_size(working.size)}"
    share, hit = working.hit_share(wanted), s.cache_hits / looked_up
    if wanted > s.cache_size and s.cache_miss > MANY_MISSES * looked_up and share > hit + GAIN:
        option = f"--cache-size {option_size(wanted)}"
        if cache_max:
            option = f"--cache-max {option_size(wanted)}"
        return (
            f"{about}: a cache of {option_size(wanted)} would have hit {share * 100:.0f} % of what "
            f"was sent again, the one of {option_size(s.cache_size)} hit {hit * 100:.0f} %: use "
            f"{option}"
        )
    too_large = s.cache_size >= LARGE_CACHE and s.cache_size >= FAR_TOO_LARGE * wanted
    if too_large and not cache_max and s.status == "completed":
        return (
            f"{about}: a cache of {option_size(wanted)} would have done, it is "
            f"{option_size(s.cache_size)}: use --cache-size {option_size(wanted)}"
        )
    return ""


def _whole(s: Statistics) -> int:
    """The smallest power of two that holds the whole guest."""
    return max(1 << (max(s.total, 1) - 1).bit_length(), s.page_size)


def why(
    cause: Cause, rounds: int, elapsed: float, stalled_rounds: int, stalled_seconds: float
) -> str:
    """Why a migration is given up, after so many rounds and seconds."""
    return {
        "ROUNDS": f"it did not converge in {rounds} rounds (--max-rounds)",
        "TIMEOUT": f"it did not converge in {elapsed:.0f} s (--timeout)",
        "STALL": f"no progress for {stalled_seconds:.0f} s and {stalled_rounds} rounds",
        "SIZE": "the guest is too large for --downtime-limit, whatever it writes",
    }[cause.name]


def obstacle(
    model: DowntimeModel, limits: Limits, pending: Pending, expected: float
) -> str:  # fmt: skip
    """What keeps a migration from converging, and which knob to turn; the guest would be stopped
    for `expected` seconds.
    """
    text = (
        f"the guest would be stopped for {expected * 1e3:.0f} ms, the limit is "
        f"{limits.downtime_limit * 1e3:.0f} ms"
    )
    trips, wire = model.trips, model.wire_seconds(pending.pages, limits)
    if trips > expected / 2:
        return (
            f"{text}; round trips to the destination take {trips * 1e3:.0f} ms of that: raise "
            "--downtime-limit"
        )
    if pending.size_seconds > limits.downtime_limit / 2:
        return f"{text}; {_size(pending)}: raise --downtime-limit to {_enough(expected)}"
    if pending.check_seconds > limits.downtime_limit / 2:
        return (
            f"{text}; looking whether any other process writes the guest takes "
            f"{pending.check_seconds * 1e3:.0f} ms of that: raise --downtime-limit"
        )
    if wire <= expected / 2:
        return f"{text}; it is bound by this machine's speed: raise --downtime-limit"
    knobs = "--max-bandwidth or --downtime-limit"
    if not limits.max_bandwidth:
        knobs = "--downtime-limit, or use a faster link"
    return f"{text}; {_written(model, limits, pending)}: raise {knobs}"


def _size(pending: Pending) -> str:
    """What the size of the guest costs."""
    parts = []
    if pending.scan_seconds >= pending.size_seconds / 10:
        parts.append(f"finding what changed takes {pending.scan_seconds * 1e3:.0f} ms of that")
    if pending.whole_seconds >= pending.size_seconds / 10:
        parts.append(f"checking the whole takes {pending.whole_seconds * 1e3:.0f} ms of that")
    return " and ".join(parts)


def _enough(expected: float) -> str:
    """A limit that leaves some room, as --downtime-limit takes it: two figures of milliseconds."""
    wanted = max(expected * ROOM * 1e3, 1.0)
    step = 10 ** max(math.floor(math.log10(wanted)) - 1, 0)
    return str(math.ceil(wanted / step) * step)


def _written(model: DowntimeModel, limits: Limits, pending: Pending) -> str:
    """What is written again, against what the link carries."""
    bandwidth = model.link_bandwidth(limits)
    per_page = model.bytes_per_page
    rate = pending.dirty_rate * per_page
    if rate > ABOVE * bandwidth:
        return (
            f"the guest writes {pending.dirty_rate:.0f} pages a second, which cost "
            f"{format_size(rate)}/s at {per_page:.0f} bytes each; the link carries "
            f"{format_size(bandwidth)}/s, {rate / bandwidth:.1f} times less"
        )
    wire, allowed = pending.pages * per_page, bandwidth * limits.downtime_limit
    text = (
        f"the guest writes {pending.pages} pages again in each round, {format_size(wire)} at "
        f"{per_page:.0f} bytes each"
    )
    if allowed and wire > allowed:
        text += (
            f"; within the limit the link carries {format_size(allowed)}, {wire / allowed:.1f} "
            "times less"
        )
    return text
