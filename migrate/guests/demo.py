"""The demo guest: the seed's load generator, as a process of its own.

Its memory is a memfd that the process, the source and the destination share:

    control block (4096 bytes) | dirty marks, a byte per page | guest memory

    word  control block (64-bit, native order)
    0     command: 1 run, 2 pause, 3 end
    1     state: 0 starting, 1 running, 2 paused
    2, 3  place: sweeps done, index of the next increment
    4     owner: 0 ours; 1 given up to a destination, will not run here again; 2 not ours yet;
          3 whole, and not ours yet
    5..11 magic, size, hot, stride, rate (float bits), fill, page size
    12    throttle: percent of its time that is taken from it, 0 to 99

Whoever pauses it holds a lock (flock) on the memfd. The kernel drops that lock when its holder
dies, however it dies; a paused guest that can take the lock goes on if it is ours, and ends if it
is half a guest, which nobody will ever own. One that was given up, or that is whole and waits to be
ours, stays paused: a journal tells whose it is. So a killed source never leaves a stopped guest
behind that is its own, a killed destination never a second one, and no two sources move the same.
The lock is looked at while the guest is throttled too: it runs at its own speed when nobody has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import mmap
import os
import signal
import stat
import struct
import subprocess
from dataclasses import dataclass
from typing import Any

from migrate._memory import first_wrong
from migrate.available import machine_memory
from migrate.directory import is_trusted
from migrate.errors import MigrationError, UsageError
from migrate.guests import isolated
from migrate.guests.guest import MemoryGuest, Place
from migrate.guests.process import Process
from migrate.memory import Memory
from migrate.parameters import PAGE_SIZES
from migrate.quantities import format_size, parse_size
from migrate.tracking import DirtyTracker, MarkTracker
from proto.kernel import PageEncoder
from proto.messages import GuestInfo

MAGIC = 0x58424D44454D4F31
CONTROL_BYTES = 4096
COMMAND, STATE, SWEEP, INDEX, OWNER = range(5)
THROTTLE = 12
OURS, GIVEN_UP, NOT_YET_OURS, PREPARED = range(4)
SHAPE = 5
RUN, PAUSE, END = 1, 2, 3
STARTING, RUNNING, PAUSED = 0, 1, 2
STATE_FORMAT = struct.Struct(">4sQQdQQQ")
STATE_MAGIC = b"demo"
MEMORY_ALIGN = 2 << 20
MAX_BYTES = 1 << 62
PATIENCE = 10.0


@dataclass(frozen=True)
class DemoShape:
    """What a demo guest is: `size` bytes, of which those at multiples of `stride` below `hot` are
    counted up, `rate` per second (0: full speed). `random` fills the rest with a fixed pattern.
    """

    size: int
    hot: int
    stride: int
    rate: float = 0.0
    random: bool = False
    page_size: int = 4096

    @property
    def marks(self) -> int:
        return (-(-self.size // self.page_size) + 7) // 8 * 8

    @property
    def memory_offset(self) -> int:
        return -(-(CONTROL_BYTES + self.marks) // MEMORY_ALIGN) * MEMORY_ALIGN

    @property
    def padded(self) -> int:
        return -(-self.size // self.page_size) * self.page_size

    @property
    def total(self) -> int:
        return self.memory_offset + self.padded

    def check_fits(self) -> None:
        """Raises UsageError where there is not enough free memory."""
        available = machine_memory()
        if available and self.total > available:
            raise UsageError(
                f"a demo guest of {format_size(self.size)} does not fit the "
                f"{format_size(available)} of free memory here"
            )


def parse_demo(spec: str, page_size: int) -> DemoShape:
    """Reads `[SIZE][,hot=SIZE][,stride=BYTES][,rate=N][,fill=zero|random]`."""
    values: dict[str, str] = {}
    for position, item in enumerate(spec.split(",")) if spec else ():
        name, equals, value = item.partition("=")
        if not equals and position == 0:
            name, value = "size", item
        if name not in ("size", "hot", "stride", "rate", "fill") or not value or name in values:
            raise UsageError(
                f"guest demo: {item!r} is not understood: write demo[:SIZE][,hot=SIZE]"
                "[,stride=BYTES][,rate=N][,fill=zero|random]"
            )
        values[name] = value
    size = parse_size(values.get("size", "16m"), "guest demo: size")
    hot = parse_size(values.get("hot", str(size)), "guest demo: hot")
    stride = parse_size(values.get("stride", "1024"), "guest demo: stride")
    fill = values.get("fill", "zero")
    rate = values.get("rate", "0")
    if not rate.isdecimal() or len(rate) > 12:
        raise UsageError(f"guest demo: rate {rate!r} is not a number of writes per second")
    if fill not in ("zero", "random"):
        raise UsageError(f"guest demo: fill {fill!r} is neither zero nor random")
    if not 0 < hot <= size or stride == 0:
        raise UsageError(
            f"guest demo: hot={hot} and stride={stride} do not fit a guest of {size} bytes: "
            "hot must be 1 byte to the whole size, stride at least 1"
        )
    return DemoShape(size, hot, stride, float(rate), fill == "random", page_size)


class DemoProcess:
    """A handle on a demo guest: its process, held from here on, and its shared memory.

    Raises UsageError where the memory is none that a demo guest has; what was given is closed then.
    """

    def __init__(self, fd: int, process: Process) -> None:
        self.fd = fd
        self._process = process
        self.pid, self.born = process.pid, process.born
        try:
            self.shape = _shape_of(fd, f"process {process.pid} is not a demo guest")
            self._map = mmap.mmap(fd, self.shape.total)
        except BaseException:
            os.close(fd)
            process.close()
            raise
        whole = memoryview(self._map)
        self.words = whole[:CONTROL_BYTES].cast("Q")
        start = self.shape.memory_offset
        self.marks = whole[CONTROL_BYTES : CONTROL_BYTES + self.shape.marks]
        self.memory = whole[start : start + self.shape.padded]

    @classmethod
    def create(cls, shape: DemoShape, *, paused: bool) -> DemoProcess:
        """Starts a demo guest: running, or waiting for its memory (`paused`)."""
        shape.check_fits()
        try:
            fd = os.memfd_create("xbmigrate-demo", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise UsageError(
                f"a demo guest needs memfd_create(2), which cannot be had here: {error.strerror}"
            ) from None
        own = -1
        try:
            _lay_out(fd, shape, paused=paused)
            # Locked before there is a process that could find the lock free; on a description of
            # our own, which it does not inherit.
            own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
            if paused:
                fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            process = Process(_spawned(fd, [] if paused else ["--fill"]))
        except BaseException as error:
            if own >= 0:
                os.close(own)
            if isinstance(error, ProcessLookupError):
                raise UsageError("a demo guest ended as soon as it was started") from None
            raise
        finally:
            os.close(fd)
        return cls(own, process)

    @classmethod
    def attach(cls, pid: int, born: str = "") -> DemoProcess:
        """A handle on a demo guest that is there already: the number is somebody's word, `born`
        its start time where that is known. Raises UsageError."""
        try:
            return cls.of(Process(pid, born))
        except ProcessLookupError as error:
            raise UsageError(f"no demo guest in process {pid}: {error.strerror}") from None

    @classmethod
    def of(cls, process: Process) -> DemoProcess:
        """A handle on a demo guest that is there already; takes `process` over. Raises
        UsageError."""
        try:
            fd = _memory_of(process)
        except BaseException:
            process.close()
            raise
        return cls(fd, process)

    def lock(self) -> None:
        """Takes the right to pause. Raises UsageError where another program has it."""
        own = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(own)
            raise UsageError(
                f"the demo guest in process {self.pid} is being moved by another program"
            ) from None
        os.close(self.fd)
        self.fd = own

    def state(self) -> int:
        return int(self.words[STATE])

    async def command(self, command: int, state: int) -> None:
        """Gives a command and waits until the guest is in that state."""
        self.words[COMMAND] = command
        loop = asyncio.get_running_loop()
        end = loop.time() + PATIENCE
        pause = 0.0002
        while self.words[STATE] != state:
            if loop.time() > end or not self.alive():
                raise MigrationError(f"the demo guest (process {self.pid}) does not answer")
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.01)

    def alive(self) -> bool:
        return not self._process.ended()

    def kill(self) -> None:
        """Ends it, where it has not ended; never another process with its number."""
        with contextlib.suppress(ProcessLookupError):
            self._process.signal(signal.SIGKILL)

    def place(self) -> tuple[int, int]:
        """(sweeps, index): how far it has counted."""
        return self.words[SWEEP], self.words[INDEX]

    def first_wrong(self) -> int:
        """Checks every byte of the paused guest; the offset of the first wrong one, or -1."""
        shape = self.shape
        memory = self.memory[: shape.size]
        return first_wrong(memory, shape.hot, shape.stride, shape.random, *self.place())

    def close(self) -> None:
        """Lets go of the handle; the guest goes on."""
        for view in (self.words, self.marks, self.memory):
            view.release()
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self.fd)
        self._process.close()


def _lay_out(fd: int, shape: DemoShape, *, paused: bool) -> None:
    """Makes a memfd the memory of a new demo guest."""
    os.ftruncate(fd, shape.total)
    with contextlib.suppress(OSError):  # a kernel that has no seals does without
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    with mmap.mmap(fd, CONTROL_BYTES) as control, memoryview(control).cast("Q") as words:
        words[SHAPE] = MAGIC
        words[SHAPE + 1 : SHAPE + 4] = _words(shape.size, shape.hot, shape.stride)
        words[SHAPE + 4] = struct.unpack("Q", struct.pack("d", shape.rate))[0]
        words[SHAPE + 5] = int(shape.random)
        words[SHAPE + 6] = shape.page_size
        words[COMMAND] = PAUSE if paused else RUN
        words[OWNER] = NOT_YET_OURS if paused else OURS


def _spawned(fd: int, arguments: list[str]) -> int:
    """The number of a new process that counts in the memory `fd`."""
    process = subprocess.Popen(
        isolated.command("migrate.guests.demo_process", str(fd), *arguments),
        env=isolated.environment(), pass_fds=[fd], start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    process.returncode = 0  # it outlives us on purpose: nobody here waits for it
    return process.pid


def _demo_memory(path: str) -> int:
    """What a descriptor of a process is, opened, if it is a demo guest's memory; else -1. It is
    known what it is before it is opened: the process may make it another one at any time."""
    held = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        ours = f"/proc/self/fd/{held}"
        named = os.readlink(ours).startswith("/memfd:xbmigrate-demo")
        if not named or not stat.S_ISREG(os.fstat(held).st_mode):
            return -1
        return os.open(ours, os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.close(held)


def _memory_of(process: Process) -> int:
    """The memory of a demo guest, opened. Raises UsageError where the process has none."""
    what, base = f"no demo guest in process {process.pid}", f"/proc/{process.pid}/fd"
    fd = -1
    try:
        for name in os.listdir(base):
            with contextlib.suppress(OSError):
                fd = _demo_memory(f"{base}/{name}")
                if fd >= 0:
                    break
    except OSError as error:
        raise UsageError(f"{what}: {error.strerror}") from None
    if fd < 0:
        raise UsageError(f"{what}: it is another program")
    if process.ended():
        os.close(fd)
        raise UsageError(f"{what}: it has ended")
    return fd


def _shape_of(fd: int, what: str) -> DemoShape:
    """Reads what the memory of a demo guest says of itself, which may be another user's word.

    Raises UsageError, which begins with `what`, where it cannot be so.
    """
    there = os.fstat(fd)
    if not stat.S_ISREG(there.st_mode) or there.st_size < CONTROL_BYTES:
        raise UsageError(what)
    words = struct.unpack_from(f"{SHAPE + 7}Q", os.pread(fd, CONTROL_BYTES, 0))[SHAPE:]
    if words[0] != MAGIC:
        raise UsageError(what)
    size, hot, stride, page_size = *words[1:4], words[6]
    rate = struct.unpack("d", struct.pack("Q", words[4]))[0]
    shape = DemoShape(size, hot, stride, rate, bool(words[5]), page_size)
    fits = page_size in PAGE_SIZES and 0 < hot <= size < MAX_BYTES and stride > 0
    if not fits or shape.total != there.st_size:
        raise UsageError(f"{what}: what it says of its size and pages cannot be")
    if not is_trusted(there.st_uid) and not _keeps_its_size(fd):
        raise UsageError(
            f"{what}: user {there.st_uid} could take its memory away while it is read: start the "
            "guest with this release of migrate-src or migrate-dst"
        )
    return shape


def _keeps_its_size(fd: int) -> bool:
    with contextlib.suppress(OSError):
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    return False


def _same_process(facts: dict[str, Any]) -> DemoProcess:
    """That of a journal. Raises MigrationError where it has ended."""
    pid, born = int(facts["pid"]), str(facts["started"])
    try:
        if not born:
            raise ProcessLookupError
        process = Process(pid, born)
    except ProcessLookupError:
        raise MigrationError(f"the demo guest in process {pid} has ended") from None
    return DemoProcess.of(process)


def _words(*values: int) -> memoryview:
    return memoryview(struct.pack(f"{len(values)}Q", *values)).cast("Q")


class DemoGuest(MemoryGuest):
    """A demo guest at the source: started here, or attached to with `demo:pid=N`."""

    kind = "demo"
    marks = True
    can_throttle = True

    def __init__(self, process: DemoProcess) -> None:
        process.lock()
        self.process = process
        self.pid, self.born = process.pid, process.born
        self.description = f"demo guest, process {process.pid}"
        self.memory = Memory(process.shape.size, process.memory)

    @classmethod
    def open(cls, spec: str, page_size: int, born: str = "") -> DemoGuest:
        """born -- start time of the process in `pid=N`, where it is known"""
        if spec.startswith("pid="):
            pid = spec.removeprefix("pid=")
            if not pid.isdecimal():
                raise UsageError(f"guest demo: {spec!r} does not name a process: write pid=1234")
            process = DemoProcess.attach(int(pid), born)
            if process.shape.page_size != page_size:
                raise UsageError(
                    f"the demo guest in process {pid} has pages of {process.shape.page_size} "
                    f"bytes: give --page-size {process.shape.page_size}"
                )
            return cls(process)
        return cls(DemoProcess.create(parse_demo(spec, page_size), paused=False))

    async def started(self) -> None:
        """Waits until the guest has filled its memory, however large, and counts."""
        if self.process.words[OWNER] != OURS:
            raise UsageError(
                f"the demo guest in process {self.pid} is not ours to move: it was given up to "
                "another machine (migrate-src resolve tells)"
            )
        while self.process.state() == STARTING and self.process.alive():
            await asyncio.sleep(0.005)
        await self.process.command(RUN, RUNNING)

    def track(self, encoder: PageEncoder) -> DirtyTracker:
        return MarkTracker(self.process.marks, encoder.pages)

    async def pause(self) -> None:
        await self.process.command(PAUSE, PAUSED)

    async def resume(self) -> None:
        await self.process.command(RUN, RUNNING)

    async def throttle(self, percent: int) -> None:
        self.process.words[THROTTLE] = percent

    def state(self) -> bytes:
        shape = self.process.shape
        sweep, index = self.process.place()
        return STATE_FORMAT.pack(
            STATE_MAGIC, shape.hot, shape.stride, shape.rate, shape.random, sweep, index
        )

    async def give_up(self) -> None:
        self.process.words[THROTTLE] = 0  # should it be given back, to whomever
        self.process.words[OWNER] = GIVEN_UP

    async def take_back(self) -> None:
        self.process.words[OWNER] = OURS

    async def release(self) -> None:
        self.process.words[COMMAND] = END

    async def close(self) -> None:
        self.process.close()

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "pid": self.pid, "started": self.born}

    @classmethod
    def reopen(cls, facts: dict[str, Any]) -> DemoGuest:
        """A guest that an earlier program had given up."""
        return cls(_same_process(facts))


class DemoPlace(Place):
    """Where a demo guest lands: a process that waits for its memory and its state.

    The process is there before the first page, so that starting it costs the pause nothing.
    """

    def __init__(self, info: GuestInfo) -> None:
        # What it counts comes with its state, when the memory is whole.
        shape = DemoShape(info.size, 1, 1, page_size=info.page_size)
        self.process = DemoProcess.create(shape, paused=True)
        self.pid, self.born = self.process.pid, self.process.born
        self.memory = self.process.memory
        self.fd, self.fd_offset = self.process.fd, shape.memory_offset
        self.reads = Memory(info.size, self.process.memory)

    async def ready(self) -> None:
        await self.process.command(PAUSE, PAUSED)

    async def prepare(self, state: bytes) -> None:
        words = self.process.words
        try:
            magic, hot, stride, rate, random, sweep, index = STATE_FORMAT.unpack(state)
        except struct.error:
            magic = b""
        size = self.process.shape.size
        if (
            magic != STATE_MAGIC
            or not 0 < hot <= size
            or not 0 < stride <= 1 << 62
            or not 0 <= rate < 1e18
            or random > 1
            or index >= -(-hot // stride)
        ):
            raise MigrationError("the state of the demo guest makes no sense")
        words[SHAPE + 2 : SHAPE + 4] = _words(hot, stride)
        words[SHAPE + 4] = struct.unpack("Q", struct.pack("d", rate))[0]
        words[SHAPE + 5] = random
        words[SWEEP], words[INDEX] = sweep, index

    def secure(self) -> None:
        self.process.words[OWNER] = PREPARED

    def unprepare(self) -> None:
        self.process.words[OWNER] = NOT_YET_OURS

    def facts(self) -> dict[str, Any]:
        return {"kind": "demo", "pid": self.pid, "started": self.born}

    @classmethod
    def reopen(cls, facts: dict[str, Any]) -> DemoPlace:
        """A guest that an earlier program had prepared."""
        place = cls.__new__(cls)
        place.process = _same_process(facts)
        place.pid, place.born = place.process.pid, place.process.born
        if place.process.words[OWNER] not in (PREPARED, OURS):
            raise MigrationError(f"the guest in process {place.pid} was never whole")
        return place

    async def start(self, state: bytes) -> str:
        if not self.process.alive():
            raise MigrationError(f"the demo guest (process {self.pid}) has ended")
        self.process.words[OWNER] = OURS
        try:
            await self.process.command(RUN, RUNNING)
        except MigrationError:
            # "Never started" must be true when it is said: a process that is only slow would run
            # later, beside the source's guest.
            self.process.kill()
            raise
        sweep, index = self.process.place()
        return f"demo guest runs in process {self.pid}, from sweep {sweep}, index {index} on"

    def close(self) -> None:
        self.process.close()

    async def discard(self) -> None:
        self.process.words[COMMAND] = END
        self.process.close()
