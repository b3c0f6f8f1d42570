"""The switch between the kernels: the requested kernel, or an ImportError."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from proto.codec import faults, kernel
from proto.codec._xbzrle import SIMD, encode, simd_kernels, use_simd
from proto.qemu import kernel as stream_kernel
from tests.fuzz.sides import COMPILED_MODULES, TWIN_MODULES

ROOT = Path(__file__).parent.parent


def run(code, **environment):
    base = {name: value for name, value in os.environ.items() if not name.startswith("XBMIGRATE_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=base | environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


SHOW = (
    "from proto.codec import kernel as k; from proto.qemu import kernel as q; "
    "print(k.NAME, k.PageCache.__module__, k.PageEncoder.__module__, k.encode.__module__, "
    "q.RamReader.__module__)"
)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "cython codec._cache codec._encoder codec._xbzrle qemu._ram_reader"),
        (
            {"XBMIGRATE_KERNEL": "cython"},
            "cython codec._cache codec._encoder codec._xbzrle qemu._ram_reader",
        ),
        (
            {"XBMIGRATE_KERNEL": "python"},
            "python codec._cache_twin codec._encoder_twin codec._xbzrle_twin qemu._ram_reader_twin",
        ),
    ],
    ids=["default", "cython", "python"],
)
def test_requested_kernel_is_used(environment, expected):
    done = run(SHOW, **environment)
    assert done.stderr == ""
    assert done.stdout.replace("proto.", "").strip() == expected


@pytest.mark.parametrize("value", ["nonsense", "", "Cython"])
def test_unknown_kernel_is_an_import_error(value):
    done = run(SHOW, XBMIGRATE_KERNEL=value)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "'cython'" in last
    assert "'python'" in last
    assert repr(value) in last


@pytest.mark.parametrize(
    "module",
    [module.__name__ for module in COMPILED_MODULES],
)
def test_missing_extension_is_an_import_error(module):
    """The slow twin never takes its place without being asked for."""
    done = run(f"import sys; sys.modules['{module}'] = None; {SHOW}")
    assert done.returncode != 0
    assert f"ImportError: the compiled kernel is missing ({module}): build it" in done.stderr


def test_best_simd_is_the_default():
    done = run("from proto.codec import kernel; print(kernel.SIMD)")
    assert done.stdout.strip() == next(name for name, can in simd_kernels().items() if can)


@pytest.mark.parametrize("name", [name for name, can in simd_kernels().items() if can])
def test_demanded_simd_is_used(name):
    done = run("from proto.codec import kernel; print(kernel.SIMD)", XBMIGRATE_SIMD=name)
    assert (done.stdout.strip(), done.stderr) == (name, "")


def test_simd_that_the_processor_lacks_is_an_import_error():
    lacking = [name for name, can in simd_kernels().items() if not can]
    if not lacking:
        pytest.skip("this processor has all kernels of this build")
    for name in lacking:
        done = run("import proto.codec.kernel", XBMIGRATE_SIMD=name)
        assert done.returncode != 0
        last = done.stderr.strip().splitlines()[-1]
        assert last == f"ImportError: this processor cannot run XBMIGRATE_SIMD={name!r}"


@pytest.mark.parametrize("name", ["nonsense", "", "AVX2", "sse2"])
def test_unknown_simd_is_an_import_error(name):
    done = run("import proto.codec.kernel", XBMIGRATE_SIMD=name)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        f"ImportError: XBMIGRATE_SIMD={name!r} is not a kernel: known are "
        + ", ".join(simd_kernels())
    )


def test_simd_can_be_changed_at_run_time():
    with pytest.raises(ImportError, match="'nonsense' is not a kernel"):
        use_simd("nonsense")
    try:
        assert use_simd("portable") == "portable"
        assert encode(b"abc" * 400, b"abd" * 400) is not None
    finally:
        assert use_simd(SIMD) == SIMD


@pytest.mark.parametrize("name", [*kernel.__all__, *stream_kernel.__all__])
def test_kernels_and_twins_have_the_same_names(name):
    if name not in ("NAME", "missing"):
        assert any(hasattr(module, name) for module in COMPILED_MODULES)
        assert any(hasattr(module, name) for module in TWIN_MODULES)


def test_fault_numbers_match_both_kernels():
    header = (ROOT / "proto/codec/_faults.pxd").read_text()
    numbers = {name: int(number) for name, number in re.findall(r"(\w+) = (-\d+)", header)}
    assert {getattr(faults, name): number for name, number in numbers.items()} == {
        sentence: number for number, sentence in faults.FAULTS.items()
    }
