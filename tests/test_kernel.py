"""The switch between the kernels: what is demanded is what one gets, or an ImportError."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(code, **environment):
    base = {name: value for name, value in os.environ.items() if name != "XBMIGRATE_KERNEL"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=base | environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


SHOW = "from proto import kernel as k; print(k.NAME, k.PageCache.__module__, k.encode.__module__)"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "cython proto._kernel proto._kernel"),
        ({"XBMIGRATE_KERNEL": "cython"}, "cython proto._kernel proto._kernel"),
        ({"XBMIGRATE_KERNEL": "python"}, "python proto._twin proto._twin"),
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


def test_a_missing_extension_is_an_import_error_not_the_twin():
    done = run(f"import sys; sys.modules['proto._kernel'] = None; {SHOW}")
    assert done.returncode != 0
    assert "ImportError: the compiled kernel proto._kernel is missing" in done.stderr


@pytest.mark.parametrize("name", ["PageCache", "PageDecoder", "PageEncoder", "decode", "encode"])
def test_both_have_what_is_imported_from_them(name):
    from proto import _kernel, _twin, kernel

    assert name in kernel.__all__
    assert hasattr(_kernel, name)
    assert hasattr(_twin, name)
