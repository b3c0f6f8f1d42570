"""Looks up the addresses of a host name, in a thread that nothing waits for.

A name server that does not answer keeps getaddrinfo busy for half a minute, and nothing can
interrupt it. Both loops would wait for it when the program ends: asyncio joins its executor, and
libuv its pool. Here each question has a daemon thread of its own: a caller can give up at any time,
and the program ends at once. Callers with the same question share its thread and its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from dataclasses import dataclass
from typing import Any

from migrate.errors import ConnectError
from migrate.transport.address import Address

# For callers without a time limit of their own.
LOOKUP_SECONDS = 10.0
# How often a program that waits without a loop checks whether it was told to end.
WATCH_SECONDS = 0.05

Question = tuple[str, int, bool]


@dataclass(frozen=True)
class Endpoint:
    """One address that TCP can connect to or listen on, as `socket` takes it."""

    family: socket.AddressFamily
    name: tuple[Any, ...]

    def __str__(self) -> str:
        return host_text(self.name)

    @property
    def port(self) -> int:
        return int(self.name[1])


_lock = threading.Lock()
_under_way: dict[Question, Future[list[Endpoint]]] = {}


async def look_up(host: str, port: int, *, listens: bool = False) -> list[Endpoint]:
    """Return the addresses of a host, the preferred one first. May be cancelled at any time.

    listens -- the addresses are to be listened on

    Raise OSError if there are none.
    """
    if (found := _numeric(host, port)) is not None:
        return found
    loop = asyncio.get_running_loop()
    answered = asyncio.Event()

    def tell(_answer: Future[list[Endpoint]]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(answered.set)

    answer = _ask(host, port, listens)
    answer.add_done_callback(tell)
    await answered.wait()
    return answer.result()


def endpoint_of(address: Address) -> Endpoint | None:
    """Return the endpoint of a numeric address; None for names and paths. Raise OSError."""
    if address.path or (found := _numeric(address.host, address.port)) is None:
        return None
    return found[0]


def look_up_now(host: str, port: int, *, listens: bool = False) -> list[Endpoint]:
    """Do as `look_up`, for callers that cannot await; within LOOKUP_SECONDS.

    Raise OSError, ConnectError if no answer comes, CancelledError if the calling task is cancelled.
    """
    if (found := _numeric(host, port)) is not None:
        return found
    answer, task = _ask(host, port, listens), _current_task()
    for _ in range(int(LOOKUP_SECONDS / WATCH_SECONDS)):
        with contextlib.suppress(NotInTime):
            return answer.result(WATCH_SECONDS)
        if task is not None and task.cancelling():
            raise asyncio.CancelledError
    raise unanswered(host, LOOKUP_SECONDS)


def unanswered(host: str, seconds: float) -> ConnectError:
    """Return the error of a name server that does not answer."""
    return ConnectError(
        f"no answer from the name server for {host} within {seconds:g} s: give an address instead, "
        "or mend the resolver (/etc/resolv.conf)"
    )


def host_text(name: tuple[Any, ...]) -> str:
    """Return the host of a socket's name as people write it: mapped IPv4 as IPv4, a scope by its
    interface."""
    host = str(name[0])
    if ":" not in host:
        return host
    scope = name[3] if len(name) > 3 else 0
    mapped = ipaddress.IPv6Address(host.partition("%")[0]).ipv4_mapped
    if mapped is not None:
        return str(mapped)
    if scope and "%" not in host:
        with contextlib.suppress(OSError):
            return f"{host}%{socket.if_indextoname(scope)}"
        return f"{host}%{scope}"
    return host


def name_of(far: Any) -> str:
    """Return HOST:PORT or [HOST]:PORT of what `getpeername` gives."""
    if not isinstance(far, tuple):
        return "a local process"
    host = host_text(far)
    return f"[{host}]:{far[1]}" if ":" in host else f"{host}:{far[1]}"


def _numeric(host: str, port: int) -> list[Endpoint] | None:
    """Return the endpoints of a numeric address; None for a name. Raise OSError."""
    try:
        return _endpoints(host, port, socket.AI_NUMERICHOST)
    except socket.gaierror:
        if ":" not in host:
            return None
    address, _, scope = host.partition("%")
    why = f"there is no interface {scope} here" if scope else f"{address} is no address"
    raise OSError(why)


def _endpoints(host: str, port: int, flags: int) -> list[Endpoint]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return list(dict.fromkeys(Endpoint(family, name) for family, _, _, _, name in found))


def _ask(host: str, port: int, listens: bool) -> Future[list[Endpoint]]:
    question = host, port, listens
    with _lock:
        answer = _under_way.get(question)
        if answer is None:
            answer = _under_way[question] = Future()
            answer.set_running_or_notify_cancel()
            threading.Thread(
                target=_resolve, args=(question, answer), name=f"look up {host}", daemon=True
            ).start()
        return answer


def _resolve(question: Question, answer: Future[list[Endpoint]]) -> None:
    host, port, listens = question
    found: list[Endpoint] = []
    fault: BaseException | None = None
    try:
        found = _endpoints(host, port, socket.AI_PASSIVE if listens else 0)
    except BaseException as error:
        fault = error
    with _lock:
        del _under_way[question]
    if fault is None:
        answer.set_result(found)
    else:
        answer.set_exception(fault)


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
