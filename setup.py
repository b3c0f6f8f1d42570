"""The two compiled modules; everything else about the build stands in pyproject.toml."""

from Cython.Build import cythonize
from setuptools import Extension, setup

FLAGS = ["-O3", "-fno-strict-aliasing", "-Wno-unused-function"]

setup(
    ext_modules=cythonize(
        [
            Extension("proto._kernel", ["proto/_kernel.pyx"], extra_compile_args=FLAGS),
            Extension("migrate._memory", ["migrate/_memory.pyx"], extra_compile_args=FLAGS),
        ],
        compiler_directives={"language_level": "3", "embedsignature": True},
    )
)
