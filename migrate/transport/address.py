"""Addresses to connect to or listen on: tcp:HOST:PORT, unix:PATH, and for listeners a bare PORT."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass

from migrate.errors import UsageError

# unix(7): sun_path has 108 bytes, one of them for the NUL.
MAX_PATH_BYTES = 107


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
    """Read an address. Blanks around it are ignored, but for those that belong to a path.

    An IPv6 address is written in brackets: without them its last group could be a port.

    listen -- an address to listen on: the host and `tcp:` may be left out

    Raise UsageError, which says what is wrong and names the forms that are understood.
    """
    forms = "[HOST:]PORT or unix:PATH" if listen else "tcp:HOST:PORT or unix:PATH"
    rest = text.lstrip()
    if rest.startswith("unix:"):
        path = rest.removeprefix("unix:").removeprefix("//")
        if not path:
            raise UsageError(f"address {text!r} names no path: write {forms}")
        if wrong := _no_path(path):
            raise UsageError(f"address {text!r}: {wrong}")
        return Address(path=path)
    rest = rest.rstrip()
    if not listen and not rest.startswith("tcp:"):
        raise UsageError(f"address {text!r} is not understood: write {forms}")
    rest = rest.removeprefix("tcp:").removeprefix("//") if rest.startswith("tcp:") else rest
    try:
        host, port = _host_and_port(rest)
        number = _port(port, needed=not listen)
        if not host and not listen:
            raise _WrongError("it names no host")
    except _WrongError as error:
        better = " or ".join(f"{'' if listen else 'tcp:'}{form}" for form in error.forms) or forms
        raise UsageError(f"address {text!r} is not understood: {error}: write {better}") from None
    return Address(host=host, port=number)


class _WrongError(ValueError):
    """A fault of an address, and the forms that were probably meant."""

    def __init__(self, why: str, *forms: str) -> None:
        super().__init__(why)
        self.forms = forms


def _host_and_port(text: str) -> tuple[str, str]:
    """Split HOST:PORT, [HOST]:PORT, :PORT or PORT. Raise _WrongError."""
    if any(char.isspace() for char in text):
        raise _WrongError("there is a blank in it")
    if text.startswith("["):
        host, closed, port = text[1:].partition("]")
        if not closed or "[" in host or "]" in port:
            raise _WrongError("its brackets are not in pairs")
        if not host:
            raise _WrongError("there is nothing in its brackets")
        if ":" in host and not _is_ipv6(host):
            raise _WrongError(f"{host} is no IPv6 address")
        if not port.startswith(":"):
            raise _WrongError("it names no port", f"[{host}]:PORT")
        port = port[1:]
    else:
        if "[" in text or "]" in text:
            raise _WrongError("its brackets are not in pairs, or not at its beginning")
        if text.count(":") > 1:
            raise _unbracketed(text)
        host, _, port = text.rpartition(":")
    if not _is_name(host):
        raise _WrongError(f"{host!r} is no name of a host")
    return host, port


def _unbracketed(text: str) -> _WrongError:
    """Return the error for a text with several colons: perhaps an IPv6 address without brackets."""
    host, _, port = text.rpartition(":")
    forms = [f"[{host}]:{port}"] if _is_ipv6(host) and port.isdecimal() else []
    forms += [f"[{text}]:PORT"] if _is_ipv6(text) else []
    if not forms:
        return _WrongError("there are too many colons in it")
    return _WrongError("an IPv6 address stands in brackets", *forms)


def _port(text: str, *, needed: bool) -> int:
    """Raises _WrongError."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= 5 else -1
    if not 0 <= number <= 65535:
        raise _WrongError(f"{text[:20]!r} is no port" if text else "it names no port")
    if needed and not number:
        raise _WrongError("port 0 cannot be connected to")
    return number


def _is_ipv6(text: str) -> bool:
    """Return whether the text is an IPv6 address, perhaps with a scope (fe80::1%eth0)."""
    try:
        return ipaddress.IPv6Address(text) is not None
    except ValueError:
        return False


def _no_path(path: str) -> str:
    """Return why a unix socket cannot have this path; "" if it can."""
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
    """Return whether a resolver can be asked for this name, which is IDNA-encoded for that."""
    if not host.isprintable() or "/" in host:
        return False
    try:
        return b"\0" not in host.encode("idna")
    except UnicodeError:
        return False


def ip_of(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the address that a socket gives, without its scope; mapped IPv4 as IPv4.

    Raise ValueError if it is none.
    """
    ip = ipaddress.ip_address(name.partition("%")[0])
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return mapped or ip
