"""Predict the pause: how long the guest would be stopped if the last round began now.

    cost of each round --learn--> DowntimeModel --predict(pending work, limits)--> seconds

The prediction counts deltas. QEMU counts 4096 bytes for each pending page although a delta may cost
14, and its measured bandwidth falls as deltas get better, so it can predict a minute for a pause of
0.2 s. Here the prediction is the work that the pause will hold, in the units that recent rounds
have measured: seconds of encoding and of applying per page (CPU seconds, since a paused guest
leaves its processor to us), bytes on the wire per page, seconds per page that is hashed, and round
trips. Two parts grow with the guest and not with what it writes: the scan for changes, and the pass
over the whole guest for the digest. Each round does and times both, as the pause will.

This module knows no clocks, sockets or guests: numbers in, seconds out.
"""

from __future__ import annotations

from dataclasses import dataclass

# Weight of each new measurement in the running mean.
WEIGHT = 0.5
# A round of fewer pages measures the fixed costs of a round, not the cost of a page.
MIN_PAGES_FOR_PAGE_COST = 64
# Hashing is measured by its wall time, which is short: fewer pages measure the timer and the call.
MIN_PAGES_FOR_DIGEST_COST = 256
# A round of fewer wire bytes is too short to measure the bandwidth of the link.
MIN_BYTES_FOR_BANDWIDTH = 1 << 20
# The best bandwidth seen fades by this factor per round, so that a link that has become slower
# shows.
BANDWIDTH_FADE = 0.9
# Seconds of the pause beside round trips: stopping the guest, and the messages of the hand-over.
FIXED_SECONDS = 0.004
# Source and destination pass over the whole guest one after the other.
SIDES = 2
# One round trip for the end of the last round and READY, one for GO and RUNNING.
ROUND_TRIPS = 2
# Seconds per hashed page, until it is measured.
DIGEST_SECONDS = 1e-6


@dataclass(frozen=True)
class RoundCost:
    """The cost of one round. The encoder's and the decoder's seconds are CPU time.

    wire_bytes -- that were sent
    saved      -- bytes that compression has saved: without it they would have been sent too
    """

    pages: int
    wire_bytes: int
    wall_seconds: float
    encode_seconds: float
    apply_seconds: float
    saved: int = 0

    @property
    def batch_bytes(self) -> int:
        """Bytes of the round's batches before compression."""
        return self.wire_bytes + self.saved


@dataclass(frozen=True)
class PendingWork:
    """The work that is left if the guest is stopped now.

    stale_pages   -- pages whose hash is to be computed from memory
    scan_seconds  -- to find the pages that were written
    dirty_rate    -- pages per second that the guest writes
    whole_seconds -- to pass over the whole guest for the digest, on both sides
    check_seconds -- to look for other writers; runs beside the last round, ends before the
                     hand-over
    stops_guest   -- False: no writer is stopped, so only what depends on the written pages counts
    """

    pages: int
    stale_pages: int
    scan_seconds: float = 0.0
    dirty_rate: float = 0.0
    whole_seconds: float = 0.0
    check_seconds: float = 0.0
    stops_guest: bool = True

    @property
    def size_seconds(self) -> float:
        """Seconds of the pause that the size of the guest costs, whatever it writes."""
        return self.scan_seconds + self.whole_seconds if self.stops_guest else 0.0


@dataclass(frozen=True)
class Limits:
    """downtime_limit and timeout in seconds, bandwidths in bytes/s; 0 means none.

    avail_switchover_bandwidth -- bandwidth to assume for the pause, in place of the measured one
    """

    downtime_limit: float = 0.3
    max_bandwidth: int = 0
    avail_switchover_bandwidth: int = 0
    max_rounds: int = 0
    timeout: float = 0.0
    stall_timeout: float = 30.0


class DowntimeModel:
    """Learns the cost of a page from each round, and predicts the pause.

    round_trip                      -- seconds; set by the owner
    encode_per_page, apply_per_page -- CPU seconds at the source and at the destination
    bytes_per_page                  -- on the wire without compression, framing included
    compressed_share                -- share of the link's time that compression leaves of the
                                       pause, 1.0 without; set by the owner
    bandwidth                       -- bytes per second, the best of recent rounds
    source_digest, peer_digest      -- seconds to hash a page at either side
    """

    def __init__(self) -> None:
        self.round_trip = 0.0
        self.encode_per_page = 0.0
        self.apply_per_page = 0.0
        self.bytes_per_page = 0.0
        self.compressed_share = 1.0
        self.bandwidth = 0.0
        self.source_digest = DIGEST_SECONDS
        self.peer_digest = DIGEST_SECONDS
        self._rounds = 0

    def learn(self, cost: RoundCost) -> None:
        """Take in the cost of a round.

        The first round sends all pages raw, so the second one replaces what it taught; from the
        third on, costs are averaged.
        """
        if cost.pages == 0:
            return
        if cost.wire_bytes > MIN_BYTES_FOR_BANDWIDTH and cost.wall_seconds > 0:
            measured = cost.wire_bytes / cost.wall_seconds
            self.bandwidth = max(self.bandwidth * BANDWIDTH_FADE, measured)
        if self._rounds >= 2 and cost.pages < MIN_PAGES_FOR_PAGE_COST:
            return
        weight = WEIGHT if self._rounds >= 2 else 1.0
        pages = cost.pages
        self.encode_per_page += weight * (cost.encode_seconds / pages - self.encode_per_page)
        self.apply_per_page += weight * (cost.apply_seconds / pages - self.apply_per_page)
        self.bytes_per_page += weight * (cost.batch_bytes / pages - self.bytes_per_page)
        self._rounds += 1

    def learn_digest(self, pages: int, seconds: float, *, peer: bool) -> None:
        """Take in what it took to hash `pages` stale pages, here or at the peer."""
        if pages < MIN_PAGES_FOR_DIGEST_COST:
            return
        if peer:
            self.peer_digest = seconds / pages
        else:
            self.source_digest = seconds / pages

    def overhead(self, pending: PendingWork) -> float:
        """Return the seconds of the pause that do not depend on how many pages are dirty."""
        fixed = FIXED_SECONDS + self.round_trip_seconds if pending.stops_guest else 0.0
        return fixed + pending.size_seconds

    @property
    def round_trip_seconds(self) -> float:
        """Seconds of the pause that messages spend on their way."""
        return ROUND_TRIPS * self.round_trip

    def link_bandwidth(self, limits: Limits) -> float:
        """Return the bytes per second that the link carries; 0.0 when that is unknown."""
        bandwidth = limits.avail_switchover_bandwidth or self.bandwidth
        if not limits.max_bandwidth:
            return bandwidth
        return min(bandwidth or limits.max_bandwidth, limits.max_bandwidth)

    def wire_seconds(self, pages: int, limits: Limits) -> float:
        """Return the seconds that `pages` dirty pages take on the wire."""
        bandwidth = self.link_bandwidth(limits)
        seconds = pages * self.bytes_per_page / bandwidth if bandwidth else 0.0
        return seconds * self.compressed_share

    def transfer_seconds(self, pages: int, limits: Limits) -> float:
        """Return the seconds to move `pages` dirty pages.

        Encoding, the wire and applying overlap, so the slowest of the three counts.
        """
        wire = self.wire_seconds(pages, limits)
        return max(wire, pages * self.encode_per_page, pages * self.apply_per_page)

    def predict(self, pending: PendingWork, limits: Limits) -> float:
        """Return the seconds of downtime if the guest is stopped now."""
        digests = pending.stale_pages * max(self.source_digest, self.peer_digest)
        rest = self.transfer_seconds(pending.pages, limits) + digests
        check = pending.check_seconds if pending.stops_guest else 0.0
        return self.overhead(pending) + max(rest, check)
