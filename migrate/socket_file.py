"""A unix socket that listens, and the file it has: for its owner alone, whatever the umask."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from migrate.directory import Directory, Identity, identity_of, leads_to
from migrate.errors import ConnectError, UsageError
from migrate.guests.reservation import turn

BACKLOG = 255
MAX_PATH = 107  # bytes in sockaddr_un
OTHER = "what stands there is no socket, and is left as it is: remove it, or name another path"


class SocketFile:
    """Listens at `path`; the file goes when it is closed, if it is still ours.

    option -- that named it

    Raises ConnectError where another program has it, UsageError for a path that cannot be.
    """

    def __init__(self, path: str, option: str, backlog: int = BACKLOG) -> None:
        whole, where = os.path.abspath(path), f"{option} unix:{path}"
        self._name = os.path.basename(whole)
        with contextlib.ExitStack() as undo:
            self.socket = undo.enter_context(socket.socket(socket.AF_UNIX))
            try:
                self._directory = undo.enter_context(Directory(os.path.dirname(whole)))
                self._ours = self._bind(path, where, backlog)
            except OSError as error:
                above = os.path.dirname(path) or "."
                why = f"no socket can be made in {above}: {error.strerror or error}"
                raise UsageError(
                    f"{where}: {OTHER if error.errno == errno.EADDRINUSE else why}"
                ) from None
            undo.pop_all()

    def _bind(self, path: str, where: str, backlog: int) -> Identity:
        """Makes the file, which is its owner's alone from the first moment on."""
        address = _address(self._directory, path)
        # One program at a time: another one would take our new socket for one whose program died.
        with turn(f"/proc/self/fd/{self._directory.fd}"):
            _make_room_for(self._directory, address, where)
            os.fchmod(self.socket.fileno(), 0o600)
            self.socket.bind(address)
            self.socket.listen(backlog)
            there = self._directory.look(self._name)
        if not stat.S_ISSOCK(there.st_mode):
            raise UsageError(f"{where}: {OTHER}")
        return identity_of(there)

    def close(self) -> None:
        """May be called again."""
        self.socket.close()
        if self._directory.fd >= 0:
            self._directory.drop(self._name, self._ours)  # others may have put one there
            self._directory.close()


def _address(directory: Directory, path: str) -> str:
    """A name for bind(2) and connect(2), which take no descriptor of a directory.

    It is the path, which ss(8) and lsof(8) then show, unless others could lead that elsewhere.
    """
    if len(os.fsencode(path)) > MAX_PATH:
        raise OSError(errno.ENAMETOOLONG, "the path is too long")
    whole = os.path.abspath(path)
    if len(os.fsencode(whole)) <= MAX_PATH and leads_to(directory.path, directory.identity):
        return whole
    return f"/proc/self/fd/{directory.fd}/{os.path.basename(whole)}"


def _make_room_for(directory: Directory, address: str, where: str) -> None:
    """Removes a socket whose program has died.

    where -- option and path, for people
    """
    name = os.path.basename(address)
    with contextlib.suppress(FileNotFoundError):
        there = directory.look(name)
        if not stat.S_ISSOCK(there.st_mode):
            raise UsageError(f"{where}: {OTHER}")
        # A stream takes no datagrams: its owner does not notice that somebody has asked.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            if probe.connect_ex(address) != errno.ECONNREFUSED:
                raise ConnectError(f"{where}: another program listens there")
        directory.drop(name, identity_of(there))
