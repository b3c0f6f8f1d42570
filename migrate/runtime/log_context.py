"""Name the migration that a log record belongs to.

    Migration, Destination --name_migration(journal's name)--> label <--MigrationFilter-- handler

The label lives in a context variable as an object that is renamed in place, because the callbacks
of a connection and the worker threads run in a context that was copied before the migration got
its name. A program moves one guest at a time: all its contexts share the label that the variable
defaults to. `migrate.send` and `migrate.receive` may run several times in one process: each calls
`new_label` before it connects.

The name is the journal's, a one-way hash of the migration's token, so both programs log the same
name and a log gives the token away to no reader.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar

# Enough of the journal's name to tell migrations apart, and to find the journal's file.
SHOWN_CHARACTERS = 8
UNNAMED = "-"


class _Label:
    """The name that log records show."""

    def __init__(self) -> None:
        self.text = UNNAMED


_PROCESS = _Label()
_label: ContextVar[_Label] = ContextVar("migration", default=_PROCESS)


def new_label() -> None:
    """Give the current task a label of its own, and the tasks that it starts from here on."""
    _label.set(_Label())


def name_migration(name: str) -> None:
    """Show `name`, a journal's, in the log records of this migration from here on."""
    _label.get().text = name[:SHOWN_CHARACTERS] or UNNAMED


class MigrationFilter(logging.Filter):
    """Set `record.migration` to the name of the migration, or "-" before it has one."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.migration = _label.get().text
        return True
