"""QEMU's machine protocol, QMP: JSON requests and answers.

    <- {"QMP": {"version": ..., "capabilities": []}}
    -> {"execute": "qmp_capabilities"}                  before anything else
    -> {"execute": NAME, "arguments": {...}, "id": ...}
    <- {"return": ..., "id": ...}  or  {"error": {"class": ..., "desc": ...}, "id": ...}

Requests are a stream of JSON texts, not lines: QEMU's own client sends no line ends. Replies end
with CR LF. Clients that have negotiated get events between them. This module knows no migrations:
migrate.monitor.commands has what the commands do.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from migrate.monitor.monitored import CommandError

MAX_REQUEST_BYTES = 64 << 10
STRING = re.compile(rb"""(["'])((?:(?!\1)[^\\]|\\.)*)\1""", re.DOTALL)
IN_STRING = re.compile(rb'\\.|"', re.DOTALL)

# Takes the arguments and returns the answer, None for {}. Raises CommandError to refuse.
Command = Callable[[dict[str, Any]], Any]


class JsonStream:
    """Cuts a stream of bytes into JSON texts.

    A text ends with the bracket that closes its first one; a text without brackets ends with white
    space. The byte 0xFF discards an unfinished text, as in QEMU. `feed` raises CommandError if a
    text is longer than `limit` bytes.
    """

    def __init__(self, limit: int = MAX_REQUEST_BYTES) -> None:
        self._limit = limit
        self._text = bytearray()
        self._depth = 0
        self._quote = 0
        self._escaped = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        for byte in data:
            if byte == 0xFF:
                self._reset()
                continue
            if self._text or byte not in b" \t\r\n":
                if len(self._text) >= self._limit:
                    raise CommandError(f"a request has no more than {self._limit} bytes")
                self._text.append(byte)
                if self._ends(byte):
                    text = bytes(self._text)
                    self._reset()
                    yield text

    def _ends(self, byte: int) -> bool:
        if self._quote:
            if self._escaped:
                self._escaped = False
            elif byte == ord("\\"):
                self._escaped = True
            elif byte == self._quote:
                self._quote = 0
            return False
        if byte in b"\"'":
            self._quote = byte
        elif byte in b"{[":
            self._depth += 1
        elif byte in b"}]":
            self._depth -= 1
            return self._depth <= 0
        return self._depth == 0 and byte in b" \t\r\n"

    def _reset(self) -> None:
        self._text.clear()
        self._depth = self._quote = 0
        self._escaped = False


class Conversation:
    """The state of one client: bytes in, answers out as objects, or as bytes (`replies`)."""

    def __init__(self, commands: Mapping[str, Command], version: Mapping[str, Any]) -> None:
        self._commands = commands
        self._version = version
        self._negotiated = False
        self._stream = JsonStream()

    def greeting(self) -> dict[str, Any]:
        return {"QMP": {"version": self._version, "capabilities": []}}

    def begin(self) -> bytes:
        return _line(self.greeting())

    async def replies(self, data: bytes) -> AsyncIterator[bytes]:
        """Give the replies to `data`. Raises CommandError if the client must be dropped."""
        for answer in self.answers(data):
            yield _line(answer)

    def event(self, message: dict[str, Any]) -> bytes:
        """Return what to send of an event: nothing before the client has negotiated."""
        return _line(message) if self._negotiated else b""

    def drop(self, error: CommandError) -> bytes:
        """Return what to send last to a client that is dropped."""
        return _line({"error": {"class": error.kind, "desc": str(error)}})

    def answers(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Give the answers to `data`. Raises CommandError if the client must be dropped."""
        for text in self._stream.feed(data):
            yield self._answer(text)

    def _answer(self, text: bytes) -> dict[str, Any]:
        identity: dict[str, Any] = {}
        try:
            request = _request(text)
            if "id" in request:
                identity = {"id": request["id"]}
            return {"return": self._execute(request), **identity}
        except CommandError as error:
            return {"error": {"class": error.kind, "desc": str(error)}, **identity}

    def _execute(self, request: dict[str, Any]) -> Any:
        for key in request:
            if key not in ("execute", "arguments", "id"):
                raise CommandError(f"QMP input member '{key}' is unexpected")
        name, arguments = request.get("execute"), request.get("arguments", {})
        if not isinstance(name, str):
            raise CommandError("QMP input lacks member 'execute'")
        if not isinstance(arguments, dict):
            raise CommandError("QMP input member 'arguments' must be an object")
        if name == "qmp_capabilities":
            if self._negotiated:
                raise CommandError(
                    "Capabilities negotiation is already complete, command ignored",
                    "CommandNotFound",
                )
            if arguments.get("enable"):
                raise CommandError("this program has no QMP capabilities to enable")
            self._negotiated = True
            return {}
        if not self._negotiated:
            raise CommandError(
                "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
            )
        if name == "query-version":
            return self._version
        if name == "query-commands":
            own = ("qmp_capabilities", "query-commands", "query-version")
            return [{"name": known} for known in sorted([*own, *self._commands])]
        if name not in self._commands:
            raise CommandError(f"The command {name} has not been found", "CommandNotFound")
        answer = self._commands[name](arguments)
        return {} if answer is None else answer


def _request(text: bytes) -> dict[str, Any]:
    try:
        request = json.loads(double_quoted(text) if b"'" in text else text)
        # A value that JSON cannot express (NaN, 1e999) or that nests too deeply cannot be sent back
        # as the `id` of the answer.
        json.dumps(request, allow_nan=False)
    except (ValueError, RecursionError):
        raise CommandError("JSON parse error, expecting value") from None
    if not isinstance(request, dict):
        raise CommandError("QMP input must be a JSON object")
    return request


def double_quoted(text: bytes) -> bytes:
    """Return JSON for what QEMU accepts beyond JSON: strings in single quotes, and \\' in all."""

    def part(found: re.Match[bytes]) -> bytes:
        return {b'"': b'\\"', b"\\'": b"'"}.get(found[0], found[0])

    return STRING.sub(lambda found: b'"%b"' % IN_STRING.sub(part, found[2]), text)


def version_of(version: str) -> dict[str, Any]:
    """Return QMP's VersionInfo for a version such as 1.2.3."""
    major, minor, micro = (int(number) for number in version.split("."))
    return {
        "qemu": {"major": major, "minor": minor, "micro": micro},
        "package": f"xbmigrate {version}",
    }


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\r\n"
