"""Built and installed as users do it: an sdist, from that a wheel, from that the programs."""

from __future__ import annotations

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
# A compiler's minute, on a machine that has other things to do, and what pip fetches.
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
    """The checkout without what is built in it."""
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

    How well the compiler optimises is nothing to what is asked here, and most of a build's time.
    """
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", directory, source,
        SOURCE_DATE_EPOCH="1000000000", CFLAGS="-O0")  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, bytes]:
    """What is to be in them, by the path below share."""
    directory = tmp_path_factory.mktemp("share")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1000000000")
        return {str(name): (directory / name).read_bytes() for name in write(directory)}


def test_the_wheel_has_pages_and_completions_of_every_program(built, expected):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = [name for name in wheel.namelist() if ".data/data/share/" in name]
        found = {name.partition("/share/")[2]: wheel.read(name) for name in names}
    assert len(found) == 6 + 3 * 4
    assert found == expected


def test_the_sdist_has_them_and_no_more_than_is_needed(built, expected):
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
def test_a_build_says_in_a_sentence_what_it_lacks(source, environment, says):
    found = subprocess.run(
        [sys.executable, "setup.py", "bdist_wheel"], cwd=source, env={**os.environ, **environment},
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert found.returncode == 1
    assert found.stdout == ""
    assert re.fullmatch(f"xbmigrate: .*{says}.*apt-get install gcc .*make wheel.*\n", found.stderr)


def test_pip_puts_them_where_shells_and_man_look(built, expected, tmp_path):
    """Below the prefix of an environment of its own, whose programs start."""
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
