"""Assembles boot.S, the load of QEMU's guest, with the assembler that comes with gcc."""

from __future__ import annotations

import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.bench.report import LeftOutError

SOURCE = Path(__file__).with_name("boot.S")
BASE = 1 << 20
MOST = 3 << 30
UNPACED_BATCH = 4096


def boot_sector(size: int, hot: int, stride: int, rate: int) -> bytes:
    """The 512 bytes for a guest with `size` bytes from 1 MiB on, `hot` of them written.

    stride -- bytes from one increment to the next
    rate   -- increments per second, in steps of 1000; 0 for full speed
    """
    if not 0 < hot <= size or size % 4 or BASE + size > MOST:
        raise ValueError(f"a hot set of {hot} in {size} bytes from 1 MiB to 3 GiB does not fit")
    if not 0 < stride <= hot:
        raise ValueError(f"a stride of {stride} does not fit a hot set of {hot}")
    if rate < 0 or rate % 1000:
        raise ValueError(f"a rate of {rate} is not a number of whole thousands a second")
    if platform.machine() != "x86_64" or not shutil.which("as") or not shutil.which("ld"):
        raise LeftOutError("The boot sector needs an x86-64 assembler (as and ld, of binutils).")
    symbols = {
        "FILL_END": BASE + size,
        "HOT_END": BASE + hot,
        "STRIDE": stride,
        "BATCH": rate // 1000 or UNPACED_BATCH,
        "PACED": int(rate > 0),
    }
    with tempfile.TemporaryDirectory() as directory:
        object_file, image = Path(directory, "boot.o"), Path(directory, "boot.bin")
        settings = [f"--defsym={name}={value}" for name, value in symbols.items()]
        _call("as", "--32", *settings, "-o", str(object_file), str(SOURCE))
        _call(
            "ld", "-m", "elf_i386", "--oformat", "binary", "-Ttext", "0x7c00",
            "-o", str(image), str(object_file),
        )  # fmt: skip
        return image.read_bytes()


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LeftOutError(f"{command[0]} failed on boot.S: {done.stderr.strip()}")
