"""What a test needs of the machine: without it a user's run skips the test, and CI's run fails."""

from __future__ import annotations

import os
import shutil

import pytest

IN_CI = bool(os.environ.get("CI"))


def need(there: object, what: str) -> None:
    """Skip the test, or fail it in CI, unless `there` is true; `what` names what is missing."""
    if there:
        return
    if IN_CI:
        pytest.fail(f"CI must have what its tests need: {what}")
    pytest.skip(what)


def need_program(program: str, package: str = "") -> None:
    need(shutil.which(program), f"{program} is not installed" + f" ({package})" * bool(package))


def need_root(to: str) -> pytest.MarkDecorator:
    """Return a mark for tests that root must run in order to do something.

    CI runs them as it is: without root they fail there.
    """
    return pytest.mark.skipif(os.geteuid() != 0 and not IN_CI, reason=f"root, to {to}")
