"""The instrumented build, in build/fuzz: the packages as in the source tree, but with kernels made
by clang with sanitizers and coverage, and a libFuzzer program that runs Python.

    build/fuzz/tree/proto, migrate    links to the Python files, and the instrumented modules
    build/fuzz/fuzzer                 tests/fuzz/fuzzer.c
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build/fuzz"
TREE = BUILD / "tree"
FUZZER = BUILD / "fuzzer"
# Without migrate.memory._memory, which never sees a peer's bytes. runtime._proc is here because the
# others import it.
MODULES = (
    "migrate.runtime._proc",
    "migrate.tracking._injection",
    "migrate.tracking._kernel",
    "proto.codec._xbzrle",
    "proto.codec._bitmaps",
    "proto.codec._hashes",
    "proto.codec._cache",
    "proto.codec._slab",
    "proto.codec._heat",
    "proto.codec._peer_copy",
    "proto.codec._encoder",
    "proto.codec._decoder",
    "proto.codec._batch_survey",
    "proto.qemu._ram_reader",
    "proto.qemu._ram_writer",
    "proto.qemu._ram_files",
    "proto.qemu._ram_survey",
)
SANITIZERS = "address,undefined"
FLAGS = ("-g", "-O1", "-fno-omit-frame-pointer", "-fno-strict-aliasing", "-w")
SANITIZED = (f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all")
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
INCLUDE = sysconfig.get_paths()["include"]


def build() -> None:
    """Brings build/fuzz up to date. Raises CalledProcessError, FileNotFoundError."""
    if shutil.which("clang") is None:
        raise FileNotFoundError("no clang: apt-get install clang libclang-rt-dev")
    _link_tree()
    rooms = [ROOT / "proto", ROOT / "migrate"]
    sources = [*(path for room in rooms for path in room.rglob("*.p[xy][xd]")),
               *(ROOT / "proto").rglob("*.h"), Path(__file__)]  # fmt: skip
    for name in MODULES:
        made = TREE / (name.replace(".", "/") + SUFFIX)
        if _is_older(made, sources):
            _module(name, made)
    if _is_older(FUZZER, [Path(__file__), Path(__file__).parent / "fuzzer.c"]):
        _program()


def _is_older(made: Path, sources: Iterable[Path]) -> bool:
    return not made.exists() or made.stat().st_mtime < max(s.stat().st_mtime for s in sources)


def _link_tree() -> None:
    for package in ("proto", "migrate"):
        for source in (ROOT / package).rglob("*.py"):
            link = TREE / source.relative_to(ROOT)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.unlink(missing_ok=True)
                link.symlink_to(source)


def _module(name: str, made: Path) -> None:
    source = name.replace(".", "/")
    c = BUILD / f"{name}.c"
    cython = [sys.executable, "-m", "cython", "-3", f"{source}.pyx", "-o", str(c)]
    subprocess.run(cython, cwd=ROOT, check=True)
    subprocess.run(
        ["clang", *FLAGS, *SANITIZED, "-fsanitize=fuzzer-no-link", "-shared", "-fPIC",
         f"-I{INCLUDE}", f"-I{ROOT / 'proto/codec'}", str(c), "-o", str(made)],
        check=True,
    )  # fmt: skip


def _program() -> None:
    library, version = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LDVERSION")
    subprocess.run(
        ["clang", *FLAGS, *SANITIZED, "-fsanitize=fuzzer", f'-DFUZZ_PYTHON="{sys.executable}"',
         f"-I{INCLUDE}", str(Path(__file__).parent / "fuzzer.c"), "-rdynamic", f"-L{library}",
         f"-Wl,-rpath,{library}", f"-lpython{version}", "-o", str(FUZZER)],
        check=True,
    )  # fmt: skip
