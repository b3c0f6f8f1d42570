"""The machine protocol: a running program answers in the JSON of QEMU's.

    <- {"QMP": {"version": ..., "capabilities": []}}
    -> {"execute": "qmp_capabilities"}                  before anything else
    -> {"execute": NAME, "arguments": {...}, "id": ...}
    <- {"return": ..., "id": ...}  or  {"error": {"class": ..., "desc": ...}, "id": ...}

Requests are a stream of JSON texts, not lines: QEMU's own client sends no line ends. Replies end
with CR LF. Events come between them, to whoever has negotiated. What a command does is up to
whoever serves it; nothing here knows migrations.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from migrate.monitor.node import Refused

MAX_REQUEST_BYTES = 64 << 10
STRING = re.compile(rb"""(["'])((?:(?!\1)[^\\]|\\.)*)\1""", re.DOTALL)
IN_STRING = re.compile(rb'\\.|"', re.DOTALL)

# What it returns is the answer; None stands for {}. What it refuses it raises as Refused.
Command = Callable[[dict[str, Any]], Any]


class JsonStream:
    """Cuts bytes into JSON texts: each ends with the bracket that closes it.

    Outside of brackets a word ends with white space. 0xFF throws away what is unfinished.
    Raises Refused where a text grows over `limit` bytes.
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
                    raise Refused(f"a request has no more than {self._limit} bytes")
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
    """What one client may ask, and the answers: bytes in, objects out, or bytes (`replies`)."""

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
        """Raises Refused where the client must be dropped."""
        for answer in self.answers(data):
            yield _line(answer)

    def event(self, message: dict[str, Any]) -> bytes:
        """What this client is sent of an event: nothing before it has negotiated."""
        return _line(message) if self._negotiated else b""

    def drop(self, error: Refused) -> bytes:
        """The last word to a client that is dropped."""
        return _line({"error": {"class": error.kind, "desc": str(error)}})

    def answers(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Raises Refused where the client must be dropped."""
        for text in self._stream.feed(data):
            yield self._answer(text)

    def _answer(self, text: bytes) -> dict[str, Any]:
        identity: dict[str, Any] = {}
        try:
            request = _request(text)
            if "id" in request:
                identity = {"id": request["id"]}
            return {"return": self._execute(request), **identity}
        except Refused as error:
            return {"error": {"class": error.kind, "desc": str(error)}, **identity}

    def _execute(self, request: dict[str, Any]) -> Any:
        for key in request:
            if key not in ("execute", "arguments", "id"):
                raise Refused(f"QMP input member '{key}' is unexpected")
        name, arguments = request.get("execute"), request.get("arguments", {})
        if not isinstance(name, str):
            raise Refused("QMP input lacks member 'execute'")
        if not isinstance(arguments, dict):
            raise Refused("QMP input member 'arguments' must be an object")
        if name == "qmp_capabilities":
            if self._negotiated:
                raise Refused(
                    "Capabilities negotiation is already complete, command ignored",
                    "CommandNotFound",
                )
            if arguments.get("enable"):
                raise Refused("this program has no QMP capabilities to enable")
            self._negotiated = True
            return {}
        if not self._negotiated:
            raise Refused(
                "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
            )
        if name == "query-version":
            return self._version
        if name == "query-commands":
            own = ("qmp_capabilities", "query-commands", "query-version")
            return [{"name": known} for known in sorted([*own, *self._commands])]
        if name not in self._commands:
            raise Refused(f"The command {name} has not been found", "CommandNotFound")
        answer = self._commands[name](arguments)
        return {} if answer is None else answer


def _request(text: bytes) -> dict[str, Any]:
    try:
        request = json.loads(double_quoted(text) if b"'" in text else text)
        # What cannot be written (NaN, 1e999, too many brackets) cannot be given back as an `id`.
        json.dumps(request, allow_nan=False)
    except (ValueError, RecursionError):
        raise Refused("JSON parse error, expecting value") from None
    if not isinstance(request, dict):
        raise Refused("QMP input must be a JSON object")
    return request


def double_quoted(text: bytes) -> bytes:
    """As JSON has it: QEMU takes strings in single quotes too, and \\' in each."""

    def part(found: re.Match[bytes]) -> bytes:
        return {b'"': b'\\"', b"\\'": b"'"}.get(found[0], found[0])

    return STRING.sub(lambda found: b'"%b"' % IN_STRING.sub(part, found[2]), text)


def version_of(version: str) -> dict[str, Any]:
    """What is said of a version such as 1.2.3."""
    major, minor, micro = (int(number) for number in version.split("."))
    return {
        "qemu": {"major": major, "minor": minor, "micro": micro},
        "package": f"xbmigrate {version}",
    }


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\r\n"
