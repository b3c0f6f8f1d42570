"""The interface of a place for QEMU's stream."""

from __future__ import annotations

from collections.abc import Sequence

from migrate.errors import MigrationError
from migrate.guests.place import Place
from migrate.qemu.stream.loader import Loader
from proto import ErrorCode


class NoQemuError(MigrationError):
    """No QEMU waits for the stream at the address given."""

    exit_code = 2
    code = ErrorCode.NO_PLACE


class StreamPlace(Place):
    """A place that a stream of QEMU's is sent to, through a `loader`.

    Subclasses open the loader in `make_ready`.
    """

    takes_stream = True

    def __init__(self) -> None:
        self._loader: Loader | None = None

    @property
    def loader(self) -> Loader:
        """The connection to what loads the stream, after `make_ready`."""
        assert self._loader is not None
        return self._loader

    def announce(self, blocks: Sequence[tuple[bytes, int]], page_size: int) -> None:
        """Take the list of the stream's RAM blocks: their names, and numbers of pages."""

    async def prove(self, *, return_path: bool) -> None:
        """Return when all that was sent is loaded; see Loader.prove. Raises MigrationError."""
        await self.loader.prove(return_path=return_path)

    def close(self) -> None:
        """Close the connection to what loads the stream."""
        if self._loader is not None:
            self._loader.close()

    async def discard(self) -> None:
        """Close the stream before its end: what loads it fails."""
        self.close()
