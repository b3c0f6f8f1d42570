"""What the parsers say, without argparse and without a shell: options, and what they take.

What may stand for a value is read from its metavar, so that a new option is completed well without
a word here: `DIR` is a directory, `PATH` or `FILE` a file, `PID` a process, `CMD` a command;
`a|b` is one or the other, and what stands before such a name in small letters (`unix:PATH`) is
written as it is. Only where a metavar cannot say it, MEANT does.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from enum import Enum

from migrate.cli.control import control_parser
from migrate.cli.destination import destination_parser
from migrate.cli.resolve import resolve_parser
from migrate.cli.source_words import source_parser
from migrate.cli.stream import stream_parser

# proto.capabilities has them, and more than there is at build time.
CAPABILITIES = ("xbzrle", "xbzrle-merge")
MEANT = {
    "--capability": "|".join(f"{name}={value}" for name in CAPABILITIES for value in ("on", "off")),
    "--congestion": "CONGESTION",
    "--guest": "demo|demo:|demo:pid=PID|file:PATH",
    "COMMAND": "help|info|query-commands|query-migrate|query-status|quit|wait|ASKED",
}


class Kind(Enum):
    """What a shell finds out when it is asked: the names are those of metavars."""

    FILE = "FILE"
    DIRECTORY = "DIR"
    PROCESS = "PID"
    COMMAND = "CMD"
    CONGESTION = "CONGESTION"  # what this system has
    ASKED = "ASKED"  # the commands of the program that listens on the socket named before


_KINDS = {"PATH": Kind.FILE, **{kind.value: kind for kind in Kind}}
_ALTERNATIVE = re.compile(r"([a-z0-9:=-]*)([A-Z]*)(?:\.[a-z]+)?")


@dataclass(frozen=True)
class Values:
    """What may stand for a value: fixed words, and what a shell finds, after a prefix."""

    words: tuple[str, ...] = ()
    found: tuple[tuple[str, Kind], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.words or self.found)


@dataclass(frozen=True)
class Option:
    """One option, or an argument without a name.

    names  -- as they are typed; none for an argument
    takes  -- what its value is called; "" for a switch
    """

    names: tuple[str, ...]
    takes: str
    help: str
    values: Values = Values()
    required: bool = False
    repeatable: bool = False


@dataclass(frozen=True)
class Program:
    """A program, or what one does where its first word is a subcommand.

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
    """All programs, with their subcommands."""
    return (
        read(source_parser(), read(resolve_parser("migrate-src"))),
        read(destination_parser(), read(resolve_parser("migrate-dst"))),
        read(control_parser()),
        read(stream_parser()),
    )


def read(parser: argparse.ArgumentParser, *subcommands: Program) -> Program:
    """What a parser says."""
    # argparse has no other way to ask for them.
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
    """What a metavar says may stand for it."""
    words, found = [], []
    for alternative in meant.split("|"):
        understood = _ALTERNATIVE.match(alternative)
        assert understood is not None  # it matches nothing at least
        prefix, name = understood.groups()
        if name in _KINDS and understood.end() == len(alternative):
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
    """The help, with the default where there is one that it does not name."""
    told = (action.help or "") % {**vars(action), "prog": prog}
    default = action.default
    if isinstance(action, argparse._VersionAction | argparse._HelpAction):
        return told.replace("program's version number", "version")
    if action.option_strings and isinstance(default, str) and default and "default" not in told:
        told += f" (default: {default})"
    return told.strip()
