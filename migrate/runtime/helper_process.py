"""Helper processes of ours, isolated from the working directory and the environment.

`python -m` imports from the working directory first: a file there called migrate.py or
subprocess.py would run in place of ours, perhaps as root. Isolated mode (-I) leaves out that
directory, PYTHONPATH and the user's own packages. One directory is then added again, behind the
standard library and before other packages: the one that this package was loaded from. So a helper
runs the same code as this process, in a checkout, an editable install or a wheel.

A helper that outlives this program, to undo what it did, speaks the protocol of HelperProcess:

    us       --request-->                a letter, and what belongs to it
    helper   --ACKNOWLEDGED, answer-->   one byte, and as many more as the request asks for;
                                         also once when the helper has started
    (end of file)                        this program has ended, or died
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import cast

import migrate
from migrate.errors import MigrationError

logger = logging.getLogger(__name__)
_ROOT = os.path.dirname(os.path.abspath(migrate.__path__[0]))
_BOOT = (
    "import runpy, sys; root, *sys.argv = sys.argv[1:]; root in sys.path or sys.path.insert(next("
    "(i for i, p in enumerate(sys.path) if p.endswith('-packages')), len(sys.path)), root); "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs one of our modules as a program.

    Raises MigrationError if the path of the running Python is unknown (an embedded one).
    """
    if not os.path.isabs(sys.executable or ""):
        raise MigrationError("no helper process can be started: the path of Python is not known")
    return [sys.executable, "-I", "-c", _BOOT, _ROOT, module, *arguments]


def environment() -> dict[str, str]:
    """Return the environment for a helper that runs no user's command: all but PYTHON*."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def ignore_signals(*more: int) -> None:
    """In a helper: let the end of the program decide, and no terminal or shutdown (and `more`)."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *more):
        signal.signal(ignored, signal.SIG_IGN)


ACKNOWLEDGED = b"k"


class HelperProcess:
    """Our end of a helper that acknowledges each request.

    It runs in a session of its own, so that a terminal's signals do not reach it.
    """

    def __init__(self, process: asyncio.subprocess.Process, died: str, patience: float) -> None:
        self._process = process
        # Both are pipes: see `start`.
        self._requests = cast(asyncio.StreamWriter, process.stdin)
        self._answers = cast(asyncio.StreamReader, process.stdout)
        self._died = died
        self._patience = patience

    @classmethod
    async def start(
        cls, module: str, *arguments: str, died: str, patience: float, keep: Sequence[int] = (),
        env: dict[str, str] | None = None, quiet: bool = False,
    ) -> HelperProcess:  # fmt: skip
        """Start one of our modules, and wait until it has acknowledged that.

        died     -- the sentence for the user if the helper does not answer
        patience -- seconds to wait for an answer
        keep     -- descriptors that the helper inherits
        env      -- its environment; None: ours
        quiet    -- whether its standard error is discarded
        """
        process = await asyncio.create_subprocess_exec(
            *command(module, *arguments), env=env, pass_fds=keep, start_new_session=True,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL if quiet else None,
        )  # fmt: skip
        helper = cls(process, died, patience)
        try:
            await helper._answer(0)
        except BaseException:
            await helper.close(kill=True)
            raise
        logger.debug("helper process %d runs %s", helper.pid, module)
        return helper

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, request: bytes, size: int = 0) -> bytes:
        """Send a request, and return the `size` bytes of its answer.

        Shield the call from cancellation: an answer that is not read would be taken for that of the
        next request. Raises MigrationError, with the sentence `died`, if no answer comes in time.
        """
        # uvloop raises RuntimeError if the helper has died; the missing answer says so.
        with contextlib.suppress(OSError, RuntimeError):
            self._requests.write(request)
        return await self._answer(size)

    async def _answer(self, size: int) -> bytes:
        answer = b""
        with contextlib.suppress(asyncio.IncompleteReadError, TimeoutError):
            async with asyncio.timeout(self._patience):
                answer = await self._answers.readexactly(1 + size)
        if answer[:1] != ACKNOWLEDGED:
            raise MigrationError(self._died)
        return answer[1:]

    def leave(self) -> None:
        """Tell the helper that this program is done with it. It may stay."""
        self._requests.close()

    async def close(self, *, kill: bool = False) -> None:
        """Tell the helper that this program is done with it, and wait for its end.

        kill -- end it now, whatever it still has to do
        """
        self.leave()
        if kill:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._patience):
                await self._process.wait()
