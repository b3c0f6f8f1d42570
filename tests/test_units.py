"""Sizes and times: accepted and refused forms, and errors that name their argument."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.errors import UsageError
from migrate.units import format_size, parse_cache_size, parse_milliseconds, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("4096", 4096), ("1k", 1 << 10), ("64m", 64 << 20), ("256M", 256 << 20),
        ("1g", 1 << 30), ("2T", 2 << 40), ("64KiB", 64 << 10), ("3mb", 3 << 20), (" 5k ", 5120),
        ("7b", 7), ("1.5g", 3 << 29), ("0.5K", 512), ("1.1k", 1126), ("2.25MiB", 9 << 18),
        ("1p", 1 << 50), ("3e", 3 << 60), ("0.000000000001t", 1),
    ],
)  # fmt: skip
def test_parse_size(text, size):
    assert parse_size(text, "x") == size


@pytest.mark.parametrize(
    "text",
    ["", "m", "-1", "1.5", "1.5b", "1,5g", ".g", "1.g", "1.5.5g", "64 m", "0x10", "1e6", "64q",
     "64mm", "∞", "\u0663k"],
)  # fmt: skip
def test_parse_size_refuses_other_text_with_examples(text):
    with pytest.raises(UsageError, match="--page-size: .* is not a size: write bytes, or 64k") as e:
        parse_size(text, "--page-size")
    assert repr(text) in str(e.value)


@pytest.mark.parametrize("text", [str(1 << 62), "4194304t", "9" * 30 + "t"])
def test_parse_size_refuses_63_bits(text):
    with pytest.raises(UsageError, match="larger than any memory|not a size"):
        parse_size(text, "x")
    assert parse_size(str((1 << 62) - 1), "x") == (1 << 62) - 1


@pytest.mark.parametrize("text", ["9" * 5000, "9" * 5000 + "m"])
def test_number_too_long_for_int_is_a_usage_error(text):
    """int() itself refuses more than 4300 digits, with a ValueError."""
    with pytest.raises(UsageError):
        parse_size(text, "x")
    with pytest.raises(UsageError):
        parse_milliseconds(text, "x")


@settings(deadline=None)
@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_usage_error(text):
    try:
        assert 0 <= parse_size(text, "--size") < 1 << 62
    except UsageError as error:
        assert str(error).startswith("--size: ")


@settings(deadline=None)
@given(st.text(alphabet="0123456789.mshMSH ", max_size=8))
def test_any_text_is_a_time_or_a_usage_error(text):
    try:
        value = parse_milliseconds(text, "--timeout")
    except UsageError as error:
        assert str(error).startswith("--timeout: ")
    else:
        assert value >= 0
        assert math.isfinite(value)


@pytest.mark.parametrize("text", ["4k", "64m", "256m", "1g", "4096"])
def test_cache_size_is_a_power_of_two(text):
    assert parse_cache_size(text, 4096) == parse_size(text, "x")


@pytest.mark.parametrize("text", ["100m", "0", "1k", "2048", "5000", "3g"])
def test_other_cache_sizes_are_refused_with_the_rule(text):
    with pytest.raises(UsageError, match=r"power of two of at least one page \(4096 bytes\)"):
        parse_cache_size(text, 4096)


def test_cache_size_without_a_suffix_gets_a_hint():
    with pytest.raises(UsageError, match=r"did you mean 512m\?"):
        parse_cache_size("512", 4096)
    with pytest.raises(UsageError) as e:
        parse_cache_size("100m", 4096)
    assert "did you mean" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "bare", "value"),
    [
        ("300", "ms", 300), ("300ms", "s", 300), ("1.5s", "ms", 1500), ("2m", "ms", 120_000),
        ("2", "s", 2000), ("1h", "ms", 3_600_000), ("0", "s", 0), (" 7 S ".strip(), "ms", None),
        ("0.25MS", "ms", 0.25),
    ],
)  # fmt: skip
def test_parse_milliseconds(text, bare, value):
    if value is None:
        with pytest.raises(UsageError):
            parse_milliseconds(text, "x", bare)
    else:
        assert parse_milliseconds(text, "x", bare) == value


@pytest.mark.parametrize("text", ["", "-1", "nan", "inf", "1e3", ".5s", "5 s", "1d", "2\u017f"])
def test_parse_milliseconds_refuses_other_text_with_examples(text):
    with pytest.raises(UsageError, match=r"--timeout: .* write 300ms, 1\.5s or 2m"):
        parse_milliseconds(text, "--timeout")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536 << 20, "1.5 GiB"),
        (5 << 40, "5.0 TiB"), (5000 << 40, "5000.0 TiB"),
    ],
)  # fmt: skip
def test_format_size(size, text):
    assert format_size(size) == text
