"""A QEMU whose guest sweeps its memory, driven over QMP. Its context leaves nothing behind.

    async with (
        Machine(sweep) as source,
        Machine(sweep, incoming="tcp:127.0.0.1:0", before=source, paused=True) as destination,
    ):
        await source.wait_for_count(sweep.every)
        await source.begin(await destination.uri(), "xbzrle", passes=4)
        await source.finish()
        await destination.wait_run_state("paused")
        await compare(source, destination)

Every wait is bounded. Failures raise MachineError, with what QEMU has written to standard error. A
command that QEMU refuses raises qemu.qmp.ExecuteError, with QEMU's words.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import xxhash
from qemu.qmp import EventListener, QMPClient, QMPError

from tests.machine.sweep import Sweep, differing
from tests.requirements import need

PROGRAM = "qemu-system-x86_64"
KVM = "/dev/kvm"
MIB = 1 << 20
PAGE = 4096
PIECE = 4 * MIB
DIMM_AT = 1 << 32
LARGEST = 2 << 30  # a PC with more has some of it above 4 GiB
SLOW = 16_000_000  # bytes a second: 400 pages in 100 ms
PATIENCE = 100.0
KVM_PATIENCE = 30.0
POLL = 0.01
LONGEST_DOWNTIME = 2_000_000
ENDED = {"completed", "failed", "cancelled"}

Info = dict[str, Any]


class MachineError(Exception):
    """A machine did not do what it should. The text says which, what, and what its QEMU said."""


class Machine:
    """A PC with one processor, `size` bytes of memory, and the guest of `sweep`.

    size     -- bytes of memory from address 0 on, up to 2 GiB
    incoming -- where it waits for a guest: a URI, or "defer" (see `listen`)
    paused   -- the guest does not run until `cont`, also after it has arrived
    before   -- the machine that the guest comes from: `counted` reads the serial ports of both
    blocks   -- names of the RAM blocks, equal parts of the memory in this order; none: pc.ram
    dimm     -- bytes of one more block, "dimm0", at 4 GiB: random unless the machine is `incoming`
    devices  -- arguments of -device: "virtio-rng-pci", ...
    machine  -- QEMU's machine type
    accel    -- "tcg" or "kvm" (see `need_kvm`); under kvm a guest with a rate never sleeps
    binary   -- the QEMU
    disk     -- content of its disk, the file "disk" in its directory; b"": it has none
    extra    -- more arguments of QEMU; {here} in them is its directory
    capabilities -- of the migration, that are on from the beginning
    """

    def __init__(
        self, sweep: Sweep, *, size: int = 64 * MIB, incoming: str = "", paused: bool = False,
        before: Machine | None = None, blocks: Sequence[str] = (), dimm: int = 0,
        devices: Sequence[str] = (), machine: str = "pc", accel: str = "tcg",
        binary: str = PROGRAM, disk: bytes = b"", extra: Sequence[str] = (),
        capabilities: Sequence[str] = (),
    ) -> None:  # fmt: skip
        need(shutil.which(binary), f"{binary} (qemu-system-x86)")
        if not sweep.end <= size <= LARGEST or size % MIB:
            raise ValueError(f"{size} bytes: whole MiB, {sweep.end} of the sweep to 2 GiB")
        self.sweep = sweep
        self.size = size
        self.dimm = dimm
        self.name = "the destination" if incoming else "the source"
        self.before = before
        self.directory = Path(tempfile.mkdtemp(prefix="xbmigrate-machine-"))
        self._serial, self._stderr = self.directory / "serial", self.directory / "stderr"
        self._command = [
            # it ends when the tests end, however they end
            "setpriv", "--pdeathsig", "KILL", binary,
            "-nodefaults", "-display", "none", "-machine", f"{machine},accel={accel}",
            "-m", f"{size >> 20}M" + (f",slots=1,maxmem={(size + dimm) >> 20}M" if dimm else ""),
            "-bios", f"{self.directory}/firmware",
            "-serial", f"file:{self._serial}",
            *(["-drive", f"file={self.directory}/disk,format=raw,if=ide"] if disk else []),
            *self._memory(blocks), *(word for device in devices for word in ("-device", device)),
            *(["-incoming", incoming] if incoming else []), *(["-S"] if paused else []),
            *(word.replace("{here}", str(self.directory)) for word in extra),
        ]  # fmt: skip
        self._incoming = bool(incoming)
        self._disk = disk
        self._capabilities = capabilities
        self._process: asyncio.subprocess.Process | None = None
        self._qmp = QMPClient(self.name)
        self._listener = EventListener()
        self._events: list[Info] = []
        self._said: dict[Path, bytes] = {}

    def _memory(self, blocks: Sequence[str]) -> list[str]:
        words = []
        for node, block in enumerate(blocks):
            words += ["-object", f"memory-backend-ram,id={block},size={self.size // len(blocks)}"]
            words += ["-numa", f"node,nodeid={node},memdev={block}"]
        if self.dimm:
            path = f"{self.directory}/dimm"
            words += ["-object", f"memory-backend-file,id=dimm0,size={self.dimm},mem-path={path}"]
            words += ["-device", "pc-dimm,memdev=dimm0,addr=" + hex(DIMM_AT)]
        return words

    # ---------------------------------------------------------------- from start to end

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._leave()

    async def _start(self) -> None:
        image = await asyncio.to_thread(self.sweep.image)
        (self.directory / "firmware").write_bytes(image)
        if self._disk:
            (self.directory / "disk").write_bytes(self._disk)
        if self.dimm and not self._incoming:
            (self.directory / "dimm").write_bytes(random.Random(0).randbytes(self.dimm))
        ours, theirs = socket.socketpair()
        with theirs, self._stderr.open("wb") as stderr:
            number = theirs.fileno()
            self._process = await asyncio.create_subprocess_exec(
                *self._command, "-chardev", f"socket,id=qmp,fd={number}",
                "-mon", "chardev=qmp,mode=control", pass_fds=[number],
                stdin=asyncio.subprocess.DEVNULL, stdout=stderr, stderr=stderr,
            )  # fmt: skip
        self._qmp.register_listener(self._listener)
        try:
            async with asyncio.timeout(PATIENCE):
                await self._qmp.connect(ours)
        except (QMPError, TimeoutError) as error:
            ours.close()
            raise await self._failure("does not start") from error
        await self.prepare("events", *self._capabilities)

    async def _leave(self) -> None:
        await self.kill()
        with contextlib.suppress(QMPError, EOFError, OSError, TimeoutError):
            async with asyncio.timeout(PATIENCE):
                await self._qmp.disconnect()
        for path in (self._serial, self._stderr):
            self._said[path] = self._read(path)
        shutil.rmtree(self.directory)

    async def kill(self) -> None:
        """Kill QEMU, as a crash would, if it still runs."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def ended(self, timeout: float = PATIENCE) -> int:
        """Wait until QEMU has ended by itself; return its exit code."""
        assert self._process is not None
        try:
            async with asyncio.timeout(timeout):
                return await self._process.wait()
        except TimeoutError:
            raise await self._failure(f"still runs after {timeout:.0f} s") from None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def stderr(self) -> str:
        """What QEMU has written to standard error so far; also after the context."""
        return self._read(self._stderr).decode(errors="replace")

    def _read(self, path: Path) -> bytes:
        if path in self._said:
            return self._said[path]
        return path.read_bytes() if path.exists() else b""

    async def _failure(self, what: str) -> MachineError:
        code = None
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1 if self._qmp.runstate.name == "RUNNING" else 3):
                    code = await self._process.wait()
        state = "" if code is None else f" (QEMU has ended with status {code})"
        return MachineError(f"{self.name} {what}{state}; standard error: {self.stderr or 'empty'}")

    # ---------------------------------------------------------------- commands

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command; return its result. Underscores in names of arguments stand for dashes."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            async with asyncio.timeout(PATIENCE):
                return await self._qmp.execute(command, named)
        except (QMPError, TimeoutError) as error:
            if self._qmp.runstate.name == "RUNNING" and not isinstance(error, TimeoutError):
                raise
            raise await self._failure(f"does not answer {command}") from error

    async def stop(self) -> None:
        await self.execute("stop")

    async def cont(self) -> None:
        await self.execute("cont")

    @property
    def events(self) -> list[Info]:
        """All events so far, the oldest first."""
        self._events += [dict(event) for event in self._listener.clear()]
        return self._events

    async def wait_run_state(self, *states: str, timeout: float = PATIENCE) -> str:
        """Wait for a status of query-status: running, paused, postmigrate, inmigrate, ..."""
        info = await self._wait(
            "query-status", lambda info: info["status"] in states, " or ".join(states), timeout
        )
        return str(info["status"])

    async def _wait(
        self, query: str, accepts: Callable[[Info], bool], what: str, timeout: float
    ) -> Info:
        end = asyncio.get_running_loop().time() + timeout
        while True:
            info: Info = await self.execute(query)
            if accepts(info):
                return info
            over = query == "query-migrate" and info.get("status") in ENDED
            if over or asyncio.get_running_loop().time() > end:
                late = "" if over else f" after {timeout:.0f} s"
                raise await self._failure(f"is not {what}{late} but {info}")
            await asyncio.sleep(POLL)

    # ---------------------------------------------------------------- migration

    async def prepare(self, *capabilities: str, **parameters: int | str) -> None:
        """Switch capabilities on, and set parameters (with underscores for their dashes)."""
        if capabilities:
            switched = [{"capability": name, "state": True} for name in capabilities]
            await self.execute("migrate-set-capabilities", capabilities=switched)
        if parameters:
            await self.execute("migrate-set-parameters", **parameters)

    async def listen(self, uri: str) -> str:
        """Have a machine with incoming="defer" listen; return where, see `uri`."""
        await self.execute("migrate-incoming", uri=uri)
        return await self.uri()

    async def uri(self) -> str:
        """Return where an incoming machine listens."""
        addresses = (await self.execute("query-migrate")).get("socket-address")
        if not addresses:
            raise await self._failure("does not listen")
        address = addresses[0]
        if address["type"] == "unix":
            return f"unix:{address['path']}"
        return f"tcp:{address['host']}:{address['port']}"

    async def migrate(self, uri: str, *capabilities: str, **parameters: int | str) -> None:
        """Begin to migrate; see `prepare`."""
        await self.prepare(*capabilities, **parameters)
        await self.execute("migrate", uri=uri)

    async def begin(
        self, uri: str, *capabilities: str, passes: int = 4, bandwidth: int = SLOW
    ) -> Info:
        """Begin to migrate, wait for a number of passes, and return the answer to query-migrate.

        QEMU completes before that if its first pass takes less than 100 ms (`bandwidth` is too
        high), or if it finds less dirty than it can send in a millisecond: a pass of small deltas
        is short, and meanwhile the guest may sleep, or wait for a processor.
        """
        await self.migrate(uri, *capabilities, max_bandwidth=bandwidth, downtime_limit=1)
        return await self.wait_info(
            lambda info: info["status"] == "completed"
            or info.get("ram", {}).get("dirty-sync-count", 0) >= passes,
            f"in pass {passes}", PATIENCE,
        )  # fmt: skip

    async def finish(self) -> Info:
        """Let the migration complete, by pausing the guest at once; return query-migrate."""
        await self.prepare(max_bandwidth=0, downtime_limit=LONGEST_DOWNTIME)
        info = await self.wait_status("completed")
        await self.wait_run_state("postmigrate")
        return info

    async def wait_status(self, *statuses: str, timeout: float = PATIENCE) -> Info:
        """Wait for a status of the migration (setup, active, completed, failed, cancelled, ...).

        Returns the answer to query-migrate. Raises MachineError as soon as the migration has ended
        with another status.
        """
        return await self.wait_info(
            lambda info: info.get("status") in statuses, " or ".join(statuses), timeout
        )

    async def wait_info(
        self, accepts: Callable[[Info], bool], what: str, timeout: float = PATIENCE
    ) -> Info:
        """Wait until the answer to query-migrate is accepted; return it.

        what -- the accepted state, for messages
        """
        return await self._wait("query-migrate", accepts, what, timeout)

    # ---------------------------------------------------------------- what the guest does

    @property
    def serial(self) -> bytes:
        """What the guest has written to its serial port, here and on the machines before."""
        return (self.before.serial if self.before else b"") + self._read(self._serial)

    def counted(self) -> list[int]:
        """Return the counts so far. Raises SweepError if one is missing or wrong."""
        return self.sweep.counted(self.serial)

    async def wait_for_count(self, number: int, timeout: float = PATIENCE) -> list[int]:
        """Wait until the guest has swept `number` times; return its counts."""
        end = asyncio.get_running_loop().time() + timeout
        while not (counts := self.counted()) or counts[-1] < number:
            assert self._process is not None
            if self._process.returncode is not None or asyncio.get_running_loop().time() > end:
                raise await self._failure(f"has not counted to {number} but to {counts[-1:]}")
            await asyncio.sleep(POLL)
        return counts

    async def wait_for_more(self, lines: int = 2, timeout: float = PATIENCE) -> list[int]:
        """Wait until the guest has written more counts, and return all of them."""
        counts = self.counted()
        last = counts[-1] if counts else -self.sweep.every
        return await self.wait_for_count(last + lines * self.sweep.every, timeout)

    async def check_sweep(self) -> int:
        """Raise SweepError unless memory and count of a paused guest agree."""
        await self._check_paused()
        memory = await self.read(self.sweep.start, self.sweep.size)
        return self.sweep.check(memory, self.counted())

    # ---------------------------------------------------------------- its memory

    @property
    def memory(self) -> list[tuple[int, int]]:
        """The parts of the memory that are contiguous: first address, and size."""
        return [(0, self.size), *([(DIMM_AT, self.dimm)] if self.dimm else [])]

    async def read(self, address: int, size: int) -> bytes:
        """Return what the guest would read there: of one moment only if the guest is paused."""
        return b"".join([piece async for piece in self._pieces(address, size)])

    async def ram_hash(self, first: int = 0, size: int | None = None) -> str:
        """Return the hash of a part of a paused guest's memory; by default of all below 4 GiB."""
        digest = xxhash.xxh3_128()
        await self._check_paused()
        async for piece in self._pieces(first, self.size - first if size is None else size):
            digest.update(piece)
        return digest.hexdigest()

    async def page_hashes(self, first: int = 0, size: int | None = None) -> list[bytes]:
        """As `ram_hash`, for each page."""
        await self._check_paused()
        return [
            xxhash.xxh3_128_digest(piece[offset : offset + PAGE])
            async for piece in self._pieces(first, self.size - first if size is None else size)
            for offset in range(0, len(piece), PAGE)
        ]

    async def _check_paused(self) -> None:
        if (await self.execute("query-status"))["running"]:
            raise MachineError(f"{self.name} runs: memory that changes cannot be compared")

    async def _pieces(self, first: int, size: int) -> AsyncIterator[bytes]:
        path = self.directory / "memory"
        for address in range(first, first + size, PIECE):
            length = min(PIECE, first + size - address)
            await self.execute("pmemsave", val=address, size=length, filename=str(path))
            content = path.read_bytes()
            if len(content) != length:
                raise MachineError(f"{self.name} gives {len(content)} of {length} bytes of memory")
            yield content
        path.unlink(missing_ok=True)


@functools.cache
def kvm_trouble() -> str:
    """Return why KVM does not run the guest here, or ""."""

    async def count() -> None:
        sweep = Sweep(MIB)
        async with Machine(sweep, size=16 * MIB, accel="kvm") as machine:
            await machine.wait_for_count(sweep.every, timeout=KVM_PATIENCE)

    if not os.access(KVM, os.R_OK | os.W_OK):
        return f"{KVM} cannot be used"
    try:
        asyncio.run(count())
    except MachineError as error:
        return str(error)
    return ""


def need_kvm() -> None:
    """Skip the test without KVM; in CI fail it if KVM is there and does not run the guest.

    Not for use in a coroutine.
    """
    if not os.access(KVM, os.R_OK | os.W_OK):
        pytest.skip(f"{KVM} cannot be used: this machine has no KVM")
    need(not kvm_trouble(), f"KVM: {kvm_trouble()}")


async def compare(ours: Machine, theirs: Machine) -> None:
    """Raise MachineError unless two paused guests have the same memory."""
    for first, size in ours.memory:
        pages = [await machine.page_hashes(first, size) for machine in (ours, theirs)]
        if wrong := differing(pages[0], pages[1], first, PAGE):
            named = ", ".join(map(hex, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
            raise MachineError(
                f"{ours.name} and {theirs.name} differ in {len(wrong)} of {len(pages[0])} pages "
                f"from {first:#x} on: {named}"
            )
