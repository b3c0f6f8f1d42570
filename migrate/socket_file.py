"""A unix socket that listens, and the file it has: for its owner alone, whatever the umask."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from migrate.directory import Directory, Identity, identity_of
from migrate.errors import ConnectError, MigrationError, UsageError
from migrate.guests.reservation import turn

BACKLOG = 255
OTHER = "what stands there is no socket, and is left as it is: remove it, or name another path"


class SocketFile:
    """Listens at `path`; the file goes when it is closed, if it is still ours.

    option -- that named it

    Raises ConnectError where another program has it, UsageError for a path that cannot be.
    """

    def __init__(self, path: str, option: str, backlog: int = BACKLOG) -> None:
        self._path = os.path.abspath(path)
        self.socket = bind(path, option, backlog)
        self._ours: Identity | None = None
        with contextlib.suppress(OSError):
            self._ours = identity_of(os.lstat(path))

    def close(self) -> None:
        """May be called again."""
        self.socket.close()
        if self._ours is not None:  # somebody may have put another one there
            with contextlib.suppress(OSError), _above(self._path) as directory:
                directory.drop(os.path.basename(self._path), self._ours)
        self._ours = None


def _above(path: str) -> Directory:
    return Directory(os.path.dirname(os.path.abspath(path)))


def _make_room_for(path: str, option: str) -> None:
    """Removes a socket whose program has died."""
    name = os.path.basename(path)
    with contextlib.suppress(FileNotFoundError), _above(path) as directory:
        there = directory.look(name)
        if not stat.S_ISSOCK(there.st_mode):
            raise UsageError(f"{option} unix:{path}: {OTHER}")
        # A stream takes no datagrams: its owner does not notice that somebody has asked.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            if probe.connect_ex(path) != errno.ECONNREFUSED:
                raise ConnectError(f"{option} unix:{path}: another program listens there")
        directory.drop(name, identity_of(there))


def bind(path: str, option: str, backlog: int = BACKLOG) -> socket.socket:
    """A listening socket that nobody but its owner can connect to, from the first moment on.

    Raises ConnectError where another program has it, UsageError for a path that cannot be.
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        # One program at a time: another one would take our new socket for one whose program died.
        with turn(os.path.dirname(path) or "."):
            _make_room_for(path, option)
            os.fchmod(sock.fileno(), 0o600)
            sock.bind(path)
            sock.listen(backlog)
    except OSError as error:
        sock.close()
        directory = os.path.dirname(path) or "."
        why = f"no socket can be made in {directory}: {error.strerror or error}"
        raise UsageError(
            f"{option} unix:{path}: {OTHER if error.errno == errno.EADDRINUSE else why}"
        ) from None
    except MigrationError:
        sock.close()
        raise
    return sock
