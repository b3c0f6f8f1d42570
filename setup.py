"""The compiled modules, the man pages and the completions; all else stands in pyproject.toml."""

import itertools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

# What builds the compiled modules; an sdist, or what a package needs, is made without.
BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


def missing() -> str:
    """What a build lacks on this machine, and what to do; "" where it lacks nothing."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    ways = (
        "on Debian: apt-get install gcc libc6-dev python3-dev; or install a wheel, which needs no "
        "compiler (`make wheel` builds one on another machine)"
    )
    if shutil.which(compiler[0]) is None:
        return f"a C compiler is needed to build it, and there is no {compiler[0]} here: {ways}"
    flags = shlex.split(os.environ.get("CFLAGS", "") + " " + os.environ.get("CPPFLAGS", ""))
    paths = {sysconfig.get_path(name) for name in ("include", "platinclude")}
    words = [*compiler, *flags, *(f"-I{path}" for path in paths), "-fsyntax-only", "-xc", "-"]
    for header, what in (("stdio.h", "C library"), ("Python.h", "Python")):
        source = f"#include <{header}>\n".encode()
        tried = subprocess.run(words, input=source, capture_output=True, check=False)
        if tried.returncode:
            return f"the headers of the {what} are needed to build it ({header}): {ways}"
    return ""


BUILDING = bool(BUILDS & set(sys.argv[1:]))
if BUILDING and (lack := missing()):
    sys.exit(f"xbmigrate: {lack}")

from Cython.Build import cythonize  # noqa: E402
from setuptools import Extension, setup  # noqa: E402

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

HEADERS = {"proto/codec/_xbzrle": ["proto/codec/_diff.h"]}
MODULES = [
    Extension(name.replace("/", "."), [f"{name}.pyx"], depends=HEADERS.get(name, []), **OPTIONS)
    for name in (
        "proto/codec/_xbzrle",
        "proto/codec/_bitmaps",
        "proto/codec/_hashes",
        "proto/codec/_cache",
        "proto/codec/_slab",
        "proto/codec/_heat",
        "proto/codec/_peer_copy",
        "proto/codec/_encoder",
        "proto/codec/_decoder",
        "proto/codec/_batch_survey",
        "proto/qemu/_ram_reader",
        "proto/qemu/_ram_writer",
        "proto/qemu/_ram_files",
        "proto/qemu/_ram_survey",
        "migrate/memory/_memory",
        "migrate/runtime/_proc",
        "migrate/tracking/_injection",
        "migrate/tracking/_kernel",
    )
]
DIRECTIVES = {"language_level": "3", "embedsignature": True}

setup(
    # As many compilers as processors: nearly all the time of a build is theirs.
    options={"build_ext": {"parallel": True}},
    data_files=[(str(where), [f"share/{path}" for path in paths]) for where, paths in PAGES],
    # To ask what there is takes no C: pip asks twice before it builds.
    ext_modules=cythonize(MODULES, compiler_directives=DIRECTIVES) if BUILDING else MODULES,
)
