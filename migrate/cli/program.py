"""What migrate-src and migrate-dst have in common: options, signals, exit codes, staying.

Results go to standard output, everything else to standard error. Exit codes:

    0 completed and verified    1 failed, the source's guest as it was    2 usage
    3 cannot connect or listen  4 protocol or capability
    5 TLS: a certificate, or who may connect                              6 memories differ
    7 did not converge          8 cancelled at the other side
    9 handed over, but not confirmed   10 the guest is here, but --on-complete failed
    129 SIGHUP   130 SIGINT   143 SIGTERM
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import os
import resource
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, NoReturn

from migrate import quantities
from migrate.errors import CancelledByPeer, MigrationError, UsageError
from migrate.guests.process import Process
from migrate.output import printable, say, signals_held
from proto.ownership import Role

if TYPE_CHECKING:
    from migrate.monitor.node import Node
    from migrate.monitor.terminal import Terminal
    from migrate.tls import Credentials

VERSION = "0.1.0"
# All channels there can be, twice as many strangers, and some.
OPEN_FILES = 1024
LEAST_OPEN_FILES = 256
# Of a whole migration on two processors, and some.
LEAST_THREADS = 12
COREDUMPS = "MIGRATE_COREDUMPS"
PR_SET_DUMPABLE = 4  # linux/prctl.h
CODES = __doc__.partition("Exit codes:")[2].strip("\n") if __doc__ else ""


QEMU_FORMS = "qemu:tcp:HOST:PORT[,qmp=PATH], qemu:unix:PATH[,qmp=PATH] or qemu:qmp=PATH"


MACHINES = """virtual machines:
  QEMU stays as it is. At the source it has a socket for us,
    -qmp unix:/run/vm.qmp,server=on,wait=off
  and at the destination waits one with the same machine type, memory and
  devices:
    -incoming defer -qmp unix:/run/vm-in.qmp,server=on,wait=off
    migrate-dst --listen 4444 --guest qemu:qmp=/run/vm-in.qmp
    migrate-src --guest qemu:qmp=/run/vm.qmp tcp:host:4444

  Once the guest has arrived the QEMU at the source stands still: end it, and
  never say cont to it. Else the guest runs on there, and the QEMU at the
  destination has to be started again. It is given up only where --timeout or
  --max-rounds say so. Without qmp= set return-path on in QEMU's monitor, and
  let it migrate to the address behind qemu: yourself.
"""


def qemu_words(text: str) -> tuple[str, str]:
    """What stands behind `qemu:`: an address, and the path of a QMP socket; one may be missing.

    Raises UsageError.
    """
    where, qmp = text, ""
    if text.startswith("qmp="):
        where, qmp = "", text.removeprefix("qmp=")
    elif ",qmp=" in text:
        where, _, qmp = text.rpartition(",qmp=")
    if not where and not qmp:
        raise UsageError(f"--guest qemu: say where it is: {QEMU_FORMS}")
    if where and not where.lstrip().startswith(("tcp:", "unix:")):
        raise UsageError(f"--guest 'qemu:{text}' is not understood: write {QEMU_FORMS}")
    if qmp:
        from migrate.qemu.client import control_path

        qmp = control_path(qmp)
    return where, qmp


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help lists what there is")


def migration_parser(prog: str, description: str, examples: str) -> Parser:
    """A parser with the options that both sides of a migration have."""
    parser = Parser(
        prog=prog,
        description=description,
        epilog=f"exit codes:\n{CODES}\n\n{MACHINES}\nexamples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{prog} {VERSION}")
    parser.add_argument(
        "--capability", action="append", default=[], metavar="NAME=on|off",
        help="switch a capability: xbzrle, xbzrle-merge (shorter deltas); both are on",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.add_argument(
        "--peer-timeout",
        default="30s",
        metavar="TIME",
        help="a peer that says or takes nothing for so long is lost (default: 30s)",
    )
    parser.add_argument(
        "--retry", default="60s", metavar="TIME",
        help="when the connection breaks, how long to connect again and resume without progress "
        "(default: 60s; 0: give up at once)",
    )  # fmt: skip
    parser.add_argument(
        "--journal", default="", metavar="DIR",
        help="where it is written down whose the guest is (default: $MIGRATE_JOURNAL, "
        "/var/lib/xbmigrate or ~/.local/state/xbmigrate)",
    )  # fmt: skip
    parser.add_argument(
        "--resolve-timeout", default="60s", metavar="TIME",
        help="how long to find out whose the guest is, where the hand-over is cut off "
        "(default: 60s)",
    )  # fmt: skip
    add_tls_creds(parser)
    parser.add_argument(
        "--qmp", default="", metavar="unix:PATH",
        help="answer on this socket (migrate-ctl asks it; QEMU's machine protocol)",
    )  # fmt: skip
    parser.add_argument(
        "--monitor", default="", metavar="stdio|unix:PATH",
        help="take commands from people, here or on this socket (help lists them)",
    )  # fmt: skip
    parser.add_argument(
        "--stay", action="store_true",
        help="do not end with the migration but on SIGTERM or `migrate-ctl quit`, and end a demo "
        "guest that runs here then, or when that guest ends: for containers and services",
    )  # fmt: skip
    return parser


def add_tls_creds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tls-creds", default="", metavar="DIR",
        help="speak TLS, with the certificates in this directory (QEMU's file names; the README "
        "shows how to make them)",
    )  # fmt: skip


def add_tls_hostname(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tls-hostname", default="", metavar="NAME",
        help="the name that the destination's certificate must have (default: that of its address)",
    )  # fmt: skip


def credentials(args: argparse.Namespace, role: Role) -> Credentials | None:
    """What --tls-creds and its kin say. Raises UsageError, TlsError; warns of loose keys."""
    authz, hostname = getattr(args, "tls_authz", []), getattr(args, "tls_hostname", "")
    if not args.tls_creds:
        if authz or hostname:
            raise UsageError("--tls-authz and --tls-hostname are of use with --tls-creds")
        return None
    from migrate.tls import Credentials

    result = Credentials(args.tls_creds, role, authz=authz, hostname=hostname)
    if not getattr(args, "quiet", False):
        for notice in result.notices:
            say(f"migrate: {notice}")
    return result


def tls_of(args: argparse.Namespace) -> dict[str, str]:
    """The same options, as operators are told of them."""
    said = {
        "tls-creds": args.tls_creds,
        "tls-hostname": getattr(args, "tls_hostname", ""),
        "tls-authz": "; ".join(getattr(args, "tls_authz", [])),
    }
    return {name: printable(value) for name, value in said.items()}


def switches(items: list[str], local: frozenset[str] = frozenset()) -> dict[str, bool]:
    """What --capability says. Raises UsageError.

    local -- capabilities of this program alone, which the other one is not told
    """
    from proto import LocalError
    from proto.capabilities import switched_on

    result: dict[str, bool] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if value not in ("on", "off") or not equals:
            raise UsageError(f"--capability {item!r}: write NAME=on or NAME=off")
        result[name] = value == "on"
    try:
        switched_on({name: on for name, on in result.items() if name not in local})
    except LocalError as error:
        raise UsageError(f"--capability: {error}") from None
    return result


def number(text: str, what: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise UsageError(f"{what}: {text!r} is not a number")
    return int(text)


def seconds(text: str, what: str) -> float:
    return quantities.parse_milliseconds(text, what, bare="s") / 1e3


def peer_timeout(args: argparse.Namespace) -> float:
    value = seconds(args.peer_timeout, "--peer-timeout")
    if value < 1:
        raise UsageError("--peer-timeout: a second is the least: a living peer pauses too")
    return value


def ending_signals() -> set[signal.Signals]:
    """What ends a program: also a terminal that is closed, where nohup(1) has not started it."""
    hangup = set() if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else {signal.SIGHUP}
    return {signal.SIGINT, signal.SIGTERM} | hangup


class Stop:
    """SIGHUP, SIGINT, SIGTERM, `quit` and `migrate_cancel`: the first cancels, and no other does;
    once it is too late it says so."""

    def __init__(self) -> None:
        self.signal = 0
        self.late = False
        self._cancelled = False
        self._cancel: Callable[[], str] = str
        self._again = ""

    def install(self, cancel: Callable[[], str], again: str = "already ending") -> None:
        """`cancel` acts, or returns the sentence why it is too late; `again` is the sentence for
        who does not wait for what it does."""
        self._cancel, self._again = cancel, again
        self._cancelled = False
        loop = asyncio.get_running_loop()
        for number in ending_signals():
            loop.add_signal_handler(number, self.request, number)

    @property
    def cancelled_code(self) -> int:
        """The exit code of what was cancelled: by a signal, or by a command of an operator."""
        return 128 + self.signal if self.signal else CancelledByPeer.exit_code

    def cancels_me(self) -> None:
        """From now on the task that calls this is cancelled."""
        task = asyncio.current_task()
        assert task is not None

        def cancel() -> str:
            task.cancel()
            return ""

        self.install(cancel)

    def cancel(self) -> str:
        """Cancels what runs, and goes on; or returns the sentence why it is too late."""
        if self._cancelled:
            return ""
        refusal = self._cancel()
        self._cancelled = not refusal
        return refusal

    def request(self, number: int = signal.SIGTERM) -> None:
        if self.signal:
            say(self._again)
            return
        refusal = self.cancel()
        if refusal:
            self.late = True
            say(refusal)
        else:
            self.signal = number

    async def until(self, done: Awaitable[object], timeout: float) -> None:
        """Waits for `done`, for so many seconds at most, or for a signal or `quit`."""
        told = asyncio.Event()

        def tell() -> str:
            told.set()
            return ""

        if self.signal or self.late:
            return
        self.install(tell)
        waiting = [asyncio.ensure_future(done), asyncio.ensure_future(told.wait())]
        await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for one in waiting:
            one.cancel()

    async def stay(self, pid: int, born: str) -> None:
        """Waits for a signal or `quit`, and ends process `pid` then, or for that process to end.

        pid  -- of the demo guest that runs here, 0 where none does
        born -- its start_time: a later process with the same number is none of ours
        """
        told = asyncio.Event()
        guest = ends = None
        if pid:
            try:
                guest = Process(pid, born)
            except ProcessLookupError:
                return  # it has ended already
            ends = asyncio.ensure_future(guest.wait())
            ends.add_done_callback(lambda _ends: told.set())

        def tell() -> str:
            told.set()
            return ""

        if self.signal or self.late:
            tell()
        self.install(tell)
        try:
            await told.wait()
            if guest is not None:
                with contextlib.suppress(ProcessLookupError):
                    guest.signal(signal.SIGTERM)
        finally:  # also where something else is to be done first
            if guest is not None and ends is not None:
                ends.cancel()
                await asyncio.wait({ends})
                guest.close()


@contextlib.asynccontextmanager
async def answering(args: argparse.Namespace, node: Node) -> AsyncIterator[Terminal | None]:
    """Answers where --qmp and --monitor say; gives what reads standard input, if anything does."""
    if not args.qmp and not args.monitor:
        yield None
        return
    from migrate.monitor.commands import commands
    from migrate.monitor.qmp import Conversation, version_of
    from migrate.monitor.server import Server, parse_path
    from migrate.monitor.terminal import Talk, Terminal

    known = commands(node)
    async with contextlib.AsyncExitStack() as stack:
        if args.qmp:
            machine = Server(
                parse_path(args.qmp), lambda: Conversation(known, version_of(VERSION)), "--qmp"
            )
            await machine.open()
            stack.push_async_callback(machine.close)
            node.listeners.add(machine.tell)
        terminal = None
        if args.monitor == "stdio":
            terminal = await stack.enter_async_context(Terminal(node, VERSION))
        elif args.monitor:
            path = parse_path(args.monitor, "--monitor")
            people = Server(path, lambda: Talk(node, VERSION), "--monitor")
            await people.open()
            stack.push_async_callback(people.close)
        yield terminal


def check_open_files() -> None:
    """Takes what there may be of file descriptors. Raises UsageError where that is too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES:
        soft = OPEN_FILES if hard < 0 else min(OPEN_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if 0 <= soft < LEAST_OPEN_FILES:
        raise UsageError(
            f"no more than {soft} files may be open here, and {LEAST_OPEN_FILES} may be needed: "
            "raise the limit (ulimit -n)"
        )


def keep_out_of_dumps() -> None:
    """A core dump of a program that moves a guest would have the guest's memory in it: there is
    none, unless it is asked for. Programs that are started from here are not concerned."""
    if os.environ.get(COREDUMPS, "") in ("", "0"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def check_threads() -> None:
    """Raises UsageError where fewer threads can be started than may be needed: one that cannot be
    started later would end the program in the middle of something."""
    over, threads = threading.Event(), []
    try:
        for _ in range(LEAST_THREADS):
            thread = threading.Thread(target=over.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError:
        raise UsageError(
            f"no more than {len(threads)} threads can be started here, and {LEAST_THREADS} may be "
            "needed: raise the limit (ulimit -u, a service's TasksMax, a container's --pids-limit)"
        ) from None
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _on_uvloop(program: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Its exit code. What is done is done: neither a signal while the loop is closed changes that,
    nor that there is no thread left to close it with."""
    import uvloop

    code = None

    async def whole() -> int:
        status = await program()
        over.enter_context(signals_held())
        return status

    try:
        with (
            contextlib.ExitStack() as over,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            code = runner.run(whole())
    except RuntimeError:
        if code is None:
            raise
    assert code is not None
    return code


def run(
    parser: Parser,
    program: Callable[[argparse.Namespace], Coroutine[Any, Any, int]],
    words: list[str] | None = None,
) -> int:
    """Runs a program on uvloop, with these arguments or its own; its exit code."""
    try:
        args = parser.parse_args(words)
        keep_out_of_dumps()
        check_open_files()
        check_threads()
        return _on_uvloop(lambda: program(args))
    except MigrationError as error:
        say(f"{parser.prog}: {error}")
        return error.exit_code
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM  # it was told to end before it had begun
    except OSError as error:
        why = f"{error.strerror or error}"
        say(f"{parser.prog}: {why}{f': {error.filename}' if error.filename else ''}")
        return 1
    except KeyboardInterrupt:
        return 130
