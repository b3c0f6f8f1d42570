"""Build and install as users do: an sdist, a wheel from the sdist, the programs from the wheel."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from migrate.manual.__main__ import write

ROOT = Path(__file__).parent.parent
# A build takes a minute on a quiet machine, and pip downloads what it needs.
pytestmark = pytest.mark.timeout(900)


def run(*words: str | Path, **environment: str) -> str:
    found = subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=800,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    return found.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout without build products."""
    directory = tmp_path_factory.mktemp("source") / "xbmigrate"
    built = shutil.ignore_patterns("*.so", "*.c", "__pycache__")
    for name in ("migrate", "proto"):
        shutil.copytree(ROOT / name, directory / name, ignore=built)
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, directory)
    return directory


@pytest.fixture(scope="module")
def built(source, tmp_path_factory) -> Path:
    """The directory of the sdist, and of the wheel that was made from it.

    It is built once for all workers, and without optimisation, which takes most of a build's time
    and makes no difference to these tests.
    """
    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent  # each worker has a directory in it
    directory = common / "dist"
    with (common / "dist.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(directory.glob("*.whl")):
            run(sys.executable, "-m", "build", "--outdir", directory, source,
                SOURCE_DATE_EPOCH="1000000000", CFLAGS="-O0")  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, bytes]:
    """The pages and completions the packages must contain, by path below share."""
    directory = tmp_path_factory.mktemp("share")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1000000000")
        return {str(name): (directory / name).read_bytes() for name in write(directory)}


@pytest.mark.wheel
def test_wheel_has_pages_and_completions_of_every_program(built, expected):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = [name for name in wheel.namelist() if ".data/data/share/" in name]
        found = {name.partition("/share/")[2]: wheel.read(name) for name in names}
    assert len(found) == 6 + 3 * 4
    assert found == expected


@pytest.mark.wheel
def test_sdist_has_pages_and_completions_and_no_build_products(built, expected):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {f"share/{name}" for name in expected} <= names
    assert "migrate/manual/bash.py" in names
    assert not {name for name in names if name.endswith((".so", ".c"))}


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"CC": "no-such-compiler -x"}, "a C compiler is needed .* there is no no-such-compiler"),
        ({"CPPFLAGS": "-nostdinc"}, r"headers of the C library are needed to build it \(stdio.h\)"),
    ],
)
def test_build_without_compiler_or_headers_says_what_to_install(source, environment, says):
    found = subprocess.run(
        [sys.executable, "setup.py", "bdist_wheel"], cwd=source, env={**os.environ, **environment},
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert found.returncode == 1
    assert found.stdout == ""
    assert re.fullmatch(f"xbmigrate: .*{says}.*apt-get install gcc .*make wheel.*\n", found.stderr)


@pytest.mark.wheel
def test_pip_installs_pages_and_completions_where_shells_and_man_look(built, expected, tmp_path):
    """Install the wheel into a new environment; its programs start."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path)
    run(sys.executable, "-m", "pip", "--python", tmp_path / "bin/python", "install", "--quiet",
        "--no-deps", "--no-index", next(built.glob("*.whl")))  # fmt: skip
    for name, content in expected.items():
        assert (tmp_path / "share" / name).read_bytes() == content
    assert "usage: migrate-src" in run(tmp_path / "bin/migrate-src", "--help")
    if shutil.which("man") is None:
        return
    page = run("man", "-P", "cat", "migrate-src", "resolve", MANPATH=str(tmp_path / "share/man"))
    assert "MIGRATE-SRC-RESOLVE(1)" in page
