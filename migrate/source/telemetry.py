"""The statistics of a source, and the observer that is told of them.

    Migration, Transfer --numbers, status, notices--> Telemetry --event, Statistics--> observer

All parts of a source share one Telemetry: it holds the only current snapshot, and counts the bytes
of all channels that there have been.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from migrate.events import Notice, Observer, SourceEvent
from migrate.runtime.observer import SafeObserver
from migrate.statistics import Statistics, Status
from migrate.transport.channels import Channels

# Inside a round, statistics are brought up to date no more often.
UPDATE_SECONDS = 0.05


class Telemetry:
    """The statistics of one migration.

    began -- when the migration began, by the monotonic clock
    """

    def __init__(
        self, statistics: Statistics, observer: Observer | None, on_exit: Callable[[], None]
    ) -> None:
        self.statistics = statistics
        self.began = time.monotonic()
        self._observer = SafeObserver(observer, on_exit)
        # The channels of this attempt, and what those of earlier attempts have sent.
        self._channels: Channels | None = None
        self._sent_before = 0
        self._further_before = 0
        self._next_update = 0.0

    # -- traffic

    def attach(self, channels: Channels) -> None:
        """Count the bytes of these channels from now on, in addition to those of earlier ones."""
        self._sent_before, self._further_before = self.sent_bytes, self.further_bytes
        self._channels = channels

    @property
    def sent_bytes(self) -> int:
        """Bytes sent over all channels, also those of earlier attempts."""
        return self._sent_before + (self._channels.sent_bytes if self._channels else 0)

    @property
    def further_bytes(self) -> int:
        """Bytes of it sent over channels other than the first one."""
        return self._further_before + (self._channels.channel_bytes if self._channels else 0)

    # -- time

    def restart_clock(self) -> None:
        """Measure the time from now on."""
        self.began = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the migration began."""
        return time.monotonic() - self.began

    def update_is_due(self) -> bool:
        """Whether UPDATE_SECONDS have passed since this was last true."""
        now = time.monotonic()
        if now < self._next_update:
            return False
        self._next_update = now + UPDATE_SECONDS
        return True

    # -- statistics and events

    def change(self, **changes: Any) -> None:
        """Replace fields of the statistics, without an event."""
        self.statistics = self.statistics.with_(**changes)

    def refresh(self, **changes: Any) -> None:
        """Replace fields, and bring the bytes and times up to date."""
        sent = self.sent_bytes
        s = self.statistics.with_(
            transferred=sent, channel_bytes=self.further_bytes, total_time=self.elapsed, **changes
        )
        s = s.with_(precopy_bytes=sent - s.downtime_bytes)
        if s.status is Status.COMPLETED:
            seconds = max(s.total_time - s.setup_time, 1e-9)
            s = s.with_(mbps=sent * 8 / seconds / 1e6)
        self.statistics = s

    def emit(self, event: SourceEvent) -> None:
        """Call the observer with an event and the statistics."""
        self._observer(event, self.statistics)

    def set_status(self, status: Status, error: str = "") -> None:
        """Change the status; call the observer if it is another one."""
        changed = status is not self.statistics.status
        self.change(status=status, error=error)
        if changed:
            self.emit(SourceEvent.STATUS)

    def announce_status(self) -> None:
        """Call the observer with the status, whether it has changed or not."""
        self.emit(SourceEvent.STATUS)

    def complete(self, paused_at: float, sent_before_pause: int) -> None:
        """Note the downtime: the guest runs at the destination now."""
        self.change(
            downtime=time.monotonic() - paused_at,
            downtime_bytes=self.sent_bytes - sent_before_pause,
            remaining=0,
            dirty_pages_rate=0.0,
        )

    def notice(self, text: str) -> None:
        """Tell the observer a sentence for the user."""
        self._observer(Notice(text), self.statistics)

    def raise_exit(self) -> None:
        """Raise the SystemExit or KeyboardInterrupt of the observer, if there was one."""
        self._observer.raise_exit()

    def close(self) -> None:
        """Drop the references to the observer and the channels; keep the numbers."""
        self._sent_before, self._further_before = self.sent_bytes, self.further_bytes
        self._channels = None
        self._observer.close()
