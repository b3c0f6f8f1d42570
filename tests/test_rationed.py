"""What strangers have printed is bounded, and none of them goes uncounted."""

from __future__ import annotations

import asyncio
import re

import pytest

from migrate import rationed
from migrate.rationed import LINES, Rationed


@pytest.mark.asyncio
async def test_lines_beyond_a_few_are_counted(monkeypatch) -> None:
    monkeypatch.setattr(rationed, "SECONDS", 0.05)
    said: list[str] = []
    ration = Rationed(said.append, lambda number: f"{number} more")
    for number in range(1000):
        ration.say(f"line {number}")
    assert said == [f"line {number}" for number in range(LINES)]
    while len(said) == LINES:
        await asyncio.sleep(0.01)
    assert said[LINES:] == [f"{1000 - LINES} more"]
    await asyncio.sleep(0.1)
    ration.say("another one")
    assert said[-1] == "another one"
    for _ in range(LINES + 4):
        ration.say("and another")
    ration.close()
    ration.close()
    assert re.fullmatch(r"\d more", said[-1])
