"""The programs' options and their values, read from the parsers.

The possible values of an option are read from its metavar, so that a new option is completed
without a change here: `DIR` is a directory, `PATH` or `FILE` a file, `PID` a process, `CMD` a
command; `a|b` is one or the other, and small letters before such a name (`unix:PATH`) are literal.
MEANT has the options whose metavar cannot say that.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from enum import Enum

from migrate.cli.destination_options import destination_parser
from migrate.cli.migrate_ctl import control_parser
from migrate.cli.migrate_stream import stream_parser
from migrate.cli.resolve import resolve_parser
from migrate.cli.source_options import source_parser

# A copy: proto.wire.capabilities needs modules that are not there at build time.
CAPABILITIES = ("xbzrle", "xbzrle-merge", "zstd")
MEANT = {
    "--capability": "|".join(f"{name}={value}" for name in CAPABILITIES for value in ("on", "off")),
    "--congestion": "CONGESTION",
    "--guest": "demo|demo:|demo:pid=PID|file:PATH",
    "COMMAND": "help|info|query-commands|query-migrate|query-status|quit|wait|ASKED",
}


class Kind(Enum):
    """What the shell looks up. The values are the names in metavars."""

    FILE = "FILE"
    DIRECTORY = "DIR"
    PROCESS = "PID"
    COMMAND = "CMD"
    CONGESTION = "CONGESTION"  # what the kernel of this system has
    ASKED = "ASKED"  # the commands of the program on the socket that is named before


_KINDS = {"PATH": Kind.FILE, **{kind.value: kind for kind in Kind}}
_ALTERNATIVE = re.compile(r"([a-z0-9:=-]*)([A-Z]*)(?:\.[a-z]+)?(.*)")


@dataclass(frozen=True)
class Values:
    """The possible values: fixed words, and (prefix, kind) of what the shell looks up."""

    words: tuple[str, ...] = ()
    found: tuple[tuple[str, Kind], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.words or self.found)


@dataclass(frozen=True)
class Option:
    """One option or positional argument.

    names -- of an option; empty for an argument
    takes -- the name of its value; "" for a switch
    """

    names: tuple[str, ...]
    takes: str
    help: str
    values: Values = Values()
    required: bool = False
    repeatable: bool = False


@dataclass(frozen=True)
class Program:
    """A program, or one of its subcommands.

    epilog -- as argparse prints it: paragraphs with headings
    """

    name: str
    description: str
    options: tuple[Option, ...]
    arguments: tuple[Option, ...]
    epilog: str = ""
    subcommands: tuple[Program, ...] = ()

    @property
    def page(self) -> str:
        return self.name.replace(" ", "-")


def programs() -> tuple[Program, ...]:
    """Return all programs, with their subcommands."""
    return (
        read(source_parser(), read(resolve_parser("migrate-src"))),
        read(destination_parser(), read(resolve_parser("migrate-dst"))),
        read(control_parser()),
        read(stream_parser()),
    )


def read(parser: argparse.ArgumentParser, *subcommands: Program) -> Program:
    """Return the program that a parser describes."""
    # argparse has no public way to list them.
    actions = [one for one in parser._actions if one.help != argparse.SUPPRESS]
    return Program(
        parser.prog,
        parser.description or "",
        tuple(_option(one, parser.prog) for one in actions if one.option_strings),
        tuple(_option(one, parser.prog) for one in actions if not one.option_strings),
        parser.epilog or "",
        subcommands,
    )


def values(meant: str) -> Values:
    """Return the possible values that a metavar describes."""
    words, found = [], []
    for alternative in meant.split("|"):
        prefix, name, rest = _ALTERNATIVE.findall(alternative)[0]
        if name in _KINDS and not rest:
            found.append((prefix, _KINDS[name]))
        elif prefix:
            words.append(prefix)
    return Values(tuple(words), tuple(found))


def _option(action: argparse.Action, prog: str) -> Option:
    takes = ""
    if action.nargs != 0:
        takes = str(action.metavar or "|".join(map(str, action.choices or ())) or action.dest)
    names = tuple(action.option_strings)
    meant = next((MEANT[key] for key in (*names, takes) if key in MEANT), takes)
    return Option(
        names,
        takes,
        _help(action, prog),
        Values(tuple(map(str, action.choices))) if action.choices else values(meant),
        required=action.required,
        repeatable="Append" in type(action).__name__ or "Count" in type(action).__name__,
    )


def _help(action: argparse.Action, prog: str) -> str:
    """Return the help text, with the default if the text does not name it."""
    told = (action.help or "") % {**vars(action), "prog": prog}
    default = action.default
    if isinstance(action, argparse._VersionAction | argparse._HelpAction):
        return told.replace("program's version number", "version")
    if action.option_strings and isinstance(default, str) and default and "default" not in told:
        told += f" (default: {default})"
    return told.strip()
