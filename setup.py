"""The compiled modules, the man pages and the completions; all else stands in pyproject.toml."""

import itertools
import os
import sys
from pathlib import Path
from typing import Any

from Cython.Build import cythonize
from setuptools import Extension, setup

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # an isolated build has only its requirements there

from migrate.manual.__main__ import write  # noqa: E402

# Made anew from the parsers each time, as pip lays them below PREFIX.
PAGES = itertools.groupby(write(HERE / "share"), lambda path: Path("share") / path.parent)

# These come after CFLAGS and would overrule a level that is asked for there.
LEVEL = [] if "-O" in os.environ.get("CFLAGS", "") else ["-O3"]
OPTIONS: dict[str, Any] = {
    "extra_compile_args": [*LEVEL, "-fno-strict-aliasing", "-Wno-unused-function"]
}

setup(
    # As many compilers as processors: nearly all the time of a build is theirs.
    options={"build_ext": {"parallel": True}},
    data_files=[(str(where), [f"share/{path}" for path in paths]) for where, paths in PAGES],
    ext_modules=cythonize(
        [
            Extension("proto._codec", ["proto/_codec.pyx"], depends=["proto/_diff.h"], **OPTIONS),
            Extension("proto._cache", ["proto/_cache.pyx"], **OPTIONS),
            Extension("proto._batch", ["proto/_batch.pyx"], **OPTIONS),
            Extension("proto._ram", ["proto/_ram.pyx"], **OPTIONS),
            Extension("proto._ram_apply", ["proto/_ram_apply.pyx"], **OPTIONS),
            Extension("proto._ram_survey", ["proto/_ram_survey.pyx"], **OPTIONS),
            Extension("migrate._memory", ["migrate/_memory.pyx"], **OPTIONS),
        ],
        compiler_directives={"language_level": "3", "embedsignature": True},
    ),
)
