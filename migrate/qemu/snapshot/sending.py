"""Sends a snapshot as a stream of QEMU's, without any QEMU.

    blocks/NAME -> RamRecorder ----------> |
    devices.bin, description.json -------> | the stream --socket--> Intake, as from a QEMU

Each file is checked against its hash as it is sent. The end of the stream, without which no QEMU
runs the guest, is sent after all of them have been checked. So a damaged snapshot is noticed before
its guest can run, and no file is read twice.

The stream has one round and no deltas, since nothing changes. The memory is one START section, one
PART for each piece of a block, and a FINISH, as QEMU writes them: a QEMU that loads it cannot tell.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
from collections.abc import Iterator

import xxhash

from migrate.errors import MigrationError
from migrate.files.directory import Directory
from migrate.memory.memory import private_buffer
from migrate.qemu.snapshot.layout import (
    CONTENT_BYTES,
    Hash,
    Snapshot,
    Stored,
    StoredBlock,
    contents,
)
from proto.qemu.kernel import RamRecorder
from proto.qemu.parts import (
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
    CommandCode,
    pack_command,
)

logger = logging.getLogger(__name__)

# The records of a piece: the pages, and for each one a word and perhaps the name of its block.
SECTION_BYTES = CONTENT_BYTES + (CONTENT_BYTES >> 4)


class SnapshotSender:
    """Sends the stream of one snapshot, in a thread of its own.

    error -- why the stream was cut; "" if it was sent to its end, or is not wanted
    """

    def __init__(self, path: str, snapshot: Snapshot, connection: socket.socket) -> None:
        """path -- of the snapshot; connection -- blocks, and is closed by the thread"""
        self.error = ""
        self._path = path
        self._snapshot = snapshot
        self._connection = connection
        self._blocks = [
            (block.name.encode("latin-1"), snapshot.pages(block)) for block in snapshot.blocks
        ]
        self._recorder = RamRecorder(self._blocks, snapshot.page_size)
        self._buffer = private_buffer(CONTENT_BYTES)
        self._section = private_buffer(SECTION_BYTES)
        self._thread = threading.Thread(target=self._run, name="snapshot", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def join(self) -> None:
        """Wait until the thread has ended. It does not end before the other socket is closed."""
        self._thread.join()

    def _run(self) -> None:
        with self._connection:
            try:
                self._send_all()
                while self._connection.recv(4096):  # the return path: there is no QEMU to hear it
                    pass
            except _NotWantedError:
                pass
            except MigrationError as error:
                self.error = str(error)
            except OSError as error:
                where = error.filename or self._path
                self.error = f"the snapshot cannot be read: {where}: {error.strerror}"
        if self.error:
            logger.debug("the snapshot is not sent to its end: %s", self.error)

    def _send_all(self) -> None:
        """Send the stream in QEMU's order.

        The header, commands and early sections; the memory; all other sections; the end.
        """
        snapshot = self._snapshot
        with self._opened(snapshot.devices) as fd:
            devices = _DevicesReader(fd, self._path, snapshot.devices)
            self._send_devices(devices, snapshot.header)
            self._send(
                pack_command(CommandCode.OPEN_RETURN_PATH)
                + pack_command(CommandCode.PING, b"\0\0\0\1")
            )
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
        with Directory(self._path) as directory, directory.reading(stored.file) as fd:
            yield fd

    def _send(self, data: bytes | memoryview) -> None:
        try:
            self._connection.sendall(data)
        except OSError:
            raise _NotWantedError from None

    # -- memory

    def _begin_memory(self) -> None:
        """Send the start of the memory's section: the list of RAM blocks."""
        blocks = self._snapshot.blocks
        content = bytearray(struct.pack(">Q", self._snapshot.memory | MEM_SIZE))
        for (name, _), block in zip(self._blocks, blocks, strict=True):
            content += bytes([len(name)]) + name + struct.pack(">Q", block.size)
        head = bytes([len(RAM)]) + RAM + struct.pack(">II", 0, RAM_VERSION)
        self._send_section(START, head + bytes(content))

    def _send_section(self, kind: int, content: bytes | memoryview) -> None:
        """Send a part of the memory's section: its start, a part with pages, or its end."""
        number = struct.pack(">I", self._snapshot.ram)
        self._send(bytes([kind]) + number)
        self._send(content)
        self._send(EOS + bytes([FOOTER]) + number)

    def _send_block(self, number: int, block: StoredBlock) -> None:
        """Send the pages of a RAM block. Raises MigrationError if its hash is wrong."""
        page_size = self._snapshot.page_size
        digest = Hash(block.size, page_size)
        with self._opened(block) as fd:
            for page, count, data in contents(fd, block.size, page_size, self._buffer):
                digest.update(count, data)
                done = 0
                while done < count:
                    rest = None if data is None else data[done * page_size :]
                    used, fit = self._recorder.put(
                        self._section, number, page + done, count - done, rest
                    )
                    self._send_section(PART, self._section[:used])
                    done += fit
        self._check(block, digest.hexdigest())

    # -- all else

    def _send_devices(self, devices: _DevicesReader, size: int) -> None:
        while size:
            piece = devices.read(min(size, CONTENT_BYTES))
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


class _DevicesReader:
    """Reads devices.bin once, from its beginning to its end. Raises MigrationError."""

    def __init__(self, fd: int, path: str, stored: Stored) -> None:
        self._fd = fd
        self._path = path
        self._stored = stored
        self._hash = xxhash.xxh3_128()

    def read(self, size: int) -> bytes:
        """Return what comes next, `size` bytes at most."""
        piece = os.read(self._fd, size)
        if not piece:
            raise _damaged(self._path, self._stored)
        self._hash.update(piece)
        return piece

    def check(self) -> None:
        """Check what was read against the hash of the file."""
        if self._hash.hexdigest() != self._stored.hash:
            raise _damaged(self._path, self._stored)


def _damaged(path: str, stored: Stored) -> MigrationError:
    return MigrationError(
        f"{os.path.join(path, stored.file)} is not what was saved there: its hash differs. The "
        "snapshot is damaged, and is not restored"
    )


class _NotWantedError(Exception):
    """The other end of the stream was closed."""
