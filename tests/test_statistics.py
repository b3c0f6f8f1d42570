"""How the numbers are printed: the seed's labels in its order, and QMP's names."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.statistics import Statistics, Status, info_migrate, info_migrate_all, query_migrate

SEED = [
    ("capabilities", "xbzrle: on"),
    ("Migration status", "completed"),
    ("transferred ram", "1234 kbytes"),
    ("remaining ram", "8 kbytes"),
    ("total ram", "65536 kbytes"),
    ("total time", "2500 milliseconds"),
    ("duplicate", "11 pages"),
    ("normal", "22 pages"),
    ("normal bytes", "88 kbytes"),
    ("cache size", "67108864 bytes"),
    ("xbzrle transferred", "20 kbytes"),
    ("xbzrle pages", "80 pages"),
    ("xbzrle cache miss", "5"),
    ("xbzrle overflow ", "3"),
]
FULL = Statistics(
    status=Status.COMPLETED, capabilities={"xbzrle": True}, total_time=2.5, setup_time=0.01,
    downtime=0.0423, expected_downtime=0.2, transferred=1234 * 1024, remaining=8192,
    total=64 << 20, duplicate=11, normal=22, skipped=4, dirty_sync_count=7, cache_size=64 << 20,
    xbzrle_bytes=20 * 1024, xbzrle_pages=80, cache_hits=15, cache_miss=5, overflow=3, evictions=2,
    overflow_skipped=9,
    mbps=123.456, pages_per_second=99.6, dirty_pages_rate=12.5,
    precopy_bytes=1000, downtime_bytes=2048,
)  # fmt: skip


def labels(s: Statistics) -> list[tuple[str, str]]:
    return [tuple(line.split(": ", 1)) for line in info_migrate(s).splitlines()]


def test_info_migrate_begins_with_the_seeds_lines():
    assert labels(FULL)[: len(SEED)] == SEED


def test_info_migrate_without_xbzrle():
    off = FULL.with_(capabilities={"xbzrle": False})
    assert labels(off)[:9] == [("capabilities", "xbzrle: off"), *SEED[1:9]]
    assert "cache" not in info_migrate(off)
    assert "xbzrle-cache" not in query_migrate(off)


def test_downtime_is_printed_once_it_is_known():
    assert ("downtime", "42 milliseconds") in labels(FULL)
    before = FULL.with_(downtime=None, expected_downtime=None)
    assert not [label for label, _ in labels(before) if "downtime" in label and "ram" not in label]
    assert not {"downtime", "expected-downtime"} & set(query_migrate(before))


def test_failure_is_printed_with_its_reason():
    failed = FULL.with_(status=Status.FAILED, error="the memories differ")
    assert ("Migration status", "failed (the memories differ)") in labels(failed)
    assert query_migrate(failed)["error-desc"] == "the memories differ"


def test_inactive_xbzrle_and_skipped_pages_are_printed():
    assert ("xbzrle active", "on") in labels(FULL)
    assert ("xbzrle overflow skipped", "9 pages") in labels(FULL)
    off = FULL.with_(xbzrle_active=False)
    assert ("xbzrle active", "off") in labels(off)
    assert query_migrate(off)["xbzrle-cache"]["xbzrle-active"] is False


def test_advice_is_printed_if_there_is_some():
    assert "advice" not in query_migrate(FULL)
    assert query_migrate(FULL.with_(advice=("do this", "and that")))["advice"] == [
        "do this", "and that",
    ]  # fmt: skip


def test_query_migrate_has_qmp_names():
    result = query_migrate(FULL)
    assert list(result) == [
        "status", "total-time", "setup-time", "downtime", "expected-downtime", "ram",
        "xbzrle-cache",
    ]  # fmt: skip
    assert result["total-time"] == 2500
    assert result["downtime"] == 42
    assert result["ram"] == {
        "transferred": 1234 * 1024, "remaining": 8192, "total": 64 << 20, "duplicate": 11,
        "skipped": 4, "normal": 22, "normal-bytes": 22 * 4096, "dirty-pages-rate": 12,
        "mbps": 123.456, "dirty-sync-count": 7, "page-size": 4096, "pages-per-second": 100,
        "precopy-bytes": 1000, "downtime-bytes": 2048, "multifd-bytes": 0,
    }  # fmt: skip
    assert result["xbzrle-cache"] == {
        "cache-size": 64 << 20, "bytes": 20 * 1024, "pages": 80, "cache-miss": 5,
        "cache-miss-rate": 0.25, "encoding-rate": 16.0, "overflow": 3, "overflow-skipped": 9,
        "xbzrle-active": True,
    }  # fmt: skip


def test_further_channels_are_printed_if_there_are_some():
    assert not {"channels", "multifd bytes"} & {label for label, _ in labels(FULL)}
    several = FULL.with_(channels=3, channel_bytes=700 * 1024)
    assert labels(several)[-2:] == [("channels", "3"), ("multifd bytes", "700 kbytes")]
    assert labels(several)[:-2] == labels(FULL)
    assert query_migrate(several)["ram"]["multifd-bytes"] == 700 * 1024


def test_query_migrate_is_empty_before_a_migration():
    assert query_migrate(Statistics()) == {}
    assert labels(Statistics())[1] == ("Migration status", "none")


def test_rates_without_counts_are_zero():
    assert Statistics().cache_miss_rate == 0.0
    assert Statistics().encoding_rate == 0.0


def test_statistics_are_immutable():
    assert FULL.with_(normal=1).normal == 1
    assert FULL.normal == 22
    with pytest.raises(AttributeError):
        FULL.normal = 5


counts = st.integers(0, 1 << 62)
reals = st.floats(0, 1e15)


@settings(deadline=None)
@given(
    st.builds(
        Statistics, status=st.just("active"), capabilities=st.just({"xbzrle": True}),
        total_time=reals, setup_time=reals, downtime=st.none() | reals,
        expected_downtime=st.none() | reals, transferred=counts, normal=counts,
        dirty_pages_rate=reals, pages_per_second=reals, mbps=reals, xbzrle_bytes=counts,
        xbzrle_pages=counts, cache_hits=counts, cache_miss=counts,
        channels=st.integers(1, 64), channel_bytes=counts,
    )
)  # fmt: skip
def test_any_counts_print_as_finite_numbers(s):
    def no_constant(name: str) -> None:
        raise AssertionError(name)

    text = json.dumps(query_migrate(s), allow_nan=False)
    assert json.loads(text, parse_constant=no_constant) == query_migrate(s)
    assert math.isfinite(query_migrate(s)["xbzrle-cache"]["encoding-rate"])
    assert [label for label, _ in labels(s)][: len(SEED)] == [label for label, _ in SEED]
    assert not {"nan", "inf"} & set(info_migrate(s).split())


def test_throttle_is_printed_while_it_is_on():
    assert "throttle" not in info_migrate(FULL)
    assert "cpu-throttle-percentage" not in query_migrate(FULL)
    slowed = FULL.with_(cpu_throttle_percentage=30)
    assert ("cpu throttle percentage", "30") in labels(slowed)
    assert query_migrate(slowed)["cpu-throttle-percentage"] == 30
    over = FULL.with_(cpu_throttle_highest=40)
    assert query_migrate(over)["cpu-throttle-highest"] == 40
    assert "throttle" not in info_migrate(over)
    assert "cpu-throttle-highest" not in query_migrate(FULL)


def test_info_migrate_all_has_the_layout_of_qemu_10():
    """Labels, tabs and units of QEMU 10.1's `info migrate -a`."""
    assert info_migrate_all(FULL).splitlines() == [
        "Status: \t\tcompleted",
        "Time (ms): \t\ttotal=2500, setup=10, down=42",
        "RAM info:",
        "  Throughput (Mbps): \t123.46",
        "  Sizes: \t\tpagesize=4 KiB, total=64 MiB",
        "  Transfers: \t\ttransferred=1.21 MiB, remain=8 KiB",
        "    Channels: \t\tprecopy=0.977 KiB, multifd=0 B, postcopy=0 B",
        "    Page Types: \tnormal=22, zero=11",
        "  Page Rates (pps): \ttransfer=100, dirty=12",
        "  Others: \t\tdirty_syncs=7, downtime_bytes=2048",
        "XBZRLE: size=67108864, transferred=20480, pages=80, miss=5",
        "  miss_rate=0.25, encode_rate=16.00, overflow=3",
    ]
    running = FULL.with_(status=Status.ACTIVE, downtime=None, cpu_throttle_percentage=30)
    said = info_migrate_all(running)
    assert "total=2500, setup=10, exp_down=200\n" in said
    assert said.endswith("\nCPU Throttle (%): 30")
