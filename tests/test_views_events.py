"""Events: each is one JSON object on a line, and no reader holds the migration up."""

from __future__ import annotations

import json
import os

import pytest

from migrate.errors import UsageError
from migrate.events import Notice, SourceEvent
from migrate.statistics import Statistics, Status, query_migrate
from migrate.views.events import MAX_WAITING_BYTES, EventLines, Events, parse_events
from migrate.views.history import History
from tests.programs import Program, destination, end_guest, guest_pid
from tests.relay import Relay
from tests.story import move, story


def told(
    events: Events, history: History, rounds: int = 3, status: Status = Status.COMPLETED
) -> None:
    for event, s in story(rounds, status):
        history.observe(event, s)
        if event == "end":
            events.end(s)
        else:
            events.observe(event, s)


def read(reading: int) -> list[dict]:
    with os.fdopen(reading) as stream:
        return [json.loads(line) for line in stream]


@pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED, Status.CANCELLED])
def test_events_of_a_migration(status):
    reading, writing = os.pipe()
    history = History()
    events = Events(history, writing, clock=lambda: 1234.000005)
    told(events, history, status=status)
    assert events.close() == ""
    os.close(writing)
    seen = read(reading)
    names = [one["event"] for one in seen]
    end = ["MIGRATION", "STOP", "ROUND", "MIGRATION"] if status == "completed" else [
        "ROUND", "MIGRATION",
    ]  # fmt: skip
    assert names == ["MIGRATION", "MIGRATION", "PROGRESS", "ROUND", "ROUND", "ROUND", *end]
    assert all(one["timestamp"] == {"seconds": 1234, "microseconds": 5} for one in seen)
    assert seen[-1]["data"] == json.loads(json.dumps(query_migrate(history.last)))
    rounds = [one["data"] for one in seen if one["event"] == "ROUND"]
    ram = seen[-1]["data"]["ram"]
    for name in ("transferred", "normal", "duplicate", "skipped"):
        assert sum(one[name] for one in rounds) == ram[name], name
    cache = seen[-1]["data"]["xbzrle-cache"]
    for name in ("pages", "bytes", "cache-miss", "overflow"):
        assert sum(one["xbzrle-cache"][name] for one in rounds) == cache[name], name
    assert rounds[-1]["paused"] == (status == "completed")
    assert rounds[-1]["unfinished"] == (status != "completed")


def test_events_of_a_second_migration():
    reading, writing = os.pipe()
    history = History()
    events = Events(history, writing)
    told(events, history)
    told(events, history, status=Status.FAILED)
    events.close()
    os.close(writing)
    ends = [one["data"]["status"] for one in read(reading) if "total-time" in one["data"]
            and one["event"] == "MIGRATION"]  # fmt: skip
    assert ends == ["completed", "failed"]


def test_slow_reader_receives_the_count_of_dropped_events():
    reading, writing = os.pipe()
    history = History()
    events = Events(history, writing)
    s = Statistics(status=Status.ACTIVE)
    history.observe(SourceEvent.STATUS, s)
    sent = 0
    while events._lines.dropped < 3:  # none of these may block
        events.observe(Notice("x" * 1000), s)
        sent += 1
    assert sent * 1000 < MAX_WAITING_BYTES + (1 << 20) + 10_000
    os.set_blocking(reading, False)
    taken = b""
    while True:  # it wakes up
        events._lines.flush()
        try:
            taken += os.read(reading, 1 << 20)
        except BlockingIOError:
            break
    events.observe(Notice("after"), s)
    assert events.close().startswith("--events: 3 events were dropped: its reader was too slow")
    taken += os.read(reading, 1 << 20)
    os.close(writing)
    os.close(reading)
    seen = [json.loads(line) for line in taken.splitlines()]
    assert len(seen) == sent - 3 + 2
    assert (seen[-2]["event"], seen[-2]["data"]) == ("DROPPED", {"count": 3})
    assert seen[-1]["data"] == {"text": "after"}


def test_closed_reader_stops_nothing():
    reading, writing = os.pipe()
    history = History()
    events = Events(history, writing)
    os.close(reading)
    told(events, history)
    assert "its reader is gone" in events.close()
    os.close(writing)


def test_long_line_arrives_whole():
    reading, writing = os.pipe()
    outlet = EventLines(writing)
    line = b"x" * 200_000 + b"\n"
    outlet.put(line, lambda _count: b"")
    taken = b""
    while len(taken) < len(line):
        taken += os.read(reading, 1 << 20)
        outlet.flush()
    assert taken == line
    os.close(reading)
    os.close(writing)


def test_parse_events_option(tmp_path):
    assert parse_events("json") == 1
    with open(tmp_path / "events", "wb") as file:
        assert parse_events(f"json:{file.fileno()}") == file.fileno()


@pytest.mark.programs
def test_descriptor_of_the_program_is_refused():
    """An event loop has some, too: events would go to its innards."""
    for fd in range(3, 16, 2):
        program = Program("migrate-src", "--events", f"json:{fd}", "unix:/nowhere")
        assert program.wait() == 2
        assert f"--events json:{fd}: descriptor {fd}: Bad file descriptor" in program.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("xml", "write json, or json:FD"),
        ("json:", "write json, or json:FD"),
        ("json:-1", "write json, or json:FD"),
        ("json:999", "Bad file descriptor"),
    ],
)
def test_unwritable_descriptor_is_refused(text, words):
    with pytest.raises(UsageError, match=words):
        parse_events(text)


def test_read_only_descriptor_is_refused():
    reading, writing = os.pipe()
    with pytest.raises(UsageError, match="Bad file descriptor"):
        parse_events(f"json:{reading}")
    os.close(reading)
    os.close(writing)


def test_wrong_descriptor_is_refused_before_connecting():
    program = Program("migrate-src", "--events", "json:77", "tcp:127.0.0.1:1")
    assert program.wait() == 2
    assert "--events json:77: descriptor 77: Bad file descriptor" in program.err


def test_events_of_a_real_migration():
    source, _ = move("--events", "json", "--json")
    seen = [json.loads(line) for line in source.out.splitlines()]  # and nothing else is there
    names = [one["event"] for one in seen]
    states = [one["data"]["status"] for one in seen if one["event"] == "MIGRATION"]
    assert states == ["setup", "active", "device", "completed"]
    assert [name for name in names if name not in ("PROGRESS", "NOTICE")][:3] == [
        "GUEST", "MIGRATION", "MIGRATION",
    ]  # fmt: skip
    assert names[-2:] == ["ROUND", "MIGRATION"]
    assert names.index("STOP") > names.index("ROUND")
    assert "PROGRESS" in names
    rounds = [one["data"] for one in seen if one["event"] == "ROUND"]
    assert [one["pass"] for one in rounds] == list(range(1, len(rounds) + 1))
    final = seen[-1]["data"]
    assert sum(one["transferred"] for one in rounds) == final["ram"]["transferred"]
    assert sum(one["normal"] for one in rounds) == final["ram"]["normal"]
    assert len(rounds) == final["ram"]["dirty-sync-count"]
    seconds = (final["total-time"] - final["setup-time"]) / 1000
    of_all = final["ram"]["transferred"] * 8 / seconds / 1e6
    assert final["ram"]["mbps"] == pytest.approx(of_all, rel=0.1)  # and not of its last round
    stamps = [(one["timestamp"]["seconds"], one["timestamp"]["microseconds"]) for one in seen]
    assert len(stamps) == len(seen)


def test_events_on_another_descriptor():
    source, _ = move("--events", "json:2", "--json", "--progress", "never")
    assert json.loads(source.out)["status"] == "completed"
    events = [json.loads(line) for line in source.err.splitlines() if line.startswith("{")]
    assert events[-1]["data"] == json.loads(source.out)


def test_round_sums_across_reconnect():
    receiver, address = destination("--retry", "20s")
    with Relay(address, breaks=(6 << 20,)) as relay:
        source = Program(
            "migrate-src", "--retry", "20s", "--events", "json", "--guest",
            "demo:16m,hot=4m,fill=random", relay.address,
        )  # fmt: skip
        assert source.wait() == 0, source.err
        assert receiver.wait() == 0
    end_guest(guest_pid(receiver.out + receiver.err))
    seen = [json.loads(line) for line in source.out.splitlines()]
    states = [one["data"]["status"] for one in seen if one["event"] == "MIGRATION"]
    assert states == ["setup", "active", "setup", "active", "device", "completed"]
    rounds = [one["data"] for one in seen if one["event"] == "ROUND"]
    final = seen[-1]["data"]
    assert final["reconnects"] == 1
    for name in ("transferred", "normal", "duplicate"):
        assert sum(one[name] for one in rounds) == final["ram"][name], name
