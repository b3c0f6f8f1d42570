"""The sentences and results that migrate-src prints."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from migrate import units
from migrate.cli.source_options import SourceConfig
from migrate.errors import HandOverUnknown, MigrationError
from migrate.output import say
from migrate.statistics import Statistics, info_migrate, query_migrate
from migrate.views.options import Views

if TYPE_CHECKING:
    from migrate.cli.dry_run import DryRunResult
    from migrate.guests.guest import Guest
    from migrate.policy.parameters import Parameters
    from migrate.transport.address import Address

PROGRAM = "migrate-src"


class SourceOutput:
    """Prints around the views: a picture on the terminal is cleared before a sentence."""

    def __init__(self, args: argparse.Namespace, config: SourceConfig, views: Views) -> None:
        self._quiet = args.quiet
        self._json = args.json
        # Standard output may belong to the events, or to the monitor.
        self._prints_result = not views.owns_stdout and args.monitor != "stdio"
        self._config = config
        self._views = views

    def progress(self, text: str) -> None:
        """Print what is being done, unless the user wants errors only."""
        if not self._quiet:
            self._views.say(text)

    def warn(self, text: str) -> None:
        """Print a warning, however quiet the program is to be."""
        self.fail(f"warning: {text}")

    def fail(self, text: str) -> None:
        """Print what went wrong."""
        self._views.clear()
        say(f"{PROGRAM}: {text}")

    def announce(self, guest: Guest) -> None:
        """Print what is about to move."""
        self.progress(f"moving {guest.description}")
        if guest.kind == "file" and not guest.stoppable:
            self.progress(
                "nothing pauses the file's writer in the last round (--pid or --pause-cmd): "
                "if it writes then, the migration fails"
            )

    def facts(self, guest: Guest, address: Address, parameters: Parameters) -> dict[str, str]:
        """Return what moves where, and with which parameters, for the views."""
        size, limits = units.format_size, parameters.limits
        bandwidth = f"{size(limits.max_bandwidth)}/s" if limits.max_bandwidth else "none"
        return {
            "guest": guest.description,
            "destination": str(address),
            "page size": size(parameters.page_size),
            "cache size": size(parameters.cache_size),
            "downtime limit": f"{limits.downtime_limit * 1e3:g} ms",
            "max bandwidth": bandwidth,
            "channels": str(parameters.channels),
            "TLS": "yes" if self._config.credentials else "no",
        }

    def failure(self, error: MigrationError, guest: Guest, *, resumable: bool) -> None:
        """Print why the migration failed, where the guest is, and what to do."""
        fate = "" if isinstance(error, HandOverUnknown) else f"; {self._fate(guest)}"
        if resumable:
            fate += "; run it again to resume"
        self.fail(f"{error}{fate}")

    def cancelled(self, guest: Guest) -> None:
        """Print that the migration was cancelled, and where the guest is."""
        self.fail(f"cancelled; {self._fate(guest)}")

    def _fate(self, guest: Guest) -> str:
        """Return where the guest is after a failure, and what to do."""
        if not guest.pid:
            return guest.after_failure
        if self._config.serves:
            return f"the guest runs on here, in process {guest.pid}, until this program is stopped"
        return (
            f"the guest runs on here, in process {guest.pid} "
            f"(try again: --guest demo:pid={guest.pid}; end it: kill {guest.pid})"
        )

    def result(self, statistics: Statistics) -> None:
        """Print the final statistics and the advice."""
        if not self._prints_result:
            return
        if self._json:
            print(json.dumps(query_migrate(statistics)), flush=True)
        elif not self._quiet:
            print(info_migrate(statistics), flush=True)
            for sentence in statistics.advice:
                if sentence not in statistics.error:
                    say(f"{PROGRAM}: advice: {sentence}")

    def dry_run_result(self, result: DryRunResult) -> None:
        """Print what a dry run has found."""
        if self._json:
            print(json.dumps(result.as_json()), flush=True)
        elif not self._quiet:
            print(result.lines(), flush=True)
