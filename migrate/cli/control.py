"""A client of a --qmp socket, for migrate-ctl: blocking, and without asyncio."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

from migrate.errors import ConnectError, PeerError, PeerLost
from migrate.runtime import bounded_json

MAX_ANSWER_BYTES = 1 << 20
READ_BYTES = 64 << 10
# Between two attempts to connect.
AGAIN_SECONDS = 0.05


class Control:
    """A connection to a --qmp socket. Each method may raise ConnectError, PeerLost, PeerError."""

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
                if time.monotonic() + AGAIN_SECONDS > end or isinstance(error, PermissionError):
                    self.close()
                    raise ConnectError(
                        f"no answer on {self._path}: {error.strerror or error}: is a program with "
                        "--qmp unix:PATH running there?"
                    ) from None
                time.sleep(AGAIN_SECONDS)
        try:
            if "QMP" not in self._read(time.monotonic() + self._timeout):
                raise self._not_qmp()
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Return the answer of a QMP command. Raises PeerError if it is refused."""
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
                    raise self._not_qmp()
                raise PeerError(f"{command}: {answer['error'].get('desc')}")
            if "return" in answer:
                return answer["return"]

    def say(self, line: str) -> str:
        """Return the answer of the human monitor to a line."""
        said = self.execute("human-monitor-command", {"command-line": line})
        return str(said).replace("\r\n", "\n")

    def _read(self, end: float) -> dict[str, Any]:
        """Return the next message. Raises ConnectError if it is not complete at `end`.

        end -- in the time of time.monotonic
        """
        while (size := self._received.find(b"\n") + 1) == 0:
            if len(self._received) > MAX_ANSWER_BYTES:
                raise self._not_qmp()
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
            raise ConnectError(f"{self._path} sends events, but no answer")
        try:
            answer = bounded_json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._not_qmp()
        return answer

    def _not_qmp(self) -> PeerError:
        return PeerError(f"the program that listens on {self._path} does not speak QMP")

    def state(self) -> dict[str, Any]:
        """Return the answer of query-migrate."""
        told = self.execute("query-migrate")
        if not isinstance(told, dict):
            raise self._not_qmp()
        return told

    def command_names(self) -> list[str]:
        """Return the names that query-commands lists."""
        told = self.execute("query-commands")
        if not isinstance(told, list) or not all(isinstance(one, dict) for one in told):
            raise self._not_qmp()
        return [str(one.get("name")) for one in told]

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
