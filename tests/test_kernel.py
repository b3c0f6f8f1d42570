"""The switch between the kernels: what is demanded is what one gets, or an ImportError."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from proto import (
    _batch,
    _cache,
    _codec,
    _ram,
    _ram_apply,
    _ram_survey,
    _twin,
    _twin_ram,
    _twin_ram_apply,
    _twin_ram_survey,
    kernel,
)
from proto._codec import SIMD, encode, simd_kernels, use_simd

ROOT = Path(__file__).parent.parent


def run(code, **environment):
    base = {name: value for name, value in os.environ.items() if not name.startswith("XBMIGRATE_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=base | environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


SHOW = (
    "from proto import kernel as k; "
    "print(k.NAME, k.PageCache.__module__, k.PageEncoder.__module__, k.encode.__module__, "
    "k.RamReader.__module__)"
)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "cython proto._cache proto._batch proto._codec proto._ram"),
        (
            {"XBMIGRATE_KERNEL": "cython"},
            "cython proto._cache proto._batch proto._codec proto._ram",
        ),
        (
            {"XBMIGRATE_KERNEL": "python"},
            "python proto._twin proto._twin proto._twin proto._twin_ram",
        ),
    ],
    ids=["default", "cython", "python"],
)
def test_the_demanded_kernel_is_the_one_that_runs(environment, expected):
    done = run(SHOW, **environment)
    assert done.stderr == ""
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("value", ["nonsense", "", "Cython"])
def test_another_kernel_is_an_import_error_that_names_the_choices(value):
    done = run(SHOW, XBMIGRATE_KERNEL=value)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "'cython'" in last
    assert "'python'" in last
    assert repr(value) in last


@pytest.mark.parametrize(
    "module", ["_batch", "_cache", "_codec", "_ram", "_ram_apply", "_ram_survey"]
)
def test_a_missing_extension_is_an_import_error_not_the_twin(module):
    done = run(f"import sys; sys.modules['proto.{module}'] = None; {SHOW}")
    assert done.returncode != 0
    assert f"ImportError: the compiled kernel is missing (proto.{module}): build it" in done.stderr


def test_without_a_demand_the_best_way_to_compare_pages_is_taken():
    done = run("from proto import kernel; print(kernel.SIMD)")
    assert done.stdout.strip() == next(name for name, can in simd_kernels().items() if can)


@pytest.mark.parametrize("name", [name for name, can in simd_kernels().items() if can])
def test_the_demanded_way_to_compare_pages_is_the_one_that_runs(name):
    done = run("from proto import kernel; print(kernel.SIMD)", XBMIGRATE_SIMD=name)
    assert (done.stdout.strip(), done.stderr) == (name, "")


def test_one_that_the_processor_lacks_is_an_import_error():
    lacking = [name for name, can in simd_kernels().items() if not can]
    if not lacking:
        pytest.skip("this processor has all kernels of this build")
    for name in lacking:
        done = run("import proto.kernel", XBMIGRATE_SIMD=name)
        assert done.returncode != 0
        last = done.stderr.strip().splitlines()[-1]
        assert last == f"ImportError: this processor cannot run XBMIGRATE_SIMD={name!r}"


@pytest.mark.parametrize("name", ["nonsense", "", "AVX2", "sse2"])
def test_an_unknown_one_is_an_import_error_that_names_the_choices(name):
    done = run("import proto.kernel", XBMIGRATE_SIMD=name)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        f"ImportError: XBMIGRATE_SIMD={name!r} is not a kernel: known are "
        + ", ".join(simd_kernels())
    )


def test_another_can_be_chosen_while_it_runs():
    with pytest.raises(ImportError, match="'nonsense' is not a kernel"):
        use_simd("nonsense")
    try:
        assert use_simd("portable") == "portable"
        assert encode(b"abc" * 400, b"abd" * 400) is not None
    finally:
        assert use_simd(SIMD) == SIMD


COMPILED = (_batch, _cache, _codec, _ram, _ram_apply, _ram_survey)
TWINS = (_twin, _twin_ram, _twin_ram_apply, _twin_ram_survey)


@pytest.mark.parametrize("name", kernel.__all__)
def test_both_have_what_is_imported_from_them(name):
    if name != "NAME":
        assert any(hasattr(module, name) for module in COMPILED)
        assert any(hasattr(module, name) for module in TWINS)
