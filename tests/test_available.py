"""What memory there is: the machine's, or what a container leaves of it."""

from pathlib import Path

import pytest

from migrate.available import available_memory

MEMINFO = "MemTotal:       32000 kB\nMemFree:         1000 kB\nMemAvailable:   20000 kB\n"


@pytest.mark.parametrize(
    ("limit", "used", "available"),
    [
        pytest.param(None, None, 20000 << 10, id="no cgroup"),
        pytest.param("max", "5000", 20000 << 10, id="no limit"),
        pytest.param("9000000", "5000000", 4000000, id="a container"),
        pytest.param("99000000000", "5000000", 20000 << 10, id="a limit above the machine"),
        pytest.param("4000", "5000", 0, id="more in use than allowed"),
    ],
)
def test_the_least_of_what_is_told(tmp_path: Path, limit: str, used: str, available: int) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit + "\n")
        (tmp_path / "memory.current").write_text(used + "\n")
    assert available_memory(tmp_path / "meminfo", tmp_path) == available


@pytest.mark.parametrize("text", ["", "MemAvailable:\n", "MemAvailable: much kB\n"])
def test_a_system_that_does_not_tell(tmp_path: Path, text: str) -> None:
    (tmp_path / "meminfo").write_text(text)
    assert available_memory(tmp_path / "meminfo", tmp_path) == 0
    assert available_memory(tmp_path / "none", tmp_path / "none") == 0


def test_this_machine_has_some() -> None:
    assert available_memory() > 1 << 20
