"""A snapshot: a directory with the memory of a virtual machine, its devices, and a list of them.

    DIR/snapshot.json      what there is, with the XXH3-128 of each file
    DIR/blocks/NAME        each RAM block as the guest sees it; pages of zeros are holes
    DIR/devices.bin        the rest of the stream as it came, but for its end and the commands
                           that concern a connection
    DIR/description.json   QEMU's own description of the devices, if the stream had one

The first `header` bytes of devices.bin are the header of the stream. The bytes from there to `head`
are sections that QEMU loads before the memory; the others follow the memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any
from urllib.parse import quote_from_bytes

import xxhash

from migrate.errors import UsageError
from migrate.files.directory import Directory
from migrate.memory.memory import Memory
from migrate.runtime import bounded_json
from proto.qemu.stream_parser import MAX_DESCRIPTION
from proto.wire.messages import MAX_BLOCKS

FACTS_FILE = "snapshot.json"
BLOCKS_DIRECTORY = "blocks"
DEVICES_FILE = "devices.bin"
DESCRIPTION_FILE = "description.json"
FORMAT, FORMAT_VERSION = "xbmigrate snapshot", 1
# Of a RAM block: 4 PiB is more than a machine can have, and keeps sums within 64 bits.
MAX_BLOCK_BYTES = 1 << 52
# The files of blocks are read in pieces of this size: few calls, and a cache of the CPU holds one.
CONTENT_BYTES = 1 << 20
_ZEROS = memoryview(bytes(CONTENT_BYTES))


@dataclass(frozen=True)
class Stored:
    """A file of the snapshot: its path in the directory, size in bytes, and XXH3-128."""

    file: str
    size: int
    hash: str


@dataclass(frozen=True)
class StoredBlock(Stored):
    """The file of a RAM block. name -- as in the stream, one character for each byte"""

    name: str


@dataclass(frozen=True)
class StoredSection:
    """A section in devices.bin, from its type to its footer: `size` bytes from `at` on.

    kind, id, name, instance, version -- see Section, in proto.qemu.stream_parser
    """

    kind: int
    id: int
    name: str
    instance: int
    version: int
    at: int
    size: int


@dataclass(frozen=True)
class Snapshot:
    """The contents of a snapshot.

    id           -- random: another one for each snapshot that is saved
    machine      -- QEMU's machine type
    capabilities -- those that the header of the stream names
    ram          -- the id of the section that the memory was in
    header, head -- bytes of devices.bin; see above
    """

    id: str
    machine: str
    page_size: int
    capabilities: tuple[str, ...]
    ram: int
    header: int
    head: int
    blocks: tuple[StoredBlock, ...]
    devices: Stored
    sections: tuple[StoredSection, ...]
    description: Stored | None

    @property
    def memory(self) -> int:
        """Bytes of all RAM blocks."""
        return sum(block.size for block in self.blocks)

    def pages(self, block: StoredBlock) -> int:
        """Return the number of pages of a block; the last one may be cut."""
        return -(-block.size // self.page_size)

    def text(self) -> str:
        """Return the content of snapshot.json."""
        facts = {"format": FORMAT, "format-version": FORMAT_VERSION, **asdict(self)}
        return json.dumps({**facts, "check": _checksum(facts)}, indent=1) + "\n"

    @classmethod
    def read(cls, path: str) -> Snapshot:
        """Read the snapshot in a directory. Raises UsageError if it has none, or a damaged one."""
        try:
            with Directory(path) as directory:
                return cls.read_in(directory)
        except OSError as error:
            raise _no_snapshot(path, error) from None

    @classmethod
    def read_in(cls, directory: Directory) -> Snapshot:
        """As `read`, from an open directory."""
        path = directory.path
        try:
            with directory.reading(FACTS_FILE) as fd, open(fd, "rb", closefd=False) as file:
                text = file.read(bounded_json.MAX_BYTES)
            return cls._read(text, os.path.join(path, FACTS_FILE), directory)
        except OSError as error:
            raise _no_snapshot(path, error) from None

    @classmethod
    def _read(cls, text: bytes, where: str, directory: Directory) -> Snapshot:
        try:
            facts = bounded_json.loads(text)
            check = facts.pop("check")
            if facts.pop("format") != FORMAT:
                raise ValueError("it is of another program")
            if facts.pop("format-version") != FORMAT_VERSION:
                raise ValueError("it is of a later version of this program")
            if check != _checksum({"format": FORMAT, "format-version": FORMAT_VERSION, **facts}):
                raise ValueError("it was changed since it was written")
            found = _snapshot(facts)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{where} is damaged: {error}") from None
        for stored in filter(None, (*found.blocks, found.devices, found.description)):
            _check_file(directory, stored)
        return found


def _no_snapshot(path: str, error: OSError) -> UsageError:
    return UsageError(f"no snapshot in {path}: {FACTS_FILE}: {error.strerror}")


def _checksum(facts: dict[str, Any]) -> str:
    """Return the XXH3-128 of facts, whatever the order and layout of their JSON."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def _check_file(directory: Directory, stored: Stored) -> None:
    """Raise UsageError if a file is missing, or has another size."""
    path = os.path.join(directory.path, stored.file)
    try:
        with directory.reading(stored.file) as fd:
            size = os.fstat(fd).st_size
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: the snapshot is not whole") from None
    if size != stored.size:
        raise UsageError(f"{path} has {size} bytes, not {stored.size}: the snapshot is damaged")


# ---------------------------------------------------------------- from JSON


def _snapshot(facts: dict[str, Any]) -> Snapshot:
    """Return the snapshot that facts describe; they are emptied.

    Raises ValueError, KeyError, TypeError or AttributeError if they are none that we write.
    """
    blocks = tuple(_made(StoredBlock, one) for one in facts.pop("blocks"))
    names = [block.name.encode("latin-1") for block in blocks]
    if not 0 < len(blocks) <= MAX_BLOCKS or not all(0 < len(name) <= 255 for name in names):
        raise ValueError("the blocks are none that a guest can have")
    if [block.file for block in blocks] != [block_file(i, name) for i, name in enumerate(names)]:
        raise ValueError("a block has the file of another name")
    described = facts.pop("description")
    found = Snapshot(
        **{name: _plain(facts.pop(name), name) for name in ("id", "machine", "page_size", "ram",
                                                            "header", "head")},
        capabilities=tuple(map(str, facts.pop("capabilities"))), blocks=blocks,
        devices=_made(Stored, facts.pop("devices")),
        sections=tuple(_made(StoredSection, one) for one in facts.pop("sections")),
        description=None if described is None else _made(Stored, described),
    )  # fmt: skip
    if facts:
        raise ValueError(f"it has {', '.join(map(repr, facts))}, which is not known")
    page_size, head = found.page_size, found.head
    if not 1024 <= page_size <= 16384 or page_size & (page_size - 1):
        raise ValueError(f"pages of {page_size} bytes")
    if found.devices.file != DEVICES_FILE or found.ram >= 1 << 32:
        raise ValueError("the devices are not where they can be")
    if not found.header <= head <= found.devices.size:
        raise ValueError("the devices are not where they can be")
    if found.description and (
        found.description.file != DESCRIPTION_FILE or found.description.size > MAX_DESCRIPTION
    ):
        raise ValueError("the description is not what it can be")
    if not all(0 < block.size < MAX_BLOCK_BYTES for block in blocks):
        raise ValueError("a block of a size that cannot be")
    return found


_KINDS = {"id": str, "machine": str, "file": str, "hash": str, "name": str}


def _plain(value: Any, name: str, kind: type | None = None) -> Any:
    """Return a value if it has the type of its name and is not negative. Raises ValueError."""
    if type(value) is not (kind or _KINDS.get(name, int)) or (type(value) is int and value < 0):
        raise ValueError(f"{name} is {value!r}")
    return value


def _made(kind: Any, facts: dict[str, Any]) -> Any:
    """Return a dataclass of a kind, made of facts with exactly its fields. Raises ValueError."""
    names = [one.name for one in fields(kind)]
    if set(names) != set(facts):
        raise ValueError(f"{facts!r:.80} where {', '.join(names)} are due")
    kinds = {"id": int} if kind is StoredSection else {}
    return kind(**{name: _plain(facts[name], name, kinds.get(name)) for name in names})


# ---------------------------------------------------------------- files


def block_file(number: int, name: bytes) -> str:
    """Return the path of a block's file: the name of the block, quoted if need be.

    number -- of the block; it keeps files apart whose names are cut
    """
    quoted = quote_from_bytes(name, safe="@,+=:")
    if quoted.startswith("."):
        quoted = "%2E" + quoted[1:]
    if len(quoted) > 240:
        quoted = f"{quoted[:200]}%-{number}"  # no quoted name has this
    return f"{BLOCKS_DIRECTORY}/{quoted}"


def contents(
    fd: int, size: int, page_size: int, buffer: memoryview
) -> Iterator[tuple[int, int, memoryview | None]]:
    """Yield a block's file in pieces: (first page, number of pages, their bytes).

    The bytes are None for a hole. Others are in `buffer`, until the next piece. A last page that is
    cut is filled up with zeros.
    """
    memory, most = Memory(size, fd=fd), min(len(buffer), CONTENT_BYTES) // page_size
    for page, count, data in memory.extents(page_size):
        for first in range(page, page + count, most):
            number = min(most, page + count - first)
            if not data:
                yield first, number, None
                continue
            piece = buffer[: number * page_size]
            there = memory.read(first * page_size, piece)
            piece[there:] = bytes(len(piece) - there)
            yield first, number, piece


class Hash:
    """XXH3-128 of a block's file, from its `contents`.

    size -- bytes of the file; what fills up the last page is not hashed
    """

    def __init__(self, size: int, page_size: int) -> None:
        self._left = size
        self._page_size = page_size
        self._digest = xxhash.xxh3_128()

    def update(self, pages: int, data: memoryview | None) -> None:
        count = min(pages * self._page_size, self._left)
        self._digest.update((_ZEROS if data is None else data)[:count])
        self._left -= count

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
