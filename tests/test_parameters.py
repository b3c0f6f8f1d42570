"""What can be set for a migration, and what of it while one runs."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from migrate.errors import UsageError
from migrate.policy.downtime import Limits
from migrate.policy.parameters import LIVE, PAGE_SIZES, Parameters
from migrate.policy.throttle import ThrottleParameters
from proto.wire.messages import MAX_CHANNELS

OTHER: dict[str, Any] = {
    "cache_size": 1 << 20, "page_size": 8192, "limits": Limits(max_rounds=3), "channels": 2,
    "capabilities": {"xbzrle": False}, "cache_max": 1 << 30, "throttle": ThrottleParameters(30),
    "compress_level": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"page_size": 5000}, "a page of 5000 bytes: it is one of"),
        ({"cache_size": 3 << 20}, "a cache of 3145728 bytes: it is a power of two"),
        ({"cache_size": 2048}, "of at least one page"),
        ({"cache_max": 3 << 20}, "a cache of at most 3145728 bytes"),
        ({"compress_level": 20}, "a compress level of 20: it is -7 to 19"),
        ({"channels": 0}, "0 channels: there can be 1 to"),
        ({"channels": MAX_CHANNELS + 1}, "channels: there can be"),
        ({"capabilities": {"rdma": True}}, "there is no capability 'rdma'"),
    ],
)
def test_invalid_parameters_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Parameters(**values)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_cache_of_one_page_is_valid(page_size: int) -> None:
    assert Parameters(page_size, page_size).cache_size == page_size


def test_parameters_that_may_change_during_migration() -> None:
    """Every parameter is either of those, or agreed on with the destination."""
    assert set(OTHER) == {one.name for one in fields(Parameters)}
    ours = Parameters()
    for name, value in OTHER.items():
        other = replace(ours, **{name: value})
        if name in LIVE:
            ours.check_change(other)
        else:
            with pytest.raises(UsageError, match="cannot change during a migration"):
                ours.check_change(other)


def test_local_capabilities_are_not_offered() -> None:
    parameters = Parameters(capabilities={"auto-converge": True, "events": True, "xbzrle": True})
    assert parameters.auto_converge
    assert parameters.wire_capabilities == {"xbzrle", "xbzrle-merge", "zstd"}
    assert not Parameters().auto_converge
