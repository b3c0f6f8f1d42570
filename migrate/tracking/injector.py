"""The injector: a process that has other processes make a userfaultfd for us.

It is a process of its own because it must not be killed between two steps (see _injection.pyx): it
is in a session of its own, ignores the signals of a terminal and of a shutdown, and does nothing
else. The source asks for one process at a time, over a socket; the answer carries the descriptor:

    us         {"pid": 4711, "start_time": "8431"}
    injector   {"seconds": 0.00005} and the descriptor, or {"reason": "gdb (4712) traces it"}
    (end of file: the source has ended)
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from typing import Any, NamedTuple

from migrate.runtime import helper_process, processes
from migrate.runtime.proc_lines import proc_lines
from migrate.tracking._injection import INSTRUCTION, inject
from migrate.tracking.record import Refused

FILTERED = "its system calls are filtered (seccomp), and the filter may end it"
PATIENCE = 10.0
STOP_PATIENCE = 1.0
MESSAGE_BYTES = 4096
# A vdso has a few pages.
VDSO_BYTES = 1 << 20
# A look at a thread takes 40 microseconds, and a process may have tens of thousands.
MAX_THREADS = 64
# Tools that run a program inside themselves, with system calls of their own in between.
SUPERVISORS = ("valgrind", "vgpreload_", "librrpreload", "libdynamorio", "pinbin")


# -- the process


def _status(pid: int) -> dict[bytes, bytes]:
    """Return all fields; processes.status has only those before the groups."""
    pairs = (line.partition(b":") for line in proc_lines(f"/proc/{pid}/status"))
    return {name: value.strip() for name, _, value in pairs}


def check_recordable(pid: int, maps: list[bytes]) -> None:
    """Raise Refused if the system call would harm a process, or would not tell all its writes.

    maps -- the lines of /proc/PID/maps
    """
    status = _status(pid)
    if tracer := int(status.get(b"TracerPid", b"0")):
        name = processes.command_name(tracer)
        raise Refused(f"{name} ({tracer}) traces it: detach it, if it need not")
    if status.get(b"Seccomp", b"0") != b"0":
        raise Refused(FILTERED)
    if int(status.get(b"VmPin", b"0 kB").split()[0]):
        raise Refused("a device may write to its memory directly: pages of it are pinned")
    for line in maps:
        if tool := next((tool for tool in SUPERVISORS if tool.encode() in line), ""):
            raise Refused(f"it runs under a tool that handles its system calls ({tool})")


def _instruction(pid: int, maps: list[bytes]) -> int:
    """Return the address of a system call instruction in a process. Raises Refused, OSError.

    It is looked for in the vdso alone, which is the kernel's own code. To read other memory may
    take as long as a file system of that user likes.
    """
    for line in maps:
        addresses, access, _, _, inode, name = line.split(b" ", 5)
        if name.strip() == b"[vdso]" and inode == b"0" and access.startswith(b"r-x"):
            start, end = (int(word, 16) for word in addresses.split(b"-"))
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                memory.seek(start)
                found = memory.read(min(end - start, VDSO_BYTES)).find(INSTRUCTION)
            if found >= 0:
                return start + found
    raise Refused("it has no vdso, whose system call instruction would be used")


class _Thread(NamedTuple):
    """A thread, and how much it would notice a stop: the less, the better.

    first -- the first argument of the system call that it is in
    """

    rank: int
    number: int
    first: int


def _threads(pid: int) -> list[_Thread]:
    """Return the threads of a process that can be stopped, the best first."""
    found = []
    for name in os.listdir(f"/proc/{pid}/task")[:MAX_THREADS]:
        number, state = int(name), processes.state(int(name))
        with contextlib.suppress(OSError):
            words = proc_lines(f"/proc/{pid}/task/{number}/syscall")[0].split(b" ")
            if state and state not in processes.ENDED:
                waits = words[0] != b"running"
                first = int(words[1], 16) if len(words) > 1 and int(words[0]) >= 0 else 0
                found.append(_Thread(waits + 2 * (state == "D"), number, first))
    return sorted(found)


def serve(pid: int, start_time: str) -> tuple[int, float]:
    """Return a userfaultfd of a process, and for how many seconds a thread of it was stopped.

    Raises Refused.
    """
    try:
        handle = os.pidfd_open(pid)
    except OSError as error:
        raise Refused(f"it cannot be held: {error.strerror}") from None
    try:
        if start_time and processes.start_time_of(pid) != start_time:
            raise Refused("it has ended")
        maps = proc_lines(f"/proc/{pid}/maps")
        check_recordable(pid, maps)
        at, reason = _instruction(pid, maps), "it has no threads that can be stopped"
        users = _status(pid)[b"Uid"]
        for thread in _threads(pid):
            try:
                fd, seconds = inject(
                    pid, thread.number, handle, users, at, thread.first, STOP_PATIENCE
                )
            except OSError as error:
                reason = _words(error)
                if error.errno != errno.ESRCH:  # this thread has ended; another one may do
                    break
            else:
                return _userfaultfd(fd), seconds
        raise Refused(reason)
    except OSError as error:
        raise Refused(_words(error)) from None
    finally:
        os.close(handle)


def _userfaultfd(fd: int) -> int:
    """Return a descriptor that is one; the process may have replaced the call meanwhile."""
    if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[userfaultfd]":
        os.close(fd)
        raise Refused("it gave another descriptor than it was asked for")
    return fd


def _words(error: OSError) -> str:
    return {
        errno.EPERM: "it may not be traced (another user's, or ptrace is restricted: "
        "/proc/sys/kernel/yama/ptrace_scope)",
        errno.EACCES: "it may not be traced (another user's)",
        errno.ESRCH: "it has ended",
        errno.ETIMEDOUT: "it hangs in the kernel",
        errno.ENOEXEC: "it is a 32-bit program",
        errno.ENOTSUP: FILTERED,
        errno.ESTALE: "it has changed meanwhile",
        errno.ENOSYS: "this kernel has no userfaultfd(2)",
    }.get(error.errno or 0, error.strerror or str(error))


def main() -> None:
    helper_process.ignore_signals()
    channel = socket.socket(fileno=int(sys.argv[1]))
    while request := channel.recv(MESSAGE_BYTES):
        asked = json.loads(request)
        try:
            fd, seconds = serve(asked["pid"], asked["start_time"])
        except Refused as refused:
            channel.send(json.dumps({"reason": str(refused)}).encode())
            continue
        socket.send_fds(channel, [json.dumps({"seconds": seconds}).encode()], [fd])
        os.close(fd)


# -- the source's end


class Injector:
    """Starts the process when it is first needed. Blocking: use it in the worker thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def userfaultfd(self, pid: int, start_time: str) -> tuple[int, float]:
        """Return a userfaultfd of a process, and for how many seconds a thread of it was stopped.

        Raises Refused.
        """
        channel = self._channel or self._start()
        try:
            channel.send(json.dumps({"pid": pid, "start_time": start_time}).encode())
            data, fds, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, 1)
        except OSError:
            data, fds = b"", []
        if not data:
            self.close()
            raise Refused("the process that traces it has died or hangs")
        answer: dict[str, Any] = json.loads(data)
        if "reason" in answer:
            raise Refused(answer["reason"])
        return fds[0], answer["seconds"]

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(PATIENCE)
        with theirs:
            command = helper_process.command("migrate.tracking.injector", str(theirs.fileno()))
            self._process = subprocess.Popen(
                command, env=helper_process.environment(), pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._channel = ours
        return ours

    def close(self) -> None:
        """End the process, once it is done with what it does."""
        channel, self._channel = self._channel, None
        process, self._process = self._process, None
        if channel is not None:
            channel.close()
        if process is not None:
            try:
                process.wait(STOP_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_PATIENCE)
                    return
                # It hangs in the kernel, and ends when that lets it. Nothing waits for it.
                process.returncode = -signal.SIGKILL


if __name__ == "__main__":
    main()
