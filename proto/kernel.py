"""The switch between the compiled kernel and its readable twin.

Both have the same names, inherit the same tests and give the same bytes. `XBMIGRATE_KERNEL` is a
demand: `cython` (the default) or `python`; one that cannot be had is an ImportError, never a
quiet fall-back that is a hundred times slower. So is `XBMIGRATE_SIMD`, which names the compiled
kernel's way of comparing pages: `avx512bw`, `avx2`, `neon` or `portable`; without it the best that
this processor has is taken. `SIMD` says which.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

NAME = os.environ.get("XBMIGRATE_KERNEL", "cython")

if NAME not in ("cython", "python"):
    raise ImportError(f"XBMIGRATE_KERNEL={NAME!r} is not a kernel: use 'cython' or 'python'")

if TYPE_CHECKING or NAME == "cython":
    try:
        from proto._batch import (
            PageDecoder,
            PageEncoder,
            PageHashes,
            count_bits,
            keep_bits,
            unite_bits,
            zeros,
        )
        from proto._cache import PageCache
        from proto._codec import SIMD, decode, decode_pages, encode, encode_pages
        from proto._ram import SCAN_END, SCAN_MORE, SCAN_RECORDS, RamReader, RamWriter
        from proto._ram_apply import RamApplier, RamRecorder
        from proto._ram_survey import BatchSurvey, RamImage, RamSurvey, select_records
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the compiled kernel is missing ({error.name}): build it with 'pip install .' "
            "or 'make build' (a C compiler and python3-dev are needed)"
        ) from error
else:
    from proto._twin import (
        SIMD,
        PageCache,
        PageDecoder,
        PageEncoder,
        PageHashes,
        count_bits,
        decode,
        decode_pages,
        encode,
        encode_pages,
        keep_bits,
        unite_bits,
        zeros,
    )
    from proto._twin_ram import SCAN_END, SCAN_MORE, SCAN_RECORDS, RamReader, RamWriter
    from proto._twin_ram_apply import RamApplier, RamRecorder
    from proto._twin_ram_survey import BatchSurvey, RamImage, RamSurvey, select_records

__all__ = [
    "NAME",
    "SCAN_END",
    "SCAN_MORE",
    "SCAN_RECORDS",
    "SIMD",
    "BatchSurvey",
    "PageCache",
    "PageDecoder",
    "PageEncoder",
    "PageHashes",
    "RamApplier",
    "RamImage",
    "RamReader",
    "RamRecorder",
    "RamSurvey",
    "RamWriter",
    "count_bits",
    "decode",
    "decode_pages",
    "encode",
    "encode_pages",
    "keep_bits",
    "select_records",
    "unite_bits",
    "zeros",
]
