"""The digest of a guest's memory, computed from its definition."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import xxhash


def page_hash(page: bytes, seed: bytes) -> bytes:
    """NH with a sum of 128 bits, then multiply-shift to 64 bits, as 8 bytes, little-endian."""
    count = len(page) // 8
    key = hashlib.shake_256(seed).digest(len(page) + 32)
    words = np.frombuffer(page, "<u8") + np.frombuffer(key, "<u8", count)
    total = sum(int(a) * int(b) for a, b in words.reshape(-1, 2).tolist()) % 2**128
    a, b = (int.from_bytes(key[at : at + 16], "little") for at in (8 * count, 8 * count + 16))
    value = (a * (total % 2**64) + b * (total >> 64)) % 2**128 >> 64
    return struct.pack("<Q", value)


def by_definition(content: bytes, page: int, seed: bytes) -> bytes:
    """XXH3-128 of the hashes of all pages, the last one filled up with zeros."""
    known: dict[bytes, bytes] = {}
    table = b""
    for at in range(0, len(content), page):
        whole = bytes(content[at : at + page]).ljust(page, b"\0")
        if whole not in known:
            known[whole] = page_hash(whole, seed)
        table += known[whole]
    return xxhash.xxh3_128(table).digest()
