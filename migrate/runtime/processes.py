"""Other processes: what the kernel tells about them, and a handle that names one process only.

A number does not name a process: once it has ended, the kernel gives the number to another one.
`Process` keeps a pidfd. If the kernel or a sandbox has none (before Linux 5.3, gVisor, old seccomp
profiles), it compares the start time before each signal, and polls for the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import signal

from migrate.errors import MigrationError
from migrate.output import printable
from migrate.runtime.proc_lines import proc_lines

# The interval of polling a process that has no pidfd for its end.
POLL_SECONDS = 0.1
# States of a thread, as in proc(5).
STOPPED = frozenset("Tt")
ENDED = frozenset("ZX")
KERNEL_THREAD = 0x00200000  # PF_KTHREAD
FREEZER = "/sys/fs/cgroup"
STATUS_BYTES = 4096


def _stat(path: str) -> list[str]:
    """Return the fields of a stat file of /proc, from the state on; none if it is unreadable."""
    try:
        line = b"\n".join(proc_lines(path))
    except OSError:
        return []
    # The name of a program may hold any bytes, and ends at the last parenthesis.
    return line.rpartition(b")")[2].decode("ascii", "replace").split()


def command_name(pid: int) -> str:
    """Return the name of a process's program, printable; "?" if it has ended."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as name:
            return printable(os.fsdecode(name.read().rstrip(b"\n")))
    except OSError:
        return "?"


def _fields(pid: int) -> list[str]:
    return _stat(f"/proc/{pid}/stat")


def state(pid: int) -> str:
    """Return the state of a process as one letter of proc(5); "" if there is no such process."""
    return "".join(_fields(pid)[:1])


def start_time_of(pid: int) -> str:
    """Return when a process started, in clock ticks since boot; "" if it has ended.

    Number and start time together name a process, also for a later program.
    """
    fields = _fields(pid)
    return "" if not fields or _has_ended(pid, fields) else fields[19]


def _has_ended(pid: int, fields: list[str]) -> bool:
    """Return whether all threads have ended. A main thread that ends first becomes a zombie."""
    return fields[0] in ENDED and task_states(pid) <= ENDED


def tasks(pid: int) -> dict[int, str]:
    """Return the state of each thread of a process; none if /proc does not show them."""
    found = {}
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            if fields := _stat(f"/proc/{pid}/task/{task}/stat"):
                found[int(task)] = fields[0]
    return found


def task_states(pid: int) -> set[str]:
    """Return the states that threads of a process are in."""
    return set(tasks(pid).values())


def exists(pid: int) -> bool:
    """Return whether there is such a process, even if /proc does not show it (hidepid)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    except OverflowError:
        return False
    return True


def is_stopped(pid: int) -> bool:
    """Return whether no thread of a process runs: all are stopped, ended or frozen.

    Raises MigrationError if the process exists and /proc does not show it.
    """
    states = task_states(pid)
    if not states and exists(pid):
        # It may have just ended, and wait for its parent.
        if task_states(pid):
            return is_stopped(pid)
        raise MigrationError(
            f"process {pid} is not shown by /proc (hidepid?): whether it has stopped cannot be seen"
        )
    return states <= STOPPED | ENDED or is_frozen(pid)


def is_stopping(pid: int) -> bool:
    """Return whether a process is about to stop: SIGSTOP is pending, or some threads have stopped.

    SIGSTOP takes effect some time after kill(2) has returned, when each thread gets a processor.
    """
    if task_states(pid) & STOPPED:
        return True
    with contextlib.suppress(OSError):
        for line in proc_lines(f"/proc/{pid}/status"):
            name, _, mask = line.partition(b":\t")
            if name in (b"SigPnd", b"ShdPnd") and int(mask, 16) >> (signal.SIGSTOP - 1) & 1:
                return True
    return False


def is_frozen(pid: int) -> bool:
    """Return whether the freezer of its cgroup, of version 1 or 2, has stopped a process."""
    with contextlib.suppress(OSError, ValueError):
        for line in proc_lines(f"/proc/{pid}/cgroup"):
            number, controllers, name = line.split(b":", 2)
            path = os.fsdecode(name)  # chosen by any user who has a cgroup of his own
            if number == b"0":
                file, frozen = f"{FREEZER}{path}/cgroup.events", b"frozen 1"
            elif b"freezer" in controllers.split(b","):
                file, frozen = f"{FREEZER}/freezer{path}/freezer.state", b"FROZEN"
            else:
                continue
            with contextlib.suppress(OSError):
                if frozen in proc_lines(file):
                    return True
    return False


def is_kernel_thread(pid: int) -> bool:
    """Return whether a process is a thread of the kernel's own."""
    fields = _fields(pid)
    return bool(fields) and bool(int(fields[6]) & KERNEL_THREAD)


def status(pid: int) -> dict[str, str]:
    """Return the first fields of /proc/PID/status, up to Gid at least; none if it is unreadable.

    The groups that come next may be 65536, and the name that comes first may hold any bytes.
    """
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb", buffering=0) as file:
        text = (file.read(STATUS_BYTES) or b"").decode("utf-8", "replace")
        pairs = (line.partition(":") for line in text.split("\n"))
        return {name: value.strip() for name, _, value in pairs}
    return {}


def user_ids(pid: int) -> frozenset[int]:
    """Return the real, effective, saved and file system user of a process; none if hidden.

    The owner of /proc/PID is no substitute: it is root for a process that dumps no core.
    """
    return frozenset(map(int, status(pid).get("Uid", "").split()))


def owners(file: os.stat_result) -> frozenset[int]:
    """Return the users who may do as they like with a file: root, its owner, and we."""
    return frozenset({0, os.geteuid(), file.st_uid})


def ancestors() -> set[int]:
    """Return the parent of this process, its parent, and so on."""
    found: set[int] = set()
    pid = os.getppid()
    while pid > 0 and pid not in found:
        found.add(pid)
        fields = _fields(pid)
        pid = int(fields[1]) if fields else 0
    return found


class Process:
    """A handle on one process.

    start_time -- the result of start_time_of, if it is known from before

    Raises ProcessLookupError if the process has ended (another one may have its number now), and
    MigrationError if nothing here can tell it from a later one.
    """

    def __init__(self, pid: int, start_time: str = "") -> None:
        self.pid = pid
        self._fd = -1
        try:
            if pid <= 0:  # these stand for groups of processes
                raise ProcessLookupError
            self._fd = os.pidfd_open(pid)
        except (ProcessLookupError, OverflowError):
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
        except OSError:
            pass  # missing, forbidden, or a thread: compare start times instead
        started = start_time_of(pid)
        self.start_time = start_time or started
        if self.ended() or self.start_time not in (started, ""):
            self.close()
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        if self._fd < 0 and not started:
            raise MigrationError(
                f"process {pid} cannot be told from a later one with its number: there is no "
                "pidfd_open(2) here, and /proc does not show it"
            )

    def ended(self) -> bool:
        """Return whether the process has ended. A zombie has."""
        if self._fd >= 0:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            return bool(poll.poll(0))
        return not exists(self.pid) or start_time_of(self.pid) != self.start_time

    def signal(self, number: int) -> None:
        """Send a signal. Raises ProcessLookupError if the process has ended, PermissionError."""
        if self._fd >= 0:
            try:
                signal.pidfd_send_signal(self._fd, number)
                return
            except OSError as error:
                # A sandbox may say EPERM for "missing". With the number, the kernel decides.
                if error.errno not in (errno.ENOSYS, errno.EPERM):
                    raise
        if self.ended():
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        os.kill(self.pid, number)

    async def wait(self) -> None:
        """Wait until the process has ended."""
        if self._fd < 0:
            while not self.ended():
                await asyncio.sleep(POLL_SECONDS)
            return
        loop = asyncio.get_running_loop()
        end = asyncio.Event()
        loop.add_reader(self._fd, end.set)  # a pidfd becomes readable when its process ends
        try:
            await end.wait()
        finally:
            loop.remove_reader(self._fd)

    def close(self) -> None:
        """Close the handle. May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
