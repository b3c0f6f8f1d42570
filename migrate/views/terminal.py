"""A terminal that is written to without ever waiting for it, until one asks to.

A user who presses ^S in the middle of a frame would stop whoever writes it. So the terminal is
opened once more, as a description of our own that does not block (the one of standard error is
shared with the shell), and what it does not take is kept for the next time.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
from typing import TextIO


class Terminal(io.TextIOBase):
    """A text stream on the terminal that `stream` is on. Raises OSError where it cannot be opened.

    Writing raises nothing: a terminal that is gone takes all.
    """

    _fd = -1

    def __init__(self, stream: TextIO) -> None:
        name = os.ttyname(stream.fileno())
        self._fd = os.open(name, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        self._encoding = stream.encoding or "utf-8"
        self._kept = bytearray()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    @property
    def behind(self) -> bool:
        """Whether there is something that the terminal has not taken."""
        self.flush()
        return bool(self._kept)

    def write(self, text: str) -> int:
        self._kept += text.encode(self._encoding, "replace")
        return len(text)

    def flush(self) -> None:
        """Gives the terminal what it takes now."""
        try:
            while self._kept:
                del self._kept[: os.write(self._fd, self._kept)]
        except BlockingIOError:
            pass
        except OSError:
            self._kept.clear()

    def drain(self) -> None:
        """Waits until it has taken all."""
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        while self.behind:
            poll.poll(1000)

    def close(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1
        super().close()
