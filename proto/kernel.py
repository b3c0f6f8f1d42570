"""The switch between the compiled kernel and its readable twin.

Both have the same names, inherit the same tests and give the same bytes. `XBMIGRATE_KERNEL` is a
demand: `cython` (the default) or `python`; one that cannot be had is an ImportError, never a
quiet fall-back that is a hundred times slower.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

NAME = os.environ.get("XBMIGRATE_KERNEL", "cython")

if NAME not in ("cython", "python"):
    raise ImportError(f"XBMIGRATE_KERNEL={NAME!r} is not a kernel: use 'cython' or 'python'")

if TYPE_CHECKING or NAME == "cython":
    try:
        from proto._kernel import PageCache, PageDecoder, PageEncoder, decode, encode
    except ImportError as error:
        raise ImportError(
            "the compiled kernel proto._kernel is missing: build it with 'pip install .' "
            "or 'make build' (a C compiler and python3-dev are needed)"
        ) from error
else:
    from proto._twin import PageCache, PageDecoder, PageEncoder, decode, encode

__all__ = ["NAME", "PageCache", "PageDecoder", "PageEncoder", "decode", "encode"]
