"""The commands of the machine protocol: names, arguments and refusals are QEMU's."""

from __future__ import annotations

from typing import Any

import pytest

from migrate.monitor.commands import commands
from migrate.monitor.node import IN_PROGRESS, Refused
from tests.node import NotingNode

INET = {"transport": "socket", "type": "inet", "host": "a", "port": "1"}
INET6 = {"transport": "socket", "type": "inet", "host": "::1", "port": "1"}
UNIX = {"transport": "socket", "type": "unix", "path": "/x"}


def main(address: object) -> dict[str, Any]:
    return {"channels": [{"channel-type": "main", "addr": address}]}


@pytest.mark.parametrize(
    ("arguments", "uri"),
    [
        ({"uri": "tcp:a:1"}, "tcp:a:1"),
        ({"uri": "tcp:a:1", "detach": True, "resume": False}, "tcp:a:1"),
        (main(INET), "tcp:a:1"),
        (main(INET6), "tcp:[::1]:1"),
        (main(UNIX), "unix:/x"),
    ],
)
def test_where_to(arguments: dict[str, Any], uri: str) -> None:
    node = NotingNode()
    assert commands(node)["migrate"](arguments) is None
    assert node.done == [f"migrate {uri}"]


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("migrate", {}, "Parameter 'uri' is missing"),
        ("migrate", {"uri": 1}, "Invalid parameter type for 'uri', expected: string"),
        ("migrate", {"uri": "tcp:a:1", "foo": 1}, "Parameter 'foo' is unexpected"),
        ("migrate", {"uri": "tcp:a:1", "resume": True}, "resumes by itself"),
        ("migrate", {"uri": "tcp:a:1", "blk": True}, "memory alone is moved"),
        ("migrate", {"uri": "tcp:a:1", **main(INET)}, "mutually exclusive"),
        ("migrate", {"channels": 1}, "one channel of type main"),
        ("migrate", main({"transport": "rdma"}), "expects a socket of type inet"),
        ("query-migrate", {"x": 1}, "Parameter 'x' is unexpected"),
        ("migrate-set-parameters", {"foo": 1}, "Parameter 'foo' is unexpected"),
        ("migrate-set-parameters", {"downtime-limit": 1.5}, "expects uint64"),
        ("migrate-set-capabilities", {}, "Parameter 'capabilities' is missing"),
        ("migrate-set-capabilities", {"capabilities": [1]}, "expects an array of objects"),
        (
            "migrate-set-capabilities",
            {"capabilities": [{"capability": "xbzrle"}]},
            "Parameter 'state' is missing",
        ),
        (
            "migrate-set-capabilities",
            {"capabilities": [{"capability": [], "state": True}]},
            "does not accept value",
        ),
        ("human-monitor-command", {}, "Parameter 'command-line' is missing"),
        ("migrate-set-cache-size", {"value": 3}, "power of two"),
    ],
)
def test_what_is_wrong_is_refused_and_nothing_is_done(
    command: str, arguments: dict[str, Any], says: str
) -> None:
    node = NotingNode()
    before = node.parameters
    with pytest.raises(Refused, match=says):
        commands(node)[command](arguments)
    assert node.done == []
    assert node.parameters == before


def test_all_capabilities_of_a_command_are_taken_or_none() -> None:
    node = NotingNode()
    known = commands(node)
    both = [{"capability": "xbzrle", "state": False}, {"capability": "events", "state": True}]
    with pytest.raises(Refused, match="foo"):
        known["migrate-set-capabilities"](
            {"capabilities": [*both, {"capability": "foo", "state": True}]}
        )
    assert {"capability": "xbzrle", "state": True} in known["query-migrate-capabilities"]({})
    known["migrate-set-capabilities"]({"capabilities": both})
    for one in both:
        assert one in known["query-migrate-capabilities"]({})
    node.busy = True
    with pytest.raises(Refused, match=IN_PROGRESS):
        known["migrate-set-capabilities"]({"capabilities": both})


def test_parameters_are_read_as_they_were_set() -> None:
    node = NotingNode()
    known = commands(node)
    values = {"max-bandwidth": 1 << 20, "downtime-limit": 100, "cpu-throttle-tailslow": True}
    known["migrate-set-parameters"](values)
    assert values.items() <= known["query-migrate-parameters"]({}).items()
    known["migrate-set-cache-size"]({"value": 1 << 28})
    assert known["query-migrate-cache-size"]({}) == 1 << 28


def test_what_is_set_of_tls_is_told_and_stays() -> None:
    node = NotingNode()
    node.tls = {"tls-creds": "/etc/pki/x"}
    known = commands(node)
    told = known["query-migrate-parameters"]({})
    assert list(told)[4:9] == [
        "max-cpu-throttle", "tls-creds", "tls-hostname", "tls-authz", "max-bandwidth",
    ]  # fmt: skip
    assert [told[name] for name in list(told)[5:8]] == ["/etc/pki/x", "", ""]
    same = {"tls-creds": "/etc/pki/x", "tls-hostname": "", "tls-authz": None}
    known["migrate-set-parameters"](same)
    for name, value in (("tls-creds", ""), ("tls-hostname", "there"), ("tls-authz", False)):
        with pytest.raises(Refused, match=rf"'{name}' cannot change while .* \(--{name}\)"):
            known["migrate-set-parameters"]({"max-bandwidth": 1, name: value})
    assert known["query-migrate-parameters"]({}) == told
    receives = commands(NotingNode(receives=True))["query-migrate-parameters"]({})
    assert list(receives) == ["tls-creds", "tls-hostname", "tls-authz", "xbzrle-cache-size"]


def test_the_monitor_for_people_is_within_reach() -> None:
    node = NotingNode()
    said = commands(node)["human-monitor-command"]({"command-line": "info status"})
    assert said == "VM status: running\r\n"


def test_setting_nothing_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A destination that takes parameters asks the source for its cache size."""
    node = NotingNode(receives=True)
    monkeypatch.setattr(node, "take", lambda parameters: pytest.fail(f"{parameters} are taken"))
    commands(node)["migrate-set-parameters"]({})


def test_a_destination_does_not_promise_to_outlive_its_failure() -> None:
    node = NotingNode(receives=True)
    command = commands(node)["migrate-incoming"]
    with pytest.raises(Refused, match="exit-on-error cannot be off"):
        command({"uri": "tcp::1", "exit-on-error": False})
    command({"uri": "tcp::1", "exit-on-error": True})
    assert node.done == ["incoming tcp::1"]
