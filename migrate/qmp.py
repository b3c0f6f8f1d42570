"""The control socket: a running program answers in the JSON of QEMU's machine protocol.

    <- {"QMP": {"version": ..., "capabilities": []}}
    -> {"execute": "qmp_capabilities"}                  before anything else
    -> {"execute": NAME, "arguments": {...}, "id": ...}
    <- {"return": ..., "id": ...}  or  {"error": {"class": ..., "desc": ...}, "id": ...}

Requests are a stream of JSON texts, not lines: QEMU's own client sends no line ends. Replies end
with CR LF. What a command does is up to whoever serves it; nothing here knows migrations.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from migrate.errors import ConnectError, UsageError

MAX_REQUEST_BYTES = 64 << 10
MAX_CLIENTS = 32
SEND_PATIENCE = 10.0
# Requests are served no faster than this: one client that asked without pause took the loop from
# the migration, and made a pause of 8 ms one of 5 s.
TURN_SECONDS = 0.002

# What it returns is the answer; None stands for {}. What it refuses it raises as CommandError.
Command = Callable[[dict[str, Any]], Any]


class CommandError(Exception):
    """A command that is refused; `kind` is QEMU's error class."""

    def __init__(self, desc: str, kind: str = "GenericError") -> None:
        super().__init__(desc)
        self.kind = kind


class JsonStream:
    """Cuts bytes into JSON texts: each ends with the bracket that closes it.

    Outside of brackets a word ends with white space. 0xFF throws away what is unfinished.
    Raises CommandError where a text grows over MAX_REQUEST_BYTES.
    """

    def __init__(self) -> None:
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
                if len(self._text) >= MAX_REQUEST_BYTES:
                    raise CommandError(f"a request has no more than {MAX_REQUEST_BYTES} bytes")
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
    """What one client may ask, and the answers: bytes in, objects out."""

    def __init__(self, commands: Mapping[str, Command], version: Mapping[str, Any]) -> None:
        self._commands = commands
        self._version = version
        self._negotiated = False
        self._stream = JsonStream()

    def greeting(self) -> dict[str, Any]:
        return {"QMP": {"version": self._version, "capabilities": []}}

    def answers(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Raises CommandError where the client must be dropped."""
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


def _no_number(name: str) -> None:
    """Python would take these, and give them back in an `id`; they are no JSON."""
    raise ValueError(name)


def _request(text: bytes) -> dict[str, Any]:
    try:
        request = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise CommandError("JSON parse error, expecting value") from None
    if not isinstance(request, dict):
        raise CommandError("QMP input must be a JSON object")
    return request


class Server:
    """Serves the socket until it is closed."""

    def __init__(self, path: str, commands: Mapping[str, Command], version: str) -> None:
        major, minor, micro = (int(number) for number in version.split("."))
        self._version = {
            "qemu": {"major": major, "minor": minor, "micro": micro},
            "package": f"xbmigrate {version}",
        }
        self._path = path
        self._commands = commands
        self._turn = asyncio.Lock()
        self._clients: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._ours: tuple[int, int] | None = None

    async def open(self) -> None:
        """Raises ConnectError where the path is not to be had."""
        sock = _bind(self._path)
        self._ours = _identity(self._path)
        self._server = await asyncio.start_unix_server(self._serve, sock=sock)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            if self._ours is not None and _identity(self._path) == self._ours:
                with contextlib.suppress(OSError):
                    os.unlink(self._path)
        for writer in self._clients:
            _hang_up(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversation = Conversation(self._commands, self._version)
        if len(self._clients) >= MAX_CLIENTS:
            _hang_up(writer)
            return
        self._clients.add(writer)
        try:
            await _say(writer, conversation.greeting())
            while data := await reader.read(4096):
                for answer in conversation.answers(data):
                    await _say(writer, answer)
                    async with self._turn:  # all clients together: a migration goes on beside them
                        await asyncio.sleep(TURN_SECONDS)
        except CommandError as error:
            with contextlib.suppress(OSError, TimeoutError):
                await _say(writer, {"error": {"class": error.kind, "desc": str(error)}})
        except (OSError, TimeoutError, RuntimeError):
            pass  # it hung up, or does not read what it asked for (uvloop: RuntimeError)
        finally:
            self._clients.discard(writer)
            _hang_up(writer)


def _identity(path: str) -> tuple[int, int] | None:
    """Which file a path names: somebody may have put another one there."""
    with contextlib.suppress(OSError):
        named = os.stat(path)
        return named.st_dev, named.st_ino
    return None


def _hang_up(writer: asyncio.StreamWriter) -> None:
    """What its client has not made room for by now is not sent any more."""
    if writer.transport.get_write_buffer_size():
        writer.transport.abort()
    else:
        writer.close()


async def _say(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    writer.write(json.dumps(message).encode() + b"\r\n")
    async with asyncio.timeout(SEND_PATIENCE):
        await writer.drain()


def parse_path(text: str) -> str:
    """The path of `unix:PATH`. Raises UsageError."""
    if not text.startswith("unix:") or not text.removeprefix("unix:"):
        raise UsageError(f"--qmp {text!r} is not understood: write unix:PATH")
    return text.removeprefix("unix:")


def _bind(path: str) -> socket.socket:
    """A listening socket that nobody but its owner can connect to, from the first moment on."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(path).st_mode):
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.setblocking(False)  # its owner may be stopped, and its backlog full
                    if probe.connect_ex(path) in (0, errno.EAGAIN):
                        raise ConnectError(f"--qmp unix:{path}: another program listens there")
                os.unlink(path)  # its program has died
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(path)
        sock.listen(MAX_CLIENTS)
    except OSError as error:
        sock.close()
        why = error.strerror or error
        raise ConnectError(f"--qmp unix:{path}: {why}") from None
    except ConnectError:
        sock.close()
        raise
    return sock
