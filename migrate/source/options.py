"""Options of a source, beside the guest, the link and the parameters."""

from __future__ import annotations

from dataclasses import dataclass

from migrate.events import Observer
from migrate.ownership.journal import Journal
from migrate.transport.channels import Dial

# Defaults of `--retry` and `--resolve-timeout`, in seconds.
RETRY_SECONDS = 60.0
RESOLVE_SECONDS = 60.0


@dataclass(frozen=True)
class SourceOptions:
    """Options for connecting, recording and reporting. Times in seconds.

    observer -- called with an event (see migrate.events) and the statistics as things happen. An
                exception of the observer is logged, and changes nothing; SystemExit and
                KeyboardInterrupt cancel the migration if it can still be cancelled, and are raised
                at its end
    dial     -- connects to the destination once more: for further channels, and after a break.
                None: one channel, and a break is a failure
    patience -- time to connect again if the destination hangs up before it has sent a message, from
                the first such attempt on. A destination that has too many clients does that
    retry    -- time to connect again after a break, from the first break after the last progress.
                0: a break is a failure
    journals -- the directory of the journals; "" keeps the journal of this migration in memory
    earlier  -- the journal of an attempt that an earlier program has left: it is resumed
    address  -- the destination's, for a later program that has to ask it
    resolve_timeout -- time to find out which side owns the guest, after a break in the hand-over
    """

    observer: Observer | None = None
    dial: Dial | None = None
    patience: float = 0.0
    retry: float = 0.0
    journals: str = ""
    earlier: Journal | None = None
    address: str = ""
    resolve_timeout: float = RESOLVE_SECONDS


DEFAULT_OPTIONS = SourceOptions()
