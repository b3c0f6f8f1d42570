"""Directory trees that Python cannot walk, and access lists."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

# Levels of a tree that no recursive function of Python reaches the end of.
DEEP = sys.getrecursionlimit() + 100


def deep_tree(path: Path, depth: int) -> None:
    """Make nested directories, each with a file and an empty directory beside the next one.

    Make it under the fixture `deep_path` if it is DEEP.
    """
    path.mkdir()
    fd = os.open(path, os.O_PATH)
    for _ in range(depth):
        for name in ("deeper", "empty"):
            os.mkdir(name, dir_fd=fd)
        os.close(os.open("file", os.O_CREAT, dir_fd=fd))
        inner = os.open("deeper", os.O_PATH, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)


def access_list(user: int) -> bytes:
    """Return a POSIX access list, as the kernel stores it, that grants `user` everything."""
    nobody = 0xFFFFFFFF
    entries = ((1, 7, nobody), (2, 7, user), (4, 5, nobody), (16, 7, nobody), (32, 5, nobody))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
