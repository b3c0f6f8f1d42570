"""What the benchmark ran on."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def describe() -> dict[str, str]:
    """Processor, memory, versions, date and commit, each as a person would read it."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{int((_field('/proc/meminfo', 'MemTotal') or '0').split()[0]) / 2**20:.1f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": version("qemu-system-x86_64"),
        "rsync": version("rsync"),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
    }


def sentence(facts: dict[str, str]) -> str:
    """The facts as a line or two."""
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory']}; Linux {facts['kernel']}, "
        f"Python {facts['python']}, QEMU {facts['qemu']}, rsync {facts['rsync']}; "
        f"{facts['date']}, commit {facts['commit']}"
    )


def version(program: str) -> str:
    """The version a program prints, or "not installed"."""
    if shutil.which(program) is None:
        return "not installed"
    words = _output(program, "--version").split("\n")[0].split()
    return words[words.index("version") + 1] if "version" in words[:-1] else "unknown"


def commit() -> str:
    """The short commit id, with a + where files differ from it."""
    name = _output("git", "rev-parse", "--short", "HEAD").strip()
    changed = _output("git", "status", "--porcelain", "--untracked-files=no").strip()
    return f"{name or 'unknown'}{'+' if changed else ''}"


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    return int((_field("/proc/meminfo", "MemAvailable") or "0").split()[0]) * 1024


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout  # fmt: skip
    except OSError:
        return ""
