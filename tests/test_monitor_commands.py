"""The commands of the machine protocol: names, arguments and refusals are QEMU's."""

from __future__ import annotations

from typing import Any

import pytest

from migrate.monitor.commands import commands
from migrate.monitor.monitored import IN_PROGRESS, CommandError
from tests.recording_program import RecordingProgram

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
def test_migrate_uri_and_channels(arguments: dict[str, Any], uri: str) -> None:
    program = RecordingProgram()
    assert commands(program)["migrate"](arguments) is None
    assert program.done == [f"migrate {uri}"]


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
def test_wrong_arguments_are_refused(command: str, arguments: dict[str, Any], says: str) -> None:
    program = RecordingProgram()
    before = program.parameters
    with pytest.raises(CommandError, match=says):
        commands(program)[command](arguments)
    assert program.done == []
    assert program.parameters == before


def test_capabilities_are_set_all_or_none() -> None:
    program = RecordingProgram()
    known = commands(program)
    both = [{"capability": "xbzrle", "state": False}, {"capability": "events", "state": True}]
    with pytest.raises(CommandError, match="foo"):
        known["migrate-set-capabilities"](
            {"capabilities": [*both, {"capability": "foo", "state": True}]}
        )
    assert {"capability": "xbzrle", "state": True} in known["query-migrate-capabilities"]({})
    known["migrate-set-capabilities"]({"capabilities": both})
    for one in both:
        assert one in known["query-migrate-capabilities"]({})
    program.busy = True
    with pytest.raises(CommandError, match=IN_PROGRESS):
        known["migrate-set-capabilities"]({"capabilities": both})


def test_parameters_read_back() -> None:
    program = RecordingProgram()
    known = commands(program)
    values = {"max-bandwidth": 1 << 20, "downtime-limit": 100, "cpu-throttle-tailslow": True}
    known["migrate-set-parameters"](values)
    assert values.items() <= known["query-migrate-parameters"]({}).items()
    known["migrate-set-cache-size"]({"value": 1 << 28})
    assert known["query-migrate-cache-size"]({}) == 1 << 28


def test_tls_parameters_are_read_only() -> None:
    program = RecordingProgram()
    program.tls = {"tls-creds": "/etc/pki/x"}
    known = commands(program)
    told = known["query-migrate-parameters"]({})
    assert list(told)[4:9] == [
        "max-cpu-throttle", "tls-creds", "tls-hostname", "tls-authz", "max-bandwidth",
    ]  # fmt: skip
    assert [told[name] for name in list(told)[5:8]] == ["/etc/pki/x", "", ""]
    same = {"tls-creds": "/etc/pki/x", "tls-hostname": "", "tls-authz": None}
    known["migrate-set-parameters"](same)
    for name, value in (("tls-creds", ""), ("tls-hostname", "there"), ("tls-authz", False)):
        with pytest.raises(CommandError, match=rf"'{name}' cannot change while .* \(--{name}\)"):
            known["migrate-set-parameters"]({"max-bandwidth": 1, name: value})
    assert known["query-migrate-parameters"]({}) == told
    receives = commands(RecordingProgram(receives=True))["query-migrate-parameters"]({})
    assert list(receives) == ["tls-creds", "tls-hostname", "tls-authz", "xbzrle-cache-size"]


def test_human_monitor_command() -> None:
    program = RecordingProgram()
    said = commands(program)["human-monitor-command"]({"command-line": "info status"})
    assert said == "VM status: running\r\n"


def test_setting_no_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A destination that takes parameters asks the source for its cache size."""
    program = RecordingProgram(receives=True)
    monkeypatch.setattr(program, "apply", lambda parameters: pytest.fail(f"{parameters} are taken"))
    commands(program)["migrate-set-parameters"]({})


def test_exit_on_error_off_is_refused() -> None:
    program = RecordingProgram(receives=True)
    command = commands(program)["migrate-incoming"]
    with pytest.raises(CommandError, match="exit-on-error cannot be off"):
        command({"uri": "tcp::1", "exit-on-error": False})
    command({"uri": "tcp::1", "exit-on-error": True})
    assert program.done == ["incoming tcp::1"]
