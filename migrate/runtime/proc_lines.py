"""The lines of the kernel's text files, in /proc and /sys.

These files hold names that any user chooses: of files, mounts, cgroups and programs. The kernel
escapes only the characters that it separates by itself: the newline, and in some files the blank
and the tab. Python separates at more. `splitlines()` ends a line at a carriage return or a form
feed, text mode turns a carriage return into a newline, and `split()` without an argument separates
words at each of these. A name with such a character in it would then forge a line or a word.

So read these files with `proc_lines`, and separate words at the one character that the file uses.
"""

from __future__ import annotations

import errno
import os

# The most that is read of one file. The maps of a process with 65530 mappings have some 7 MB.
MAX_BYTES = 64 << 20
_READ_BYTES = 1 << 16


def proc_lines(path: str) -> list[bytes]:
    """Return the lines of a file, without their newlines.

    Raises OSError, with EFBIG if the file has more than MAX_BYTES.
    """
    text = bytearray()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while data := os.read(fd, _READ_BYTES):
            text += data
            if len(text) > MAX_BYTES:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
    finally:
        os.close(fd)
    return bytes(text.removesuffix(b"\n")).split(b"\n") if text else []
