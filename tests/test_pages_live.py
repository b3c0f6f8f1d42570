"""Pages copied from guest memory during writes to it: what still holds."""

import mmap
import os
import random
import threading

import pytest

from proto.codec.pageset import PageSet
from tests.kernels import COMPILED, kernel  # noqa: F401 - a fixture

PAGE = 4096
SEED = bytes(16)


def drain(encoder, memory, dirty, apply):
    """Feeds all of a round and applies its batches as they are made."""
    page = 0
    while page < dirty.pages:
        _, page = encoder.feed_memory(memory, dirty.bits, page, dirty.pages, 1000)
        if encoder.pending:
            apply(*encoder.finish_batch())


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("size", [37 * 1024, 37 * 1024 - 1, 36 * 1024 + 1])
def test_feeding_memory_and_snapshots_gives_the_same_bytes(kernel, size, merge):
    rng = random.Random(size)
    pages, page_size = 37, 1024
    memory = bytearray(rng.randbytes(size))
    batches = {"memory": [], "snapshot": []}
    encoders = {}
    for name in batches:
        hashes = kernel.PageHashes(pages, page_size, SEED)
        cache = kernel.PageCache(16 * page_size, page_size)
        encoders[name] = kernel.PageEncoder(hashes, cache, merge=merge, room=5000)
    for number in range(1, 7):
        dirty = PageSet(pages, rng.sample(range(pages), 20)) if number > 1 else PageSet.full(pages)
        for page in dirty:
            start = page * page_size
            end = min(start + page_size, size)
            choice = rng.randrange(4)
            if choice == 0:
                memory[start:end] = bytes(end - start)
            elif choice == 1:
                memory[start:end] = rng.randbytes(end - start)
            elif choice == 2:
                memory[rng.randrange(start, end)] ^= 1
        for encoder in encoders.values():
            encoder.begin_round(number)
        drain(
            encoders["memory"], memory, dirty,
            lambda *batch: batches["memory"].append(tuple(map(bytes, batch))),
        )  # fmt: skip
        encoder = encoders["snapshot"]
        todo = list(dirty)
        while todo or encoder.pending:
            space, numbers = encoder.space()
            count = min(len(numbers), len(todo), 1)
            for page in todo[:count]:
                numbers[0] = page
                content = bytes(memory[page * page_size : (page + 1) * page_size])
                space[:page_size] = content.ljust(page_size, b"\0")
            encoder.feed(count, dirty.bits)
            del todo[:count], space, numbers
            if encoder.full or not todo:
                batches["snapshot"].append(tuple(map(bytes, encoder.finish_batch())))
    assert batches["memory"] == batches["snapshot"]


def test_writing_guest_never_separates_cache_and_destination():
    """Threads write as fast as they can. After each round, every cached page must be what the
    destination holds; when they have stopped, one more round makes the memories equal."""
    pages = 256
    memory = memoryview(mmap.mmap(-1, pages * PAGE))
    memory[:] = os.urandom(pages * PAGE)
    there = memoryview(mmap.mmap(-1, pages * PAGE))
    cache = COMPILED.PageCache(pages * PAGE, PAGE)
    encoder = COMPILED.PageEncoder(COMPILED.PageHashes(pages, PAGE, SEED), cache, merge=True)
    decoder = COMPILED.PageDecoder(COMPILED.PageHashes(pages, PAGE, SEED), pages * PAGE)
    stop = threading.Event()

    def write(seed):
        # Large copies: the interpreter is left while they go on.
        rng = random.Random(seed)
        pieces = [rng.randbytes(length) for length in (1, 7, 64, 300, 5000)] + [bytes(PAGE)]
        while not stop.is_set():
            piece = rng.choice(pieces)
            at = rng.randrange(len(memory) - len(piece))
            memory[at : at + len(piece)] = piece

    everything = PageSet.full(pages)
    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(2)]
    for thread in writers:
        thread.start()
    try:
        for number in range(1, 41):
            encoder.begin_round(number)
            drain(encoder, memory, everything, lambda *batch: decoder.apply(*batch, there))
            for page in range(pages):
                cached = cache.get(page)
                if cached is not None:
                    assert cached == there[page * PAGE : (page + 1) * PAGE], f"page {page}"
    finally:
        stop.set()
        for thread in writers:
            thread.join()
    encoder.begin_round(41)
    drain(encoder, memory, everything, lambda *batch: decoder.apply(*batch, there))
    assert memory == there
    assert encoder.delta > 0


def test_feed_memory_refuses_sizes_that_do_not_fit(kernel):
    encoder = kernel.PageEncoder(kernel.PageHashes(4, 1024, SEED))
    memory, todo = bytearray(4096), PageSet.full(4).bits
    with pytest.raises(ValueError, match="out of order"):
        encoder.feed_memory(memory, todo, 0, 4, 9)
    encoder.begin_round(1)
    with pytest.raises(ValueError, match="outside"):
        encoder.feed_memory(memory, todo, 0, 5, 9)
    with pytest.raises(ValueError, match="too short"):
        encoder.feed_memory(memory, b"\xff", 0, 4, 9)
    for wrong in (4097, 3072, 0):
        with pytest.raises(ValueError, match="4 pages"):
            encoder.feed_memory(bytearray(wrong), todo, 0, 4, 9)
    assert encoder.feed_memory(memory, todo, 0, 4, 3) == (3, 3)
    with pytest.raises(ValueError, match="out of order"):
        encoder.feed_memory(memory, todo, 2, 4, 9)
    assert encoder.feed_memory(memory, todo, 3, 4, 9) == (1, 4)
