"""The sliding buffer keeps received bytes in order until they are taken."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from migrate.memory.stream_buffer import StreamBuffer

STREAM = bytes(range(256)) * 8


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40))))
def test_nothing_is_lost_and_the_place_in_the_stream_is_known(steps: list[tuple[int, int]]) -> None:
    window = StreamBuffer(memoryview(bytearray(64)), 16)
    taken = bytearray()
    for come, take in steps:
        room = window.room()
        assert len(room) >= min(16, 64 - len(window))
        count = min(come, len(room), len(STREAM) - window.received)
        room[:count] = STREAM[window.received : window.received + count]
        window.add(count)
        assert window.data[window.start : window.end] == STREAM[len(taken) : window.received]
        taken += window.take(min(window.start + take, window.end))
        assert window.base + window.start == len(taken)
    assert taken == STREAM[: len(taken)]
    assert len(window) == window.received - len(taken)
