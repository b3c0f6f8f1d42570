"""Resuming, in the kernels: pages lost with a connection are found and sent again."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.batches import SEED, Pair, counters, hashes_tell_the_content, touch
from tests.kernels import BOTH


def break_off(pair: Pair) -> None:
    """Do what both ends do after a break: the destination reports the pages that it holds."""
    size = pair.size
    pair.decoder.mark_received(0, pair.encoder.pages, False)
    for page in range(pair.encoder.pages):
        if pair.there.stale[page >> 3] >> (page & 7) & 1:
            content = pair.memory[page * size : (page + 1) * size]
            pair.there.hash_pages(array("Q", [page]), 1, content)
    pair.decoder.end_round()
    half = pair.encoder.pages // 2
    pair.encoder.adopt(0, pair.there.table[: 8 * half])
    pair.encoder.adopt(half, pair.there.table[8 * half :])


@given(
    seed=st.integers(0, 2**32),
    cache=st.sampled_from([0, 4, 64]),
    room=st.sampled_from([2000, 5000, 1 << 20]),
    merge=st.booleans(),
)
@settings(max_examples=150, print_blob=True)
def test_lost_batches_are_sent_again(seed, cache, room, merge):
    """Lose any batches of a round, one of them half made; a scan finds exactly the missing pages.

    It depends only on these four values. A failure names them, and how to run them again.
    """
    noise, count, size = random.Random(seed), 20, 1024
    pairs = [Pair(each, pages=count, cache=cache, room=room, merge=merge) for each in BOTH]
    memory = {page: bytes(size) for page in range(count)}
    touched = list(memory)
    for now in range(1, 9):
        broken, kept = now % 2 == 0, noise.randint(0, 3)
        sent = []
        for pair in pairs:
            pair.encoder.begin_round(now)
            got = iter(range(kept)) if broken else iter(range(1000))
            receive = pair.receive

            def lossy(records, data, receive=receive, got=got):
                if next(got, None) is not None:
                    receive(records, data)

            pair.receive = lossy
            sent.append(pair.send({page: memory[page] for page in touched}))
            pair.receive = receive
        assert sent[0] == sent[1]
        if not broken:
            for page, content in memory.items():
                assert pairs[0].page(page) == content
        touched = touch(noise, memory, size)
        if not broken:
            continue
        whole = b"".join(memory[page] for page in range(count))
        found = []
        for pair in pairs:
            if touched:  # a batch is half made when the connection breaks
                pair.encoder.begin_round(now)
                snapshot, numbers = pair.encoder.space()
                numbers[0] = touched[0]
                snapshot[:size] = memory[touched[0]]
                pair.encoder.feed(1, bytes(8))
            break_off(pair)
            assert not pair.encoder.pending
            changed = bytearray(8)
            pair.encoder.scan(0, count, whole, changed)
            found.append(bytes(changed))
        differ = [page for page in memory if pairs[0].page(page) != memory[page]]
        touched = [page for page in range(count) if found[0][page >> 3] >> (page & 7) & 1]
        assert found[0] == found[1]
        assert touched == differ
        assert counters(pairs[0].encoder) == counters(pairs[1].encoder)
        assert pairs[0].memory == pairs[1].memory
        if cache:
            for page in memory:
                kept_page = pairs[0].cache.get(page)
                assert kept_page == pairs[1].cache.get(page)
                assert kept_page in (None, pairs[0].page(page))
        hashes_tell_the_content(pairs)


@pytest.mark.parametrize("kernel", BOTH)
def test_forget_sends_every_page_again(kernel):
    pair = Pair(kernel, pages=8, cache=4)
    pair.encoder.begin_round(1)
    contents = {page: bytes([page]) * pair.size for page in range(8)}
    first = pair.send(contents)
    pair.encoder.forget()
    assert len(pair.cache) == 0
    assert pair.hashes.table == kernel.PageHashes(8, pair.size, SEED).table
    pair.encoder.begin_round(2)
    again = pair.send(contents)
    assert [head[4:] for head, _ in again] == [head[4:] for head, _ in first]


@pytest.mark.parametrize("kernel", BOTH)
def test_pages_outside_the_guest_are_refused(kernel):
    pair = Pair(kernel, pages=8)
    for first, hashes in [(0, bytes(72)), (8, bytes(8)), (1 << 62, bytes(8)), (0, bytes(7))]:
        with pytest.raises(ValueError, match="bytes of hashes from page"):
            pair.encoder.adopt(first, hashes)
    with pytest.raises(ValueError, match="outside the guest"):
        pair.decoder.mark_received(7, 2, True)
