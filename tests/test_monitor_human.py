"""The monitor for people: QEMU's commands and words, whatever is typed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.monitor.human import Human
from migrate.monitor.node import IN_PROGRESS
from tests.node import NotingNode


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
def test_what_is_set_is_in_the_parameters(line: str, name: str, value: int) -> None:
    node = NotingNode()
    assert Human(node).execute(line) == ""
    assert getattr(node.parameters, name) == value


def test_limits_in_their_units() -> None:
    node = NotingNode()
    human = Human(node)
    for line in ("migrate_set_speed 1.5g", "migrate_set_downtime 0.5"):
        assert human.execute(line) == ""
    assert node.parameters.limits.max_bandwidth == 3 << 29
    assert human.execute("migrate_set_parameter max-bandwidth 1.5") == ""
    assert node.parameters.limits.max_bandwidth == 3 << 19
    assert human.execute("migrate_set_speed 16") == ""
    assert node.parameters.limits.max_bandwidth == 16 << 20
    assert node.parameters.limits.downtime_limit == 0.5
    assert human.execute("migrate_set_parameter downtime-limit 250") == ""
    said = human.execute("info migrate_parameters")
    assert "max-bandwidth: 16777216 bytes/second\n" in said
    assert "downtime-limit: 250 ms\n" in said
    assert "xbzrle-cache-size: 67108864 bytes\n" in said
    assert "cpu-throttle-tailslow: off\n" in said
    assert human.execute("info migrate_cache_size") == "xbzrle cache size: 65536 kbytes\n"


def test_tls_as_qemu_prints_it() -> None:
    node = NotingNode()
    node.tls = {"tls-creds": "/etc/pki/x"}
    human = Human(node)
    said = human.execute("info migrate_parameters")
    assert (
        "max-cpu-throttle: 99\ntls-creds: '/etc/pki/x'\ntls-hostname: ''\ntls-authz: ''\n" in said
    )
    assert human.execute('migrate_set_parameter tls-hostname ""') == ""
    assert human.execute("migrate_set_parameter tls-creds /x").startswith(
        "Error: Parameter 'tls-creds' cannot change while the program runs"
    )


def test_capabilities_on_one_line_and_xbzrle_first() -> None:
    node = NotingNode()
    human = Human(node)
    assert human.execute("migrate_set_capability xbzrle off") == ""
    assert human.execute("info migrate_capabilities").startswith("xbzrle: off , xbzrle-merge: on")
    node.busy = True
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
def test_what_is_wrong_is_said(line: str, says: str) -> None:
    node = NotingNode()
    assert says in Human(node).execute(line)
    assert node.done == []


def test_a_word_in_quotes_may_have_blanks() -> None:
    node = NotingNode()
    assert Human(node).execute(r'migrate -d "unix:/tmp/a \"b\" c"') == ""
    assert node.done == ['migrate unix:/tmp/a "b" c']


@pytest.mark.asyncio
async def test_migrate_waits_and_says_why_it_failed_and_with_d_it_does_not() -> None:
    node = NotingNode()
    human = Human(node)
    assert await human.run("migrate -d tcp:a:1") == ""
    assert node.done == ["migrate tcp:a:1"]
    assert await human.run("migrate tcp:a:1") == ""
    assert node.done[-1] == "ended"
    node.why = "the link is down"
    assert await human.run("migrate tcp:a:1") == "Error: the link is down\n"
    assert human.execute("migrate_cancel") == human.execute("q") == ""
    assert node.done[-2:] == ["cancel", "quit"]


def test_two_layouts() -> None:
    human = Human(NotingNode())
    assert human.execute("info migrate") == "Migration status: active\n"
    assert human.execute("info migrate -a") == "Status: \t\tactive\n"
    assert "extraneous" in human.execute("info status -a")


def test_each_side_has_its_own_commands() -> None:
    source, destination = Human(NotingNode()), Human(NotingNode(receives=True))
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


def test_help_names_every_command_and_each_alone() -> None:
    human = Human(NotingNode())
    assert len(human.execute("help").splitlines()) == len(human.commands)
    for name in human.commands:
        assert human.execute(f"help {name}").startswith(name)
    assert human.execute("?") == human.execute("help")
    assert len(human.execute("info").splitlines()) == len(human.infos)


@given(st.lists(st.sampled_from([
    "migrate", "-d", "info", "help", "migrate_set_parameter", "max-bandwidth", "10", "on", "xbzrle",
    "migrate_set_capability", "tcp:a:1", "-a", "quit", "\0", "q", "migrate_set_cache_size", "٣",
])))  # fmt: skip
def test_any_words_get_an_answer_that_ends_with_a_line_end(words: list[str]) -> None:
    said = Human(NotingNode()).execute(" ".join(words))
    assert said == "" or said.endswith("\n")
