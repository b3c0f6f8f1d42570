"""The switch between the compiled kernels of pages and their readable twins.

Both have the same names, pass the same tests and give the same bytes. `XBMIGRATE_KERNEL` demands
one of them: `cython` (the default) or `python`. A kernel that is missing is an ImportError: never a
quiet fall-back that is a hundred times slower. `XBMIGRATE_SIMD` demands a way in which the compiled
kernel compares pages: `avx512bw`, `avx2`, `neon` or `portable`; without it the best that this
processor has is used. `SIMD` names the one in use.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

NAME = os.environ.get("XBMIGRATE_KERNEL", "cython")

if NAME not in ("cython", "python"):
    raise ImportError(f"XBMIGRATE_KERNEL={NAME!r} is not a kernel: use 'cython' or 'python'")


def missing(error: ModuleNotFoundError) -> str:
    """Return what to do if a compiled module cannot be found."""
    return (
        f"the compiled kernel is missing ({error.name}): build it with 'pip install .' "
        "or 'make build' (a C compiler and python3-dev are needed)"
    )


if TYPE_CHECKING or NAME == "cython":
    try:
        from proto.codec._batch_survey import BatchSurvey
        from proto.codec._bitmaps import count_bits, keep_bits, unite_bits, zeros
        from proto.codec._cache import PageCache
        from proto.codec._decoder import PageDecoder
        from proto.codec._encoder import PageEncoder
        from proto.codec._hashes import PageHashes
        from proto.codec._xbzrle import SIMD, decode, decode_pages, encode, encode_pages
    except ModuleNotFoundError as error:
        raise ImportError(missing(error)) from error
else:
    from proto.codec._batch_survey_twin import BatchSurvey
    from proto.codec._bitmaps_twin import count_bits, keep_bits, unite_bits, zeros
    from proto.codec._cache_twin import PageCache
    from proto.codec._decoder_twin import PageDecoder
    from proto.codec._encoder_twin import PageEncoder
    from proto.codec._hashes_twin import PageHashes
    from proto.codec._xbzrle_twin import SIMD, decode, decode_pages, encode, encode_pages

__all__ = [
    "NAME",
    "SIMD",
    "BatchSurvey",
    "PageCache",
    "PageDecoder",
    "PageEncoder",
    "PageHashes",
    "count_bits",
    "decode",
    "decode_pages",
    "encode",
    "encode_pages",
    "keep_bits",
    "missing",
    "unite_bits",
    "zeros",
]
