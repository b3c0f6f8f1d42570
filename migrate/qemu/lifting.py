"""A virtual machine that has landed in a directory, lifted out of it into a QEMU again.

    blocks/NAME -> RamRecorder -> \\
    devices.bin, description.json -> a stream of QEMU's --socket--> Intake, as from any QEMU

Each file is checked against its hash as it goes by, and the end of the stream, without which no
QEMU runs the guest, goes only behind all of them. The directory stays as it is: a machine may be
lifted as often as one likes, and two that were lifted from one know nothing of each other.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import xxhash

from migrate.directory import Directory
from migrate.errors import MigrationError
from migrate.guests.hold import DirectoryHold
from migrate.memory import private_buffer
from migrate.qemu.guest import BEGIN_SECONDS, QemuGuest
from migrate.qemu.intake import Intake, StreamLost
from migrate.qemu.machine import stream_pair
from migrate.qemu.snapshot import (
    PIECE_BYTES,
    Hash,
    Snapshot,
    Stored,
    StoredBlock,
    contents,
)
from migrate.threads import in_thread
from proto.kernel import RamRecorder
from proto.qemu import (
    DESCRIPTION,
    EOF,
    EOS,
    FINISH,
    FOOTER,
    MEM_SIZE,
    PART,
    RAM,
    RAM_VERSION,
    START,
    Command,
    order,
)

OUT_BYTES = PIECE_BYTES + (PIECE_BYTES >> 4)


class Lifter:
    """Writes the stream of one snapshot, in a thread of its own."""

    def __init__(self, path: str, snapshot: Snapshot) -> None:
        self.error = ""
        """Why the stream has no end."""
        self._path = path
        self._snapshot = snapshot
        self._blocks = [
            (block.name.encode("latin-1"), snapshot.pages(block)) for block in snapshot.blocks
        ]
        self._recorder = RamRecorder(self._blocks, snapshot.page_size)
        self._buffer = private_buffer(PIECE_BYTES)
        self._out = private_buffer(OUT_BYTES)
        self._sock: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def start(self, sock: socket.socket) -> None:
        self._sock = sock
        self._thread = threading.Thread(target=self._run, name="lift", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Its other end was closed: returns when the thread has ended."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        assert self._sock is not None
        with self._sock:
            try:
                self._write()
                while self._sock.recv(4096):  # what the QEMU over there says is for none here
                    pass
            except _GoneError:
                pass
            except MigrationError as error:
                self.error = str(error)
            except OSError as error:
                where = error.filename or self._path
                self.error = f"the snapshot cannot be read: {where}: {error.strerror}"

    def _write(self) -> None:
        snapshot = self._snapshot
        with self._opened(snapshot.devices) as fd:
            devices = _Devices(fd, self._path, snapshot.devices)
            self._send_devices(devices, snapshot.header)
            self._send(order(Command.OPEN_RETURN_PATH) + order(Command.PING, b"\0\0\0\1"))
            self._send_devices(devices, snapshot.head - snapshot.header)
            self._begin_memory()
            for number, block in enumerate(snapshot.blocks):
                self._send_block(number, block)
            self._send_section(FINISH, b"")
            self._send_devices(devices, snapshot.devices.size - snapshot.head)
            devices.check()
        text = self._description()
        self._send(bytes([EOF]))
        if text is not None:
            self._send(struct.pack(">BI", DESCRIPTION, len(text)) + text)

    @contextlib.contextmanager
    def _opened(self, stored: Stored) -> Iterator[int]:
        with Directory(self._path) as directory, directory.opened(stored.file) as fd:
            yield fd

    def _send(self, data: bytes | memoryview) -> None:
        assert self._sock is not None
        try:
            self._sock.sendall(data)
        except OSError:
            raise _GoneError from None

    # -- memory

    def _begin_memory(self) -> None:
        blocks = self._snapshot.blocks
        content = bytearray(struct.pack(">Q", self._snapshot.memory | MEM_SIZE))
        for (name, _), block in zip(self._blocks, blocks, strict=True):
            content += bytes([len(name)]) + name + struct.pack(">Q", block.size)
        head = bytes([len(RAM)]) + RAM + struct.pack(">II", 0, RAM_VERSION)
        self._send_section(START, head + bytes(content))

    def _send_section(self, kind: int, content: bytes | memoryview) -> None:
        """A part of the memory's section."""
        number = struct.pack(">I", self._snapshot.ram)
        self._send(bytes([kind]) + number)
        self._send(content)
        self._send(EOS + bytes([FOOTER]) + number)

    def _send_block(self, number: int, block: StoredBlock) -> None:
        page_size = self._snapshot.page_size
        digest = Hash(block.size, page_size)
        with self._opened(block) as fd:
            for page, count, data in contents(fd, block.size, page_size, self._buffer):
                digest.update(count, data)
                done = 0
                while done < count:
                    rest = None if data is None else data[done * page_size :]
                    used, fit = self._recorder.put(
                        self._out, number, page + done, count - done, rest
                    )
                    self._send_section(PART, self._out[:used])
                    done += fit
        self._check(block, digest.hexdigest())

    # -- all else

    def _send_devices(self, devices: _Devices, size: int) -> None:
        while size:
            piece = devices.read(min(size, PIECE_BYTES))
            self._send(piece)
            size -= len(piece)

    def _description(self) -> bytes | None:
        stored = self._snapshot.description
        if stored is None:
            return None
        with self._opened(stored) as fd, open(fd, "rb", closefd=False) as file:
            text = file.read(stored.size)
        self._check(stored, xxhash.xxh3_128_hexdigest(text))
        return text

    def _check(self, stored: Stored, found: str) -> None:
        if found != stored.hash:
            raise _damaged(self._path, stored)


class _Devices:
    """devices.bin, read from its beginning to its end, once."""

    def __init__(self, fd: int, path: str, stored: Stored) -> None:
        self._fd = fd
        self._path = path
        self._stored = stored
        self._hash = xxhash.xxh3_128()

    def read(self, size: int) -> bytes:
        piece = os.read(self._fd, size)
        if not piece:
            raise _damaged(self._path, self._stored)
        self._hash.update(piece)
        return piece

    def check(self) -> None:
        if self._hash.hexdigest() != self._stored.hash:
            raise _damaged(self._path, self._stored)


def _damaged(path: str, stored: Stored) -> MigrationError:
    return MigrationError(
        f"{os.path.join(path, stored.file)} is not what had landed there: its hash is another. The "
        "snapshot is damaged, and is not lifted"
    )


class _GoneError(Exception):
    """Nobody reads the stream any more."""


# ---------------------------------------------------------------- the guest


class LiftIntake(Intake):
    """Of a Lifter, who knows why its stream has no end."""

    def __init__(self, sock: socket.socket, page_size: int, lifter: Lifter) -> None:
        super().__init__(sock, page_size)
        self._lifter = lifter

    def _fill(self) -> bool:
        try:
            return super()._fill()
        except StreamLost:
            self._lifter.join()
            if self._lifter.error:
                raise MigrationError(self._lifter.error) from None
            raise


class SnapshotGuest(QemuGuest):
    """A machine that has landed in `path`. Raises UsageError where there is none."""

    waits = "the snapshot is as it was"
    ours = f"the guest does not run at the destination; {waits}"
    theirs = f"the guest runs at the destination; {waits}"

    def __init__(self, path: str) -> None:
        super().__init__(None)
        self._path = path
        self._snapshot = Snapshot.read(path)
        self._lifter: Lifter | None = None
        self._directory: DirectoryHold | None = None

    async def hold(self) -> None:
        if self._directory is None:
            hold = DirectoryHold(self._path, f"guest snapshot:{self._path}")
            await hold.take()
            self._directory, self.cautions = hold, hold.cautions

    def unhold(self) -> None:
        if self._directory is not None:
            self._directory.close()
            self._directory = None

    @property
    def remains(self) -> str:  # type: ignore[override]
        return self.waits

    @property
    def driven(self) -> bool:
        """It begins when there is a destination."""
        return True

    @property
    def description(self) -> str:  # type: ignore[override]
        return f"snapshot of a QEMU guest ({self._snapshot.machine})"

    async def started(self) -> None:
        if self._intake is not None:
            return
        await self.hold()
        ours, theirs = stream_pair()
        self._socket = ours
        self._lifter = Lifter(self._path, self._snapshot)
        self._lifter.start(theirs)
        intake = LiftIntake(ours, self._snapshot.page_size, self._lifter)
        if not await in_thread(intake.begin, BEGIN_SECONDS):
            raise MigrationError(f"{self._path} was not read in {BEGIN_SECONDS:g} s")
        intake.check(return_path=True)
        self._intake = intake

    async def give_up(self) -> None:
        """It runs nowhere, so there is nothing to hold."""
        self._given_up = True

    async def close(self) -> None:
        await super().close()
        if self._lifter is not None:
            await in_thread(self._lifter.join)
        self.unhold()

    def facts(self) -> dict[str, Any]:
        return {"kind": "snapshot", "path": os.path.abspath(self._path)}
