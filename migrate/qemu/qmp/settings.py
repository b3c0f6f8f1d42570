"""QEMU's settings for a migration: its capabilities and parameters, changed and put back.

QEMU keeps them from one migration to the next, and the user may have set them. So what is changed
here is remembered with its former value, until `restore` puts it back.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from migrate.errors import QemuError
from migrate.qemu.qmp.client import Client
from migrate.qemu.qmp.status import object_in, unexpected_answer

logger = logging.getLogger(__name__)

RETURN_PATH, SWITCHOVER_ACK = "return-path", "switchover-ack"
DOWNTIME_LIMIT, MAX_BANDWIDTH = "downtime-limit", "max-bandwidth"
SWITCHOVER_BANDWIDTH = "avail-switchover-bandwidth"
# Capabilities with which the stream cannot be carried: it would need more connections, offsets in a
# file or memory that both ends share, or the guest would go on before its memory is there. They are
# switched off at the destination too: an incoming QEMU waits for what its capabilities announce.
UNFIT = (
    "multifd",
    "mapped-ram",
    "zero-copy-send",
    "background-snapshot",
    "rdma-pin-all",
    "x-colo",
    "x-ignore-shared",
    "compress",
    "postcopy-ram",
    "postcopy-preempt",
)
# Capabilities that are switched off at the source in addition.
OFF = (
    *UNFIT,
    "release-ram",  # QEMU frees what it has sent: after a failure the guest would have no memory
    "pause-before-switchover",  # QEMU waits for a migrate-continue, which we do not send
    "xbzrle",  # migrate-src makes the deltas
)
# The socket to migrate-src is local, so TLS in QEMU would only cost time; migrate-src encrypts what
# leaves the host. The modes cpr-* replace the QEMU of a guest on the same host.
TLS = "tls-creds"
PLAIN = {TLS: "", "mode": "normal"}


@dataclass(frozen=True)
class ChangedSettings:
    """Capabilities and parameters as they were before we changed them; false if there are none."""

    capabilities: Mapping[str, bool] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.capabilities or self.parameters)


class MigrationSettings:
    """The capabilities and parameters of one QEMU. All `async` methods raise QemuError."""

    def __init__(self, client: Client) -> None:
        self._client = client
        # As they were before we changed them; only those that we changed.
        self._capabilities: dict[str, bool] = {}
        self._parameters: dict[str, Any] = {}

    @property
    def changed(self) -> ChangedSettings:
        """What `restore` would put back. Another connection to this QEMU can `adopt` it."""
        return ChangedSettings(self._capabilities, self._parameters)

    def adopt(self, changed: ChangedSettings) -> None:
        """Have `restore` put back what was changed in this QEMU over another connection."""
        self._capabilities, self._parameters = dict(changed.capabilities), dict(changed.parameters)

    async def query_capabilities(self) -> dict[str, bool]:
        """Return every capability that this QEMU knows, and whether it is on."""
        answer = await self._client.execute("query-migrate-capabilities")
        try:
            return {str(one["capability"]): bool(one["state"]) for one in answer}
        except (KeyError, TypeError):
            raise unexpected_answer("query-migrate-capabilities", answer) from None

    async def query_parameters(self) -> dict[str, Any]:
        """Return every parameter that this QEMU knows."""
        answer = await self._client.execute("query-migrate-parameters")
        return dict(object_in("query-migrate-parameters", answer))

    async def set_capabilities(self, wanted: Mapping[str, bool], now: dict[str, bool]) -> None:
        """Set those that this QEMU knows and that differ from what they are now."""
        wanted = {name: to for name, to in wanted.items() if now.get(name, to) != to}
        if wanted:
            self._capabilities = {name: now[name] for name in wanted} | self._capabilities
            await self._send_capabilities(wanted)

    async def _send_capabilities(self, states: Mapping[str, bool]) -> None:
        listed = [{"capability": name, "state": to} for name, to in states.items()]
        await self._client.execute("migrate-set-capabilities", {"capabilities": listed})

    async def set_parameters(
        self, wanted: Mapping[str, Any], now: dict[str, Any] | None = None
    ) -> None:
        """Set those that this QEMU knows and that differ from what they are now.

        now -- what they are, if that has been queried already
        """
        now = await self.query_parameters() if now is None else now
        wanted = {name: to for name, to in wanted.items() if now.get(name, to) != to}
        if wanted:
            self._parameters = {name: now[name] for name in wanted} | self._parameters
            await self._client.execute("migrate-set-parameters", wanted)

    async def restore(self) -> tuple[str, ...]:
        """Put back what was changed. Return a sentence for each thing that could not be put back.

        QEMU refuses to change capabilities while a migration goes on: cancel it first.
        """
        faults = []
        try:
            if self._capabilities:
                await self._send_capabilities(self._capabilities)
                self._capabilities = {}
        except QemuError as error:
            faults.append(str(error))
        try:
            if self._parameters:
                await self._client.execute("migrate-set-parameters", self._parameters)
                self._parameters = {}
        except QemuError as error:
            faults.append(str(error))
        logger.debug("settings of QEMU are restored%s", f", but: {faults}" if faults else "")
        return tuple(faults)


def milliseconds(seconds: float) -> int:
    """Return whole milliseconds, at least 1 for a positive time: with 0 no migration would end."""
    return math.ceil(round(seconds * 1000, 3)) if seconds > 0 else 0
