"""Put decisions and numbers into sentences for users, which name the option to change.

    statistics, working set, costs per page, limits -> sentences; none if nothing is worth saying

Each sentence is about one thing that another setting would have improved: a cache that is too small
or far too large, deltas that cost more than they save, a guest that writes more than the link
carries. `obstacle` says what takes the time in a pause that does not get short enough.

This module knows no clocks, guests or terminals.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from migrate.policy.cache_sizing import FAR_TOO_LARGE
from migrate.policy.convergence import Cause
from migrate.statistics import Status
from migrate.units import format_size, option_size

if TYPE_CHECKING:
    from migrate.policy.convergence import AbortFacts, ConvergencePolicy
    from migrate.policy.delta_switch import DeltaSwitch
    from migrate.policy.downtime import DowntimeModel, Limits, PendingWork
    from migrate.policy.working_set import WorkingSet
    from migrate.statistics import Statistics

# Shares of fewer pages are too uncertain to advise a user on: of 1024, the standard error is up to
# 1.6 %, which is far below the tenths that they are compared with here. (4 MiB of 4 KiB pages.)
MIN_PAGES_FOR_ADVICE = 1024
# A cache with a larger share of misses may be too small.
MANY_MISSES = 0.1
# A larger cache is proposed when it would have hit this much more.
ADVISED_GAIN = 0.1
# Memory below this is not worth a sentence, even if the cache is FAR_TOO_LARGE.
LARGE_CACHE = 256 << 20
# Deltas that save less than this share of the bytes of their pages are not worth making.
LITTLE_SAVED = 0.1
# The guest must write this many times what the link carries before the rates are compared in words.
ABOVE = 1.05
# A proposed limit is this many times the predicted pause, since no two pauses are alike.
PROPOSED_MARGIN = 1.5
# Bytes per second above which deltas may cost more than they save: 10 us per page of 4 KiB.
FAST_LINK = 400e6


def advice(
    s: Statistics, working: WorkingSet, deltas: DeltaSwitch | None = None, *,
    cache_max: int = 0, bandwidth: float = 0.0,
) -> tuple[str, ...]:  # fmt: skip
    """Return what to change the next time, after a migration that has ended or makes no progress.

    deltas    -- the switch of the migration, if it made deltas at all
    cache_max -- the bound of `--cache-max` for a cache that finds its own size, else 0
    bandwidth -- bytes per second that the link carries
    """
    if s.xbzrle:
        found = _cost_of_deltas(s, deltas) or _cache(s, working, cache_max)
    else:
        found = _no_deltas(s, working, bandwidth)
    return (found,) if found else ()


def _no_deltas(s: Statistics, working: WorkingSet, bandwidth: float) -> str:
    """Advise deltas to a migration that failed without them.

    One that completed needs no such advice: the user had a reason to switch deltas off.
    """
    if (
        s.status is Status.COMPLETED
        or working.pages < MIN_PAGES_FOR_ADVICE
        or bandwidth > FAST_LINK
    ):
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
    if tried < MIN_PAGES_FOR_ADVICE or s.cache_miss > tried:
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
    if looked_up < MIN_PAGES_FOR_ADVICE:
        return ""
    wanted = working.fitting(_whole(s))
    about = f"the working set is about {format_size(working.size)}"
    share, hit = working.hit_share(wanted), s.cache_hits / looked_up
    if (
        wanted > s.cache_size
        and s.cache_miss > MANY_MISSES * looked_up
        and share > hit + ADVISED_GAIN
    ):
        option = f"--cache-size {option_size(wanted)}"
        if cache_max:
            option = f"--cache-max {option_size(wanted)}"
        return (
            f"{about}: a cache of {option_size(wanted)} would have hit {share * 100:.0f} % of what "
            f"was sent again, the one of {option_size(s.cache_size)} hit {hit * 100:.0f} %: use "
            f"{option}"
        )
    too_large = s.cache_size >= LARGE_CACHE and s.cache_size >= FAR_TOO_LARGE * wanted
    if too_large and not cache_max and s.status is Status.COMPLETED:
        return (
            f"{about}: a cache of {option_size(wanted)} would have done, it is "
            f"{option_size(s.cache_size)}: use --cache-size {option_size(wanted)}"
        )
    return ""


def _whole(s: Statistics) -> int:
    """Return the smallest power of two that holds the whole guest, in bytes."""
    return max(1 << (max(s.total, 1) - 1).bit_length(), s.page_size)


def switch_notice(deltas: DeltaSwitch) -> str:
    """Return a sentence on deltas that have just been switched on or off."""
    costs = (
        f"{deltas.with_deltas * 1e6:.1f} us a page with them, {deltas.without * 1e6:.1f} us without"
    )
    if deltas.active:
        return f"deltas pay again: {costs}: they are switched on"
    return f"deltas cost more than they save here: {costs}: they are switched off"


def compression_notice(level: int | None, ratio: float) -> str:
    """Return a sentence on compression that has just begun, or ended.

    level -- of zstd; None: it has ended
    ratio -- bytes that it leaves of a byte
    """
    if level is None:
        return "compression does not pay any more: batches are sent as they are"
    return f"batches are compressed: zstd at level {level} leaves {ratio:.0%} of their bytes"


def abort_reason(
    policy: ConvergencePolicy, facts: AbortFacts, pending: PendingWork
) -> tuple[str, str]:  # fmt: skip
    """Return why a migration is given up, and the part of that which names the obstacle."""
    found = obstacle(policy.model, policy.limits, pending, facts.expected_downtime)
    return f"{_cause(facts)}: {found}", found


def _cause(facts: AbortFacts) -> str:
    return {
        Cause.ROUNDS: f"it did not converge in {facts.rounds} rounds (--max-rounds)",
        Cause.TIMEOUT: f"it did not converge in {facts.elapsed:.0f} s (--timeout)",
        Cause.STALL: (
            f"no progress for {facts.stalled_seconds:.0f} s and {facts.stalled_rounds} rounds"
        ),
        Cause.SIZE: "the guest is too large for --downtime-limit, whatever it writes",
    }[facts.cause]


def obstacle(
    model: DowntimeModel, limits: Limits, pending: PendingWork, expected: float
) -> str:  # fmt: skip
    """Return what keeps a migration from converging, and which option to change.

    expected -- predicted downtime in seconds
    """
    text = (
        f"the guest would be stopped for {expected * 1e3:.0f} ms, the limit is "
        f"{limits.downtime_limit * 1e3:.0f} ms"
    )
    trips, wire = model.round_trip_seconds, model.wire_seconds(pending.pages, limits)
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


def _size(pending: PendingWork) -> str:
    """Return what the size of the guest costs in the pause."""
    parts = []
    if pending.scan_seconds >= pending.size_seconds / 10:
        parts.append(f"finding what changed takes {pending.scan_seconds * 1e3:.0f} ms of that")
    if pending.whole_seconds >= pending.size_seconds / 10:
        parts.append(f"checking the whole takes {pending.whole_seconds * 1e3:.0f} ms of that")
    return " and ".join(parts)


def _enough(expected: float) -> str:
    """Return a limit with a margin, as --downtime-limit takes it: milliseconds in two figures."""
    wanted = max(expected * PROPOSED_MARGIN * 1e3, 1.0)
    step = 10 ** max(math.floor(math.log10(wanted)) - 1, 0)
    return str(math.ceil(wanted / step) * step)


def _written(model: DowntimeModel, limits: Limits, pending: PendingWork) -> str:
    """Return what the guest writes again, compared with what the link carries."""
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
