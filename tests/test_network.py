"""Migrations over networks that are slow, lossy, silently cut, or blocked at the other end.

Each test has its own hosts (tests/network.py), on which the programs run as a user runs them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import pytest
import uvloop

from migrate.errors import PeerLost
from migrate.guests.demo.handle import DemoProcess
from migrate.guests.demo.layout import Owner, State
from migrate.transport.address import Address
from migrate.transport.connect import connect
from migrate.transport.link import SEND_HIGH
from migrate.transport.receive_queue import RECEIVE_AHEAD_BYTES
from proto.wire.messages import BATCH_BYTES, MAX_BODY
from tests.bench.processes import Measured, private_memory
from tests.bench.report import LeftOutError
from tests.network import FAR, FAR6, Link, call
from tests.programs import BIN, Program, destination, ended_or_given_up, guest_pid, look_at
from tests.requirements import need

MIB = 1 << 20
SO_RCVBUFFORCE = 33
ESTABLISHED = "01"
PEER_TIMEOUT = 3.0
# How long both try to find out whose the guest is, where the hand-over is cut off.
RESOLVE = 8.0
# What a program may take to end beside the timeout: the machine may be busy.
SLACK = 20.0
# One way. What a test has to do while a message is under way must be done by then.
LONG_WAY = 0.3
# Programs that should end and do not are an error after so long.
PATIENCE = 60.0


@pytest.fixture(scope="module", autouse=True)
def network() -> None:
    """Skip without network namespaces; fail in CI."""
    try:
        with Link(delay=0.001):
            pass
    except LeftOutError as error:
        need(False, str(error))


def until(condition: Callable[[], object], what: str, timeout: float = PATIENCE) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {timeout:g} s"
        time.sleep(0.001)


def assert_guest_is_right(pid: int) -> None:
    before, after, wrong = look_at(pid, 0.2)
    assert wrong == -1
    assert after > before


class Move:
    """A migration of a demo guest from near to far. Its programs end with the link."""

    def __init__(
        self, link: Link, guest: str, *options: str, there: tuple[str, ...] = (), host: str = FAR,
        timeout: float = PEER_TIMEOUT,
    ) -> None:  # fmt: skip
        both = ["--peer-timeout", f"{timeout:g}s", "--resolve-timeout", f"{RESOLVE:g}s"]
        listen = f"[{host}]:0" if ":" in host else f"{host}:0"
        self.receiver, self.address = destination(*both, *there, listen=listen, namespace=link.far)
        self.source = Program(
            "migrate-src", *both, "--guest", guest, "--json", *options, self.address,
            namespace=link.near,
        )  # fmt: skip
        self.pid = int(self.source.read_line(r"moving demo guest, process (\d+)")[1])
        self.guest = DemoProcess.attach(self.pid)

    def __enter__(self) -> Move:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for program in (self.source, self.receiver):
            if program.process.returncode is None:
                program.kill()
                program.wait(PATIENCE)

    def assert_arrives(self) -> dict[str, object]:
        """Assert that it completes, and that the guest is intact at the destination only."""
        assert self.source.wait(PATIENCE) == 0, self.source.err
        assert self.receiver.wait(PATIENCE) == 0, self.receiver.err
        assert_guest_is_right(guest_pid(self.receiver.out))
        assert ended_or_given_up(self.pid)
        return dict(json.loads(self.source.out))

    def assert_kept(self, since: float, timeout: float = PEER_TIMEOUT) -> None:
        """Assert that both ends notice in time, and that the guest is intact at the source only."""
        landed = self.landed()
        assert self.source.wait(PATIENCE) == 1, self.source.err
        assert time.monotonic() - since < timeout + SLACK
        assert f"process {self.pid}" in self.source.err
        assert self.receiver.wait(PATIENCE) == 1, self.receiver.err
        assert time.monotonic() - since < timeout + SLACK
        assert_guest_is_right(self.pid)
        for pid in landed:
            until(lambda pid=pid: gone(pid), "the end of what had arrived")

    def landed(self) -> list[int]:
        """Return the processes that the destination has started for the guest."""
        return [
            int(pid)
            for task in Path(f"/proc/{self.receiver.process.pid}/task").iterdir()
            for pid in (task / "children").read_text().split()
        ]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# ---------------------------------------------------------------- the network itself


def test_emulated_network_applies_its_settings() -> None:
    """The other tests rely on delay, loss, silence, and the end of silence."""
    with Link(delay=0.05, loss=0.2) as link:
        with link.inside("far"):
            receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 * MIB)
            receiver.bind((FAR, 0))
            receiver.settimeout(1.0)
        with link.inside("near"):
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with receiver, sender:

            def came(count: int) -> int:
                for _ in range(count):
                    sender.sendto(b"x" * 1000, receiver.getsockname())
                seen = 0
                with contextlib.suppress(TimeoutError):
                    while True:
                        receiver.recv(2000)
                        seen += 1
                return seen

            assert 700 < came(1000) < 900  # 800 +- 13: seven times that
            link.cut()
            assert came(1000) == 0
            link.mend()
            carried = link.carried()
            assert came(1000) > 0
            assert 700_000 < link.carried() - carried < 1_000_000
    with Link(delay=0.05) as link:
        with link.inside("far"):
            server = socket.create_server((FAR, 0))
        began = time.monotonic()
        with server, link.inside("near"), socket.create_connection(server.getsockname()):
            assert time.monotonic() - began >= 0.1
    with pytest.raises(LeftOutError, match="Cannot open network namespace"):
        call("ip", "-n", link.near, "link")


def test_rate_of_a_link_in_use_changes() -> None:
    with Link(rate=10**9) as link:
        with link.inside("far"):
            server = socket.create_server((FAR, 0))
        with server, link.inside("near"), socket.create_connection(server.getsockname()) as sender:
            receiver, _ = server.accept()
            with receiver:
                link.set_rate(16_000_000)
                began = time.monotonic()
                sending = threading.Thread(target=sender.sendall, args=(bytes(2 * MIB),))
                sending.start()
                left = 2 * MIB
                while left:
                    left -= len(receiver.recv(left))
                sending.join()
                assert time.monotonic() - began > 0.9  # 1.05 s, less what comes at once


# ---------------------------------------------------------------- delay and loss


@pytest.mark.network
def test_several_channels_fill_a_lossy_path() -> None:
    """50 ms of round trip and 1 % of loss each way limit one connection to 2 to 4 Mbit/s, whatever
    the link carries. The migration of a busy guest completes, and channels multiply the speed."""
    with (
        Link(20_000_000, delay=0.025, loss=0.01) as link,
        Move(link, "demo:64m,hot=1m,rate=20000,fill=random") as lone,
    ):
        until(lambda: link.carried() > 300_000, "the first bytes")
        before, began = link.carried(), time.monotonic()
        time.sleep(4)
        single = (link.carried() - before) / (time.monotonic() - began)
        lone.source.kill()
        lone.source.wait(PATIENCE)
        lone.receiver.wait(PATIENCE)
    with (
        Link(20_000_000, delay=0.025, loss=0.01) as link,
        Move(link, "demo:8m,hot=1m,rate=20000,fill=random", "--channels", "8") as many,
    ):
        result = many.assert_arrives()
    took = float(str(result["total-time"])) / 1e3
    assert 8 * MIB / took > 1.5 * single


@pytest.mark.network
def test_bbr_fills_a_lossy_path_with_one_channel() -> None:
    """--congestion bbr fills the same path, where a single cubic connection gets 2 to 4 Mbit/s."""
    known = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    need("bbr" in known, "this kernel has no bbr")
    with (
        Link(20_000_000, delay=0.025, loss=0.01) as link,
        Move(link, "demo:8m,hot=1m,rate=20000,fill=random", "--congestion", "bbr") as move,
    ):
        result = move.assert_arrives()
    took = float(str(result["total-time"])) / 1e3
    assert 8 * MIB * 8 / took > 6_000_000  # 16 Mbit/s when nothing disturbs it


@pytest.mark.network
def test_duplicated_late_and_lost_packets_over_ipv6() -> None:
    """Each of these only costs time, over IPv4 and IPv6 alike."""
    with (
        Link(delay=0.01, loss=0.01, duplicates=0.05, reordered=0.2) as link,
        Move(
            link,
            "demo:8m,hot=2m,fill=random",
            "--channels",
            "4",
            "--downtime-limit",
            "1000",
            host=FAR6,
        ) as move,
    ):
        assert move.address.startswith(f"tcp:[{FAR6}]:")
        move.assert_arrives()


# ---------------------------------------------------------------- silence


def in_round(link: Link, move: Move, number: int) -> None:
    """Wait until the middle of that round."""
    if number > 1:
        move.source.read_line(rf"round {number}: ")
    carried = link.carried()
    until(lambda: link.carried() > carried + 2 * MIB, f"the middle of round {number}")


def in_pause(link: Link, move: Move, number: int) -> None:
    """Wait until the guest is paused. READY is then still a long round trip away."""
    until(lambda: move.guest.state == State.PAUSED, "the pause")


MOMENTS = {"round 1": (in_round, 1), "round 2": (in_round, 2), "pause": (in_pause, 0)}
# Rounds of at least two seconds, none of which is short enough to be the last.
ENDLESS = ("demo:24m,hot=16m,fill=random", "--capability", "xbzrle=off", "--progress", "plain")
# The pause is longer than the round trip alone, and it is allowed to be.
SHORT = ("demo:4m,hot=1m,rate=20000,fill=random", "--downtime-limit", "3000")


@pytest.mark.network
@pytest.mark.parametrize("moment", MOMENTS)
def test_silence_before_commit_leaves_guest_at_source(moment: str) -> None:
    """Both ends notice within --peer-timeout, report it, and exit with 1."""
    wait_for, number = MOMENTS[moment]
    slow = moment != "pause"
    with (
        Link(60_000_000 if slow else 0, delay=0.0 if slow else LONG_WAY) as link,
        Move(link, *(ENDLESS if slow else SHORT)) as move,
    ):
        wait_for(link, move, number)
        link.cut()
        cut_at = time.monotonic()
        assert move.guest.owner != Owner.RELINQUISHED
        move.assert_kept(cut_at)
        for program in (move.source, move.receiver):
            assert re.search(r"has said nothing for 3(\.\d+)? s", program.err), program.err


@pytest.mark.network
@pytest.mark.parametrize("deaf", ["near", "far"])
def test_one_way_path_is_detected(deaf: str) -> None:
    """The side that still receives is told by the other, or finds its data unacknowledged."""
    with Link(60_000_000) as link, Move(link, *ENDLESS, "--channels", "4") as move:
        in_round(link, move, 1)
        link.cut(deaf)
        move.assert_kept(time.monotonic())


@pytest.mark.network
def test_path_that_drops_large_packets_is_detected() -> None:
    """The handshake and the pings pass, but no data does."""
    with Link() as link:
        link.cut("far", above=1000)
        with Move(link, *SHORT) as move:
            move.assert_kept(time.monotonic())


# Where nothing arrives any more, in this order.
CUT_AFTER_COMMIT = {"GO": ["far", "near"], "RUNNING": ["near"]}


@pytest.mark.network
@pytest.mark.parametrize("lost", CUT_AFTER_COMMIT)
def test_silence_after_commit_never_makes_two_owners(lost: str) -> None:
    """The source asks in vain and exits with 9, its guest paused. The destination runs the guest if
    GO arrived, and else aborts."""
    with Link(delay=LONG_WAY) as link, Move(link, *SHORT) as move:
        until(lambda: move.guest.owner == Owner.RELINQUISHED, "the commit")
        link.cut(*CUT_AFTER_COMMIT[lost])  # GO is on its way
        cut_at = time.monotonic()
        landed = move.landed()
        assert len(landed) == 1
        assert move.source.wait(PATIENCE) == 9, move.source.err
        assert time.monotonic() - cut_at < PEER_TIMEOUT + RESOLVE + SLACK
        assert "asking whose the guest is" in move.source.err
        assert "look there first" in move.source.err
        received = move.receiver.wait(PATIENCE)
        assert time.monotonic() - cut_at < PEER_TIMEOUT + RESOLVE + SLACK
        assert ended_or_given_up(move.pid)
        if lost == "RUNNING":
            assert received == 0, move.receiver.err
            assert "the source may not know" in move.receiver.err
            assert guest_pid(move.receiver.out) == landed[0]
            assert_guest_is_right(landed[0])
        else:
            assert received == 1
            assert "has said nothing for" in move.receiver.err
            until(lambda: gone(landed[0]), "the end of what had arrived")


@pytest.mark.network
@pytest.mark.parametrize("lost", CUT_AFTER_COMMIT)
def test_short_silence_after_commit_completes(lost: str) -> None:
    """Both sides notice the dead connection; then the link is back, and the source asks."""
    with Link(delay=LONG_WAY) as link, Move(link, *SHORT) as move:
        until(lambda: move.guest.owner == Owner.RELINQUISHED, "the commit")
        link.cut(*CUT_AFTER_COMMIT[lost])
        move.source.read_line("asking whose the guest is")
        link.mend()
        move.assert_arrives()


@pytest.mark.network
def test_silence_in_the_handshake_times_out() -> None:
    """The destination then waits for the next source, since no guest was described to it."""
    with Link(delay=LONG_WAY) as link, Move(link, *SHORT) as move:
        there = Path(f"/proc/{move.receiver.process.pid}/net/tcp")
        until(lambda: f" {ESTABLISHED} " in there.read_text(), "the connection")
        link.cut()
        cut_at = time.monotonic()
        assert move.source.wait(PATIENCE) == 1, move.source.err
        assert time.monotonic() - cut_at < PEER_TIMEOUT + SLACK
        assert "has said nothing for" in move.source.err
        move.receiver.read_line("refused .* has said nothing for")
        assert_guest_is_right(move.pid)


def test_unresponsive_host_times_out() -> None:
    with Link() as link:
        link.cut()
        began = time.monotonic()
        source = Program(
            "migrate-src", "--connect-timeout", "1s", f"tcp:{FAR}:4444", namespace=link.near
        )
        assert source.wait(PATIENCE) == 3
        assert time.monotonic() - began < 1 + SLACK
        assert f"no answer from tcp:{FAR}:4444 within 1 s" in source.err


@pytest.mark.network
def test_link_restored_before_timeout_is_reused() -> None:
    """The link is down for almost half of --peer-timeout; neither side gives up."""
    with (
        Link(20_000_000, delay=0.1) as link,
        Move(
            link,
            "demo:16m,hot=1m,rate=20000,fill=random",
            "--channels",
            "2",
            "--downtime-limit",
            "3000",
            timeout=12,  # a busy machine needs some of what the kernel leaves of it
        ) as move,
    ):
        in_round(link, move, 1)
        link.cut()
        time.sleep(5.5)
        link.mend()
        move.assert_arrives()


LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("mechanism", ["TCP_USER_TIMEOUT", "keepalive"])
def test_kernel_timeout_detects_lost_peer(loop: str, mechanism: str) -> None:
    """Without our own pings, unacknowledged data ends a link, and so does an idle silence."""
    with Link() as link:
        with link.inside("far"):
            server = socket.create_server((FAR, 0))

        async def lose() -> float:
            peer = await connect(Address(*server.getsockname()), peer_timeout=PEER_TIMEOUT)
            assert peer._timer is not None
            peer._timer.cancel()
            await asyncio.sleep(0.1)
            await asyncio.to_thread(link.cut)
            began = time.monotonic()
            if mechanism == "TCP_USER_TIMEOUT":
                peer._write_now(bytearray(b"anything"))
            async with asyncio.timeout(PATIENCE):
                with pytest.raises(PeerLost, match="timed out"):
                    await peer.receive()
            return time.monotonic() - began

        with server, link.inside("near"), asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            assert PEER_TIMEOUT / 3 < runner.run(lose()) < PEER_TIMEOUT * 1.5 + SLACK


# ---------------------------------------------------------------- a slow reader


# The queue of the connection, which one batch may overshoot; a batch that is being made, one that
# is done, and one whose memory is used again; and what the allocator holds in reserve.
SENDER_BOUND = SEND_HIGH + 4 * BATCH_BYTES + 4 * MIB
# What waits to be applied, one frame that overshoots and one that comes in, in arenas of two bodies
# of which a part may be free, and as much for the allocator.
RECEIVER_BOUND = RECEIVE_AHEAD_BYTES + 6 * MAX_BODY + 4 * MIB
BIG = "demo:128m,hot=1m,rate=20000,fill=random"


def peak(pid: int, seconds: float) -> int:
    """Return the peak private memory of a process, in bytes, over the next `seconds`."""
    most, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        most = max(most, private_memory(pid))
        time.sleep(0.01)
    return most


@pytest.mark.network
def test_source_memory_is_bounded_on_a_slow_link() -> None:
    """128 MiB on a link that would need 9 minutes: the send queue is bounded."""
    with Link(2_000_000) as link, Move(link, BIG, "--capability", "xbzrle=off", timeout=30) as move:
        move.receiver.read_line("receiving a demo guest")
        base = private_memory(move.source.process.pid)
        assert peak(move.source.process.pid, 4) < base + SENDER_BOUND
        move.source.kill(signal.SIGINT)
        assert move.source.wait(PATIENCE) == 130
        assert_guest_is_right(move.pid)


@pytest.mark.network
def test_source_memory_is_bounded_when_destination_stops_reading() -> None:
    """It is stopped for less than --peer-timeout, then completes."""
    with Link() as link, Move(link, BIG, "--capability", "xbzrle=off", timeout=30) as move:
        move.receiver.read_line("receiving a demo guest")
        base = private_memory(move.source.process.pid)
        carried = link.carried()
        until(lambda: link.carried() > carried + 32 * MIB, "the first bytes")
        move.receiver.kill(signal.SIGSTOP)
        assert peak(move.source.process.pid, 3) < base + SENDER_BOUND
        carried = link.carried()
        time.sleep(0.5)
        assert link.carried() - carried < MIB, "it went on sending"
        move.receiver.kill(signal.SIGCONT)
        move.assert_arrives()


SLOW_WORKER = """
import itertools, sys, time
from migrate.destination import page_receiver
from migrate.cli.migrate_dst import main
numbers = itertools.count(1)
class SlowDecoder(page_receiver.PageDecoder):
    def apply(self, *arguments):
        time.sleep({stall} if next(numbers) == 3 else {usual})
        super().apply(*arguments)
page_receiver.PageDecoder = SlowDecoder
main()
"""


@contextlib.contextmanager
def slow_destination(
    *options: str, usual: float = 0.0, stall: float = 0.0
) -> Iterator[tuple[Measured, str]]:
    """Start a migrate-dst that takes `usual` seconds to apply a batch, as on a slow disk, and
    `stall` seconds for the third one."""
    program = [sys.executable, "-c", SLOW_WORKER.format(usual=usual, stall=stall)]
    with Measured([*program, "--listen", "127.0.0.1:0", *options]) as receiver:
        yield receiver, receiver.wait_for(r"listening on (\S+)")[1]


@pytest.mark.network
def test_destination_memory_is_bounded_on_a_slow_disk(shm: Path) -> None:
    (shm / "memory").write_bytes(os.urandom(64 * MIB))
    with slow_destination("--output", str(shm / "output"), usual=0.05) as (receiver, address):
        base = private_memory(receiver.pid)
        command = [str(BIN / "migrate-src"), "--guest", f"file:{shm}/memory", address]
        with Measured(command) as source:
            assert source.wait(PATIENCE).status == 0, source.err
        assert receiver.wait(PATIENCE).status == 0, receiver.err
        assert receiver.memory < base + RECEIVER_BOUND
    assert (shm / "memory").read_bytes() == (shm / "output").read_bytes()


@pytest.mark.network
def test_destination_busy_beyond_the_timeout_is_not_lost(shm: Path) -> None:
    """A disk that stalls keeps it from reading, not from saying that it lives. All of the guest
    has been sent: six batches, of which four may wait, so that the destination does not read, and
    the source has nothing to do but to listen. (With more to send, it would find that nothing is
    taken for so long, and give up: TCP_USER_TIMEOUT.)"""
    (shm / "memory").write_bytes(os.urandom(12 * MIB))
    options = ["--peer-timeout", "4s"]
    output = ["--output", str(shm / "output")]
    with slow_destination(*output, *options, stall=10) as (receiver, address):
        command = [str(BIN / "migrate-src"), *options, "--guest", f"file:{shm}/memory", address]
        with Measured(command) as source:
            assert source.wait(PATIENCE).status == 0, source.err
        assert receiver.wait(PATIENCE).status == 0, receiver.err
    assert (shm / "memory").read_bytes() == (shm / "output").read_bytes()
