"""Lines of people, however they come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.monitor.node import Refused
from migrate.monitor.terminal import MAX_LINE_BYTES, Lines, Talk
from tests.node import NotingNode


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n"))), st.integers(1, 9))
def test_lines_are_found_however_they_are_cut(lines: list[str], size: int) -> None:
    data = "".join(f"{line}\n" for line in lines).encode()
    taken = Lines()
    found = [line for at in range(0, len(data), size) for line in taken.feed(data[at : at + size])]
    assert found == lines


def test_a_line_that_never_ends_is_bounded() -> None:
    lines = Lines()
    assert not list(lines.feed(b"x" * MAX_LINE_BYTES))
    with pytest.raises(Refused, match="no more than 4096 bytes"):
        list(lines.feed(b"x"))


@pytest.mark.asyncio
async def test_a_talk_prompts_after_each_answer() -> None:
    talk = Talk(NotingNode(), "1.2.3")
    assert talk.begin().endswith(b"for more information\r\n(migrate-src) ")
    said = [reply async for reply in talk.replies(b"info status\n\nfo")]
    assert said == [b"VM status: running\r\n(migrate-src) ", b"(migrate-src) "]
    said = [reply async for reply in talk.replies(b"o\n")]
    assert said == [b"unknown command: 'foo'\r\n(migrate-src) "]
    assert talk.event({"event": "STOP"}) == b""
