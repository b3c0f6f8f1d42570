"""Bitmaps of pages in plain Python: see _bitmaps.pyx."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer


def bitmap(pages: int) -> bytearray:
    return bytearray((pages + 63) // 64 * 8)


def zeros(size: int) -> memoryview:
    """Return writable memory of `size` zeros."""
    return memoryview(bytearray(max(size, 1)))


def _number(bits: Buffer, others: Buffer, *, both: bool = True) -> tuple[int, int]:
    one, other = bytes(bits), bytes(others)
    if len(one) % 8 or ((both or other) and len(one) != len(other)):
        raise ValueError(f"bitmaps of {len(one)} and {len(other)} bytes")
    return int.from_bytes(one, "little"), int.from_bytes(other, "little")


def count_bits(bits: Buffer, others: Buffer = b"") -> int:
    """Return how many bits are set in a bitmap, or in either of two."""
    one, other = _number(bits, others, both=False)
    return (one | other).bit_count()


def unite_bits(bits: Buffer, others: Buffer) -> None:
    """Set the bits of another bitmap too."""
    one, other = _number(bits, others)
    memoryview(bits)[:] = (one | other).to_bytes(len(memoryview(bits)), "little")


def keep_bits(bits: Buffer, others: Buffer) -> None:
    """Clear the bits that are not set in another bitmap."""
    one, other = _number(bits, others)
    memoryview(bits)[:] = (one & other).to_bytes(len(memoryview(bits)), "little")
