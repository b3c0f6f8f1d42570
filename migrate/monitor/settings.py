"""Parameters and capabilities by the names that operators use, which are QEMU's where it has one.

Each has a path into Parameters (migrate.parameters), which checks what it is given. A program takes
the whole of them anew with each change; a migration that runs takes what may change then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from migrate import quantities
from migrate.errors import UsageError
from migrate.parameters import LOCAL, Parameters
from proto.capabilities import OPTIONAL

if TYPE_CHECKING:
    from migrate.monitor.node import Node

MAX_DOWNTIME = 2_000_000
# xbzrle first: people look for it.
CAPABILITIES = (*sorted(OPTIONAL), *LOCAL)


class Kind(Enum):
    """What a value is; its text is what QEMU prints behind one."""

    BYTES = " bytes"
    RATE = " bytes/second"
    TIME = " ms"
    COUNT = ""
    SWITCH = " "


@dataclass(frozen=True)
class Setting:
    """One parameter. For an operator a size is in bytes, a time in milliseconds.

    destination -- whether it means something there: it asks for this size
    """

    name: str
    kind: Kind
    path: tuple[str, ...]
    destination: bool = False

    def read(self, parameters: Parameters) -> int | bool:
        value: Any = parameters
        for name in self.path:
            value = getattr(value, name)
        shown: int | bool = round(value * 1000) if self.kind is Kind.TIME else value
        return shown

    def write(self, parameters: Parameters, value: int | bool) -> Parameters:
        """Raises UsageError for what cannot be."""
        stored: Any = value / 1000 if self.kind is Kind.TIME else value
        changes: dict[str, Any] = {self.path[-1]: stored}
        if len(self.path) > 1:
            changes = {self.path[0]: replace(getattr(parameters, self.path[0]), **changes)}
        elif self.name == "xbzrle-cache-size":
            changes["cache_max"] = 0  # whoever sets it wants no other
        return replace(parameters, **changes)

    def shown(self, parameters: Parameters) -> str:
        value = self.read(parameters)
        if self.kind is Kind.SWITCH:
            return "on" if value else "off"
        return f"{value}{self.kind.value}"


SETTINGS = {
    one.name: one
    for one in (
        Setting(
            "throttle-trigger-threshold", Kind.COUNT, ("throttle", "throttle_trigger_threshold")
        ),
        Setting("cpu-throttle-initial", Kind.COUNT, ("throttle", "cpu_throttle_initial")),
        Setting("cpu-throttle-increment", Kind.COUNT, ("throttle", "cpu_throttle_increment")),
        Setting("cpu-throttle-tailslow", Kind.SWITCH, ("throttle", "cpu_throttle_tailslow")),
        Setting("max-cpu-throttle", Kind.COUNT, ("throttle", "max_cpu_throttle")),
        Setting("max-bandwidth", Kind.RATE, ("limits", "max_bandwidth")),
        Setting("avail-switchover-bandwidth", Kind.RATE, ("limits", "avail_switchover_bandwidth")),
        Setting("downtime-limit", Kind.TIME, ("limits", "downtime_limit")),
        Setting("multifd-channels", Kind.COUNT, ("channels",)),
        Setting("xbzrle-cache-size", Kind.BYTES, ("cache_size",), destination=True),
        Setting("max-rounds", Kind.COUNT, ("limits", "max_rounds")),
        Setting("timeout", Kind.TIME, ("limits", "timeout")),
        Setting("stall-timeout", Kind.TIME, ("limits", "stall_timeout")),
    )
}


# Told beside them, and set where a program is started: its certificates are read then.
TLS = ("tls-creds", "tls-hostname", "tls-authz")
_BEFORE = list(SETTINGS).index("max-bandwidth")
ORDER = (*list(SETTINGS)[:_BEFORE], *TLS, *list(SETTINGS)[_BEFORE:])


def table(node: Node) -> dict[str, tuple[int | bool | str, str]]:
    """What is set, in QEMU's order: each value, and how people read it."""
    rows: dict[str, tuple[int | bool | str, str]] = {
        one.name: (one.read(node.parameters), one.shown(node.parameters))
        for one in SETTINGS.values()
        if one.destination or not node.receives
    }
    rows |= {name: (node.tls.get(name, ""), f"'{node.tls.get(name, '')}'") for name in TLS}
    return {name: rows[name] for name in ORDER if name in rows}


def changed(parameters: Parameters, values: Mapping[str, Any]) -> Parameters:
    """The parameters with these values, as a machine gives them. Raises UsageError; then none of
    them is taken."""
    for name, value in values.items():
        setting = SETTINGS.get(name)
        if setting is None:
            raise UsageError(f"Parameter '{name}' is unexpected")
        if setting.kind is Kind.SWITCH:
            if not isinstance(value, bool):
                raise UsageError(f"Parameter '{name}' expects a boolean")
        elif not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
            raise UsageError(f"Parameter '{name}' expects uint64")
        _check(setting, value, parameters.page_size)
        parameters = setting.write(parameters, value)
    return parameters


def _check(setting: Setting, value: int, page_size: int) -> None:
    """What QEMU refuses in words of its own."""
    if setting.name == "xbzrle-cache-size" and (value < page_size or value & (value - 1)):
        hint = f" (did you mean {value}m?)" if 0 < value < page_size else ""
        raise UsageError(
            "Parameter 'xbzrle_cache_size' expects a power of two no less than the target page "
            f"size{hint}"
        )
    if setting.name == "downtime-limit" and value > MAX_DOWNTIME:
        raise UsageError(
            "Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms"
        )


def parse(name: str, text: str) -> int | bool | str:
    """A value as a person writes it: sizes and times may have a suffix; a bare bandwidth is in
    MiB/s, as QEMU has it. Raises UsageError."""
    if name in TLS:
        return "" if text in ("''", '""') else text
    setting = SETTINGS.get(name)
    if setting is None:
        raise UsageError(f"Parameter '{name}' is unexpected")
    if setting.kind is Kind.SWITCH:
        if text not in ("on", "off"):
            raise UsageError(f"Parameter '{name}' expects 'on' or 'off'")
        return text == "on"
    if setting.kind is Kind.TIME:
        return round(quantities.parse_milliseconds(text, name))
    if setting.kind is Kind.RATE:
        return mebibytes(text, name)
    if setting.kind is Kind.BYTES:
        return quantities.parse_size(text, name)
    if not text.isdecimal() or len(text) > 18:
        raise UsageError(f"{name}: {text!r} is not a number")
    return int(text)


def mebibytes(text: str, what: str) -> int:
    """A size whose bare number counts mebibytes."""
    bare = text.strip().replace(".", "", 1).isdecimal()
    return quantities.parse_size(f"{text.strip()}m" if bare else text, what)


def switches(parameters: Parameters) -> dict[str, bool]:
    """All capabilities, and whether each is on."""
    return {name: parameters.capabilities.get(name, name not in LOCAL) for name in CAPABILITIES}


def switched(parameters: Parameters, name: object, state: object) -> Parameters:
    """The parameters with one capability switched. Raises UsageError."""
    if name not in CAPABILITIES or not isinstance(name, str):
        raise UsageError(f"Parameter 'capability' does not accept value '{name}'")
    if not isinstance(state, bool):
        raise UsageError("Parameter 'state' expects a boolean")
    return replace(parameters, capabilities={**parameters.capabilities, name: state})
