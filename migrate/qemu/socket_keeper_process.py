"""The socket keeper: a process that keeps QEMU's socket open if the source dies in the hand-over.

QEMU lets its guest run on if its stream is closed before SHUT has come on the return path. Once GO
may have been sent, the guest may run at the destination, so an accident here must not close the
socket. This process has a copy of it.

socket_keeper.py starts it, isolated (see migrate.runtime.helper_process), with the descriptor as
its argument. It reads one letter at a time from standard input and answers each with `k`:

    g   the guest is relinquished: keep the socket whatever happens
    r   the guest is reclaimed
    (end of file: the source has ended. Keep the socket if the guest is relinquished, else exit)

A keeper whose source is gone waits for `migrate-src resolve`, which sends a signal:

    SIGUSR1   the guest runs at the destination: tell QEMU, so that it stays stopped
    SIGTERM   the guest is ours: exit; QEMU sees the end of its stream and lets the guest run
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys

from migrate.qemu.stream.return_path import MOVED
from migrate.runtime.helper_process import ACKNOWLEDGED, ignore_signals


def keep(connection: int) -> None:
    """Keep the socket until a signal decides, or QEMU has closed its end."""
    poll = select.poll()
    # Over TCP, POLLHUP needs both ends closed; POLLRDHUP tells that QEMU has closed its own.
    poll.register(connection, select.POLLRDHUP)
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: None)
    poll.register(read, select.POLLIN)
    for ready, _ in poll.poll():
        if ready == read and signal.SIGUSR1 in os.read(read, 64):
            with contextlib.suppress(OSError):
                os.set_blocking(connection, True)
                os.write(connection, MOVED)


def main() -> None:
    connection, relinquished = int(sys.argv[1]), False
    os.write(1, ACKNOWLEDGED)
    while letter := os.read(0, 1):
        relinquished = letter == b"g"
        os.write(1, ACKNOWLEDGED)
    if relinquished:
        keep(connection)


if __name__ == "__main__":
    ignore_signals(signal.SIGUSR1)
    main()
