"""Other processes: what the kernel says of them, and a handle that is never on a later one.

A number alone does not name a process: when it has ended, the kernel gives its number away again.
`Process` keeps a pidfd, and where the kernel or a sandbox has none (before Linux 5.3, gVisor, old
seccomp profiles) it compares the start time before each signal, and polls for the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import signal

from migrate.errors import MigrationError

# How often a process is looked at where no pidfd tells of its end.
POLL_SECONDS = 0.1
STOPPED = frozenset("Tt")
ENDED = frozenset("ZX")
KERNEL_THREAD = 0x00200000  # PF_KTHREAD
FREEZER = "/sys/fs/cgroup"


def _stat(path: str) -> list[str]:
    """A stat file of /proc, from the state on; empty where it cannot be read."""
    try:
        # The name of a program may be any bytes.
        with open(path, encoding="utf-8", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()
    except OSError:
        return []


def _fields(pid: int) -> list[str]:
    return _stat(f"/proc/{pid}/stat")


def state(pid: int) -> str:
    """One letter, as in proc(5): Z or X where it has ended; "" where there is none."""
    return "".join(_fields(pid)[:1])


def start_time(pid: int) -> str:
    """When a process started, in the kernel's own units; "" where it has ended.

    It tells a process that outlives the program that knows it from a later one with its number.
    """
    fields = _fields(pid)
    return "" if not fields or _has_ended(pid, fields) else fields[19]


def _has_ended(pid: int, fields: list[str]) -> bool:
    """A main thread that has ended is a zombie while other threads of its process go on."""
    return fields[0] in ENDED and task_states(pid) <= ENDED


def task_states(pid: int) -> set[str]:
    """The states of all its threads; empty where none can be seen."""
    states = set()
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            states |= set(_stat(f"/proc/{pid}/task/{task}/stat")[:1])
    return states


def exists(pid: int) -> bool:
    """Whether there is such a process, also where /proc does not show it (hidepid)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    except OverflowError:
        return False
    return True


def stands_still(pid: int) -> bool:
    """Whether no thread of the process runs: stopped, ended, or frozen by its cgroup.

    Raises MigrationError where it exists and /proc does not show it.
    """
    states = task_states(pid)
    if not states and exists(pid):
        # It may have ended just now, and be there for its parent.
        if task_states(pid):
            return stands_still(pid)
        raise MigrationError(
            f"process {pid} is not shown by /proc (hidepid?): whether it has stopped cannot be seen"
        )
    return states <= STOPPED | ENDED or frozen(pid)


def frozen(pid: int) -> bool:
    """Whether the freezer of its cgroup, of version 1 or 2, has stopped it."""
    with contextlib.suppress(OSError, ValueError):
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as groups:
            lines = groups.read().splitlines()
        for line in lines:
            number, controllers, path = line.split(":", 2)
            if number == "0":
                with contextlib.suppress(OSError), open(f"{FREEZER}{path}/cgroup.events") as events:
                    if "frozen 1" in events.read().splitlines():
                        return True
            elif "freezer" in controllers.split(","):
                with (
                    contextlib.suppress(OSError),
                    open(f"{FREEZER}/freezer{path}/freezer.state") as now,
                ):
                    if now.read().strip() == "FROZEN":
                        return True
    return False


def is_kernel_thread(pid: int) -> bool:
    fields = _fields(pid)
    return bool(fields) and bool(int(fields[6]) & KERNEL_THREAD)


def status(pid: int) -> dict[str, str]:
    """What /proc/PID/status says; empty where it cannot be read."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", errors="replace") as lines:
        pairs = (line.partition(":") for line in lines)
        return {name: value.strip() for name, _, value in pairs}
    return {}


def users(pid: int) -> frozenset[int]:
    """The users that a process acts for: real, effective, saved and of the file system; empty
    where it is not to be seen. The owner of /proc/PID does not say it: that is root of a process
    that wants no core dump."""
    return frozenset(map(int, status(pid).get("Uid", "").split()))


def ancestors() -> set[int]:
    """The processes that have started this one, one by the other."""
    found: set[int] = set()
    pid = os.getppid()
    while pid > 0 and pid not in found:
        found.add(pid)
        fields = _fields(pid)
        pid = int(fields[1]) if fields else 0
    return found


class Process:
    """A handle on one process.

    born -- its start_time, where it is known from before

    Raises ProcessLookupError where it has ended (also where another process has its number now),
    MigrationError where nothing here can tell it from a later one.
    """

    def __init__(self, pid: int, born: str = "") -> None:
        self.pid = pid
        self._fd = -1
        try:
            if pid <= 0:  # those stand for groups of processes
                raise ProcessLookupError
            self._fd = os.pidfd_open(pid)
        except (ProcessLookupError, OverflowError):
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
        except OSError:
            pass  # missing, forbidden, or a thread: by start time
        started = start_time(pid)
        self.born = born or started
        if self.ended() or self.born not in (started, ""):
            self.close()
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        if self._fd < 0 and not started:
            raise MigrationError(
                f"process {pid} cannot be told from a later one with its number: there is no "
                "pidfd_open(2) here, and /proc does not show it"
            )

    def ended(self) -> bool:
        if self._fd >= 0:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            return bool(poll.poll(0))
        return not exists(self.pid) or start_time(self.pid) != self.born

    def signal(self, number: int) -> None:
        """Sends a signal. Raises ProcessLookupError where it has ended, PermissionError."""
        if self._fd >= 0:
            try:
                signal.pidfd_send_signal(self._fd, number)
                return
            except OSError as error:
                # EPERM may be a sandbox's word for "missing"; by number the kernel has its say.
                if error.errno not in (errno.ENOSYS, errno.EPERM):
                    raise
        if self.ended():
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        os.kill(self.pid, number)

    async def wait(self) -> None:
        """Waits until the process has ended."""
        if self._fd < 0:
            while not self.ended():
                await asyncio.sleep(POLL_SECONDS)
            return
        loop = asyncio.get_running_loop()
        told = asyncio.Event()
        loop.add_reader(self._fd, told.set)
        try:
            await told.wait()
        finally:
            loop.remove_reader(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
