"""Parameters and capabilities by name: QEMU's names, units and words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import UsageError
from migrate.monitor import settings
from migrate.monitor.settings import SETTINGS, Kind
from migrate.policy.parameters import Parameters

ALL = st.sampled_from(list(SETTINGS.values()))


def some_value(setting: settings.Setting) -> st.SearchStrategy[int | bool]:
    if setting.kind is Kind.SWITCH:
        return st.booleans()
    if setting.name == "xbzrle-cache-size":
        return st.sampled_from([1 << shift for shift in range(12, 40)])
    if setting.path[0] == "throttle":
        return st.integers(20, 99)
    return st.integers(1, 64)


@given(st.data())
def test_setting_changes_one_value(data: st.DataObject) -> None:
    parameters = Parameters()
    setting = data.draw(ALL)
    value = data.draw(some_value(setting))
    after = settings.changed(parameters, {setting.name: value})
    assert setting.read(after) == value
    for other in SETTINGS.values():
        if other is not setting:
            assert other.read(after) == other.read(parameters)


@pytest.mark.exhaustive
@given(ALL, st.none() | st.text() | st.floats() | st.integers(max_value=-1) | st.lists(st.none()))
def test_wrong_type_is_refused(setting: settings.Setting, value: object) -> None:
    with pytest.raises(UsageError, match="expects (uint64|a boolean)"):
        settings.changed(Parameters(), {setting.name: value})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"foo": 1}, "Parameter 'foo' is unexpected"),
        ({"xbzrle-cache-size": 64}, "power of two no less than the target page size"),
        ({"xbzrle-cache-size": 512}, r"did you mean 512m\?"),
        ({"xbzrle-cache-size": 3 << 20}, "'xbzrle_cache_size' expects a power of two"),
        ({"xbzrle-cache-size": 64.0}, "'xbzrle-cache-size' expects uint64"),
        ({"downtime-limit": 2_000_001}, r"in the range of 0 to \(2000 \* 1000\) ms"),
        ({"multifd-channels": 0}, "channels"),
        ({"cpu-throttle-initial": 100}, "'cpu_throttle_initial' expects an integer in the range"),
        ({"max-bandwidth": 1, "downtime-limit": "x"}, "expects uint64"),
    ],
)
def test_wrong_value_is_refused_in_qemus_words(values: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        settings.changed(Parameters(), values)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max-bandwidth", "10", 10 << 20),  # a bare number in MiB/s, as QEMU has it
        ("max-bandwidth", "10k", 10 << 10),
        ("avail-switchover-bandwidth", "1g", 1 << 30),
        ("xbzrle-cache-size", "4k", 4096),
        ("xbzrle-cache-size", "64", 64),
        ("downtime-limit", "300", 300),
        ("downtime-limit", "1.5s", 1500),
        ("cpu-throttle-tailslow", "on", True),
        ("max-rounds", "7", 7),
    ],
)
def test_parse_typed_values(name: str, text: str, value: int | bool) -> None:
    assert settings.parse(name, text) == value


@given(ALL, st.text())
def test_parse_any_text(setting: settings.Setting, text: str) -> None:
    try:
        value = settings.parse(setting.name, text)
    except UsageError:
        return
    assert isinstance(value, bool if setting.kind is Kind.SWITCH else int)


def test_order_has_every_setting() -> None:
    assert sorted(settings.ORDER) == sorted([*SETTINGS, *settings.TLS])


def test_switch_capabilities() -> None:
    parameters = Parameters()
    assert settings.switches(parameters) == {
        "xbzrle": True, "xbzrle-merge": True, "zstd": True, "auto-converge": False, "events": False,
    }  # fmt: skip
    parameters = settings.switched(parameters, "auto-converge", True)
    parameters = settings.switched(settings.switched(parameters, "events", True), "xbzrle", False)
    assert settings.switches(parameters) == {
        "xbzrle": False, "xbzrle-merge": True, "zstd": True, "auto-converge": True, "events": True,
    }  # fmt: skip
    assert parameters.auto_converge
    assert parameters.wire_capabilities == {"xbzrle-merge", "zstd"}
    with pytest.raises(UsageError, match="'capability' does not accept value 'foo'"):
        settings.switched(parameters, "foo", True)
    with pytest.raises(UsageError, match="'state' expects a boolean"):
        settings.switched(parameters, "xbzrle", "on")


def test_cache_size_ends_auto_sizing() -> None:
    parameters = Parameters(cache_max=1 << 30)
    assert settings.changed(parameters, {"xbzrle-cache-size": 1 << 26}).cache_max == 0
    assert settings.changed(parameters, {"max-bandwidth": 1 << 26}).cache_max == 1 << 30
