"""Build batches of pages, and apply them, with either kernel."""

from __future__ import annotations

import hashlib
import itertools
import random
import struct
from array import array

from proto.codec.pageset import PageSet

PAGE = 1024
HEAD = 20
COUNTERS = [
    "zero", "unchanged", "raw", "delta", "delta_bytes", "hits", "misses", "overflows", "spared",
]  # fmt: skip
SEED = b"a seed of one migration"
STEP = 0x9E3779B97F4A7C15
SMALLEST_ROOM = PAGE + 96


def bitmap(pages: int, numbers=()) -> bytearray:
    return PageSet(pages, numbers).bits


def listed(bits: bytes) -> list[int]:
    return [i for i in range(len(bits) * 8) if bits[i >> 3] >> (i & 7) & 1]


def fill(byte: int, size: int = PAGE) -> bytes:
    return bytes([byte]) * size


def page_hash(content: bytes, seed: bytes = SEED) -> int:
    """NH, then multiply-shift: by its definition."""
    n = len(content) // 8
    *key, a0, a1, b0, b1 = struct.unpack(
        f"<{n + 4}Q", hashlib.shake_256(seed).digest(len(content) + 32)
    )
    data = struct.unpack(f"<{n}Q", content)
    words = [(d + k) % 2**64 for d, k in zip(data, key, strict=True)]
    total = sum(words[i] * words[i + 1] for i in range(0, n, 2)) % 2**128
    a, b = a0 + (a1 << 64), b0 + (b1 << 64)
    return (a * (total % 2**64) + b * (total >> 64)) % 2**128 >> 64


def check_of(*raw: bytes) -> int:
    check = 0
    for content in raw:
        check = (check * STEP + page_hash(content)) % 2**64
    return check


def head(now: int, page: int, *raw: bytes) -> bytes:
    """What stands before the records of a batch with these raw pages."""
    return now.to_bytes(4, "big") + page.to_bytes(8, "big") + check_of(*raw).to_bytes(8, "big")


def put(encoder, contents: dict[int, bytes], todo=None) -> int:
    """Copies as many pages as there is space for and feeds them; how many that was."""
    memory, numbers = encoder.space()
    count = min(len(numbers), len(contents))
    for i, page in enumerate(itertools.islice(contents, count)):
        memory[i * encoder.page_size : (i + 1) * encoder.page_size] = contents[page]
        numbers[i] = page
    encoder.feed(count, bitmap(encoder.pages, contents) if todo is None else todo)
    return count


def put_as(encoder, numbers: list[int], content: bytes) -> None:
    """Feeds one content under any numbers."""
    memory, places = encoder.space()
    for i, number in enumerate(numbers):
        memory[i * PAGE : (i + 1) * PAGE] = content
        places[i] = number
    encoder.feed(len(numbers), bitmap(encoder.pages))


def taken(encoder) -> tuple[bytes, bytes]:
    """A batch, copied: (head, raw pages)."""
    records, data = encoder.finish_batch()
    return bytes(records), bytes(data)


def batch(encoder, contents: dict[int, bytes]) -> tuple[bytes, bytes]:
    assert put(encoder, contents) == len(contents)
    return taken(encoder)


def counters(encoder) -> dict[str, int]:
    return {name: getattr(encoder, name) for name in COUNTERS if getattr(encoder, name)}


class Pair:
    """A source and a destination of one kernel, and the destination's memory."""

    def __init__(
        self, kernel, *, pages=16, cache=8, room=1 << 20, size=PAGE, merge=False, headroom=0,
        bytes_=None,
    ):  # fmt: skip
        self.cache = kernel.PageCache(cache * size, size) if cache else None
        self.hashes = kernel.PageHashes(pages, size, SEED)
        self.there = kernel.PageHashes(pages, size, SEED)
        self.encoder = kernel.PageEncoder(
            self.hashes, self.cache, merge=merge, headroom=headroom, room=room
        )
        self.decoder = kernel.PageDecoder(self.there, bytes_ or pages * size)
        self.memory = bytearray(pages * size)
        self.size = size
        self.headroom = headroom

    def send(self, contents: dict[int, bytes]) -> list[tuple[bytes, bytes]]:
        """Feeds, takes, checks and applies, in as many batches as the room makes."""
        left, batches, todo = dict(contents), [], bitmap(self.encoder.pages, contents)
        while True:
            while left and not self.encoder.full:
                for page in list(itertools.islice(left, put(self.encoder, left, todo))):
                    del left[page]
            if self.encoder.pending:
                records, data = taken(self.encoder)
                batches.append((records[self.headroom :], data))
                self.receive(*batches[-1])
            if not left:
                return batches

    def receive(self, records: bytes, data: bytes) -> int:
        self.decoder.check(records, len(data))
        return self.decoder.apply(records, data, self.memory)

    def page(self, number: int) -> bytes:
        return bytes(self.memory[number * self.size : (number + 1) * self.size])


def touch(noise: random.Random, memory: dict[int, bytes], size: int) -> list[int]:
    """One round of a guest: some pages zeroed, some changed here and there, some rewritten."""
    touched = sorted(noise.sample(sorted(memory), noise.randint(0, len(memory))))
    for page in touched:
        content = bytearray(memory[page])
        match noise.choice(["zero", "sparse", "sparse", "dense", "half", "same"]):
            case "zero":
                content = bytearray(size)
            case "sparse":
                for _ in range(noise.randint(1, 9)):
                    content[noise.randrange(size)] = noise.randrange(256)
            case "dense":
                content = bytearray(noise.randbytes(size))
            case "half":
                step = noise.choice([2, 3, 4])
                content[::step] = noise.randbytes(len(content[::step]))
        memory[page] = bytes(content)
    return touched


def hashes_tell_the_content(pairs: list[Pair]) -> None:
    """Both kernels keep the same hashes; each is of what the destination has, or is stale."""
    for a, b in [(pairs[0].hashes, pairs[1].hashes), (pairs[0].there, pairs[1].there)]:
        assert (a.table, a.stale) == (b.table, b.stale)
    source, there, fresh = pairs[0].hashes, pairs[0].there, pairs[0].hashes.__class__
    truth = fresh(source.pages, source.page_size, SEED)
    truth.hash_pages(array("Q", range(truth.pages)), truth.pages, pairs[0].memory)
    for page in range(truth.pages):
        right = truth.table[8 * page : 8 * page + 8]
        for each in (source, there):
            stale = each.stale[page >> 3] >> (page & 7) & 1
            assert stale or each.table[8 * page : 8 * page + 8] == right
    # what has just come to the destination by a delta is stale on either side
    assert set(listed(there.stale)) <= set(listed(source.stale))
