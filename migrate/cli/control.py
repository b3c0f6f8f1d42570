"""The program migrate-ctl: asks a running migrate-src or migrate-dst over its --qmp socket.

    migrate-ctl PATH query-status       one command, its answer as JSON
    migrate-ctl PATH wait               until the migration there has ended

It has no asyncio and no codec: a health check that runs each second should cost little.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import sys
import time
from typing import Any, BinaryIO

from migrate import quantities
from migrate.cli.program import VERSION, Parser
from migrate.errors import ConnectError, MigrationError, PeerError, PeerLost

ENDED = ("completed", "failed", "cancelled")
WAIT_INTERVAL = 0.1
MAX_ANSWER_BYTES = 1 << 20

EPILOG = """exit codes:
    0 answered; for wait: the migration completed    1 refused, or it has failed    2 usage
    3 nobody answers on that socket

examples:
  migrate-ctl /run/dst.sock query-status
  migrate-ctl /run/src.sock query-migrate
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
    parser.add_argument("command", metavar="COMMAND", help="query-commands lists them; or wait")
    parser.add_argument(
        "arguments", nargs="?", default="{}", metavar="JSON", help="the command's arguments"
    )
    parser.add_argument(
        "--timeout", default="5s", metavar="TIME",
        help="how long to try to connect, and to wait for an answer (default: 5s)",
    )  # fmt: skip
    return parser


class Control:
    """A connection to a --qmp socket. Raises ConnectError, PeerLost, PeerError."""

    def __init__(self, path: str, timeout: float = 5.0) -> None:
        self._path = path.removeprefix("unix:")
        self._lines: BinaryIO | None = None
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(max(timeout, 0.001))
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
        self._lines = self._sock.makefile("rb")
        try:
            if "QMP" not in self._read():
                raise PeerError(f"what listens on {self._path} does not speak QMP")
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """The answer of a command. Raises PeerError where it is refused."""
        request = {"execute": command, "arguments": arguments or {}}
        try:
            self._sock.sendall(json.dumps(request).encode())
        except OSError as error:
            raise PeerLost(f"{self._path} has hung up: {error.strerror or error}") from None
        while True:
            answer = self._read()
            if "error" in answer:
                raise PeerError(f"{command}: {answer['error'].get('desc')}")
            if "return" in answer:
                return answer["return"]

    def _read(self) -> dict[str, Any]:
        assert self._lines is not None
        try:
            line = self._lines.readline(MAX_ANSWER_BYTES)
        except TimeoutError:
            raise ConnectError(f"{self._path} does not answer") from None
        except OSError as error:
            raise PeerLost(f"{self._path} has hung up: {error.strerror or error}") from None
        if not line.endswith(b"\n"):
            raise PeerLost(f"{self._path} has hung up")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise PeerError(f"what listens on {self._path} does not speak QMP")
        return answer

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
        self._sock.close()

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def wait(control: Control) -> int:
    """Waits until the migration has ended, and says how; 0 where it completed."""
    while True:
        try:
            state = control.execute("query-migrate")
        except PeerLost:
            raise PeerLost(
                "the program ended before it could be asked how its migration did (--stay keeps it)"
            ) from None
        if state.get("status") in ENDED:
            break
        time.sleep(WAIT_INTERVAL)
    if state["status"] == "completed":
        print(json.dumps(state), flush=True)
        return 0
    why = state.get("error-desc", "")
    print(f"migrate-ctl: the migration has {_ended(state['status'])}: {why}", file=sys.stderr)
    return 1


def _ended(status: str) -> str:
    return "been cancelled" if status == "cancelled" else "failed"


def run(words: list[str] | None = None) -> int:
    try:
        args = control_parser().parse_args(words)
        timeout = quantities.parse_milliseconds(args.timeout, "--timeout", bare="s") / 1e3
        try:
            arguments = json.loads(args.arguments)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            control_parser().error(f"the arguments {args.arguments!r} are no JSON object")
        with Control(args.path, timeout) as control, contextlib.suppress(BrokenPipeError):
            if args.command == "wait":
                return wait(control)
            print(json.dumps(control.execute(args.command, arguments)), flush=True)
        return 0
    except MigrationError as error:
        print(f"migrate-ctl: {error}", file=sys.stderr)
        return 1 if isinstance(error, PeerError) else error.exit_code
    except OSError as error:
        print(f"migrate-ctl: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def main() -> None:
    sys.exit(run())
