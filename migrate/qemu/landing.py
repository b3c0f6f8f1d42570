"""Where a guest lands that a QEMU sends, without any QEMU: a directory (see snapshot.py).

    source ==> QemuPlace --socket--> Landing: StreamParser -> RamApplier -> a file for each block
                                                           -> all else   -> devices.bin

To the rest of the program a Landing is a QEMU that waits: it answers PING, and says in the end how
it went. But nothing runs here, so it gets all of the stream before GO, and READY means that all of
it is checked and safe on the disk, in a directory of another name. GO gives it its name. Until it
is whole its files have no names at all, where the file system can do that: nothing is left of a
landing that fails, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any

import xxhash

from migrate.address import Address
from migrate.directory import Directory, Identity, Left, identity_of, read_identity
from migrate.errors import MigrationError, UsageError
from migrate.filesystem import check_writable, hidden_name, kind_of, try_directory
from migrate.guests.guest import Place
from migrate.guests.hold import DirectoryHold
from migrate.guests.reservation import Reservation
from migrate.memory import private_buffer
from migrate.qemu.description import check_sections
from migrate.qemu.place import LOAD_SECONDS, NoQemuError, QemuPlace
from migrate.qemu.snapshot import (
    BLOCKS,
    DESCRIPTION,
    DEVICES,
    FACTS,
    PIECE_BYTES,
    Hash,
    Snapshot,
    Stored,
    StoredBlock,
    StoredSection,
    block_file,
    contents,
)
from migrate.quantities import format_size
from migrate.sliding import Sliding
from migrate.threads import in_thread
from proto.errors import ProtoError
from proto.kernel import RamApplier
from proto.qemu import (
    RAM,
    START,
    BlockList,
    Body,
    Command,
    Description,
    End,
    Header,
    Order,
    Pages,
    Part,
    Reply,
    Section,
    SectionEnd,
    StreamParser,
    Text,
)

BUFFER_BYTES = 4 << 20
# Behind the hidden name of a machine that lands: the one it takes the place of.
BEFORE = ".before"
LEAST_READ = BUFFER_BYTES // 4
# What was written is brought to the disk so often, for little to be left in the end.
FLUSH_SECONDS = 1.0
PAGE_BYTES = 4096
# Some hundred sections and ten orders are what a machine has; the largest body, of a graphics card
# that has its pictures in it, is some ten MiB.
MAX_SECTIONS = MAX_ORDERS = 10_000
MAX_SECTION_BYTES = 128 << 20
MAX_DEVICES_BYTES = 512 << 20
UNWANTED = "it is not wanted any more"
# From this version on QEMU understands SWITCHOVER_ACK; an earlier one fails at it. A machine's type
# ends in the version that it came with.
ACK_SINCE = (8, 1)
TYPE_VERSION = re.compile(r"-(\d+)\.(\d+)$")
# Orders to the one that loads a stream which are of its own way, not of the guest.
OF_THE_WAY = (Command.OPEN_RETURN_PATH, Command.PING, Command.POSTCOPY_ADVISE)


class Files:
    """The files of a directory that is being made: they have names when all of it is whole.

    Raises OSError.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        where, self.name = os.path.split(hidden_name(path, spare=len(BEFORE)))
        self.above = Directory(where)
        self._made: Directory | None = None
        self._blocks: Directory | None = None
        self._open: dict[str, int] = {}

    @property
    def temporary(self) -> str:
        return os.path.join(self.above.path, self.name)

    @property
    def left(self) -> Left:
        """The directory, when it has its hidden name."""
        assert self._made is not None
        return Left(self.path, self.above.path, self.name, self._made.identity)

    @property
    def before(self) -> Identity | None:
        """Of what has the name now."""
        with contextlib.suppress(OSError):
            return identity_of(self.above.look(os.path.basename(self.path)))
        return None

    def make(self, name: str) -> int:
        """A new file, to read and write; its descriptor is closed by `close`."""
        fd = -1
        if self._made is None:
            fd = self.above.make_nameless()
            if fd < 0:
                self._give_names()
        if self._made is not None:
            directory, own = self._place_of(name)
            fd = directory.make(own)
        self._open[name] = fd
        return fd

    def _place_of(self, name: str) -> tuple[Directory, str]:
        assert self._made is not None
        assert self._blocks is not None
        within, _, own = name.rpartition("/")
        return self._blocks if within else self._made, own

    def _give_names(self) -> None:
        self._made = self.above.make_directory(self.name)
        self._blocks = self._made.make_directory(BLOCKS)
        for name, fd in self._open.items():
            directory, own = self._place_of(name)
            directory.link(fd, own)

    def finish(self) -> None:
        """All of them are on the disk, under their names."""
        for fd in self._open.values():
            os.fsync(fd)
        if self._made is None:
            self._give_names()
        assert self._made is not None
        assert self._blocks is not None
        for directory in (self._blocks, self._made):
            directory.sync()

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def remove(self) -> None:
        self.close()
        if self._made is not None:
            self.above.drop(self.name, self._made.identity)
        self.free()

    def free(self) -> None:
        """Lets go of the directories. May be called again."""
        for directory in (self._blocks, self._made, self.above):
            if directory is not None:
                directory.close()


class Landing:
    """One stream, taken in by a thread of its own; `path` is where it will be."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.files = Files(path)
        self.snapshot: Snapshot | None = None
        """What there is, when it is whole."""
        self.error = ""
        """Why it is not."""
        self.announced: Sequence[tuple[bytes, int]] | None = None
        """The names of the RAM blocks and their pages, of `announced_size` bytes."""
        self.announced_size = PAGE_BYTES
        self._over = False
        self._parser = StreamParser()
        self._stream = Sliding(private_buffer(BUFFER_BYTES), LEAST_READ)
        self._last = False
        self._applier: RamApplier | None = None
        self._blocks: list[tuple[bytes, int, int]] = []  # name, size, file
        self._header = Header()
        self._devices = self._described = -1
        self._at = 0  # in devices.bin
        self._header_bytes = 0
        self._ram = self._head = self._early = -1
        self._paged = False
        self._sections: list[StoredSection] = []
        self._orders = 0
        self._began = 0  # the section that is read, in devices.bin
        self._hash = xxhash.xxh3_128()
        self._description = bytearray()
        self._sock: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._flusher = Flusher()

    def start(self, sock: socket.socket) -> None:
        """Raises OSError where there can be no file."""
        self._devices = self.files.make(DEVICES)
        self._sock = sock
        self._thread = threading.Thread(target=self._run, name="landing", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._take_all()
            self._finish()
            self._say(Reply.SHUT, 0)
        except BaseException as error:
            self.error = self._sentence(error)
            self._flusher.stop()
            self.files.remove()
            self._say(Reply.SHUT, 1)
            assert self._sock is not None
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def _sentence(self, error: BaseException) -> str:
        if isinstance(error, OSError):
            return f"--output {self.path}: {error.strerror or error}"
        if isinstance(error, ProtoError):
            return f"QEMU's stream cannot be landed: {error}"
        return str(error) or type(error).__name__

    def _say(self, reply: Reply, value: int) -> None:
        assert self._sock is not None
        with contextlib.suppress(OSError):
            self._sock.sendall(struct.pack(">HHI", reply, 4, value))

    def _allow_switchover(self) -> None:
        """No device here has to be made ready before the guest stands still: a QEMU whose
        capability switchover-ack is on waits for that word. Another one does not mind it."""
        version = TYPE_VERSION.search(self._header.machine)
        if version is not None and (int(version[1]), int(version[2])) >= ACK_SINCE:
            assert self._sock is not None
            with contextlib.suppress(OSError):
                self._sock.sendall(struct.pack(">HH", Reply.SWITCHOVER_ACK, 0))

    def close(self) -> None:
        """It is over, one way or the other: the thread has ended when this returns."""
        self._over = True
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join()
        self._flusher.stop()
        if self._sock is not None:
            self._sock.close()
        self.files.close()

    # -- the stream

    def _take_all(self) -> None:
        parser, stream = self._parser, self._stream
        while not parser.complete:
            if self._over:
                raise MigrationError(UNWANTED)
            at, part = parser.step(stream.data, stream.start, stream.end, last=self._last)
            if part is not None:
                self._take(part, stream.take(at))
            elif self._last:
                break
            elif not self._fill():
                self._last = True
        half = self._described >= 0 and not parser.complete
        if not parser.ended or stream or half:
            raise MigrationError("the stream has ended before its end")

    def _fill(self) -> bool:
        assert self._sock is not None
        try:
            count = self._sock.recv_into(self._stream.room())
        except ConnectionError:
            return False
        self._stream.come(count)
        return count > 0

    def _take(self, part: Part, data: memoryview) -> None:
        if isinstance(part, Pages):
            assert self._applier is not None
            assert self._parser.reader is not None
            if not self._paged:
                self._paged = True
                self._come_before_pages()
            # Where the records are, they say from the beginning of the buffer.
            whole = self._stream.data[: self._stream.end]
            self._applier.apply(whole, self._parser.reader.records, part.count)
        elif isinstance(part, BlockList):
            self._open_blocks(part)
            self._allow_switchover()
        elif isinstance(part, Header):
            self._header = part
            self._keep(data)
            self._header_bytes = self._at
        elif isinstance(part, Section):
            self._begin_section(part, data)
        elif isinstance(part, Body | SectionEnd):
            self._go_on(part, data)
        elif isinstance(part, Order):
            self._obey(part, data)
        elif isinstance(part, Description):
            self._described = self.files.make(DESCRIPTION)
        elif isinstance(part, Text):
            self._description += data
        else:
            assert isinstance(part, End)

    def _obey(self, order: Order, data: memoryview) -> None:
        self._orders += 1
        if self._orders > MAX_ORDERS:
            raise MigrationError(f"the stream has more than {MAX_ORDERS} orders")
        if order.number == Command.PING:
            self._say(Reply.PONG, int.from_bytes(order.data[:4], "big"))
        if order.number not in OF_THE_WAY:
            self._keep(data)

    def _open_blocks(self, part: BlockList) -> None:
        page_size, pages = self._parser.page_size, []
        found = [(one.name, one.pages(self.announced_size)) for one in part.blocks]
        if self.announced is not None and found != [*self.announced]:
            raise MigrationError("the stream has other RAM blocks than were announced for it")
        for number, block in enumerate(part.blocks):
            fd = self.files.make(block_file(number, block.name))
            pages.append(block.pages(page_size))
            os.ftruncate(fd, pages[-1] * page_size)
            self._blocks.append((block.name, block.size, fd))
        files = [fd for _, _, fd in self._blocks]
        self._applier = RamApplier(pages, files, page_size)
        self._flusher.start(files)

    def _begin_section(self, section: Section, data: memoryview) -> None:
        if section.name == RAM.decode():
            if section.kind == START:
                self._ram = section.id
                self._come_before_pages()
            return
        self._began = self._at
        self._keep(data)

    def _come_before_pages(self) -> None:
        """What is there goes before the memory when it is lifted: also what followed on the list of
        its blocks, as the size of a device whose memory must be there when its pages come."""
        self._head, self._early = self._at, len(self._sections)

    def _go_on(self, part: Body | SectionEnd, data: memoryview) -> None:
        section = part.section
        if section.name == RAM.decode():
            return
        self._keep(data)
        if self._at - self._began > MAX_SECTION_BYTES:
            most = format_size(MAX_SECTION_BYTES)
            raise MigrationError(f"the section of {section.name} is longer than {most}")
        if isinstance(part, Body):
            return
        if len(self._sections) == MAX_SECTIONS:
            raise MigrationError(f"the stream has more than {MAX_SECTIONS} sections")
        self._sections.append(
            StoredSection(
                section.kind, section.id, section.name, section.instance, section.version,
                self._began, self._at - self._began,
            )
        )  # fmt: skip

    def _keep(self, data: memoryview) -> None:
        if self._at + len(data) > MAX_DEVICES_BYTES:
            most = format_size(MAX_DEVICES_BYTES)
            raise MigrationError(f"the state of the devices is longer than {most}")
        write_all(self._devices, data)
        self._hash.update(data)
        self._at += len(data)

    # -- the end

    def _finish(self) -> None:
        if self._applier is None:
            raise MigrationError("the stream has no memory")
        self._flusher.stop()
        self._flusher.check()
        text = bytes(self._description)
        if self._described >= 0:
            write_all(self._described, memoryview(text))
            check_sections(
                text, self._sections, self._early,
                lambda at, size: os.pread(self._devices, size, at),
            )  # fmt: skip
        snapshot = Snapshot(
            id=secrets.token_hex(16), machine=self._header.machine,
            page_size=self._parser.page_size, capabilities=self._header.capabilities,
            ram=self._ram, header=self._header_bytes, head=self._head,
            blocks=tuple(self._blocks_stored()),
            devices=Stored(DEVICES, self._at, self._hash.hexdigest()),
            sections=tuple(self._sections),
            description=Stored(DESCRIPTION, len(text), xxhash.xxh3_128_hexdigest(text))
            if self._described >= 0 else None,
        )  # fmt: skip
        write_all(self.files.make(FACTS), memoryview(snapshot.text().encode()))
        self.files.finish()
        self.snapshot = snapshot

    def _blocks_stored(self) -> list[StoredBlock]:
        buffer, page_size, found = private_buffer(PIECE_BYTES), self._parser.page_size, []
        for number, (name, size, fd) in enumerate(self._blocks):
            os.ftruncate(fd, size)
            digest = Hash(size, page_size)
            for _, pages, data in contents(fd, size, page_size, buffer):
                if self._over:
                    raise MigrationError(UNWANTED)
                digest.update(pages, data)
            file = block_file(number, name)
            found.append(StoredBlock(file, size, digest.hexdigest(), name.decode("latin-1")))
        return found


class Flusher:
    """A thread that brings files to the disk while they are written."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def start(self, files: list[int]) -> None:
        self._thread = threading.Thread(target=self._run, args=(files,), daemon=True)
        self._thread.start()

    def _run(self, files: list[int]) -> None:
        try:
            while not self._over.wait(FLUSH_SECONDS):
                for fd in files:
                    os.fdatasync(fd)
        except OSError as error:
            self._error = error  # the kernel says it once, and forgets it

    def stop(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def check(self) -> None:
        """Raises OSError where a file was not written."""
        if self._error is not None:
            raise self._error


def write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


# ---------------------------------------------------------------- places


def check_landing(path: str, overwrite: bool) -> None:
    """Raises UsageError where a machine cannot land at `path`."""
    what = f"--output {path}"
    check_writable(os.path.dirname(os.path.abspath(path)), what)
    hidden_name(path, spare=len(BEFORE))
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{what}: {error.strerror}") from None
    if os.path.islink(path) or not os.path.isdir(path):
        raise UsageError(f"{what}: there is {kind_of(mode)}, and it is no directory")
    if os.path.ismount(path):
        raise UsageError(
            f"{what}: something is mounted there, and a machine cannot take its place: name a "
            "directory in it"
        )
    if not os.listdir(path):
        return
    if not overwrite:
        raise UsageError(f"{what}: it is not empty: remove it or give --overwrite")
    if not os.path.isfile(os.path.join(path, FACTS)):
        raise UsageError(f"--output {path}: no machine has landed there: it is not overwritten")


def try_landing(path: str, overwrite: bool) -> None:
    """As check_landing, and does once what a landing will need there. Raises UsageError."""
    check_landing(path, overwrite)
    try_directory(path, f"--output {path}", mapped=False)


class LandedPlace(Place):
    """A machine that is whole, under a hidden name: `left`.

    identity -- of its snapshot
    size     -- of its memory, in bytes
    before   -- device and inode of what it takes the place of, if there is something

    What it takes the place of is removed by `close`, once it has started: that may take long.

    Raises OSError.
    """

    runs = False

    def __init__(
        self, left: Left, identity: str, size: int, *, overwrite: bool,
        directory: Directory | None = None, before: Identity | None = None,
        reservation: Reservation | None = None,
    ) -> None:  # fmt: skip
        self._reservation = reservation
        self._size = size
        self._started = False
        self.path = left.path
        self.identity = identity
        self._left = left
        self._name = os.path.basename(left.path)
        self._overwrite = overwrite
        self._directory = directory or Directory(left.directory)
        self._before = before

    @property
    def temporary(self) -> str:
        return os.path.join(self._left.directory, self._left.name)

    @property
    def _aside(self) -> str:
        """The name of one that is overwritten."""
        return f"{self._left.name}{BEFORE}"

    def facts(self) -> dict[str, Any]:
        return {
            "kind": "snapshot", "path": self.path, "temporary": self.temporary,
            "identity": self.identity, "overwrite": self._overwrite,
            "inode": list(self._left.known), "before": list(self._before or ()),
        }  # fmt: skip

    @classmethod
    def reopen(cls, facts: dict[str, Any]) -> LandedPlace:
        """What an earlier program had prepared. Raises MigrationError where it is gone."""
        try:
            left = Left.read(facts)
            before = read_identity(facts["before"]) if facts.get("before") else None
            place = cls(
                left, str(facts["identity"]), 0, overwrite=bool(facts["overwrite"]), before=before
            )
        except (ValueError, KeyError, OSError):
            raise MigrationError("what was prepared is gone, or never was") from None
        if not place._is_there():
            place.close()
            raise MigrationError(f"what was prepared for {place.path} is gone")
        return place

    def _is_there(self) -> bool:
        """Whether it is, under either name; reads its size."""
        known = self._left.known
        for name in (self._left.name, self._name):
            if self._directory.has(name, known):
                with contextlib.suppress(UsageError):
                    found = Snapshot.read(os.path.join(self._directory.path, name))
                    self._size = found.memory
                    return found.id == self.identity
        return False

    async def start(self, state: bytes = b"") -> str:
        """Gives it its name."""
        await in_thread(self._put_in_place)
        return f"the machine is in {self.path}, {format_size(self._size)} of memory"

    def _put_in_place(self) -> None:
        directory, left = self._directory, self._left
        if not directory.has(self._name, left.known):
            try:
                with contextlib.ExitStack() as until_named:
                    if self._reservation is None:  # an earlier program had it
                        until_named.callback(Reservation(self.path).close)
                    Snapshot.read(self.temporary)
                    check_landing(self.path, self._overwrite)
                    self._rename()
            except OSError as error:
                raise MigrationError(f"--output {self.path}: {error.strerror}") from None
        # It stands under its name now: nothing below may say that it was not started.
        self._started = True
        with contextlib.suppress(OSError):
            directory.sync()

    def _rename(self) -> None:
        """One that was there goes when this one has its place."""
        directory, left, name = self._directory, self._left, self._name
        if not os.path.lexists(os.path.join(self.path, FACTS)):
            # which an empty directory may be at
            directory.give_name(left.known, left.name, name, overwrite=True)
            return
        self._before = identity_of(directory.look(name))
        directory.give_name(self._before, name, self._aside, overwrite=False)
        try:
            directory.give_name(left.known, left.name, name, overwrite=False)
        except OSError:
            directory.give_name(self._before, self._aside, name, overwrite=False)
            raise

    def close(self) -> None:
        """May be called again."""
        if self._started and self._before is not None:
            self._directory.drop_later(self._aside, self._before)
        self._started = False
        self._directory.close()
        if self._reservation is not None:
            self._reservation.close()

    async def discard(self) -> None:
        await in_thread(self._directory.drop, self._left.name, self._left.known)
        self.close()


class LandingPlace(QemuPlace):
    """A directory `path` that a machine lands in."""

    irrevocable = False

    def __init__(self, path: str, *, overwrite: bool = False) -> None:
        super().__init__(Address(path=path))
        self.path = path
        self._overwrite = overwrite
        self._landing: Landing | None = None
        self._sent = False
        self._landed: LandedPlace | None = None
        self._reservation: Reservation | None = None
        self._replaced: DirectoryHold | None = None

    async def _open(self) -> socket.socket:
        try:
            check_landing(self.path, self._overwrite)
            self._reservation = Reservation(self.path)
            if os.path.isdir(self.path):  # it is replaced: it cannot be lifted meanwhile
                self._replaced = DirectoryHold(self.path, f"--output {self.path}")
                await self._replaced.take()
            landing = Landing(self.path)
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            landing.start(theirs)
        except UsageError as error:
            raise NoQemuError(str(error)) from None
        except OSError as error:
            raise NoQemuError(f"--output {self.path}: {error.strerror}") from None
        self._landing = landing
        return ours

    def _gone(self, reason: str) -> MigrationError:
        error = self._landing.error if self._landing else ""
        return MigrationError(error or f"--output {self.path}: the landing {reason}")

    def announce(self, blocks: Sequence[tuple[bytes, int]], page_size: int) -> None:
        assert self._landing is not None
        self._landing.announced, self._landing.announced_size = blocks, page_size

    async def prove(self, *, return_path: bool) -> None:
        """Returns when all of the machine is safe on the disk. Raises MigrationError."""
        del return_path
        if not self._sent:
            self._sent = True
            await in_thread(self.send, self._held)
            assert self._socket is not None
            self._socket.shutdown(socket.SHUT_WR)
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                await self._ended.wait()
        except TimeoutError:
            raise MigrationError(
                f"--output {self.path}: the disk has not taken the machine in {LOAD_SECONDS:g} s"
            ) from None
        assert self._landing is not None
        snapshot = self._landing.snapshot
        if snapshot is None:
            raise self._gone("has failed")
        files = self._landing.files
        self._landed = LandedPlace(
            files.left, snapshot.id, snapshot.memory, overwrite=self._overwrite,
            directory=files.above, before=files.before, reservation=self._reservation,
        )  # fmt: skip

    async def start(self, state: bytes) -> str:
        assert self._landed is not None
        self.runs = False
        return await self._landed.start()

    def facts(self) -> dict[str, Any]:
        return self._landed.facts() if self._landed else {"kind": "snapshot"}

    def close(self) -> None:
        super().close()
        if self._landing is not None:
            self._landing.close()
        if self._landed is not None:
            self._landed.close()
        self._free()

    def _free(self) -> None:
        if self._landing is not None:
            self._landing.files.free()
        for one in (self._reservation, self._replaced):
            if one is not None:
                one.close()

    async def discard(self) -> None:
        super().close()
        if self._landing is not None:
            await in_thread(self._landing.close)
            await in_thread(self._landing.files.remove)
        self._free()
