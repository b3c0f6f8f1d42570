"""What strangers have printed is bounded, and none of them goes uncounted."""

from __future__ import annotations

import asyncio
import re

import pytest

from migrate.cli import log_limit
from migrate.cli.log_limit import LINES, LogLimit


@pytest.mark.asyncio
async def test_lines_beyond_the_limit_are_counted(monkeypatch) -> None:
    monkeypatch.setattr(log_limit, "SECONDS", 0.05)
    said: list[str] = []
    limit = LogLimit(said.append, lambda number: f"{number} more")
    for number in range(1000):
        limit.say(f"line {number}")
    assert said == [f"line {number}" for number in range(LINES)]
    while len(said) == LINES:
        await asyncio.sleep(0.01)
    assert said[LINES:] == [f"{1000 - LINES} more"]
    await asyncio.sleep(0.1)
    limit.say("another one")
    assert said[-1] == "another one"
    for _ in range(LINES + 4):
        limit.say("and another")
    limit.close()
    limit.close()
    assert re.fullmatch(r"\d more", said[-1])
