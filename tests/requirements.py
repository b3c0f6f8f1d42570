"""What a test needs of the machine: without it a person's run skips, saying why; CI's fails."""

from __future__ import annotations

import os

import pytest


def need(there: object, what: str) -> None:
    """Goes on where `there` is true."""
    if there:
        return
    if os.environ.get("CI"):
        pytest.fail(f"CI must have what its tests need: {what}")
    pytest.skip(what)
