"""--allow, and what counts as another host."""

from __future__ import annotations

import pytest

from migrate.errors import UsageError
from migrate.transport.networks import is_allowed, leaves_host, parse_networks


def test_allow_takes_addresses_and_networks() -> None:
    assert is_allowed(("10.1.2.3", 1), parse_networks(["10.0.0.0/8"]))
    assert is_allowed(("::ffff:10.1.2.3", 1, 0, 0), parse_networks(["10.0.0.0/8"]))
    assert not is_allowed(("11.1.2.3", 1), parse_networks(["10.0.0.0/8", "::1"]))
    assert is_allowed(("fe80::1%eth0", 1, 0, 2), parse_networks(["fe80::/10"]))
    assert is_allowed("", parse_networks(["10.0.0.1"]))
    for wrong in ("10.0.0.1/8", "host", "", "10.0.0.0/33"):
        with pytest.raises(UsageError, match="--allow"):
            parse_networks([wrong])


def test_connection_to_another_host_is_noticed() -> None:
    assert leaves_host(("10.0.0.1", 1), ("10.0.0.2", 2))
    assert leaves_host(("fe80::1%eth0", 1, 0, 2), ("fe80::2%eth0", 2, 0, 2))
    assert not leaves_host(("10.0.0.1", 1), ("10.0.0.1", 2))
    assert not leaves_host(("127.0.0.1", 1), ("127.0.0.2", 2))
    assert not leaves_host(("::ffff:127.0.0.1", 1, 0, 0), ("::ffff:127.0.0.1", 2, 0, 0))
    assert not leaves_host("", "/run/socket")
