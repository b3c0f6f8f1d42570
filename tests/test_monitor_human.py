"""The monitor for people: QEMU's commands and words, whatever is typed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.monitor.human import HumanMonitor
from migrate.monitor.monitored import IN_PROGRESS
from tests.recording_program import RecordingProgram


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("migrate_set_cache_size 256m", "cache_size", 256 << 20),
        ("migrate_set_cache_size 256", "cache_size", 256 << 20),  # MBytes, says the seed
        ("migrate_set_parameter xbzrle-cache-size 4k", "cache_size", 4096),
        ("migrate_set_parameter multifd-channels 4", "channels", 4),
        ("  migrate_set_cache_size\t0.25g \r", "cache_size", 256 << 20),
        ('migrate_set_parameter "multifd-channels"  "4"', "channels", 4),
    ],
)
def test_commands_set_parameters(line: str, name: str, value: int) -> None:
    program = RecordingProgram()
    assert HumanMonitor(program).execute(line) == ""
    assert getattr(program.parameters, name) == value


def test_units_of_limits() -> None:
    program = RecordingProgram()
    human = HumanMonitor(program)
    for line in ("migrate_set_speed 1.5g", "migrate_set_downtime 0.5"):
        assert human.execute(line) == ""
    assert program.parameters.limits.max_bandwidth == 3 << 29
    assert human.execute("migrate_set_parameter max-bandwidth 1.5") == ""
    assert program.parameters.limits.max_bandwidth == 3 << 19
    assert human.execute("migrate_set_speed 16") == ""
    assert program.parameters.limits.max_bandwidth == 16 << 20
    assert program.parameters.limits.downtime_limit == 0.5
    assert human.execute("migrate_set_parameter downtime-limit 250") == ""
    said = human.execute("info migrate_parameters")
    assert "max-bandwidth: 16777216 bytes/second\n" in said
    assert "downtime-limit: 250 ms\n" in said
    assert "xbzrle-cache-size: 67108864 bytes\n" in said
    assert "cpu-throttle-tailslow: off\n" in said
    assert human.execute("info migrate_cache_size") == "xbzrle cache size: 65536 kbytes\n"


def test_info_tls_parameters() -> None:
    program = RecordingProgram()
    program.tls = {"tls-creds": "/etc/pki/x"}
    human = HumanMonitor(program)
    said = human.execute("info migrate_parameters")
    assert (
        "max-cpu-throttle: 99\ntls-creds: '/etc/pki/x'\ntls-hostname: ''\ntls-authz: ''\n" in said
    )
    assert human.execute('migrate_set_parameter tls-hostname ""') == ""
    assert human.execute("migrate_set_parameter tls-creds /x").startswith(
        "Error: Parameter 'tls-creds' cannot change while the program runs"
    )


def test_info_capabilities() -> None:
    program = RecordingProgram()
    human = HumanMonitor(program)
    assert human.execute("migrate_set_capability xbzrle off") == ""
    assert human.execute("info migrate_capabilities").startswith("xbzrle: off , xbzrle-merge: on")
    program.busy = True
    assert human.execute("migrate_set_capability xbzrle on") == f"Error: {IN_PROGRESS}\n"
    assert human.execute("migrate_set_capability events on") == ""


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("foo", "unknown command: 'foo'"),
        ("info foo", "unknown command: 'info foo'"),
        ("info status now", "extraneous"),
        ("help foo", "unknown command: 'foo'"),
        ("migrate", 'Try "help migrate" for more information'),
        ("migrate -x tcp:a:1", "Error: write migrate [-d]"),
        ("migrate -d", "Error: write migrate [-d]"),
        ("migrate rdma:a:1", "Error: no such thing"),
        ("migrate_set_cache_size 3m", "Error: Parameter 'xbzrle_cache_size' expects a power of"),
        ("migrate_set_parameter xbzrle-cache-size 512", "did you mean 512m?"),
        ("migrate_set_parameter foo 1", "Error: Parameter 'foo' is unexpected"),
        ("migrate_set_capability foo on", "Error: Parameter 'capability' does not accept"),
        ("migrate_set_capability xbzrle yes", "Error: Parameter 'state' expects 'on' or 'off'"),
        ("\x1b[2J", r"unknown command: '\x1b[2J'"),
        ('migrate "tcp:a:1', "Error: unterminated string"),
        ('migrate "tcp:a\\x:1"', "Error: unsupported escape code: '\\x'"),
    ],
)
def test_wrong_lines_are_answered(line: str, says: str) -> None:
    program = RecordingProgram()
    assert says in HumanMonitor(program).execute(line)
    assert program.done == []


def test_quoted_word_with_blanks() -> None:
    program = RecordingProgram()
    assert HumanMonitor(program).execute(r'migrate -d "unix:/tmp/a \"b\" c"') == ""
    assert program.done == ['migrate unix:/tmp/a "b" c']


@pytest.mark.asyncio
async def test_migrate_waits_unless_detached() -> None:
    program = RecordingProgram()
    human = HumanMonitor(program)
    assert await human.run("migrate -d tcp:a:1") == ""
    assert program.done == ["migrate tcp:a:1"]
    assert await human.run("migrate tcp:a:1") == ""
    assert program.done[-1] == "ended"
    program.why = "the link is down"
    assert await human.run("migrate tcp:a:1") == "Error: the link is down\n"
    assert human.execute("migrate_cancel") == human.execute("q") == ""
    assert program.done[-2:] == ["cancel", "quit"]


def test_info_migrate_layouts() -> None:
    human = HumanMonitor(RecordingProgram())
    assert human.execute("info migrate") == "Migration status: active\n"
    assert human.execute("info migrate -a") == "Status: \t\tactive\n"
    assert "extraneous" in human.execute("info status -a")


def test_commands_of_each_side() -> None:
    source, destination = (
        HumanMonitor(RecordingProgram()),
        HumanMonitor(RecordingProgram(receives=True)),
    )
    assert "unknown command" in source.execute("migrate_incoming tcp:a:1")
    assert "unknown command" in destination.execute("migrate tcp:a:1")
    assert destination.execute("migrate_incoming tcp:a:1") == ""
    assert source.execute("info status") == "VM status: running\n"
    assert destination.execute("info status") == "VM status: paused (inmigrate)\n"
    assert "is the source's: set it there" in destination.execute(
        "migrate_set_parameter downtime-limit 1"
    )
    assert destination.execute("migrate_set_cache_size 256m") == ""
    assert destination.execute("info migrate_parameters") == (
        "tls-creds: ''\ntls-hostname: ''\ntls-authz: ''\nxbzrle-cache-size: 268435456 bytes\n"
    )


def test_help() -> None:
    human = HumanMonitor(RecordingProgram())
    assert len(human.execute("help").splitlines()) == len(human.commands)
    for name in human.commands:
        assert human.execute(f"help {name}").startswith(name)
    assert human.execute("?") == human.execute("help")
    assert len(human.execute("info").splitlines()) == len(human.infos)


@given(st.lists(st.sampled_from([
    "migrate", "-d", "info", "help", "migrate_set_parameter", "max-bandwidth", "10", "on", "xbzrle",
    "migrate_set_capability", "tcp:a:1", "-a", "quit", "\0", "q", "migrate_set_cache_size", "٣",
])))  # fmt: skip
def test_every_answer_ends_with_a_line_end(words: list[str]) -> None:
    said = HumanMonitor(RecordingProgram()).execute(" ".join(words))
    assert said == "" or said.endswith("\n")
