"""Sizes and times as people write them: 64m, 1g, 300ms."""

from __future__ import annotations

import re

from migrate.errors import UsageError

_SIZE = re.compile(r"(\d{1,20})(?:\.(\d{1,20}))?([kmgtpe]?)(?:i?b)?", re.ASCII | re.IGNORECASE)
_SHIFT = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_TIME = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)(ms|s|m|h|)", re.ASCII | re.IGNORECASE)
_MILLISECONDS = {"ms": 1.0, "s": 1e3, "m": 60e3, "h": 3600e3}


def parse_size(text: str, what: str) -> int:
    """Return the bytes of `64m`, `256M`, `1.5g` or `4096`. Raises UsageError.

    The suffixes k, m, g, t, p, e are powers of 1024. A fraction of a byte is cut off, as in QEMU.

    what -- what the error calls the argument
    """
    found = _SIZE.fullmatch(text.strip())
    shift = _SHIFT[found[3].lower()] if found else 0
    if not found or (found[2] and not shift):
        raise UsageError(f"{what}: {text!r} is not a size: write bytes, or 64k, 64m, 1.5g, 2t")
    fraction = found[2] or ""
    scale: int = 10 ** len(fraction)
    value = (int(found[1] + fraction) << shift) // scale
    if value >= 1 << 62:
        raise UsageError(f"{what}: {text!r} is larger than any memory")
    return value


def parse_cache_size(text: str, page_size: int = 1, what: str = "cache size") -> int:
    """Return a cache size in bytes: a power of two, and at least a page. Raises UsageError."""
    size = parse_size(text, what)
    if size < page_size or size & (size - 1):
        hint = f" (did you mean {size}m?)" if text.strip().isdigit() and size < 1 << 16 else ""
        raise UsageError(
            f"{what}: {text!r} is not a power of two of at least one page "
            f"({page_size} bytes): write 64m, 256m, 1g{hint}"
        )
    return size


def parse_milliseconds(text: str, what: str, bare: str = "ms") -> float:
    """Return the milliseconds of `300`, `300ms`, `1.5s` or `2m`. Raises UsageError.

    bare -- the unit of a number without one
    """
    found = _TIME.fullmatch(text.strip())
    if not found:
        raise UsageError(f"{what}: {text!r} is not a time: write 300ms, 1.5s or 2m")
    return float(found[1]) * _MILLISECONDS[found[2].lower() or bare]


def format_size(size: float) -> str:
    """Return a size for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def option_size(size: int) -> str:
    """Return a size as --cache-size accepts it: 256m."""
    for suffix in "tgmk":
        if size and size % (1 << _SHIFT[suffix]) == 0:
            return f"{size >> _SHIFT[suffix]}{suffix}"
    return str(size)


def format_seconds(seconds: float) -> str:
    """Return a time for people: 0.3 ms, 24 ms, 1.5 s."""
    milliseconds = seconds * 1e3
    if milliseconds < 1000:
        return f"{milliseconds:.1f} ms" if milliseconds < 10 else f"{milliseconds:.0f} ms"
    return f"{seconds:.1f} s"
