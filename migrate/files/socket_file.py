"""A listening unix socket and its file, which only its owner may use, whatever the umask."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from migrate.errors import ConnectError, UsageError
from migrate.files.directory import Directory
from migrate.files.identity import Identity, identity_of
from migrate.files.reservation import turn
from migrate.files.trusted_places import leads_to

BACKLOG = 255
MAX_PATH = 107  # bytes in sockaddr_un
OTHER = "the file there is not a socket, and is left as it is: remove it, or name another path"


class SocketFile:
    """A socket that listens at `path`. `close` removes the file, if it is still ours.

    option -- the option that names the path, for messages

    Raises ConnectError if another program listens there, UsageError if the path cannot be used.
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
        """Make the file with mode 0600 from the first moment on; return its identity."""
        address = _address(self._directory, path)
        # One program at a time: between bind and listen, another one would take our socket for that
        # of a dead program, and remove it.
        with turn(f"/proc/self/fd/{self._directory.fd}"):
            _remove_dead_socket(self._directory, address, where)
            os.fchmod(self.socket.fileno(), 0o600)
            self.socket.bind(address)
            self.socket.listen(backlog)
            status = self._directory.lstat(self._name)
        if not stat.S_ISSOCK(status.st_mode):
            raise UsageError(f"{where}: {OTHER}")
        return identity_of(status)

    def close(self) -> None:
        """Stop listening. May be called again."""
        self.socket.close()
        if self._directory.fd >= 0:
            self._directory.remove_file(self._name, self._ours)
            self._directory.close()


def _address(directory: Directory, path: str) -> str:
    """Return the address for bind(2) and connect(2), which take no descriptor of a directory.

    It is the path, which ss(8) and lsof(8) then show, unless others could have that lead elsewhere.
    Raises OSError if the path is longer than an address may be.
    """
    if len(os.fsencode(path)) > MAX_PATH:
        raise OSError(errno.ENAMETOOLONG, "the path is too long")
    whole = os.path.abspath(path)
    if len(os.fsencode(whole)) <= MAX_PATH and leads_to(directory.path, directory.identity):
        return whole
    return f"/proc/self/fd/{directory.fd}/{os.path.basename(whole)}"


def _remove_dead_socket(directory: Directory, address: str, where: str) -> None:
    """Remove the socket of a program that has died.

    where -- option and path, for messages

    Raises ConnectError if a program listens there, UsageError if the file is no socket.
    """
    name = os.path.basename(address)
    with contextlib.suppress(FileNotFoundError):
        status = directory.lstat(name)
        if not stat.S_ISSOCK(status.st_mode):
            raise UsageError(f"{where}: {OTHER}")
        # A live stream socket refuses a datagram socket by its type (EPROTOTYPE), unnoticed by its
        # program; a dead one refuses any by ECONNREFUSED.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            if probe.connect_ex(address) != errno.ECONNREFUSED:
                raise ConnectError(f"{where}: another program listens there")
        directory.remove_file(name, identity_of(status))
