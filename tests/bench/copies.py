"""What people do without live migration: rsync in passes, and a plain copy of a stopped guest."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from tests.bench.guest_files import random_file, same_content, shelf
from tests.bench.migration import python
from tests.bench.ours import writing
from tests.bench.processes import Measured, ProgramError
from tests.bench.workload import Attempt, Workload
from tests.network import FAR, Link

RSYNC_PORT = 8730
CANNOT_CONNECT = 10
LIVE_PASSES = 3
SHORTER = 0.9
CONFIGURATION = """\
port = {port}
address = {address}
use chroot = no
[guest]
path = {path}
read only = no
uid = {uid}
gid = {gid}
"""


def plain_copy(workload: Workload) -> Attempt:
    """Stops the writer, copies everything through one TCP connection: all of it is downtime."""
    with shelf(2 * workload.size) as directory, Link(workload.link) as link:
        path, output = random_file(directory / "guest", workload.size), directory / "arrived"
        with (
            writing(workload, str(path)) as writer,
            Measured(
                python("tests.bench.stream", "receive", FAR, "0", str(output)), link.far
            ) as receiver,
        ):
            port = receiver.wait_for(r"listening on (\d+)")[1]
            time.sleep(1)
            os.kill(writer.pid, signal.SIGSTOP)
            with Measured(
                python("tests.bench.stream", "send", FAR, port, str(path)), link.near
            ) as sender:
                sender.expect(workload.patience)
                result = json.loads(receiver.expect(workload.patience).out)
            equal = same_content(path, output)
            return Attempt(
                True, "", result["seconds"], link.carried(), result["seconds"], None,
                "equal" if equal else "WRONG", {},
            )  # fmt: skip


def rsync(workload: Workload) -> Attempt:
    """Passes while the writer writes, as long as they get shorter; then one with it stopped.

    Blocks are as large as rsync makes them by itself: with blocks of a page it sends less, and
    takes longer.
    """
    with shelf(2 * workload.size) as directory, Link(workload.link) as link:
        path, arrived = random_file(directory / "guest", workload.size), directory / "arrived"
        arrived.mkdir()
        configuration = directory / "rsyncd.conf"
        configuration.write_text(
            CONFIGURATION.format(
                port=RSYNC_PORT, address=FAR, path=arrived, uid=os.getuid(), gid=os.getgid()
            )
        )
        daemon = ["rsync", "--daemon", "--no-detach", f"--config={configuration}"]
        daemon += [f"--log-file={directory / 'rsyncd.log'}"]
        with writing(workload, str(path)) as writer, Measured(daemon, link.far):
            began = time.monotonic()
            live: list[float] = []
            while len(live) < LIVE_PASSES and (
                len(live) < 2 or live[-1] < SHORTER * live[-2]
            ):  # fmt: skip
                live.append(one_pass(path, link, workload))
            os.kill(writer.pid, signal.SIGSTOP)
            last = one_pass(path, link, workload)
            total = time.monotonic() - began
            equal = same_content(path, arrived / "guest")
            return Attempt(
                True, "", total, link.carried(), last, None, "equal" if equal else "WRONG",
                {"passes": [*live, last]},
            )  # fmt: skip


def one_pass(path: Path, link: Link, workload: Workload) -> float:
    """Seconds of one run of rsync. Every block is looked at: a mapped file keeps its date."""
    command = [
        "rsync", "--inplace", "--no-whole-file", "--ignore-times",
        str(path), f"rsync://{FAR}:{RSYNC_PORT}/guest/guest",
    ]  # fmt: skip
    for _ in range(50):
        began = time.monotonic()
        with Measured(command, link.near) as program:
            ended = program.wait(workload.patience * 2)
        if ended.status == 0:
            return time.monotonic() - began
        if ended.status != CANNOT_CONNECT:
            break
        time.sleep(0.1)  # the daemon is not there yet
    raise ProgramError(f"rsync ended with status {ended.status}: {ended.err.strip()}")
