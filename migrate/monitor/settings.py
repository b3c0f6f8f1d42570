"""Parameters and capabilities by the names that operators use: QEMU's, if it has one.

Each parameter has a path into policy.parameters.Parameters, which checks its value. Parameters is
immutable: each change makes another one, which the program and a running migration apply as a
whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from migrate import units
from migrate.errors import UsageError
from migrate.policy.parameters import LOCAL, Parameters
from proto.wire.capabilities import OPTIONAL

# Milliseconds, QEMU's limit.
MAX_DOWNTIME = 2_000_000
# xbzrle comes first: people look for it.
CAPABILITIES = (*sorted(OPTIONAL), *LOCAL)


class Kind(Enum):
    """The kind of a value. Its text is the unit as QEMU prints it after a value."""

    BYTES = " bytes"
    RATE = " bytes/second"
    TIME = " ms"
    COUNT = ""
    SWITCH = " "


@dataclass(frozen=True)
class Setting:
    """One parameter. Operators give sizes in bytes and times in milliseconds.

    path        -- attributes that lead to it, from Parameters on; times are in seconds there
    destination -- whether a destination has it, too: it asks the source for the cache size
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
        """Return `parameters` with this value. Raises UsageError."""
        stored: Any = value / 1000 if self.kind is Kind.TIME else value
        changes: dict[str, Any] = {self.path[-1]: stored}
        if len(self.path) > 1:
            changes = {self.path[0]: replace(getattr(parameters, self.path[0]), **changes)}
        elif self.name == "xbzrle-cache-size":
            changes["cache_max"] = 0  # this size, not one that is found automatically
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


# Shown among the parameters, and set on the command line: certificates are read at the start.
TLS = ("tls-creds", "tls-hostname", "tls-authz")
_BEFORE = list(SETTINGS).index("max-bandwidth")
ORDER = (*list(SETTINGS)[:_BEFORE], *TLS, *list(SETTINGS)[_BEFORE:])


def table(
    parameters: Parameters, tls: Mapping[str, str], *, receives: bool
) -> dict[str, tuple[int | bool | str, str]]:
    """Return the parameters in QEMU's order: each value, and the text that people read.

    tls      -- the TLS options that the program was started with, by QEMU's names
    receives -- the program is a destination, which has fewer parameters
    """
    rows: dict[str, tuple[int | bool | str, str]] = {
        one.name: (one.read(parameters), one.shown(parameters))
        for one in SETTINGS.values()
        if one.destination or not receives
    }
    rows |= {name: (tls.get(name, ""), f"'{tls.get(name, '')}'") for name in TLS}
    return {name: rows[name] for name in ORDER if name in rows}


def changed(parameters: Parameters, values: Mapping[str, Any]) -> Parameters:
    """Return `parameters` with these values, as QMP gives them. Raises UsageError."""
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
    """Raise UsageError, in QEMU's words, for a value that QEMU refuses."""
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
    """Return the value of a parameter that an operator has typed. Raises UsageError.

    Sizes and times may have a suffix. A bandwidth without one is in MiB/s, as in QEMU.
    """
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
        return round(units.parse_milliseconds(text, name))
    if setting.kind is Kind.RATE:
        return mebibytes(text, name)
    if setting.kind is Kind.BYTES:
        return units.parse_size(text, name)
    if not text.isdecimal() or len(text) > 18:
        raise UsageError(f"{name}: {text!r} is not a number")
    return int(text)


def mebibytes(text: str, what: str) -> int:
    """Return a size in bytes; a number without suffix counts mebibytes. Raises UsageError."""
    bare = text.strip().replace(".", "", 1).isdecimal()
    return units.parse_size(f"{text.strip()}m" if bare else text, what)


def switches(parameters: Parameters) -> dict[str, bool]:
    """Return whether each capability is on."""
    return {name: parameters.capabilities.get(name, name not in LOCAL) for name in CAPABILITIES}


def switched(parameters: Parameters, name: object, state: object) -> Parameters:
    """Return `parameters` with one capability switched. Raises UsageError."""
    if name not in CAPABILITIES or not isinstance(name, str):
        raise UsageError(f"Parameter 'capability' does not accept value '{name}'")
    if not isinstance(state, bool):
        raise UsageError("Parameter 'state' expects a boolean")
    return replace(parameters, capabilities={**parameters.capabilities, name: state})
