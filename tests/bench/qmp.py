"""A small synchronous QMP client: commands and their results; events are passed over."""

from __future__ import annotations

import json
import socket
import time
from types import TracebackType
from typing import Any


class QMPError(Exception):
    """QEMU refused a command; the message is QEMU's."""


class QMP:
    """A connection to the unix socket of a QEMU that may still be starting."""

    def __init__(self, path: str, timeout: float = 20) -> None:
        end = time.monotonic() + timeout
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(path)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                self._socket.close()
                if time.monotonic() > end:
                    raise QMPError(f"QEMU does not listen at {path}") from None
                time.sleep(0.02)
        self._socket.settimeout(timeout)
        self._lines = self._socket.makefile("r", encoding="utf-8")
        greeting = self._read()
        if "QMP" not in greeting:
            raise QMPError(f"this is no QMP greeting: {greeting}")
        self.execute("qmp_capabilities")

    def __enter__(self) -> QMP:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lines.close()
        self._socket.close()

    def execute(self, command: str, **arguments: Any) -> Any:
        """The command's result. Underscores in names of arguments stand for dashes."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        request = {"execute": command, "arguments": named}
        self._socket.sendall(json.dumps(request).encode() + b"\r\n")
        while True:
            answer = self._read()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise QMPError(f"{command}: {answer['error'].get('desc')}")

    def monitor(self, line: str) -> str:
        """A command of the human monitor, for what QMP lacks."""
        return str(self.execute("human-monitor-command", command_line=line))

    def _read(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except TimeoutError:
            raise QMPError("QEMU does not answer") from None
        if not line:
            raise QMPError("QEMU has closed the connection")
        answer: dict[str, Any] = json.loads(line)
        return answer
