"""The monitor of real programs: the usage section of the xbzrle document, and QEMU's own client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import signal
import socket
import stat
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import qemu.qmp

from migrate.cli.control import Control
from migrate.guests.demo.handle import DemoProcess
from migrate.guests.demo.layout import State
from tests.programs import BIN, Program, children, destination, end_guest, guest_pid, look_at

GUEST = "demo:32m,hot=8m,stride=4096"
SLOW = str(8 << 20)
# As the document prints them, in this order.
LABELS = """capabilities: xbzrle: on
Migration status:
transferred ram:
remaining ram:
total ram:
total time:
duplicate:
normal:
normal bytes:
cache size:
xbzrle transferred:
xbzrle pages:
xbzrle cache miss:
xbzrle overflow :""".splitlines()


class Idle:
    """An idle source and a destination that waits for its address, both asked over QMP."""

    def __init__(self, directory: Path, *options: str, guest: str = GUEST) -> None:
        self.directory = directory
        self.receiver = Program("migrate-dst", "--qmp", f"unix:{directory}/dst")
        self.sender = Program(
            "migrate-src", "--qmp", f"unix:{directory}/src", "--guest", guest,
            "--monitor", f"unix:{directory}/monitor", *options,
        )  # fmt: skip
        self.pid = guest_pid(self.sender.read_line(r"idle: demo guest, process \d+")[0])
        self.src, self.dst = Control(f"{directory}/src", 20), Control(f"{directory}/dst", 20)
        self.arrived = 0

    def listen(self) -> str:
        self.dst.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
        address = self.receiver.read_line(r"listening on (\S+)")[1]
        assert self.dst.execute("query-migrate") == {
            "status": "setup",
            "socket-address": [
                {"type": "inet", "host": "127.0.0.1", "port": address.rpartition(":")[2]}
            ],
        }
        return address

    def until(self, *wanted: str, side: str = "src") -> dict[str, Any]:
        control = self.src if side == "src" else self.dst
        end = time.monotonic() + 60
        while (state := control.execute("query-migrate")).get("status") not in wanted:
            assert time.monotonic() < end, state
            time.sleep(0.01)
        return state

    def verified(self) -> None:
        """It runs at the destination and nowhere else, and every byte is right."""
        state = self.until("completed", side="dst")
        self.arrived = guest_pid(state["running"])
        assert look_at(self.arrived, 0.1)[2] == -1
        assert self.src.execute("query-status") == {"running": False, "status": "postmigrate"}

    def end(self) -> None:
        for control in (self.src, self.dst):
            with contextlib.suppress(Exception):
                control.execute("quit")
            control.close()
        for program in (self.sender, self.receiver):
            try:
                program.wait(20)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()
        for pid in (self.pid, self.arrived):
            if pid:
                end_guest(pid)


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[Any]:
    made: list[Idle] = []

    def make(*options: str, **more: str) -> Idle:
        made.append(Idle(tmp_path, *options, **more))
        return made[-1]

    yield make
    for one in made:
        one.end()


# ---------------------------------------------------------------- for people


class Screen:
    """A program on a terminal of its own."""

    def __init__(self, *command: str, **environment: str) -> None:
        self.master, self.slave = pty.openpty()
        self.process = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, env=os.environ | environment,
        )  # fmt: skip
        self.shown = ""

    def close(self) -> None:
        termios.tcflow(self.slave, termios.TCOON)
        self.process.kill()
        self.process.wait()
        for end in (self.master, self.slave):
            os.close(end)

    def begin(self, *patterns: str) -> None:
        """Waits until all of these were shown, in whichever order."""
        for pattern in patterns:
            self.shown = self.until(pattern) + self.shown
        self.shown = ""

    def until(self, pattern: str) -> str:
        """Return the output since the last call, up to a match."""
        end = time.monotonic() + 60
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < end, self.shown
            self.shown += os.read(self.master, 4096).decode().replace("\r", "")
        shown, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return shown

    def type(self, line: str) -> str:
        """Type a line; return the output up to the next prompt."""
        os.write(self.master, f"{line}\n".encode())
        self.until(re.escape(line) + "\n")
        return self.until(r"\(migrate-...\) ").rpartition("(migrate-")[0]


def test_documented_commands_on_a_terminal() -> None:
    receiver = Screen("migrate-dst", "--monitor", "stdio")
    source = Screen("migrate-src", "--monitor", "stdio", "--guest", GUEST)
    arrived = 0
    try:
        source.begin(r"\(migrate-src\) ", r"idle: demo guest, process \d+.*\n")
        receiver.begin(r"\(migrate-dst\) ")
        for screen in (receiver, source):
            assert screen.type("info migrate_capabilities").startswith("xbzrle: on , ")
            assert screen.type("migrate_set_capability xbzrle on") == ""
        assert source.type("migrate_set_cache_size 256m") == ""
        said = receiver.type("migrate_incoming tcp:127.0.0.1:0")
        assert said.startswith("migrate-dst: listening on tcp:127.0.0.1:")
        port = said.strip().rpartition(":")[2]
        said = source.type(f"migrate -d tcp:127.0.0.1:{port}")
        assert said in ("", f"migrate-src: connecting to tcp:127.0.0.1:{port}\n")
        end = time.monotonic() + 60
        while "Migration status: completed" not in (said := source.type("info migrate")):
            assert time.monotonic() < end, said
            time.sleep(0.1)
        lines = [line for line in said.splitlines() if not line.startswith("migrate-src: ")]
        for line, label in zip(lines, LABELS, strict=False):
            assert line.startswith(label)
        assert re.search(r"^total time: \d+ milliseconds$", said, re.MULTILINE)
        assert re.search(r"^cache size: 268435456 bytes$", said, re.MULTILINE)
        assert source.type("info status") == "VM status: paused (postmigrate)\n"
        assert "vm that was paused due to previous" in source.type("migrate -d tcp:a:1")
        said = receiver.until(r"runs in process \d+")
        arrived = guest_pid(said[said.index("runs in process") :])
        assert receiver.type("info status") == "VM status: running\n"
        assert look_at(arrived, 0.1)[2] == -1
        for screen in (receiver, source):
            os.write(screen.master, b"quit\n")
            assert screen.process.wait(20) == 0
    finally:
        for screen in (receiver, source):
            screen.close()
        if arrived:
            end_guest(arrived)


@pytest.mark.programs
def test_script_on_standard_input_runs_to_its_end() -> None:
    """The end of it ends the program, but not before the migration."""
    receiver = subprocess.Popen(
        [BIN / "migrate-dst", "--listen", "127.0.0.1:0", "--retry", "0"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert receiver.stderr is not None
    address = receiver.stderr.readline().split()[-1]
    done = subprocess.run(
        [BIN / "migrate-src", "--monitor", "stdio", "--guest", GUEST, "--max-bandwidth", "16m"],
        input=f"migrate -d {address}\ninfo status\n", capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out, _ = receiver.communicate(timeout=20)
    assert receiver.returncode == 0
    pid = guest_pid(out)
    assert look_at(pid, 0.1)[2] == -1
    end_guest(pid)


def test_overlong_lines_end_nothing() -> None:
    """Neither one that is too long nor one that the terminal has no letters for."""
    source = Program(
        "migrate-src", "--monitor", "stdio", "--guest", GUEST,
        stdin=f"{'x' * 9000}\nflüg\0\ufffd\ninfo status\n",
        environment={"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert source.wait(20) == 0
    assert "Error: a line has no more than 4096 bytes" in source.out
    assert "unknown command: 'fl" in source.out
    assert "VM status: running" in source.out
    assert gone(guest_pid(source.err))


@pytest.mark.programs
def test_stopped_terminal_does_not_stop_migration(tmp_path: Path) -> None:
    """^S, and then commands whose answers it does not take."""
    screen = Screen(
        "migrate-src", "--monitor", "stdio", "--guest", GUEST, "--qmp", f"unix:{tmp_path}/src"
    )
    receiver, address = destination()
    arrived = 0
    try:
        screen.begin(r"\(migrate-src\) ", r"idle: demo guest, process \d+.*\n")
        termios.tcflow(screen.slave, termios.TCOOFF)
        os.write(screen.master, b"help\ninfo migrate_parameters\n" * 20)
        with Control(f"{tmp_path}/src", 20) as control:
            control.execute("migrate", {"uri": address})
            end = time.monotonic() + 60
            while control.execute("query-migrate")["status"] != "completed":
                assert time.monotonic() < end
                time.sleep(0.02)
            assert receiver.wait(20) == 0
            arrived = guest_pid(receiver.out)
            control.execute("quit")
        termios.tcflow(screen.slave, termios.TCOON)
        screen.until("moving demo guest")
        assert screen.process.wait(20) == 0
    finally:
        screen.close()
        receiver.kill()
        receiver.wait()
        if arrived:
            end_guest(arrived)


@pytest.mark.programs
@pytest.mark.parametrize("last", ["migrate_cancel\nquit\n", "quit\n", "migrate_cancel\n"])
def test_pipelined_commands_run_in_order(last: str) -> None:
    """A migration that has not begun is cancelled at once; no destination listens there."""
    source = Program(
        "migrate-src", "--monitor", "stdio", "--guest", GUEST, "--connect-timeout", "100s",
        stdin=f"migrate -d tcp:127.0.0.1:1\n{last}info migrate\n",
    )  # fmt: skip
    assert source.wait() in (0, 143)
    assert "Error" not in source.out
    assert "Migration status: cancelled" in source.out
    assert "connecting" not in source.err
    assert gone(guest_pid(source.err))


@pytest.mark.programs
def test_migrate_without_d_waits_on_monitor_socket(idle) -> None:
    both = idle("--connect-timeout", "0.5s")
    path = both.directory / "monitor"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(path))
        reader = client.makefile("rb")

        def type_(line: str) -> bytes:
            client.sendall(f"{line}\r\n".encode())
            said = b""
            while not said.endswith(b"(migrate-src) "):
                said += reader.read(1)
            return said.removesuffix(b"(migrate-src) ")

        while reader.read(1) != b")":
            pass
        reader.read(1)
        assert type_("migrate tcp:127.0.0.1:1").startswith(b"Error: cannot connect to")
        assert type_("info status") == b"VM status: running\r\n"
        assert type_(f"migrate {both.listen()}") == b""
        assert type_("info status") == b"VM status: paused (postmigrate)\r\n"
    both.verified()


@pytest.mark.programs
def test_migrate_ctl_prompt(idle, tmp_path: Path) -> None:
    """Completion, an error that ends nothing, a history for the next one, and the end of input."""
    both = idle()
    first = Screen("migrate-ctl", f"{both.directory}/src", XDG_STATE_HOME=str(tmp_path / "state"))
    try:
        first.until(r"\(migrate\) ")
        os.write(first.master, b"info migrate_cac\t\n")
        first.until("xbzrle cache size: 65536 kbytes\n")
        os.write(first.master, b"fly\n")
        first.until(r"unknown command: 'fly'\n.*\(migrate\) ")
        os.write(first.master, b"\x04")
        assert first.process.wait(20) == 0
    finally:
        first.close()
    second = Screen("migrate-ctl", f"{both.directory}/src", XDG_STATE_HOME=str(tmp_path / "state"))
    try:
        second.until(r"\(migrate\) ")
        os.write(second.master, b"\x1b[A\x1b[A\n")  # up, up
        second.until("xbzrle cache size: 65536 kbytes\n")
        os.write(second.master, b"quit\n")
        assert second.process.wait(20) == 0
    finally:
        second.close()
    assert both.sender.wait(20) == 0


@pytest.mark.programs
@pytest.mark.parametrize(
    "line",
    ["migrate_set_cache_size", "migrate_set_cache_size 1 2", "info status now", "info fly", "fly",
     "help fly", "migrate_set_parameter max-bandwidth x"],
)  # fmt: skip
def test_refused_commands_fail_for_scripts(idle, line: str) -> None:
    both = idle()
    program = Program("migrate-ctl", f"{both.directory}/src", *line.split())
    assert program.wait() == 1
    assert program.out


# ---------------------------------------------------------------- QEMU's own client


@pytest.mark.programs
@pytest.mark.asyncio
async def test_qemu_qmp_client_drives_a_migration(idle) -> None:
    both = await asyncio.to_thread(idle)
    address = await asyncio.to_thread(both.listen)
    source, destination = qemu.qmp.QMPClient("src"), qemu.qmp.QMPClient("dst")
    told: dict[str, list[Any]] = {"src": [], "dst": []}
    await source.connect(f"{both.directory}/src")
    await destination.connect(f"{both.directory}/dst")

    async def follow(client: qemu.qmp.QMPClient, name: str) -> None:
        with client.listener() as listener:
            async for event in listener:
                told[name].append(event)
                if event.get("data", {}).get("status") == "completed":
                    return

    following = [
        asyncio.create_task(follow(source, "src")),
        asyncio.create_task(follow(destination, "dst")),
    ]
    await asyncio.sleep(0)
    assert await source.execute("query-migrate") == {}
    assert await source.execute("query-status") == {"running": True, "status": "running"}
    for client in (source, destination):
        await client.execute(
            "migrate-set-capabilities",
            {
                "capabilities": [
                    {"capability": name, "state": True} for name in ("xbzrle", "events")
                ]
            },
        )
    limits = {"xbzrle-cache-size": 1 << 24, "downtime-limit": 500, "max-bandwidth": 32 << 20}
    await source.execute("migrate-set-parameters", limits)
    assert limits.items() <= (await source.execute("query-migrate-parameters")).items()
    host, _, port = address.removeprefix("tcp:").rpartition(":")
    where = {"transport": "socket", "type": "inet", "host": host, "port": port}
    await source.execute("migrate", {"channels": [{"channel-type": "main", "addr": where}]})
    with pytest.raises(qemu.qmp.ExecuteError, match="There's a migration process in progress"):
        await source.execute("migrate", {"uri": address})
    async with asyncio.timeout(60):
        await asyncio.gather(*following)
    state = await source.execute("query-migrate")
    assert state["status"] == "completed"
    assert state["xbzrle-cache"]["cache-size"] == 1 << 24
    assert state["ram"]["remaining"] == 0
    said = [
        event["data"]["status"] if event["event"] == "MIGRATION" else event["event"]
        for event in told["src"]
        if event["event"] != "MIGRATION_PASS"
    ]
    assert said == ["setup", "active", "device", "STOP", "completed"]
    passes = [e["data"]["pass"] for e in told["src"] if e["event"] == "MIGRATION_PASS"]
    assert passes == list(range(1, state["ram"]["dirty-sync-count"] + 1))
    times = [
        event["timestamp"]["seconds"] * 1_000_000 + event["timestamp"]["microseconds"]
        for event in told["src"]
    ]
    assert times == sorted(times)
    arrived = [e["event"] for e in told["dst"] if e["event"] != "MIGRATION_PASS"]
    assert arrived == ["MIGRATION", "RESUME", "MIGRATION"]
    text = await source.execute("human-monitor-command", {"command-line": "info migrate"})
    assert "Migration status: completed\r\n" in text
    await asyncio.to_thread(both.verified)
    for client in (source, destination):
        await client.disconnect()


def test_qmp_shell(idle) -> None:
    both = idle()
    lines = ["query-status", "migrate-set-parameters max-bandwidth=1000000", "query-migrate"]
    done = subprocess.run(
        [BIN / "qmp-shell", f"{both.directory}/src"], input="\n".join(lines), text=True,
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert '"return": {"running": true, "status": "running"}' in done.stdout
    assert "error" not in done.stdout
    assert both.src.execute("query-migrate-parameters")["max-bandwidth"] == 1_000_000


# ---------------------------------------------------------------- again and again


@pytest.mark.programs
def test_migrate_again_after_cancel_or_failure(idle, tmp_path: Path) -> None:
    both = idle("--max-bandwidth", SLOW, "--connect-timeout", "1s")
    both.src.execute("migrate", {"uri": "tcp:127.0.0.1:1"})
    assert "cannot connect" in both.until("failed")["error-desc"]
    assert both.src.execute("query-status") == {"running": True, "status": "running"}

    other = Program("migrate-dst", "--listen", f"unix:{tmp_path}/other")
    other.read_line("listening on")
    both.src.execute("migrate", {"uri": f"unix:{tmp_path}/other"})
    both.until("active")
    both.src.execute("migrate_cancel")
    both.until("cancelled")
    assert other.wait() == 8
    assert both.src.execute("query-status") == {"running": True, "status": "running"}
    assert DemoProcess.attach(both.pid).state == State.RUNNING  # it counts on here
    assert both.src.execute("migrate_cancel") == {}  # succeeds when there is nothing to cancel

    both.src.execute("migrate", {"uri": both.listen()})
    both.src.execute("migrate-set-parameters", {"max-bandwidth": 0})
    state = both.until("completed")
    assert state["ram"]["normal-bytes"] <= 40 << 20  # counted anew, not since the first attempt
    both.verified()


class Ear:
    """Follows the events of a program: `statuses` of its migrations."""

    def __init__(self, path: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(60)
        self._sock.connect(path)
        self._lines = self._sock.makefile("rb")
        for request in (
            b"{'execute': 'qmp_capabilities'}",
            b"{'execute': 'migrate-set-capabilities', 'arguments': {'capabilities': "
            b"[{'capability': 'events', 'state': true}]}}",
        ):
            self._lines.readline()
            self._sock.sendall(request)
        assert json.loads(self._lines.readline()) == {"return": {}}

    def until(self, last: str) -> list[str]:
        """Return the events since the last call, up to this status, STOP and RESUME included."""
        told: list[str] = []
        while last not in told:
            message = json.loads(self._lines.readline())
            if message.get("event") not in (None, "MIGRATION_PASS"):
                told.append(message.get("data", {}).get("status", message["event"]))
        return told

    def close(self) -> None:
        self._lines.close()
        self._sock.close()


def test_events_of_a_migration_that_ends_early(idle) -> None:
    """As in QEMU, events begin with setup, even without a connection."""
    both = idle("--max-bandwidth", "2m", "--connect-timeout", "100s")
    ear = Ear(f"{both.directory}/src")
    early, cancelled = ["setup", "cancelling", "cancelled"], {"status": "cancelled"}
    nobody = {"uri": f"unix:{both.directory}/nobody"}
    both.src.execute("migrate", nobody)
    both.sender.read_line("connecting to")
    both.src.execute("migrate_cancel")
    assert ear.until("cancelled") == early
    assert both.until("cancelled") == cancelled
    both.src.execute("migrate", nobody)
    both.src.execute("migrate_cancel")
    assert ear.until("cancelled") == early
    both.src.execute("migrate", {"uri": both.listen()})
    both.until("active")
    both.src.execute("migrate_cancel")
    assert ear.until("cancelled") == ["setup", "active", "cancelling", "cancelled"]
    assert both.receiver.wait() == 8
    ear.close()


def test_statistics_of_a_migration_that_ends_early(idle, tmp_path: Path) -> None:
    """In the first round each page has gone in one way, or remains; the next begins anew."""
    both = idle("--max-bandwidth", "2m", "--capability", "zstd=off")
    ear = Ear(f"{both.directory}/src")
    for how in ("cancelled", "failed"):
        other = Program("migrate-dst", "--listen", f"unix:{tmp_path}/{how}")
        other.read_line("listening on")
        both.src.execute("migrate", {"uri": f"unix:{tmp_path}/{how}"})
        end = time.monotonic() + 60
        while not (ram := both.src.execute("query-migrate").get("ram", {})).get("normal"):
            assert time.monotonic() < end, ram
            time.sleep(0.01)
        if how == "cancelled":
            both.src.execute("migrate_cancel")
        else:
            other.kill()
        told = ear.until(how)
        assert told == ["setup", "active", *["cancelling"] * (how == "cancelled"), how]
        other.wait()
        state = both.until(how)
        ram = state["ram"]
        assert ram["normal"] + ram["duplicate"] + ram["remaining"] // 4096 == 8192
        assert 0 < ram["normal-bytes"] < ram["transferred"] == ram["precopy-bytes"]
        assert ram["dirty-sync-count"] == 0
        assert "downtime" not in state
        time.sleep(0.1)
        assert both.src.execute("query-migrate") == state
    ear.close()


def test_limits_change_during_migration(idle) -> None:
    """At 64 KiB/s it would take eight minutes; the new rate holds at once."""
    both = idle("--max-bandwidth", "64k")
    both.src.execute("migrate", {"uri": both.listen()})
    both.until("active")
    with pytest.raises(Exception, match="channels cannot change during a migration"):
        both.src.execute("migrate-set-parameters", {"multifd-channels": 2})
    both.src.execute("migrate-set-parameters", {"max-bandwidth": 1 << 30, "downtime-limit": 900})
    both.until("completed")
    both.verified()


def test_parameters_set_during_migration_persist(idle) -> None:
    """Neither a capability, nor the cache size that the other side has asked for."""
    both = idle("--max-bandwidth", "4m")
    both.src.execute("migrate", {"uri": both.listen()})
    both.until("active")
    events = {"capability": "events", "state": True}
    both.src.execute("migrate-set-capabilities", {"capabilities": [events]})
    both.dst.execute("migrate-set-cache-size", {"value": 1 << 22})
    end = time.monotonic() + 60
    while both.src.execute("query-migrate-cache-size") != 1 << 22:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert both.src.say("info migrate_cache_size") == "xbzrle cache size: 4096 kbytes\n"
    both.src.execute("migrate-set-parameters", {"downtime-limit": 400})
    both.src.execute("migrate_cancel")
    both.until("cancelled")
    assert events in both.src.execute("query-migrate-capabilities")
    left = both.src.execute("query-migrate-parameters")
    assert (left["xbzrle-cache-size"], left["downtime-limit"]) == (1 << 22, 400)
    both.src.execute("migrate-set-cache-size", {"value": 1 << 23})
    assert both.src.execute("query-migrate-cache-size") == 1 << 23


def test_migrate_incoming_again_after_listen_failure(idle) -> None:
    both = idle()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = f"tcp:127.0.0.1:{taken.getsockname()[1]}"
        both.dst.execute("migrate-incoming", {"uri": busy})
        state = both.until("failed", side="dst")
        assert state == {
            "status": "failed", "error-desc": f"cannot listen on {busy}: Address already in use"
        }  # fmt: skip
    both.src.execute("migrate", {"uri": both.listen()})
    with pytest.raises(Exception, match="has already been started"):
        both.dst.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
    both.until("completed")
    both.verified()


def test_script_fails_if_destination_cannot_listen() -> None:
    receiver = Program(
        "migrate-dst", "--monitor", "stdio",
        stdin="migrate_incoming unix:/nonexistent/x\nmigrate_incoming nowhere\ninfo migrate\n",
    )  # fmt: skip
    assert receiver.wait(20) == 143
    said = "Error: cannot listen on unix:/nonexistent/x: no socket can be made in /nonexistent: "
    assert receiver.out.count(said) == 1
    assert "Error: address 'nowhere' is not understood" in receiver.out


def test_lower_round_limit_ends_migration(idle) -> None:
    both = idle("--max-bandwidth", "32m", "--capability", "xbzrle=off", "--downtime-limit", "1")
    both.src.execute("migrate", {"uri": both.listen()})
    both.until("active")
    both.src.execute("migrate-set-parameters", {"max-rounds": 2})
    assert "in 2 rounds (--max-rounds)" in both.until("failed")["error-desc"]
    assert both.src.execute("query-status")["running"]


def test_fifty_cache_resizes_from_both_sides(idle) -> None:
    """Under the working set and past it: the source confirms each, and the memory stays equal."""
    both = idle(
        "--max-bandwidth", "16m", "--downtime-limit", "0", guest="demo:4m,hot=2m,stride=4096"
    )
    both.src.execute("migrate", {"uri": both.listen()})
    both.until("active")
    for number in range(50):
        size = 1 << (12 + number * 7 % 16)
        side = both.dst if number % 2 else both.src
        side.execute("migrate-set-cache-size", {"value": size})
        end = time.monotonic() + 60
        while True:
            state = both.src.execute("query-migrate")
            assert state["status"] == "active", state
            if state["xbzrle-cache"]["cache-size"] == size:
                break
            assert time.monotonic() < end, (size, state)
            time.sleep(0.005)
    assert both.dst.execute("query-migrate")["xbzrle-cache"]["cache-size"] in {
        1 << (12 + number * 7 % 16) for number in range(48, 50)
    }
    both.src.execute("migrate-set-parameters", {"downtime-limit": 2000, "max-bandwidth": 0})
    cache = both.until("completed")["xbzrle-cache"]
    assert cache["cache-miss"] > 0
    assert cache["pages"] > 0
    both.verified()


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize("name", ["migrate-src", "migrate-dst"])
def test_missing_address_needs_a_monitor(name: str) -> None:
    program = Program(name)
    assert program.wait() == 2
    assert "--monitor stdio" in program.err


def gone(pid: int) -> bool:
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}/cmdline").exists() and time.monotonic() < end:
        try:
            if not Path(f"/proc/{pid}/cmdline").read_bytes():
                return True  # it waits for its parent to take note
        except OSError:
            return True
        time.sleep(0.01)
    return not os.path.exists(f"/proc/{pid}")


def test_quit_ends_only_an_unmoved_guest(idle, tmp_path: Path) -> None:
    both = idle()
    other = Program(
        "migrate-src", "--qmp", f"unix:{tmp_path}/other", "--guest", f"demo:pid={both.pid}"
    )
    other.read_line("idle: ")
    with Control(f"{tmp_path}/other", 20) as control:
        control.execute("quit")
    assert other.wait(20) == 0
    assert both.src.execute("query-status") == {"running": True, "status": "running"}
    both.src.execute("quit")
    assert both.sender.wait(20) == 0
    assert gone(both.pid)


def test_signal_before_guest_is_ready_leaves_no_guest() -> None:
    source = Program("migrate-src", "--monitor", "stdio", "--guest", "demo:2g,fill=random")
    deadline = time.monotonic() + 60
    while not (guests := [pid for pid in children(source.process.pid) if not gone_already(pid)]):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.2)
    source.kill(signal.SIGTERM)
    assert source.wait() in (143, -signal.SIGTERM)
    assert all(gone(pid) for pid in guests)


def gone_already(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")
