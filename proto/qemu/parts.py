"""The parts of QEMU's migration stream, and the messages of its return path.

    "QEVM" 3  [configuration]  section*  EOF  [description]

    START 01, FULL 04   id  name  instance  version  body  FOOTER
    PART 02, END 03     id  body  FOOTER
    COMMAND 08          number  length  data
    FOOTER 7e           id

proto.qemu.stream_parser cuts a stream into these parts. The facts are from QEMU's
docs/devel/migration, and from streams of QEMU 7.2 and 10.0.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

MAGIC = b"QEVM\x00\x00\x00\x03"
EOF, START, PART, FINISH, FULL, SUBSECTION, DESCRIPTION, CONFIGURATION, COMMAND = range(9)
FOOTER = 0x7E
RAM = b"ram"
RAM_VERSION = 4
MEM_SIZE = 0x04
EOS = struct.pack(">Q", 0x10)


class CommandCode(IntEnum):
    """The numbers of commands (qemu_vm_cmd in QEMU)."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11


def pack_command(number: CommandCode, data: bytes = b"") -> bytes:
    """Return the bytes of a command in the stream."""
    return struct.pack(">BHH", COMMAND, number, len(data)) + data


class Reply(IntEnum):
    """Messages of the destination on the return path."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7


@dataclass(frozen=True)
class Block:
    """A RAM block, of which `size` bytes are in use."""

    name: bytes
    size: int

    def pages(self, page_size: int) -> int:
        """Return the number of its pages; the last one may be used in part."""
        return -(-self.size // page_size)


@dataclass(frozen=True)
class Header:
    """The magic and the configuration.

    machine -- the machine type; "" if the stream does not say it
    """

    machine: str = ""
    capabilities: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """The head of a section. A section of type PART or END has name and version from its START."""

    kind: int
    id: int
    name: str
    instance: int = 0
    version: int = 0


@dataclass(frozen=True)
class BlockList:
    """The RAM blocks, in the order in which their pages are numbered."""

    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Pages:
    """Records of pages: the first `count` of StreamParser.records. More may follow at once."""

    count: int


@dataclass(frozen=True)
class Body:
    """A piece of the body of a section, which only QEMU can read."""

    section: Section


@dataclass(frozen=True)
class SectionEnd:
    """The footer of a section."""

    section: Section


@dataclass(frozen=True)
class Command:
    """A command to the destination, and its argument."""

    number: int
    data: bytes


@dataclass(frozen=True)
class End:
    """The end mark: no section follows, but the description may."""


@dataclass(frozen=True)
class Description:
    """The head of the description of the devices, JSON, which QEMU does not need. `Text` follows.

    length -- bytes of all `Text`
    """

    length: int


@dataclass(frozen=True)
class Text:
    """A piece of the description."""


Part = Header | Section | BlockList | Pages | Body | SectionEnd | Command | End | Description | Text
