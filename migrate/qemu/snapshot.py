"""A virtual machine at rest: a directory with its memory, its devices, and what they are.

    DIR/snapshot.json      what there is, with the XXH3-128 of each file
    DIR/blocks/NAME        each RAM block as the guest sees it; what is zero is a hole
    DIR/devices.bin        the stream but for its memory and its end, as it came
    DIR/description.json   QEMU's own description of the devices, where there was one

In devices.bin the first `header` bytes are the stream's header, and what is there up to `head` goes
before the memory: sections that QEMU loads first. All others follow it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any
from urllib.parse import quote_from_bytes

import xxhash

from migrate import bounded_json
from migrate.directory import Directory
from migrate.errors import UsageError
from migrate.memory import Memory
from proto.messages import MAX_BLOCKS
from proto.qemu import MAX_DESCRIPTION

FACTS = "snapshot.json"
BLOCKS = "blocks"
DEVICES = "devices.bin"
DESCRIPTION = "description.json"
FORMAT, VERSION = "xbmigrate snapshot", 1
MAX_FACTS = bounded_json.MOST_BYTES
MAX_BYTES = 1 << 52
PIECE_BYTES = 1 << 20
_ZEROS = memoryview(bytes(PIECE_BYTES))


@dataclass(frozen=True)
class Stored:
    """A file: its path in the directory, bytes, and XXH3-128."""

    file: str
    size: int
    hash: str


@dataclass(frozen=True)
class StoredBlock(Stored):
    """name -- as in the stream, a character for each byte"""

    name: str


@dataclass(frozen=True)
class StoredSection:
    """A section of devices.bin, from its type to its footer: `size` bytes from `at` on."""

    kind: int
    id: int
    name: str
    instance: int
    version: int
    at: int
    size: int


@dataclass(frozen=True)
class Snapshot:
    """id -- of this landing; ram -- the number of the section that the memory was in"""

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
        return sum(block.size for block in self.blocks)

    def pages(self, block: StoredBlock) -> int:
        return -(-block.size // self.page_size)

    def text(self) -> str:
        facts = {"format": FORMAT, "format-version": VERSION, **asdict(self)}
        return json.dumps({**facts, "check": _check_of(facts)}, indent=1) + "\n"

    @classmethod
    def read(cls, path: str) -> Snapshot:
        """That in a directory. Raises UsageError."""
        where = os.path.join(path, FACTS)
        try:
            with Directory(path) as directory, directory.opened(FACTS) as fd:
                with open(fd, "rb", closefd=False) as file:
                    text = file.read(MAX_FACTS)
                return cls._read(text, where, directory)
        except OSError as error:
            raise UsageError(f"no snapshot in {path}: {FACTS}: {error.strerror}") from None

    @classmethod
    def _read(cls, text: bytes, where: str, directory: Directory) -> Snapshot:
        try:
            facts = bounded_json.loads(text)
            check = facts.pop("check")
            if facts.pop("format") != FORMAT:
                raise ValueError("it is of another program")
            if facts.pop("format-version") != VERSION:
                raise ValueError("it is of a later version of this program")
            if check != _check_of({"format": FORMAT, "format-version": VERSION, **facts}):
                raise ValueError("it was changed since it was written")
            found = _snapshot(facts)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{where} is damaged: {error}") from None
        for stored in filter(None, (*found.blocks, found.devices, found.description)):
            _check_file(directory, stored)
        return found


def _check_of(facts: dict[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def _check_file(directory: Directory, stored: Stored) -> None:
    path = os.path.join(directory.path, stored.file)
    try:
        with directory.opened(stored.file) as fd:
            size = os.fstat(fd).st_size
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: the snapshot is not whole") from None
    if size != stored.size:
        raise UsageError(f"{path} has {size} bytes, not {stored.size}: the snapshot is damaged")


# ---------------------------------------------------------------- out of JSON


def _snapshot(facts: dict[str, Any]) -> Snapshot:
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
    if found.devices.file != DEVICES or found.ram >= 1 << 32:
        raise ValueError("the devices are not where they can be")
    if not found.header <= head <= found.devices.size:
        raise ValueError("the devices are not where they can be")
    if found.description and (
        found.description.file != DESCRIPTION or found.description.size > MAX_DESCRIPTION
    ):
        raise ValueError("the description is not what it can be")
    if not all(0 < block.size < MAX_BYTES for block in blocks):
        raise ValueError("a block of a size that cannot be")
    return found


_KINDS = {"id": str, "machine": str, "file": str, "hash": str, "name": str}


def _plain(value: Any, name: str, kind: type | None = None) -> Any:
    if type(value) is not (kind or _KINDS.get(name, int)) or (type(value) is int and value < 0):
        raise ValueError(f"{name} is {value!r}")
    return value


def _made(kind: Any, facts: dict[str, Any]) -> Any:
    names = [one.name for one in fields(kind)]
    if set(names) != set(facts):
        raise ValueError(f"{facts!r:.80} where {', '.join(names)} are due")
    kinds = {"id": int} if kind is StoredSection else {}
    return kind(**{name: _plain(facts[name], name, kinds.get(name)) for name in names})


# ---------------------------------------------------------------- files


def block_file(number: int, name: bytes) -> str:
    """The path of a block's file: its name where that can be one, else made to be."""
    quoted = quote_from_bytes(name, safe="@,+=:")
    if quoted.startswith("."):
        quoted = "%2E" + quoted[1:]
    if len(quoted) > 240:
        quoted = f"{quoted[:200]}%-{number}"  # no quoted name has this
    return f"{BLOCKS}/{quoted}"


def contents(
    fd: int, size: int, page_size: int, buffer: memoryview
) -> Iterator[tuple[int, int, memoryview | None]]:
    """(first page, pages, their bytes) of a block's file; None: a hole. They are in `buffer` up to
    the next step. A last page that is not whole goes on in zeros."""
    memory, most = Memory(size, fd=fd), min(len(buffer), PIECE_BYTES) // page_size
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
    """XXH3-128 of a block's file, from its `contents`."""

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
