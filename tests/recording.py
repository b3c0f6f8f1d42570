"""What tests of recorded writes share."""

from __future__ import annotations

import functools
import mmap

from migrate.tracking.own_record import OwnRecord
from migrate.tracking.record import Record, Refused
from proto.codec.pageset import PageSet

PAGE = 4096


def anonymous(size: int) -> memoryview:
    """Return private memory."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


@functools.cache
def why_not() -> str:
    """Return why this kernel records no writes, or ""."""
    try:
        OwnRecord(anonymous(PAGE), PAGE).close()
    except Refused as refused:
        return str(refused)
    return ""


def written(record: Record, pages: int) -> tuple[set[int], str]:
    """Look at a record: the written pages, and what else has happened."""
    dirty = PageSet(pages)
    happened = record.look(dirty)
    return set(dirty), happened
