"""Free memory: the machine's, or as much of it as the container allows."""

from pathlib import Path

import pytest

from migrate.runtime.machine_memory import available_memory

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
def test_available_memory_is_the_smaller_of_machine_and_cgroup(
    tmp_path: Path, limit: str, used: str, available: int
) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit + "\n")
        (tmp_path / "memory.current").write_text(used + "\n")
    assert available_memory(tmp_path / "meminfo", tmp_path) == available


@pytest.mark.parametrize("text", ["", "MemAvailable:\n", "MemAvailable: much kB\n"])
def test_available_memory_is_zero_if_the_system_hides_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "meminfo").write_text(text)
    assert available_memory(tmp_path / "meminfo", tmp_path) == 0
    assert available_memory(tmp_path / "none", tmp_path / "none") == 0


def test_available_memory_of_this_machine() -> None:
    assert available_memory() > 1 << 20
