"""The program migrate-ctl: ask a running migrate-src or migrate-dst over its --qmp socket.

    migrate-ctl PATH                    a prompt for commands of the human monitor
    migrate-ctl PATH info migrate       one such command, and its answer
    migrate-ctl PATH query-status       a command of QMP, with its answer as JSON
    migrate-ctl PATH wait               wait until the migration has ended

It imports neither asyncio nor the codec, so that a health check every second costs little.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from typing import Any

from migrate import units
from migrate.cli.control import Control
from migrate.cli.line_editing import line_editing
from migrate.cli.options import VERSION, Parser
from migrate.errors import MigrationError, PeerError, PeerLost
from migrate.monitor.monitored import TRY_HELP
from migrate.monitor.words import BLANK, line_of
from migrate.output import printable, say
from migrate.output.run import run_program

ENDED = ("completed", "failed", "cancelled")
# Seconds between two questions of `wait`.
WAIT_INTERVAL = 0.1

EPILOG = """exit codes:
    0 answered; for wait: the migration completed
    1 refused, or the migration failed, or an answer cannot be printed (except wait's)
    2 usage    3 no program answers on that socket

examples:
  migrate-ctl /run/dst.sock query-status
  migrate-ctl /run/src.sock query-migrate
  migrate-ctl /run/src.sock info migrate
  migrate-ctl /run/src.sock migrate_set_parameter max-bandwidth 100
  migrate-ctl /run/dst.sock migrate_set_cache_size 256m
  migrate-ctl /run/src.sock wait && echo 'it is there'
  migrate-ctl /run/dst.sock quit
"""


def control_parser() -> Parser:
    """Return the parser of migrate-ctl."""
    parser = Parser(
        prog="migrate-ctl",
        description="Asks a running migrate-src or migrate-dst.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"migrate-ctl {VERSION}")
    parser.add_argument("path", metavar="PATH", help="the socket that --qmp unix:PATH names")
    parser.add_argument(
        "command", metavar="COMMAND", nargs="*",
        help="a command of QMP (query-commands lists them), with its arguments as a JSON object; "
        "one of the human monitor (help lists them), with its words; or wait. Without a command: a "
        "prompt",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", default="5s", metavar="TIME",
        help="how long to try to connect, and how long to wait for an answer (default: 5s)",
    )  # fmt: skip
    return parser


def wait(control: Control) -> int:
    """Wait until the migration has ended, and print how; return 0 if it completed, else 1."""
    while True:
        try:
            state = control.state()
        except PeerLost:
            raise PeerLost(
                "the program ended before it told how its migration ended (--stay keeps it running)"
            ) from None
        if state.get("status") in ENDED:
            break
        time.sleep(WAIT_INTERVAL)
    if state["status"] == "completed":
        _print(json.dumps(state) + "\n", matters=False)  # the exit code tells it, too
        return 0
    why = state.get("error-desc", "")
    say(f"migrate-ctl: the migration has {_ended(state['status'])}: {why}")
    return 1


def _ended(status: str) -> str:
    return "been cancelled" if status == "cancelled" else "failed"


def arguments_of(command: str, words: list[str]) -> dict[str, Any] | None:
    """Return the arguments of a QMP command; None for a command of the human monitor.

    Raises UsageError.
    """
    if not words:
        return None if set(command) & set(BLANK) else {}  # a whole line
    # Nearly all names of QMP have hyphens, those of the human monitor never.
    if "-" not in command and not words[0].startswith("{"):
        return None
    from migrate.monitor.qmp import double_quoted

    text = " ".join(words)
    try:
        arguments = json.loads(double_quoted(os.fsencode(text)) if "'" in text else text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        control_parser().error(f"the arguments {text!r} are not a JSON object")
    return arguments


def ask(control: Control, command: str, words: list[str]) -> int:
    """Execute one command of any kind; return the exit code."""
    if [command, *words] == ["wait"]:
        return wait(control)
    arguments = arguments_of(command, words)
    machine = arguments is not None
    if machine and not words and "-" not in command:
        machine = command in control.command_names()
    if machine:
        answer = control.execute(command, arguments)
        _print(json.dumps(answer) + "\n", matters=answer != {})
        return 0
    # A single word is sent as a line. Of several, each stays one word, as in the shell.
    said = control.say(line_of([command, *words]) if words else command)
    _print(said)
    refused = said.startswith(("Error: ", "unknown command: ")) or said.endswith(TRY_HELP)
    return 1 if refused else 0


def _print(text: str, *, matters: bool = True) -> None:
    """Print an answer.

    matters -- raise OSError if it cannot be printed; otherwise report that and go on
    """
    try:
        print("\n".join(map(printable, text.split("\n"))), end="", flush=True)
    except OSError as error:
        if matters:
            raise
        if not isinstance(error, BrokenPipeError):
            say(f"migrate-ctl: {error.strerror or error}")


def converse(control: Control) -> int:
    """Execute lines from standard input, up to its end; return the exit code."""
    person = sys.stdin.isatty()
    with line_editing(control) if person else contextlib.nullcontext():
        while True:
            try:
                line = input("(migrate) " if person else "")
            except EOFError:
                return 0
            _print(control.say(line) if line.strip() else "", matters=False)  # more lines follow
            if line.split()[:1] in (["quit"], ["q"]):
                return 0


def run(words: list[str] | None = None) -> int:
    """Run the program; return its exit code.

    words -- the command line without the program's name; None: this process's own
    """
    try:
        args, rest = control_parser().parse_known_args(words)
        command = [*args.command, *rest]  # a command of the monitor has options of its own
        if rest and not args.command:
            control_parser().error(f"unrecognized arguments: {' '.join(rest)}")
        timeout = units.parse_milliseconds(args.timeout, "--timeout", bare="s") / 1e3
        if command:
            arguments_of(command[0], command[1:])
        with Control(args.path, timeout) as control, contextlib.suppress(BrokenPipeError):
            return ask(control, command[0], command[1:]) if command else converse(control)
        return 0
    except MigrationError as error:
        say(f"migrate-ctl: {error}")
        return 1 if isinstance(error, PeerError) else error.exit_code
    except OSError as error:
        say(f"migrate-ctl: {error.strerror or error}")
        return 1
    except KeyboardInterrupt:
        return 130


def main() -> None:
    run_program("migrate-ctl", run, waits=True)
