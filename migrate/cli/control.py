"""The program migrate-ctl: asks a running migrate-src or migrate-dst over its --qmp socket.

    migrate-ctl PATH                    a prompt for commands of the monitor
    migrate-ctl PATH info migrate       one of them, and what it says
    migrate-ctl PATH query-status       a command of QMP, its answer as JSON
    migrate-ctl PATH wait               until the migration there has ended

It has no asyncio and no codec: a health check that runs each second should cost little.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from migrate import bounded_json, output, quantities
from migrate.cli.program import VERSION, Parser
from migrate.directory import Directory, make_trusted
from migrate.errors import ConnectError, MigrationError, PeerError, PeerLost, UsageError
from migrate.filesystem import write_whole
from migrate.journal import is_of_another, state_directory
from migrate.monitor.node import TRY_HELP
from migrate.monitor.words import BLANK, line_of
from migrate.output import say

ENDED = ("completed", "failed", "cancelled")
WAIT_INTERVAL = 0.1
MAX_ANSWER_BYTES = 1 << 20
READ_BYTES = 64 << 10
HISTORY = "history"
HISTORY_LINES = 1000
MAX_HISTORY = 1 << 20  # characters

EPILOG = """exit codes:
    0 answered; for wait: the migration completed
    1 refused, or it has failed, or an answer (not that of wait) cannot be printed
    2 usage    3 nobody answers on that socket

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
    parser = Parser(
        prog="migrate-ctl",
        description="Asks a running migrate-src or migrate-dst.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"migrate-ctl {VERSION}")
    parser.add_argument("path", metavar="PATH", help="the socket: what --qmp unix:PATH names")
    parser.add_argument(
        "command", metavar="COMMAND", nargs="*",
        help="of QMP (query-commands lists them), with its arguments as a JSON object; of the "
        "monitor (help lists them), with its words; or wait. None: a prompt",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", default="5s", metavar="TIME",
        help="how long to try to connect, and to wait for an answer (default: 5s)",
    )  # fmt: skip
    return parser


class Control:
    """A connection to a --qmp socket. Raises ConnectError, PeerLost, PeerError."""

    def __init__(self, path: str, timeout: float = 5.0) -> None:
        self._path = path.removeprefix("unix:")
        self._received = bytearray()
        self._sock = socket.socket(socket.AF_UNIX)
        self._timeout = max(timeout, 0.001)
        self._sock.settimeout(self._timeout)
        end = time.monotonic() + timeout
        while True:
            try:
                self._sock.connect(self._path)
                break
            except OSError as error:
                if time.monotonic() + 0.05 > end or isinstance(error, PermissionError):
                    self.close()
                    raise ConnectError(
                        f"nobody answers on {self._path}: {error.strerror or error}: does a "
                        "program with --qmp unix:PATH run there?"
                    ) from None
                time.sleep(0.05)
        try:
            if "QMP" not in self._read(time.monotonic() + self._timeout):
                raise self._no_qmp()
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """The answer of a command. Raises PeerError where it is refused."""
        request = {"execute": command, "arguments": arguments or {}}
        try:
            self._sock.settimeout(self._timeout)
            self._sock.sendall(json.dumps(request).encode())
        except OSError as error:
            raise PeerLost(f"{self._path} has hung up: {error.strerror or error}") from None
        end = time.monotonic() + self._timeout
        while True:
            answer = self._read(end)
            if "error" in answer:
                if not isinstance(answer["error"], dict):
                    raise self._no_qmp()
                raise PeerError(f"{command}: {answer['error'].get('desc')}")
            if "return" in answer:
                return answer["return"]

    def say(self, line: str) -> str:
        """What the monitor says to a line."""
        said = self.execute("human-monitor-command", {"command-line": line})
        return str(said).replace("\r\n", "\n")

    def _read(self, end: float) -> dict[str, Any]:
        """One line, which is whole at `end` (time.monotonic)."""
        while (size := self._received.find(b"\n") + 1) == 0:
            if len(self._received) > MAX_ANSWER_BYTES:
                raise self._no_qmp()
            try:
                self._sock.settimeout(max(end - time.monotonic(), 0.001))
                more = self._sock.recv(READ_BYTES)
            except TimeoutError:
                raise ConnectError(f"{self._path} does not answer") from None
            except OSError as error:
                raise PeerLost(f"{self._path} has hung up: {error.strerror or error}") from None
            if not more:
                raise PeerLost(f"{self._path} has hung up")
            self._received += more
        line = bytes(self._received[:size])
        del self._received[:size]
        if time.monotonic() > end:
            raise ConnectError(f"{self._path} tells of events, and does not answer")
        try:
            answer = bounded_json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._no_qmp()
        return answer

    def _no_qmp(self) -> PeerError:
        return PeerError(f"what listens on {self._path} does not speak QMP")

    def state(self) -> dict[str, Any]:
        """What query-migrate tells."""
        told = self.execute("query-migrate")
        if not isinstance(told, dict):
            raise self._no_qmp()
        return told

    def command_names(self) -> list[str]:
        """What query-commands tells."""
        told = self.execute("query-commands")
        if not isinstance(told, list) or not all(isinstance(one, dict) for one in told):
            raise self._no_qmp()
        return [str(one.get("name")) for one in told]

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def wait(control: Control) -> int:
    """Waits until the migration has ended, and says how; 0 where it completed."""
    while True:
        try:
            state = control.state()
        except PeerLost:
            raise PeerLost(
                "the program ended before it could be asked how its migration did (--stay keeps it)"
            ) from None
        if state.get("status") in ENDED:
            break
        time.sleep(WAIT_INTERVAL)
    if state["status"] == "completed":
        _print(json.dumps(state) + "\n", matters=False)  # the exit code says it
        return 0
    why = state.get("error-desc", "")
    say(f"migrate-ctl: the migration has {_ended(state['status'])}: {why}")
    return 1


def _ended(status: str) -> str:
    return "been cancelled" if status == "cancelled" else "failed"


def arguments_of(command: str, words: list[str]) -> dict[str, Any] | None:
    """Of a QMP command; None where these are words for the monitor. Raises UsageError."""
    if not words:
        return None if set(command) & set(BLANK) else {}  # a whole line
    # Names of QMP have hyphens, nearly all of them, those of the monitor never.
    if "-" not in command and not words[0].startswith("{"):
        return None
    from migrate.monitor.qmp import double_quoted

    text = " ".join(words)
    try:
        arguments = json.loads(double_quoted(os.fsencode(text)) if "'" in text else text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        control_parser().error(f"the arguments {text!r} are no JSON object")
    return arguments


def ask(control: Control, command: str, words: list[str]) -> int:
    """One command, of any kind; the exit code."""
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
    # One word is a line as it is; of several each is one word there too, as for the shell.
    said = control.say(line_of([command, *words]) if words else command)
    _print(said)
    refused = said.startswith(("Error: ", "unknown command: ")) or said.endswith(TRY_HELP)
    return 1 if refused else 0


def _print(text: str, *, matters: bool = True) -> None:
    """Print an answer.

    matters -- raise OSError where it cannot be printed; else say so, once, and go on
    """
    try:
        print("\n".join(map(output.printable, text.split("\n"))), end="", flush=True)
    except OSError as error:
        if matters:
            raise
        if not isinstance(error, BrokenPipeError):
            say(f"migrate-ctl: {error.strerror or error}")


def converse(control: Control) -> int:
    """Lines of a person, or of a script, until there are no more."""
    person = sys.stdin.isatty()
    with _remembering(control) if person else contextlib.nullcontext():
        while True:
            try:
                line = input("(migrate) " if person else "")
            except EOFError:
                return 0
            _print(control.say(line) if line.strip() else "", matters=False)  # others follow
            if line.split()[:1] in (["quit"], ["q"]):
                return 0


@contextlib.contextmanager
def _remembering(control: Control) -> Iterator[None]:
    """A history that outlives us, and names that complete."""
    if is_of_another(os.environ.get("HOME", "")):
        os.environ["INPUTRC"] = os.devnull  # else what his ~/.inputrc says is typed for us
    import readline

    names = _names(control)

    def complete(text: str, state: int) -> str | None:
        begun = readline.get_line_buffer()[: readline.get_endidx()]
        found = [name for name in names if name.startswith(begun)]
        return found[state][len(begun) - len(text) :] + " " if state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
    for line in _remembered():
        readline.add_history(line)
    try:
        yield
    finally:
        last = readline.get_current_history_length()
        numbers = range(max(last - HISTORY_LINES, 0) + 1, last + 1)
        _remember([readline.get_history_item(number) or "" for number in numbers])


def _names(control: Control) -> list[str]:
    """What completes: the names of commands, and of what `info` tells.

    Only those that can be printed: they get into the line that is edited.
    """
    names = [one.split()[:1] for one in control.say("help").splitlines()]
    names += [one.split()[:2] for one in control.say("info").splitlines()]
    return [name for words in names if words and (name := " ".join(words)).isprintable()]


def _remembered() -> list[str]:
    """The lines of earlier conversations, as far as a trusted directory has them."""
    with (
        contextlib.suppress(OSError, UsageError),
        Directory(state_directory(), trusted=True) as here,
        here.opened(HISTORY) as fd,
        open(fd, errors="surrogateescape", closefd=False) as file,
    ):
        return file.read(MAX_HISTORY).splitlines()[-HISTORY_LINES:]
    return []


def _remember(lines: list[str]) -> None:
    """Keeps these lines, if there is a trusted directory for them."""
    text = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
    with contextlib.suppress(OSError, UsageError):
        make_trusted(state_directory()).close()
        write_whole(os.path.join(state_directory(), HISTORY), text, HISTORY, mode=0o600)


def run(words: list[str] | None = None) -> int:
    try:
        args, rest = control_parser().parse_known_args(words)
        command = [*args.command, *rest]  # a command of the monitor has options of its own
        if rest and not args.command:
            control_parser().error(f"unrecognized arguments: {' '.join(rest)}")
        timeout = quantities.parse_milliseconds(args.timeout, "--timeout", bare="s") / 1e3
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
    output.program("migrate-ctl", run, waits=True)
