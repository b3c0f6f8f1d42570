"""Send log records to standard error: `-v`, `--log-level` and MIGRATE_LOG.

    --log-level LEVEL     of the loggers `migrate` and `proto`
    -v, -vv               info, debug
    MIGRATE_LOG           LEVEL, or LOGGER=LEVEL[,LOGGER=LEVEL]...; used without an option

Without any of them the loggers are silent. Records go through `sys.stderr`, which migrate.output
has made unfailing: a reader that is slow or gone neither blocks the program nor changes its exit
code.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from datetime import UTC, datetime

from migrate.errors import UsageError
from migrate.output import printable
from migrate.runtime.log_context import MigrationFilter

LEVELS = ("debug", "info", "warning", "error")
LOGGERS = ("migrate", "proto")
VARIABLE = "MIGRATE_LOG"
SILENT = logging.CRITICAL + 1
FORMAT = "%(asctime)s %(levelname)s %(name)s [%(migration)s] %(message)s"


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the programs that move a guest."""
    parser.add_argument(
        "-v", "--verbose", action="count", default=0,
        help="log what the program does to standard error; -vv also logs each frame",
    )  # fmt: skip
    parser.add_argument(
        "--log-level", choices=LEVELS,
        help="log from this level on (default: $MIGRATE_LOG, which may also set levels by logger: "
        "migrate.transport=debug,proto=info; else nothing)",
    )  # fmt: skip


def levels_of(args: argparse.Namespace) -> dict[str, str]:
    """Return the level of each logger that is to be heard. Raises UsageError.

    Without the options, `args` may come from a parser that does not have them.
    """
    level, verbose = getattr(args, "log_level", None), getattr(args, "verbose", 0)
    if level or verbose:
        return dict.fromkeys(LOGGERS, level or ("info" if verbose == 1 else "debug"))
    return _parse(os.environ.get(VARIABLE, ""))


def _parse(text: str) -> dict[str, str]:
    """Return what MIGRATE_LOG sets. Raises UsageError."""
    levels: dict[str, str] = {}
    for item in filter(None, (one.strip() for one in text.split(","))):
        name, equals, level = item.rpartition("=")
        if level.lower() not in LEVELS or (equals and name.partition(".")[0] not in LOGGERS):
            raise UsageError(
                f"{VARIABLE}: {item!r} is not understood: write LEVEL or LOGGER=LEVEL, with the "
                f"level one of {', '.join(LEVELS)} and a logger such as migrate.transport or proto"
            )
        levels |= dict.fromkeys([name] if equals else LOGGERS, level.lower())
    return levels


class _StandardError(logging.Handler):
    """Write to what `sys.stderr` is when a record comes."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_Formatter(FORMAT))
        self.addFilter(MigrationFilter())

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # a record that cannot be formatted is left out
            sys.stderr.write(f"{self.format(record)}\n")


class _Formatter(logging.Formatter):
    """Format a record, and escape what a terminal would obey, such as a peer's words."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Return the record's time in UTC, ISO 8601 with milliseconds."""
        del datefmt
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def start_logging(args: argparse.Namespace) -> None:
    """Send the records that the user asked for to standard error. Raises UsageError."""
    levels = levels_of(args)
    # Without a handler Python would print warnings and errors.
    handler = _StandardError() if levels else logging.NullHandler()
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        if levels:
            logger.setLevel(SILENT)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level.upper())
