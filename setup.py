"""The compiled modules; everything else about the build stands in pyproject.toml."""

from typing import Any

from Cython.Build import cythonize
from setuptools import Extension, setup

OPTIONS: dict[str, Any] = {
    "extra_compile_args": ["-O3", "-fno-strict-aliasing", "-Wno-unused-function"]
}

setup(
    ext_modules=cythonize(
        [
            Extension("proto._codec", ["proto/_codec.pyx"], depends=["proto/_diff.h"], **OPTIONS),
            Extension("proto._cache", ["proto/_cache.pyx"], **OPTIONS),
            Extension("proto._batch", ["proto/_batch.pyx"], **OPTIONS),
            Extension("migrate._memory", ["migrate/_memory.pyx"], **OPTIONS),
        ],
        compiler_directives={"language_level": "3", "embedsignature": True},
    )
)
