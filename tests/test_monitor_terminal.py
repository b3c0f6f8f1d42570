"""Lines of people, however they come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.monitor.terminal import MAX_LINE_BYTES, HumanConversation, Lines
from tests.recording_program import RecordingProgram


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n"))), st.integers(1, 9))
def test_lines_split_anywhere(lines: list[str], size: int) -> None:
    data = "".join(f"{line}\n" for line in lines).encode()
    taken = Lines()
    found = [line for at in range(0, len(data), size) for line in taken.feed(data[at : at + size])]
    assert found == lines


@given(st.integers(1, 5000))
def test_overlong_line_is_discarded(size: int) -> None:
    lines, found = Lines(), []
    data = b"x" * MAX_LINE_BYTES + b"\n" + b"y" * (MAX_LINE_BYTES + 1) + b"\nz\n"
    for at in range(0, len(data), size):
        found += lines.feed(data[at : at + size])
        assert len(lines._rest) <= MAX_LINE_BYTES
    assert found == ["x" * MAX_LINE_BYTES, None, "z"]


@pytest.mark.asyncio
async def test_prompt_after_each_answer() -> None:
    talk = HumanConversation(RecordingProgram(), "1.2.3")
    assert talk.begin().endswith(b"for more information\r\n(migrate-src) ")
    said = [reply async for reply in talk.replies(b"info status\n\nfo")]
    assert said == [b"VM status: running\r\n(migrate-src) ", b"(migrate-src) "]
    said = [reply async for reply in talk.replies(b"o\n")]
    assert said == [b"unknown command: 'foo'\r\n(migrate-src) "]
    assert talk.event({"event": "STOP"}) == b""
