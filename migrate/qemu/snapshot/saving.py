"""Saves a stream of QEMU's as a snapshot, without any QEMU (see layout.py for its files).

    StreamReceiver -> Loader --socket--> SnapshotSaver: StreamParser -> RamApplier -> blocks/*
                                                                     -> all else   -> devices.bin

To the rest of the program a SnapshotSaver is a QEMU that waits for a guest: it answers PING, and
says SHUT at the end. But no guest runs here, so it gets all of the stream before GO. Its SHUT means
that the snapshot was checked and is safe on the disk, under a hidden name. After GO it gets its own
name (see prepared.py).

Pages go into a file for each RAM block: a later delta, or a page that comes again, overwrites what
it changes, and the snapshot is no longer than the machine. Everything else is kept as QEMU sent it,
in order, because only QEMU can read the state of a device:

    devices.bin   header | sections before the memory | sections after it
                         ^ header_bytes               ^ head

When the snapshot is sent, the memory is put back in at `head`: behind what QEMU must know before it
loads pages (the size of plugged memory, virtio-mem), and before the states of the other devices.

A stream may be as long as its sender likes. So sections and commands are counted, and the size of
each section is bounded; pages are bounded by the list of RAM blocks.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import socket
import threading
from collections.abc import Sequence

import xxhash

from migrate.errors import MigrationError
from migrate.files.partial_output import PartialOutput
from migrate.memory.memory import private_buffer
from migrate.memory.stream_buffer import StreamBuffer
from migrate.qemu.snapshot.files import DeviceFile, SnapshotFiles, write_all
from migrate.qemu.snapshot.layout import (
    DESCRIPTION_FILE,
    DEVICES_FILE,
    FACTS_FILE,
    Snapshot,
    Stored,
    StoredSection,
)
from migrate.qemu.snapshot.memory_files import MemoryFiles
from migrate.qemu.stream.description import check_sections
from migrate.qemu.stream.return_path import reply
from migrate.units import format_size
from proto.qemu.parts import (
    RAM,
    START,
    BlockList,
    Body,
    Command,
    CommandCode,
    Description,
    End,
    Header,
    Pages,
    Part,
    Reply,
    Section,
    SectionEnd,
    Text,
)
from proto.qemu.stream_parser import StreamParser
from proto.wire.errors import ProtoError

logger = logging.getLogger(__name__)

# More than twice the longest record, a page of 16 KiB (see StreamBuffer); larger, so that each
# recv(2) may return much.
STREAM_BUFFER_BYTES = 4 << 20
MIN_STREAM_READ_BYTES = STREAM_BUFFER_BYTES // 4
PAGE_BYTES = 4096
# A machine has some hundred sections and ten commands.
MAX_SECTIONS = MAX_COMMANDS = 10_000
# The largest section, that of a graphics card with its video memory, has some ten MiB.
MAX_SECTION_BYTES = 128 << 20
UNWANTED = "it is not wanted any more"
# QEMU understands SWITCHOVER_ACK from this version on; an earlier one fails at it. The name of a
# machine type ends in the version that it came with.
ACK_SINCE = (8, 1)
TYPE_VERSION = re.compile(r"-(\d+)\.(\d+)$")
# Commands that concern the connection, and not the guest: they are not kept in the snapshot.
CONNECTION_COMMANDS = (CommandCode.OPEN_RETURN_PATH, CommandCode.PING, CommandCode.POSTCOPY_ADVISE)


class SnapshotSaver:
    """Reads one stream in a thread of its own, and saves it in `files`.

    snapshot  -- what was saved, when it is whole
    left      -- the directory that it is in, when it is whole
    error     -- why it is not whole
    announced -- the names of the RAM blocks and their pages, if they are known before the stream
    announced_size -- bytes of a page in `announced`
    """

    def __init__(self, files: SnapshotFiles, connection: socket.socket) -> None:
        """Make the files. Raises OSError if one cannot be made."""
        self.files = files
        self.snapshot: Snapshot | None = None
        self.left: PartialOutput | None = None
        self.error = ""
        self.announced: Sequence[tuple[bytes, int]] | None = None
        self.announced_size = PAGE_BYTES
        self._connection = connection
        self._unwanted = False
        self._parser = StreamParser()
        self._stream = StreamBuffer(private_buffer(STREAM_BUFFER_BYTES), MIN_STREAM_READ_BYTES)
        self._stream_ended = False
        self._memory: MemoryFiles | None = None  # from the list of RAM blocks on
        self._devices = DeviceFile(files.make(DEVICES_FILE))
        self._header = Header()
        self._header_bytes = 0
        self._ram_section = -1
        # What comes before the memory: bytes of devices.bin, and number of sections. It grows until
        # the first page: see _come_before_memory.
        self._head = self._early = -1
        self._paged = False
        self._sections: list[StoredSection] = []
        self._section_at = 0  # where the section that is being read begins in devices.bin
        self._commands = 0
        self._description: bytearray | None = None
        self._thread = threading.Thread(target=self._run, name="snapshot", daemon=True)

    def start(self) -> None:
        """Begin to read the stream."""
        self._thread.start()

    def _run(self) -> None:
        try:
            self._read_all()
            self._finish()
            self._say(reply(Reply.SHUT, 0))
        except BaseException as error:
            self.error = self._sentence(error)
            logger.debug("the snapshot failed: %s", self.error)
            if self._memory is not None:
                self._memory.flusher.stop()
            self.files.remove()
            self._say(reply(Reply.SHUT, 1))
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)

    def _sentence(self, error: BaseException) -> str:
        """Return why the snapshot failed, for the user."""
        if isinstance(error, OSError):
            return f"--output {self.files.path}: {error.strerror or error}"
        if isinstance(error, ProtoError):
            return f"QEMU's stream cannot be saved: {error}"
        return str(error) or type(error).__name__

    def _say(self, message: bytes) -> None:
        """Send a message of the return path. A peer that is gone is noticed where we read."""
        with contextlib.suppress(OSError):
            self._connection.sendall(message)

    def close(self) -> None:
        """Stop saving, and wait until the thread has ended."""
        self._unwanted = True
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        if self._thread.ident is not None:
            self._thread.join()
        if self._memory is not None:
            self._memory.flusher.stop()
        self._connection.close()
        self.files.close()

    # -- the stream

    def _read_all(self) -> None:
        parser, stream = self._parser, self._stream
        while not parser.complete:
            if self._unwanted:
                raise MigrationError(UNWANTED)
            at, part = parser.step(stream.data, stream.start, stream.end, last=self._stream_ended)
            if part is not None:
                self._take(part, stream.take(at))
            elif self._stream_ended:
                break
            elif not self._fill():
                self._stream_ended = True
        half_described = self._description is not None and not parser.complete
        if not parser.ended or stream or half_described:
            raise MigrationError("the stream has ended before its end")

    def _fill(self) -> bool:
        """Read more of the stream; return False if it has ended."""
        try:
            count = self._connection.recv_into(self._stream.room())
        except ConnectionError:
            return False
        self._stream.add(count)
        return count > 0

    def _take(self, part: Part, data: memoryview) -> None:
        """Save a part of the stream. data -- its bytes"""
        if isinstance(part, Pages):
            self._apply(part)
        elif isinstance(part, BlockList):
            self._memory = self._open_blocks(part)
            self._allow_switchover()
        elif isinstance(part, Header):
            self._header = part
            self._devices.append(data)
            self._header_bytes = self._devices.size
        elif isinstance(part, Section):
            self._begin_section(part, data)
        elif isinstance(part, Body | SectionEnd):
            self._continue_section(part, data)
        elif isinstance(part, Command):
            self._obey(part, data)
        elif isinstance(part, Description):
            self._description = bytearray()
        elif isinstance(part, Text):
            if self._description is not None:
                self._description += data
        else:
            assert isinstance(part, End)

    def _obey(self, command: Command, data: memoryview) -> None:
        """Answer a command, or keep it for the QEMU that restores the snapshot."""
        self._commands += 1
        if self._commands > MAX_COMMANDS:
            raise MigrationError(f"the stream has more than {MAX_COMMANDS} commands")
        if command.number == CommandCode.PING:
            self._say(reply(Reply.PONG, int.from_bytes(command.data[:4], "big")))
        if command.number not in CONNECTION_COMMANDS:
            self._devices.append(data)

    def _open_blocks(self, part: BlockList) -> MemoryFiles:
        """Make a file for each RAM block. Raises MigrationError if others were announced."""
        found = [(one.name, one.pages(self.announced_size)) for one in part.blocks]
        if self.announced is not None and found != [*self.announced]:
            raise MigrationError("the stream has other RAM blocks than were announced for it")
        return MemoryFiles(self.files, part, self._parser.page_size)

    def _allow_switchover(self) -> None:
        """Say SWITCHOVER_ACK, if QEMU understands it.

        With the capability switchover-ack QEMU does not stop its guest before the destination says
        that its devices are ready. Here there is nothing to make ready. Without the capability
        QEMU ignores the message.
        """
        version = TYPE_VERSION.search(self._header.machine)
        if version is not None and (int(version[1]), int(version[2])) >= ACK_SINCE:
            self._say(reply(Reply.SWITCHOVER_ACK))

    def _apply(self, part: Pages) -> None:
        """Write pages into the files of their blocks."""
        memory = self._memory
        assert memory is not None  # the parser has no pages before the list of blocks
        if not self._paged:
            self._paged = True
            self._come_before_memory()
        # Records hold places in the whole buffer.
        whole = self._stream.data[: self._stream.end]
        memory.applier.apply(whole, self._parser.records, part.count)

    def _begin_section(self, section: Section, data: memoryview) -> None:
        """Keep the head of a section, unless it is that of the memory."""
        if section.name == RAM.decode():
            if section.kind == START:
                self._ram_section = section.id
                self._come_before_memory()
            return
        self._section_at = self._devices.size
        self._devices.append(data)

    def _come_before_memory(self) -> None:
        """Note what goes before the memory when the snapshot is restored: all that came so far.

        Called at the list of RAM blocks, and at the first page: what comes between them may be the
        size of a device (virtio-mem), which QEMU must know before it loads the device's pages.
        """
        self._head, self._early = self._devices.size, len(self._sections)

    def _continue_section(self, part: Body | SectionEnd, data: memoryview) -> None:
        """Keep a part of a section, unless it is that of the memory; note where a section ends."""
        section = part.section
        if section.name == RAM.decode():
            return
        self._devices.append(data)
        size = self._devices.size - self._section_at
        if size > MAX_SECTION_BYTES:
            most = format_size(MAX_SECTION_BYTES)
            raise MigrationError(f"the section of {section.name} is longer than {most}")
        if isinstance(part, Body):
            return
        if len(self._sections) == MAX_SECTIONS:
            raise MigrationError(f"the stream has more than {MAX_SECTIONS} sections")
        self._sections.append(
            StoredSection(
                section.kind, section.id, section.name, section.instance, section.version,
                self._section_at, size,
            )
        )  # fmt: skip

    # -- the end

    def _finish(self) -> None:
        """Check all that was saved, bring it to the disk, and give it its hidden name."""
        if self._memory is None:
            raise MigrationError("the stream has no memory")
        self._memory.flusher.stop()
        self._memory.flusher.check()
        description = self._save_description()
        snapshot = Snapshot(
            id=secrets.token_hex(16), machine=self._header.machine,
            page_size=self._parser.page_size, capabilities=self._header.capabilities,
            ram=self._ram_section, header=self._header_bytes, head=self._head,
            blocks=tuple(self._memory.finish(self._check_wanted)),
            devices=Stored(DEVICES_FILE, self._devices.size, self._devices.hexdigest()),
            sections=tuple(self._sections), description=description,
        )  # fmt: skip
        write_all(self.files.make(FACTS_FILE), memoryview(snapshot.text().encode()))
        self.left = self.files.finish()
        self.snapshot = snapshot

    def _save_description(self) -> Stored | None:
        """Check the sections against QEMU's description of them, and save it, if there is one."""
        if self._description is None:
            return None
        text = bytes(self._description)
        write_all(self.files.make(DESCRIPTION_FILE), memoryview(text))
        check_sections(text, self._sections, self._early, self._devices.read)
        return Stored(DESCRIPTION_FILE, len(text), xxhash.xxh3_128_hexdigest(text))

    def _check_wanted(self) -> None:
        if self._unwanted:
            raise MigrationError(UNWANTED)
