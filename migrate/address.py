"""Where to connect or listen: tcp:HOST:PORT, unix:PATH, and for listeners a bare PORT."""

from __future__ import annotations

import os
from dataclasses import dataclass

from migrate.errors import UsageError

MAX_PATH_BYTES = 107  # what Linux has room for


@dataclass(frozen=True)
class Address:
    """`path` is set for a unix socket, else `host` (empty: all interfaces) and `port`."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{'//' if self.path.startswith('//') else ''}{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


def parse_address(text: str, *, listen: bool = False) -> Address:
    """Reads an address. Raises UsageError naming the forms that are understood."""
    forms = "[HOST:]PORT or unix:PATH" if listen else "tcp:HOST:PORT or unix:PATH"
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        if not path:
            raise UsageError(f"address {text!r} names no path: write {forms}")
        if wrong := _no_path(path):
            raise UsageError(f"address {text!r}: {wrong}")
        return Address(path=path)
    rest = text
    if text.startswith("tcp:"):
        rest = text.removeprefix("tcp:").removeprefix("//")
    elif not listen:
        raise UsageError(f"address {text!r} is not understood: write {forms}")
    host, _, port = rest.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    number = int(port) if port.isdecimal() and len(port) <= 5 else -1
    if not set(host).isdisjoint("/[]") or not _is_name(host):
        number = -1  # it would be read in another way than it was meant
    if not 0 <= number <= 65535 or (not listen and (not host or number == 0)):
        raise UsageError(f"address {text!r} is not understood: write {forms}")
    return Address(host=host, port=number)


def _no_path(path: str) -> str:
    """Why a unix socket cannot have this path; "" if it can."""
    try:
        size = len(os.fsencode(path))
    except UnicodeError:
        return "the path cannot be written in the encoding of file names"
    if "\0" in path:
        return "a path has no NUL byte"
    if size > MAX_PATH_BYTES:
        return f"the path of a socket has no more than {MAX_PATH_BYTES} bytes, this one has {size}"
    return ""


def _is_name(host: str) -> bool:
    """Whether a resolver can be asked for it: it is encoded for that."""
    try:
        return b"\0" not in host.encode("idna")
    except UnicodeError:
        return False
