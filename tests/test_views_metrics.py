"""Metrics, read as Prometheus reads them."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from migrate.destination.receiver import Arrival
from migrate.errors import ConnectError, UsageError
from migrate.statistics import Statistics, Status
from migrate.views.metrics import Metrics, destination_families, source_families
from migrate.views.metrics_server import MAX_CLIENTS
from proto.wire.messages import GuestInfo
from tests.programs import Program, destination, end_guest, guest_pid
from tests.story import move, story


def numbers(text: str) -> dict[str, float]:
    """Each sample by its name, with its label's value."""
    return {
        "/".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(address: str) -> dict[str, float]:
    with urllib.request.urlopen(address, timeout=10) as answer:
        return numbers(answer.read().decode())


LAST = list(story())[-1][1]


def test_source_metrics():
    now = [Statistics()]
    metrics = Metrics(lambda: source_families(now[0]), "127.0.0.1:0")
    try:
        before = scrape(metrics.address)
        assert before["migrate_status/none"] == 1
        assert "migrate_downtime_seconds" not in before
        now[0] = LAST
        after = scrape(metrics.address)
    finally:
        metrics.close()
    assert after["migrate_ram_transferred_bytes_total"] == LAST.transferred
    assert after["migrate_pages_total/zero"] == LAST.duplicate
    assert after["migrate_pages_total/normal"] == LAST.normal
    assert after["migrate_pages_total/xbzrle"] == LAST.xbzrle_pages
    assert after["migrate_xbzrle_cache_misses_total"] == LAST.cache_miss
    assert after["migrate_downtime_seconds"] == 0.05
    assert after["migrate_pass"] == 4
    assert after["migrate_status/completed"] == 1
    assert sum(value for name, value in after.items() if name.startswith("migrate_status/")) == 1
    assert after["migrate_ram_dirty_bytes_per_second"] == 202.0 * 4096


def test_cancelling_state_metric(tmp_path):
    path = tmp_path / "m.prom"
    Metrics(lambda: source_families(Statistics(status=Status.CANCELLING)), textfile=str(path))
    assert numbers(path.read_text())["migrate_status/cancelling"] == 1


def test_destination_metrics():
    info = GuestInfo("demo", 1 << 20, 4096, bytes(16), 1, "", b"", 1)
    arrival = Arrival(info, "active", 5000, 2, 10, 20, 30, 65536)
    now: list[Arrival | None] = [None]
    metrics = Metrics(lambda: destination_families(now[0]), "127.0.0.1:0")
    try:
        assert scrape(metrics.address)["migrate_status/none"] == 1
        now[0] = arrival
        seen = scrape(metrics.address)
    finally:
        metrics.close()
    assert seen["migrate_ram_received_bytes_total"] == 5000
    assert [seen[f"migrate_pages_total/{kind}"] for kind in ("zero", "normal", "xbzrle")] == [
        10, 20, 30,
    ]  # fmt: skip
    assert (seen["migrate_pass"], seen["migrate_ram_bytes"]) == (2, 1 << 20)


def test_textfile_is_replaced_but_not_in_the_pause(tmp_path):
    path, now = tmp_path / "m.prom", [0.0]
    metrics = Metrics(lambda: source_families(LAST), textfile=str(path), clock=lambda: now[0])
    first = path.stat().st_ino
    metrics.observe(paused=False)
    assert path.stat().st_ino == first
    now[0] = 6.0
    metrics.observe(paused=True)
    assert path.stat().st_ino == first
    metrics.observe(paused=False)
    assert os.listdir(tmp_path) == ["m.prom"]
    assert numbers(path.read_text())["migrate_pass"] == 4


@pytest.mark.programs
def test_silent_clients_are_bounded(monkeypatch, capfd):
    monkeypatch.setattr("migrate.views.metrics_server.CLIENT_SECONDS", 0.5)
    before = threading.active_count()
    metrics = Metrics(lambda: source_families(Statistics()), "127.0.0.1:0")
    host, port = metrics.address.removeprefix("http://").removesuffix("/metrics").split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(4 * MAX_CLIENTS)]
    assert scrape(metrics.address)["migrate_channels"] >= 0
    assert threading.active_count() <= before + MAX_CLIENTS + 2
    while threading.active_count() > before + 2:
        time.sleep(0.05)
    for one in silent:
        one.settimeout(20)
        with contextlib.suppress(ConnectionResetError):
            assert one.recv(1) == b""
        one.close()
    assert scrape(metrics.address)["migrate_channels"] >= 0
    metrics.close()
    assert capfd.readouterr().err == ""


def connected(metrics: Metrics) -> socket.socket:
    host, port = metrics.address.removeprefix("http://").removesuffix("/metrics").split(":")
    return socket.create_connection((host, int(port)), 20)


def test_request_size_limit(monkeypatch, capfd):
    monkeypatch.setattr("migrate.views.metrics_server.CLIENT_SECONDS", 60.0)
    metrics = Metrics(lambda: source_families(Statistics()), "127.0.0.1:0")
    line = b"X: " + b"a" * 5000 + b"\r\n"
    for lines, answer in ((3, b"HTTP/1.0 200"), (4, b"")):
        with connected(metrics) as client, contextlib.suppress(ConnectionResetError):
            client.sendall(b"GET /metrics HTTP/1.0\r\n" + lines * line)
            if answer:
                client.sendall(b"\r\n")
            assert client.recv(12, socket.MSG_WAITALL) == answer
    metrics.close()
    assert capfd.readouterr().err == ""


def test_slow_request_is_dropped(monkeypatch):
    monkeypatch.setattr("migrate.views.metrics_server.CLIENT_SECONDS", 1.0)
    metrics = Metrics(lambda: source_families(Statistics()), "127.0.0.1:0")
    with connected(metrics) as client, contextlib.suppress(ConnectionError):
        client.settimeout(0.1)
        began = time.monotonic()
        while True:
            assert time.monotonic() - began < 15
            client.sendall(b"a")
            with contextlib.suppress(TimeoutError):
                assert client.recv(1) == b""
                break
    metrics.close()


def test_metrics_address_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConnectError, match=f"--metrics 127.0.0.1:{port}: Address already in"):
            Metrics(lambda: source_families(LAST), f"127.0.0.1:{port}")
        program = Program("migrate-src", "--metrics", f"127.0.0.1:{port}", "tcp:127.0.0.1:1")
        assert program.wait() == 3
        assert "Address already in use" in program.err


@pytest.mark.parametrize("listen", ["unix:/tmp/x", "nowhere", "1:2:3:x"])
def test_wrong_metrics_address(listen):
    with pytest.raises(UsageError):
        Metrics(lambda: source_families(LAST), listen)


def test_unwritable_textfile_is_refused(tmp_path):
    with pytest.raises(UsageError, match="No such file or directory"):
        Metrics(lambda: source_families(LAST), textfile=str(tmp_path / "no" / "m.prom"))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="it is not a regular file"):
        Metrics(lambda: source_families(LAST), textfile=str(tmp_path / "fifo"))
    program = Program("migrate-dst", "--listen", "127.0.0.1:0", "--metrics-textfile", "/no/m")
    assert program.wait() == 2


@pytest.mark.programs
def test_textfiles_of_a_real_migration(tmp_path):
    here, there = tmp_path / "src.prom", tmp_path / "dst.prom"
    source, _ = move("--metrics-textfile", str(here),
                     receiving=("--metrics-textfile", str(there)))  # fmt: skip
    sent, received = numbers(here.read_text()), numbers(there.read_text())
    assert sent["migrate_status/completed"] == received["migrate_status/completed"] == 1
    assert sent["migrate_ram_bytes"] == received["migrate_ram_bytes"] == 16 << 20
    assert sent["migrate_pass"] == received["migrate_pass"]
    for kind in ("zero", "normal", "xbzrle"):
        name = f"migrate_pages_total/{kind}"
        assert sent[name] == received[name], name
    assert sent["migrate_downtime_seconds"] > 0
    shown = re.search(r"normal: (\d+) pages", source.out)
    assert shown
    assert sent["migrate_pages_total/normal"] == int(shown[1])


@pytest.mark.programs
def test_scrape_a_running_program():
    receiver = Program("migrate-dst", "--listen", "127.0.0.1:0", "--metrics", "0")
    address = receiver.read_line(r"metrics at (\S+)")[1]
    assert scrape(address)["migrate_status/none"] == 1
    receiver.read_line("listening on")
    receiver.kill(15)
    assert receiver.wait() == 143, receiver.err
    receiver, there = destination()
    source = Program(
        "migrate-src", "--guest", "demo:32m,fill=random", "--max-bandwidth", "8m", "--metrics", "0",
        there,
    )  # fmt: skip
    address = source.read_line(r"metrics at (\S+)")[1]
    source.read_line("round 1: ")
    seen = scrape(address)
    assert seen["migrate_status/active"] == 1
    assert 0 < seen["migrate_ram_remaining_bytes"] < 32 << 20
    source.kill(2)
    assert source.wait() == 130
    receiver.wait()
    end_guest(guest_pid(source.err))
