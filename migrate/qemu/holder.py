"""The holder: a process that keeps QEMU's socket open when the source dies in the hand-over.

Started by guest.py, isolated (see migrate.guests.isolated), with the argument FD.

QEMU lets its guest run on where the stream it sends is closed without an answer; once GO may have
been said that must not happen by an accident. The holder reads one letter at a time from its
standard input:

    g   the guest is given up: whatever happens, hold on      r   it is ours again
    (end of file: the source is gone. A guest that was given up is held, another one let go)

and answers k. Held, it waits for a later program (`migrate-src resolve`):

    SIGUSR1   the guest runs at the destination: QEMU is told so, and stays stopped
    SIGTERM   it is ours: QEMU lets it run on
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import sys

from proto.qemu import Reply

MOVED = struct.pack(">HHI", Reply.SHUT, 4, 0)


def hold(connection: int) -> None:
    """Until somebody decides, or QEMU is gone."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)  # over TCP the other end's alone is no POLLHUP
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
    connection, given_up = int(sys.argv[1]), False
    os.write(1, b"k")
    while letter := os.read(0, 1):
        given_up = letter == b"g"
        os.write(1, b"k")
    if given_up:
        hold(connection)


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    main()
