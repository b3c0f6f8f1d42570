"""The sentences and results that migrate-dst prints."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from migrate import units
from migrate.cli.log_limit import LogLimit
from migrate.events import DestinationEvent
from migrate.output import say, show

if TYPE_CHECKING:
    from migrate.destination.destination import Destination
    from migrate.destination.receiver import Arrival
    from migrate.transport.link import Link

PROGRAM = "migrate-dst"


class DestinationOutput:
    """Prints what migrate-dst does. Lines that strangers can cause are bounded.

    resolve_timeout -- seconds that a source which is gone has to come back after READY
    """

    def __init__(self, args: argparse.Namespace, resolve_timeout: float) -> None:
        self._resolve_timeout = resolve_timeout
        self._quiet = args.quiet
        self._json = args.json
        self._warned = False
        self._refusals = LogLimit(self.fail, lambda number: f"refused {number} more connections")
        self._visits = LogLimit(
            self.progress, lambda number: f"{number} more lines about guests and dry runs"
        )

    def progress(self, text: str) -> None:
        """Print what is being done, unless the user wants errors only."""
        if not self._quiet:
            self.fail(text)

    def fail(self, text: str) -> None:
        """Print what went wrong."""
        say(f"{PROGRAM}: {text}")

    def visit(self, text: str) -> None:
        """Print what a source does here; any stranger can cause such lines."""
        self._visits.say(text)

    def refused(self, peer: str, why: object) -> None:
        """Print that a connection was refused."""
        self._refusals.say(f"refused {peer}: {why}")

    def probed(self, link: Link) -> None:
        """Print that a dry run has measured the path."""
        self.visit(f"{link.peer_name} measured the path to here: nothing was moved (--dry-run)")

    def observe(self, event: DestinationEvent, arrival: Arrival, destination: Destination) -> None:
        """Print what has happened to the guest that `destination` receives."""
        peer = destination.link.peer_name
        if event is DestinationEvent.ACCEPTED:
            size = units.format_size(arrival.info.size)
            self.visit(f"receiving a {arrival.info.kind} guest of {size} from {peer}")
            self._warn_if_exposed(destination.link)
        elif event is DestinationEvent.INTERRUPTED:
            self.visit(
                "the connection broke: the source may come back within "
                f"{destination.patience:.3g} s"
            )
        elif event is DestinationEvent.RETURNED:
            self.visit(f"the source is back, from {peer}")
        elif event is DestinationEvent.LOST:
            self.progress(
                "the source is gone, and its guest is whole here: it may come back and ask within "
                f"{self._resolve_timeout:g} s"
            )

    def _warn_if_exposed(self, link: Link) -> None:
        """Warn, once, that others on the path can read the guest's memory."""
        if link.exposed and not self._warned:
            from migrate.transport.tls import PLAIN

            self._warned = True
            self.progress(f"warning: {PLAIN}")

    def result(self, running: str, report: dict[str, Any] | None = None) -> None:
        """Print that the guest is here.

        running -- where it runs, in a sentence
        report  -- printed instead with --json
        """
        if self._json:
            if report is not None:
                print(json.dumps(report), flush=True)
        elif not self._quiet:
            show(f"completed and verified: {running}")

    def close(self) -> None:
        """Print how many lines were left out."""
        self._refusals.close()
        self._visits.close()
